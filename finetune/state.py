"""What a checkpoint of fine-tuning holds beside the weights, by parameter name: AdamW's moments, and numbers of losses.

Used by the loop, whose files are those of pretraining's resume (`pretrain.resume`).
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from setclip.checkpoint import SET_MODEL_NAME
from setclip.files import write_json
from setclip.models.set_model import SetModel

MOMENTS = ("exp_avg", "exp_avg_sq", "step")
_OTHER = "other."


def moments_of(
    optimizer: torch.optim.Optimizer, names: Mapping[str, nn.Parameter], others: Mapping[str, nn.Parameter]
) -> dict[str, Tensor]:
    """Returns "exp_avg.NAME" and so on, on the CPU, of parameters that have stepped, and "other.NAME", the numbers of losses."""
    found = {
        f"{kind}.{name}": optimizer.state[parameter][kind].detach().float().cpu().clone()
        for name, parameter in names.items()
        for kind in MOMENTS
        if kind in optimizer.state.get(parameter, {})
    }
    return found | {f"{_OTHER}{name}": value.detach().cpu().clone() for name, value in others.items()}


@torch.no_grad()
def restore_moments(
    optimizer: torch.optim.Optimizer,
    names: Mapping[str, nn.Parameter],
    others: Mapping[str, nn.Parameter],
    moments: Mapping[str, Tensor],
) -> None:
    """Puts in what `moments_of` gave."""
    for name, parameter in names.items():
        if f"exp_avg.{name}" in moments:
            optimizer.state[parameter] = {kind: moments[f"{kind}.{name}"].to(parameter.device) for kind in MOMENTS}
    for name, value in others.items():
        value.copy_(moments[f"{_OTHER}{name}"])


def write_set_model(folder: Path, model: SetModel) -> None:
    """Writes what builds the model into a checkpoint folder that is being written."""
    write_json(folder / SET_MODEL_NAME, model.description)


def preprocess_of(
    mean: tuple[float, ...], std: tuple[float, ...], interpolation: str, resize_mode: str
) -> dict[str, Any]:
    """Returns open_clip's preprocess_cfg."""
    return {"mean": list(mean), "std": list(std), "interpolation": interpolation, "resize_mode": resize_mode}
