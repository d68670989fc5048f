"""A run of pretraining as a unit: it goes on from its own checkpoints, and is evaluated by the evaluation suite's functions.

Used by the experiments on losses and text domains.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from eval_suite.results import Results
from eval_suite.retrieval import RetrievalConfig
from eval_suite.retrieval import evaluate as evaluate_retrieval
from eval_suite.zeroshot import ZeroShotConfig
from eval_suite.zeroshot import evaluate as evaluate_zero_shot
from pretrain.config import PretrainConfig
from pretrain.losses import LossConfig
from pretrain.run import train
from pretrain.text_domains import TextConfig
from setclip.checkpoint import checkpoints_of


def pretrained(recipe: str, config: PretrainConfig) -> Path:
    """Trains, or goes on from the newest checkpoint of `config.out`; returns that folder."""
    assert config.out is not None
    can_go_on = config.out.exists() and bool(checkpoints_of(config.out))
    train(recipe, replace(config, resume=can_go_on, overwrite=not can_go_on))
    return config.out


def with_settings(config: PretrainConfig, settings: Mapping[str, Any], seed: int, out: Path) -> PretrainConfig:
    """Returns `config` with the loss and the text domains of an arm ("loss", "text": names to values) in a folder."""
    loss = LossConfig(**_typed(LossConfig, settings.get("loss", {})))
    text = TextConfig(**_typed(TextConfig, settings.get("text", {})))
    return replace(config, loss=loss, text=text, seed=seed, out=out)


def _typed(kind: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns values of JSON as the fields of a dataclass have them."""
    hints = get_type_hints(kind)
    return {
        name: tuple(value) if get_origin(hints[name]) is tuple else Path(value) if _is_path(hints[name]) else value
        for name, value in values.items()
    }


def _is_path(hint: Any) -> bool:
    return hint is Path or Path in get_args(hint)


def zero_shot(run: Path, device: str, **settings: Any) -> Results:
    """Returns the results of zero-shot classification with a run's model."""
    return evaluate_zero_shot(ZeroShotConfig(checkpoint=str(run), device=device, workers=0, **settings)).results


def retrieval(run: Path, data: Path, split: str, device: str) -> Results:
    """Returns the results of retrieval with a run's model."""
    return evaluate_retrieval(
        RetrievalConfig(checkpoint=str(run), data=data, split=split, gallery_queries=0, device=device, workers=0)
    ).results


def figures(results: Results) -> Iterator[tuple[str, float, float | None, tuple[float, float] | None]]:
    """Yields (name, value, chance, interval) of all metrics of an evaluation."""
    for name, metric in results.metrics.items():
        yield name, metric.value, metric.chance, metric.interval_95
