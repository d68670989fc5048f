"""The demo's folder: where each step leaves what, and demo.json, the record of its steps.

Written by setclip.demo as it goes; read by setclip.demo_report.
"""

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from setclip.errors import InputError
from setclip.files import write_json
from setclip.provenance import describe

RECORD_NAME = "demo.json"
REPORT_NAME = "report.html"

ARMS = {"object_iou": "Object-IoU labels", "hard": "hard labels"}
"""Loss to its name in the report, in the order of the runs and of every figure."""
SLOTS = "slots"
"""The run that fine-tunes the first arm's model."""


@dataclass(frozen=True)
class DemoFolder:
    """Places under the demo's --out."""

    root: Path

    @property
    def scenes(self) -> Path:
        """Shards, manifest, objects.parquet, zeroshot/."""
        return self.root / "scenes"

    @property
    def report(self) -> Path:
        return self.root / REPORT_NAME

    def run(self, arm: str) -> Path:
        """Run folder of an arm, or of `SLOTS`."""
        return self.root / "runs" / arm

    def checkpoint(self, arm: str) -> Path:
        """The last checkpoint of an arm's run, which must be there."""
        return max((self.run(arm) / "checkpoints").glob("step-*"))

    def results(self, evaluation: str, arm: str) -> Path:
        """Results file of "zeroshot", "retrieval" or "diagnostics"."""
        return self.root / "results" / f"{evaluation}_{arm}.json"

    def looks(self, arm: str) -> Path:
        """Pictures of where elements of sets look, which the diagnostics command writes beside its results."""
        return self.root / "results" / f"diagnostics_{arm}.looks.json"

    def gallery(self, arm: str) -> Path:
        """Queries with their best answers, which the retrieval command writes beside its results."""
        return self.root / "results" / f"retrieval_{arm}.gallery.json"


@dataclass(frozen=True, kw_only=True)
class StepRecord:
    """One finished step."""

    title: str
    commands: list[str]
    """As a user would type them."""
    seconds: float


@dataclass(kw_only=True)
class DemoRecord:
    """The content of demo.json."""

    config: dict[str, Any]
    """The resolved settings of the demo."""
    steps: list[StepRecord] = field(default_factory=list)
    provenance: dict[str, Any] = field(default_factory=describe)

    def save(self, root: Path) -> None:
        """Writes demo.json, beside and renamed."""
        write_json(root / RECORD_NAME, dataclasses.asdict(self))

    @classmethod
    def load(cls, root: Path) -> "DemoRecord":
        """Reads demo.json. Raises InputError where the folder is none of the demo's."""
        path = root / RECORD_NAME
        if not path.exists():
            raise InputError(f"expected a demo's folder with {path}, found none; `python -m setclip.demo` makes one")
        content = json.loads(path.read_text(encoding="utf-8"))
        content["steps"] = [StepRecord(**step) for step in content["steps"]]
        return cls(**content)
