"""Sums the similarities of several runs on the same data, and reports what the sum retrieves beside each run alone.

    python -m finetune.ensemble runs/a runs/b                    # on the test data of the runs
    python -m finetune.ensemble runs/a                           # a run of several seeds: all of them
    python -m finetune.ensemble runs/x/seed-0 runs/x/seed-1 --row dive-coco-frcnn-bigru-ensemble   # beside a paper's row

Rows of papers that are marked as ensembles sum two models so. Scores of other similarities may have other ranges: they are summed
as they are, without weights. Writes results.json and results.md into --out, which `python -m finetune.recipes --table` takes.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
from torch import Tensor

from eval_suite.results import RUN_RESULTS_NAME, Results, markdown_table
from eval_suite.retrieval import KEPT_SCORES
from eval_suite.scores import Score, remembered
from eval_suite.sharing import ALONE, alone_on
from finetune.config import FinetuneConfig
from finetune.data import Part, open_parts
from finetune.evaluate import results_of_score, score_with
from finetune.features import PartInputs
from finetune.recipes import ROWS
from finetune.recipes.comparison import TABLE_NAME, write_comparison
from setclip import config as configuration
from setclip.checkpoint import LoadedModel, find_checkpoint, load_model
from setclip.distributed import World
from setclip.errors import InputError
from setclip.files import replacing
from setclip.log import say
from setclip.lookup import look_up
from setclip.models.set_model import SetModel


@dataclass(frozen=True, kw_only=True)
class EnsembleConfig:
    """Which runs, on what, and where the results go."""

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Folders of finetune.run: two or more, or one of several seeds."""
    split: Literal["test", "val"] = "test"
    """The runs' test data, or those on which they chose their checkpoints."""
    out: Path | None = None
    """Folder of the results. None: FIRST-ensemble beside the first run."""
    row: str | None = None
    """Row of a paper beside which the sum stands: python -m finetune.recipes --list."""
    device: str = "auto"
    """cpu, cuda, cuda:1, …; auto takes CUDA where there is one."""


@dataclass(frozen=True)
class Member:
    """A run whose scores are summed."""

    folder: Path
    config: FinetuneConfig
    loaded: LoadedModel

    @property
    def model(self) -> SetModel:
        """The chosen checkpoint."""
        assert isinstance(self.loaded.model, SetModel)
        return self.loaded.model


def ensemble(config: EnsembleConfig) -> Path:
    """Does what the command does; returns the folder of the results. Raises InputError where runs do not go together."""
    if config.row is not None:
        look_up(ROWS, config.row, "row")
    world = alone_on(config.device)
    folders = runs_of(config.runs)
    members = [open_run(folder, world.device) for folder in folders]
    out = config.out or folders[0].parent / f"{folders[0].name}-ensemble"
    if out.exists() and any(out.iterdir()) and not (out / RUN_RESULTS_NAME).exists():
        raise InputError(f"expected a new or empty folder for the results, found {out}; give another --out")
    begun = time.monotonic()
    parts = [part_of(member, config.split) for member in members]
    check_same(folders, parts)
    scores = [
        remembered(score_of_run(member, part, world), KEPT_SCORES) for member, part in zip(members, parts, strict=True)
    ]
    each = [
        results_of_score(score, parts[0], ALONE, dict(member.loaded.identity), {}, {}, begun)
        for member, score in zip(members, scores, strict=True)
    ]
    told = [
        {
            "where": member.loaded.identity["where"],
            "recipe": member.loaded.identity.get("recipe"),
            "seed": member.config.seed,
            "config": configuration.to_dict(member.config),
        }
        for member in members
    ]
    identity = {"where": str(out), "model": f"sum of {len(members)} runs", "head": members[0].config.head}
    details: dict[str, Any] = {"similarity": "mean of the runs' scores", "members": told}
    found = results_of_score(mean_of(scores), parts[0], ALONE, identity, configuration.to_dict(config), details, begun)
    found.save(out / RUN_RESULTS_NAME)
    return _tell(out, [*each, found], config.row)


