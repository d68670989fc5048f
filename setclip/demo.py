"""Runs the whole road on the embedded corpus: data, two trainings, export, evaluation, and a report to look at.

    python -m setclip.demo                               # some minutes on two cores; then open demo/report.html
    python -m setclip.demo --fast True --out demo-fast   # a smoke test: shows that it runs, not that it learns

Each step is the real command of its stage in a process of its own, printed as one would type it. The demo needs no
network and no GPU. The two arms differ in their labels only: Object-IoU soft labels against CLIP's hard ones. The first
arm's model is then fine-tuned with slots, which make a set of vectors of a picture and a caption.
"""

import shlex
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from setclip.config import command, parse, to_dict
from setclip.demo_record import ARMS, RECORD_NAME, SLOTS, DemoFolder, DemoRecord, StepRecord
from setclip.demo_report import write_report
from setclip.errors import InputError
from setclip.files import remove
from setclip.log import duration, say
from setclip.steps import Steps


@dataclass(frozen=True, kw_only=True)
class Size:
    """How much the demo does."""

    scenes: int
    """Training scenes."""
    test_scenes: int
    """Held-out scenes for retrieval."""
    nouns: int
    zeroshot_per_noun: int
    """Held-out pictures per noun."""
    global_batch_size: int
    steps: int
    """Training steps of each arm."""
    slot_epochs: float
    """Of the fine-tuning, over all training scenes."""
    held_out: int
    """Training scenes that choose its checkpoint."""


FULL = Size(
    scenes=20_000,
    test_scenes=1_000,
    nouns=300,
    zeroshot_per_noun=10,
    global_batch_size=256,
    steps=250,
    slot_epochs=0.5,
    held_out=200,
)
FAST = Size(
    scenes=2_000,
    test_scenes=100,
    nouns=60,
    zeroshot_per_noun=3,
    global_batch_size=64,
    steps=24,
    slot_epochs=0.5,
    held_out=50,
)

EVALUATIONS = {False: 5, True: 3}
"""Points of the accuracy curves, by --fast."""
NUM_STEPS = 7

# Threads that wait for each other by spinning stall where other work shares the cores: with another training on the same
# two cores, 7 samples/s against 95.
_PATIENT = {"OMP_WAIT_POLICY": "PASSIVE"}

# The checkpoint folder is the export. setclip is imported for its torchvision work-around only; elsewhere it is not needed.
_LOAD_WITH_OPEN_CLIP = """
import setclip, open_clip, torch
from PIL import Image
picture, names = Image.open("{picture}"), "{names}".split(", ")
for place in "{places}".split(", "):
    model, preprocess = open_clip.create_model_from_pretrained(place)
    with torch.no_grad():
        image = model.encode_image(preprocess(picture)[None], normalize=True)
        texts = model.encode_text(open_clip.get_tokenizer(place)(["a " + name for name in names]), normalize=True)
    print(place, *(f"{{name}} {{cosine:.2f}}" for name, cosine in zip(names, (texts @ image[0]).tolist())), sep="  ")
"""


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """Where it goes and how much is done."""

    out: Path = Path("demo")
    """Folder for all that the demo makes; new or empty."""
    steps: int | None = None
    """Training steps of each arm. Default: 250, with --fast 24."""
    seed: int = 0
    """Of the scenes and of both trainings."""
    fast: bool = False
    """Small data and little training, for tests."""
    overwrite: bool = False
    """Remove an earlier demo in that folder."""

    def __post_init__(self) -> None:
        if self.steps is not None and self.steps < 1:
            raise InputError(f"expected at least 1 step, found --steps {self.steps}; raise it")

    @property
    def size(self) -> Size:
        """What --fast chooses."""
        return FAST if self.fast else FULL

    @property
    def num_steps(self) -> int:
        """Training steps of each arm."""
        return self.size.steps if self.steps is None else self.steps


class Demo:
    """Counts the steps, runs their commands and keeps the record."""

    def __init__(self, folder: DemoFolder, config: DemoConfig):
        self.folder, self._steps = folder, Steps(_PATIENT)
        settings = {**to_dict(config), "steps": config.num_steps, "size": to_dict(config.size)}
        self.record = DemoRecord(config={k: v for k, v in settings.items() if k != "overwrite"})
        self.record.save(folder.root)

    def step(self, title: str, *commands: Sequence[str]) -> None:
        """Runs a step's commands, each the arguments of a Python of its own, with their output passed through."""
        name = f"{len(self.record.steps) + 1}/{NUM_STEPS} {title}"
        say(f"\n=== {name}")
        start = time.monotonic()
        typed = [shlex.join(["python", *arguments]) for arguments in commands]
        for arguments, line in zip(commands, typed, strict=True):
            say(f"$ {line}")
            status = self._steps.run(arguments)
            if status:
                raise InputError(
                    f"step {name!r} ended with status {status}; what it said stands above. To repeat it alone:\n{line}"
                )
        self.record.steps.append(StepRecord(title=title, commands=typed, seconds=round(time.monotonic() - start, 1)))
        self.record.save(self.folder.root)
        say(f"=== {name}: {duration(self.record.steps[-1].seconds)}")