def _tell(out: Path, found: Sequence[Results], row: str | None) -> Path:
    text = markdown_table(found).rstrip()
    say(f"\n{text}")
    if row is not None:
        say(f"\n{write_comparison(out, row)}")
    else:
        with replacing(out / TABLE_NAME) as temporary:
            temporary.write_text(text + "\n", encoding="utf-8")
    say(f"\nresults: {out / RUN_RESULTS_NAME}")
    return out


def mean_of(scores: Sequence[Score]) -> Score:
    """Returns the Score that is the mean of others, summed in float64."""

    def score(rows: slice, columns: slice) -> Tensor:
        return torch.stack([each(rows, columns).double() for each in scores]).mean(0).float()

    return score


def runs_of(folders: Sequence[Path]) -> list[Path]:
    """Returns the runs that folders name: a folder of several seeds stands for its seeds. Raises InputError."""
    runs = [seed for folder in folders for seed in (seeds_of(folder) or [folder])]
    if len(runs) < 2:
        raise InputError(
            f"expected two or more runs, or one of several seeds, found {', '.join(map(str, runs)) or 'none'}; `python -m "
            "finetune.run RECIPE --seeds 2` makes them"
        )
    twice = {str(run) for run in runs if sum(other.resolve() == run.resolve() for other in runs) > 1}
    if twice:
        raise InputError(f"expected each run once, found {', '.join(sorted(twice))} twice; leave one out")
    return runs


def seeds_of(folder: Path) -> list[Path]:
    """Returns the runs of a run of several seeds, in the order of their seeds; none of an ordinary run."""
    if (folder / configuration.CONFIG_NAME).exists():
        return []
    found = [path for path in folder.glob("seed-*") if (path / configuration.CONFIG_NAME).exists()]
    return sorted(found, key=lambda path: int(path.name.removeprefix("seed-")))


def open_run(folder: Path, device: torch.device | str = "cpu") -> Member:
    """Returns a run of finetune.run. Raises InputError where it is none, or has no checkpoint."""
    path = folder / configuration.CONFIG_NAME
    if not path.exists():
        raise InputError(
            f"expected a run of finetune.run at {folder}, found no {configuration.CONFIG_NAME} there; give the folder that --out "
            "named"
        )
    config: FinetuneConfig = configuration.parse(FinetuneConfig, ["--config", str(path)])
    loaded = load_model(find_checkpoint(folder), device)
    if not isinstance(loaded.model, SetModel):
        raise InputError(
            f"expected a fine-tuned model at {folder}, found one of pretraining; give a run of finetune.run"
        )
    return Member(folder, config, loaded)


def part_of(member: Member, split: str) -> Part:
    """Returns a run's test or validation data. Raises InputError where it has none."""
    part = getattr(open_parts(member.config), split)
    if part is None:
        raise InputError(f"expected a run with test data at {member.folder}, found none; take --split val")
    return part


def check_same(folders: Sequence[Path], parts: Sequence[Part]) -> None:
    """Raises InputError where runs were not made on the same data."""
    first = parts[0]
    for folder, part in zip(folders, parts, strict=True):
        if part.data.captions_sha256 != first.data.captions_sha256 or part.data.keys != first.data.keys:
            raise InputError(
                f"expected runs on the same data, found {first.place}, {first.split} ({len(first):,} pictures) of {folders[0]} "
                f"and {part.place}, {part.split} ({len(part):,}) of {folder}; sum runs on one data set"
            )


def score_of_run(member: Member, part: Part, world: World) -> Score:
    """Returns the scores of all pictures with all texts, as the run itself was evaluated."""
    inputs = PartInputs(part, None, None)
    return score_with(member.model, inputs, member.loaded, world, member.model.inference, show_progress=True)[0]


def main() -> None:
    """The command."""
    ensemble(configuration.parse(EnsembleConfig, description=__doc__))


if __name__ == "__main__":
    configuration.command(main)