def run(config: DemoConfig) -> Path:
    """Does all steps; returns the report's path. Raises InputError where a step fails."""
    folder = claim(config.out, config.overwrite)
    demo = Demo(folder, config)
    demo.step("draw scenes, parse their captions, write shards", scenes_command(folder, config))
    for arm, label in ARMS.items():
        demo.step(f"pretrain with {label}", pretrain_command(folder, config, arm))
    demo.step("load the checkpoints with open_clip alone", open_clip_command(folder))
    demo.step("fine-tune the first model with slots", finetune_command(folder, config))
    retrievals = [evaluate_command(folder, run, "retrieval") for run in (*ARMS, SLOTS)]
    classifications = [evaluate_command(folder, arm, "zeroshot", "scenes") for arm in ARMS]
    looks = [*evaluate_command(folder, SLOTS, "diagnostics"), "--pictures", "4"]
    demo.step("evaluate retrieval, zero-shot classification and slots", *retrievals, *classifications, looks)
    demo.step("write the report", ["-m", "setclip.demo_report", str(folder.root)])
    write_report(folder.root)  # again, now with the time of the last step
    return folder.report


def claim(out: Path, overwrite: bool) -> DemoFolder:
    """Makes the folder; removes an earlier demo in it if asked to, but nothing that is not a demo."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        is_demo = (out / RECORD_NAME).is_file()
        if not is_demo:
            raise InputError(
                f"expected a new or empty folder, found {out} with something else than a demo in it, which "
                "--overwrite True would not remove either; give another --out"
            )
        if not overwrite:
            raise InputError(
                f"expected a new or empty folder, found an earlier demo in {out}; replace it with --overwrite True, or "
                "give another --out"
            )
        remove(out)
    out.mkdir(parents=True, exist_ok=True)
    return DemoFolder(out)


def scenes_command(folder: DemoFolder, config: DemoConfig) -> list[str]:
    """Arguments that make the corpus."""
    size = config.size
    sizes = ["--samples", size.scenes, "--test-samples", size.test_scenes, "--nouns", size.nouns]
    sizes += ["--zeroshot-per-noun", size.zeroshot_per_noun, "--seed", config.seed]
    return ["-m", "data_prep.run", "scenes", "--out", str(folder.scenes), *map(str, sizes)]


def pretrain_command(folder: DemoFolder, config: DemoConfig, arm: str) -> list[str]:
    """Arguments that train one arm; the arms differ in --loss.name and --out only."""
    steps = config.num_steps
    numbers = ["--global-batch-size", config.size.global_batch_size, "--steps", steps, "--seed", config.seed]
    numbers += ["--log-every-steps", -(-steps // 25), "--eval.every-steps", -(-steps // EVALUATIONS[config.fast])]
    places = [
        "--eval.zeroshot",
        folder.scenes / "zeroshot",
        "--eval.retrieval",
        folder.scenes,
        "--out",
        folder.run(arm),
    ]
    head = ["-m", "pretrain.run", "tiny", "--data.shards", str(folder.scenes), "--loss.name", arm]
    return [*head, *map(str, numbers), *map(str, places)]


def open_clip_command(folder: DemoFolder) -> list[str]:
    """Arguments that load each arm's checkpoint with open_clip and compare a picture with a few names, its own first."""
    places = ", ".join(f"local-dir:{folder.checkpoint(arm)}" for arm in ARMS)
    pictures = sorted((folder.scenes / "zeroshot").glob("*/*.jpg"))
    chosen = pictures[len(pictures) // 2]
    classes = sorted(path.name for path in chosen.parents[1].iterdir())
    others = [name for name in classes[:: max(1, len(classes) // 4)] if name != chosen.parent.name][:4]
    names = [name.replace("_", " ") for name in (chosen.parent.name, *others)]
    code = _LOAD_WITH_OPEN_CLIP.format(places=places, picture=chosen, names=", ".join(names))
    return ["-c", code.strip()]


def finetune_command(folder: DemoFolder, config: DemoConfig) -> list[str]:
    """Arguments that fine-tune the first arm's model by its own loss: towers frozen, small slots on top, for some seconds.

    Not all scenes are seen, so features of the towers are made at each step and not of all beforehand.
    """
    size = config.size
    slots = ["num_elements=4", "blocks=2", "heads=4", "head_width=32", "mlp_ratio=2"]
    numbers = ["--hold-out", size.held_out, "--width", 128, "--epochs", size.slot_epochs, "--seed", config.seed]
    numbers += ["--batch-size", 128, "--optim.lr", 2e-3, "--optim.warmup-share", 0.1]
    loss = ["--weights.triplet", "0", "--weights.contrastive", "1", "--contrastive.name", next(iter(ARMS))]
    places = ["--model", folder.run(next(iter(ARMS))), "--data", folder.scenes, "--test-split", "none"]
    places += ["--out", folder.run(SLOTS)]
    head = ["-m", "finetune.run", "--head", "slot", "--options", *slots, "--backbone.cache-gb", "0"]
    return [*head, *loss, *map(str, numbers), *map(str, places)]


def evaluate_command(folder: DemoFolder, run: str, evaluation: str, *name: str) -> list[str]:
    """Arguments that evaluate an arm, or the slots; `name` is that of a data set whose settings are taken."""
    places = ["--data", folder.scenes, "--checkpoint", folder.run(run), "--out", folder.results(evaluation, run)]
    return ["-m", f"eval_suite.{evaluation}", *name, *map(str, places)]


def main() -> None:
    """The command."""
    config: DemoConfig = parse(DemoConfig, description=__doc__)
    start = time.monotonic()
    report = run(config)
    say(f"\nThe demo took {duration(time.monotonic() - start)}.")
    say(f"report: {report}")


if __name__ == "__main__":
    command(main)
