"""Our training loop against open_clip's own trainer on one GPU: images a second and MFU, bf16, compiled.

    python -m benchmarks.train_gpu --json FILE [--shards DIR] [--models ViT-B-16 ViT-B-32] [--minutes 8]
    python -m benchmarks.train_gpu --device cpu --models tiny --json FILE     # that it runs; its figures mean nothing

Each model is trained by ours (`pretrain.run`) and by open_clip's trainer (`open_clip_train.main`; `python -m
benchmarks.open_clip_environment` makes its environment), once on JPEGs from tars, as users start it, and once with one
batch that is given at every step ("synthetic": no reading, decoding or augmentation, but the copy to the GPU). Counted is
the time between two lines of each log, after what is compiled and warmed up; waiting for data is by each trainer's own log.
MFU counts the model's FLOPs, forward and backward, by its definition, against the bf16 peak of the data sheet.

DIR holds shards of data_prep, which are repeated; without it photographs of $SETCLIP_REAL_DATA, or scenes. The file holds what
is measured so far at any moment, and no run is begun after so many minutes. Beside this repository and what it requires
(pyproject.toml; the parser is needed only where --shards is not given) it needs webdataset 0.2.86 here or in that environment.
"""

import os
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from benchmarks import open_clip_environment
from benchmarks.train import MODELS, SIDES
from benchmarks.trainers import Measured, Side, Task, run_trainer, write_model
from pretrain.loader import automatic_workers
from pretrain.throughput import peak_flops, training_flops
from setclip.config import command, parse
from setclip.errors import InputError
from setclip.files import write_json
from setclip.log import say
from setclip.manifest import Manifest
from setclip.models.clip import build_clip, model_config
from setclip.shards import KEY_LENGTH, Shard, ShardWriter

GOALS = {"mfu of ViT-B-16": 0.45, "times open_clip's trainer": 1.3, "data wait of ViT-B-16": 0.03}

BATCH_SIZES = {"ViT-B-16": 1_024, "ViT-B-32": 2_048, "tiny": 16}
"""Model to pairs a step, about half of what 139 GiB hold; --batch-size for others."""

Data = Literal["jpegs", "synthetic"]


@dataclass(frozen=True, kw_only=True)
class BenchmarkConfig:
    """Compares our training with open_clip's on a GPU."""

    models: tuple[str, ...] = ("ViT-B-16", "ViT-B-32")
    """Names of open_clip's; tiny is for a try on a CPU."""
    device: Literal["cuda", "cpu"] = "cuda"
    """cpu only shows that everything runs."""
    shards: Path | None = None
    """Shards of data_prep to read, repeated."""
    samples: int = 16_384
    """Samples in the shards that are read, repeats included."""
    batch_size: int | None = None
    """Pairs a step; None: what fits each model on a GPU of 139 GiB."""
    steps: int = 61
    """Steps of each run."""
    warmup: int = 20
    """Steps of them before counting."""
    workers: int | None = None
    """Loader processes; None: one for each core but one, 16 at most."""
    compile: bool = True
    """By torch.compile, both trainers."""
    minutes: float = 8.0
    """After so many no further run is begun."""
    json: Path | None = None
    """File for the figures."""


def main() -> None:
    """The command."""
    config = parse(BenchmarkConfig, description=__doc__)
    if config.device == "cuda" and not torch.cuda.is_available():
        raise InputError(
            "expected a CUDA device to measure on, found none; run it where there is one, or try that it runs with "
            "--device cpu --models tiny"
        )
    for name in config.models:
        if name not in BATCH_SIZES and config.batch_size is None:
            raise InputError(
                f"expected a batch size for {name}, which is none of {', '.join(BATCH_SIZES)}; give --batch-size"
            )
    open_clip_environment.python_of()
    with tempfile.TemporaryDirectory() as folder:
        measure(config, Path(folder))


def measure(config: BenchmarkConfig, folder: Path) -> dict[str, Any]:
    """Measures one run after the other, writing the file after each; returns what it holds."""
    start = time.monotonic()
    workers = automatic_workers(1) if config.workers is None else config.workers
    source = repeated_shards(config, folder / "shards", max(1, workers))
    gpu = torch.cuda.get_device_name() if config.device == "cuda" else None
    peak = None if gpu is None else peak_flops(gpu)
    figures: dict[str, Any] = {
        "goals": GOALS,
        "device": gpu or "CPU: figures mean nothing",
        "peak_flops": peak,
        "cores": len(os.sched_getaffinity(0)),
        "workers": workers,
        "compile": config.compile,
        "material": source,
        "torch": torch.__version__,
        "runs": [],
        "left_out": [],
    }
    say(f"{figures['device']}, {workers} loader processes; {source}")
    for name, data, side, task, flops in runs_of(config, folder, workers):
        what = {"model": name, "data": data, "trainer": side, "batch_size": task.global_batch_size}
        if time.monotonic() - start > 60 * config.minutes:
            figures["left_out"].append(what)
            continue
        try:
            found = run_trainer(side, task, folder / f"{name}-{data}-{side}", config.warmup)
        except InputError as error:  # what the others measure counts all the same
            figures["left_out"].append({**what, "error": str(error)})
            say(f"{name}, {data}, {side}: {error}")
        else:
            figures["runs"].append({**what, **_entry(found, flops, peak)})
            _say_run(figures["runs"][-1])
        figures["ratios"] = ratios_of(figures["runs"])
        if config.json is not None:
            write_json(config.json, figures)
    for line in verdicts(figures):
        say(line)
    return figures


def runs_of(config: BenchmarkConfig, folder: Path, workers: int) -> Iterator[tuple[str, Data, Side, Task, float]]:
    """Yields (model, data, trainer, task, FLOPs a pair) of each run. Ours is first: it leaves the batch that is repeated."""
    for name in config.models:
        model_cfg = MODELS["vit-32"] if name == "tiny" else model_config(name)
        task = Task(
            shards=folder / "shards",
            model=write_model(folder / f"model-{name}", model_cfg),
            global_batch_size=config.batch_size or BATCH_SIZES[name],
            steps=config.steps,
            ranks=1,
            workers=workers,
            device=config.device,
            precision="bf16",
            compile=config.compile,
        )
        flops = training_flops(build_clip(model_cfg))
        kept = folder / f"batch-{name}"
        kept.mkdir()
        for data, chosen in (("jpegs", task), ("synthetic", replace(task, repeated=kept))):
            for side in SIDES:
                yield name, data, side, chosen, flops  # type: ignore[misc]


def repeated_shards(config: BenchmarkConfig, out: Path, workers: int) -> str:
    """Writes config.samples samples in so many shards that each loader process has one; returns where they are from."""
    num_shards = max(8, workers)
    if config.shards is None:
        from benchmarks.train_material import write_shards  # needs the parser, which a GPU machine may lack

        return write_shards(out, config.samples, num_shards)
    manifest = Manifest.load(config.shards)
    of_split = [Shard(config.shards / info.name) for info in manifest.of_split("train")]
    places = [(shard, row) for shard in of_split for row in range(len(shard))]
    out.mkdir(parents=True)
    infos = []
    for number in range(num_shards):
        with ShardWriter(out / f"train-{number:05d}.tar") as writer:
            for sample in range(number, config.samples, num_shards):
                shard, row = places[sample % len(places)]
                writer.copy(shard, row, key=f"{sample:0{KEY_LENGTH}x}")
        infos.append(writer.info)
    captions = sum(info.captions for info in infos)
    replace(manifest, shards=infos, pairs_listed=captions, pairs_present=captions).save(out)
    return f"{len(places):,} samples of {config.shards}, repeated"


def _entry(found: Measured, flops: float, peak: float | None) -> dict[str, Any]:
    rate = found.samples_per_second
    return {**asdict(found), "images_per_second": rate, "mfu": None if peak is None else rate * flops / peak}


def _say_run(entry: dict[str, Any]) -> None:
    mfu = "" if entry["mfu"] is None else f", MFU {entry['mfu']:.1%}"
    say(
        f"{entry['model']}, {entry['data']:9} {entry['trainer']:9} {entry['images_per_second']:9,.0f} images/s{mfu}, data wait "
        f"{entry['data_wait']:.1%}"
    )


def ratios_of(runs: list[dict[str, Any]]) -> dict[str, float]:
    """Returns "MODEL, DATA" to how many times open_clip's images a second ours are, where both were measured."""
    rates = {(run["model"], run["data"], run["trainer"]): run["images_per_second"] for run in runs}
    return {
        f"{model}, {data}": rate / rates[model, data, "open_clip"]
        for (model, data, side), rate in rates.items()
        if side == "ours" and (model, data, "open_clip") in rates
    }


def verdicts(figures: dict[str, Any]) -> list[str]:
    """Returns a line for each goal; a CPU reaches and misses none."""
    lines = [f"{what}: {ratio:.2f} times open_clip's trainer" for what, ratio in figures.get("ratios", {}).items()]
    if figures["peak_flops"] is None:
        return [*lines, "goals are those of a GPU whose peak is known: none is judged"]
    of_b16 = [run for run in figures["runs"] if (run["model"], run["trainer"]) == ("ViT-B-16", "ours")]
    jpegs = [run for run in of_b16 if run["data"] == "jpegs"]
    judged = [(f"MFU of ViT-B-16, {run['data']}", run["mfu"], run["mfu"] >= GOALS["mfu of ViT-B-16"]) for run in of_b16]
    judged += [
        ("data wait of ViT-B-16", run["data_wait"], run["data_wait"] < GOALS["data wait of ViT-B-16"]) for run in jpegs
    ]
    judged += [
        (f"times open_clip's trainer, {what}", ratio, ratio >= GOALS["times open_clip's trainer"])
        for what, ratio in figures["ratios"].items()
    ]
    lines += [
        f"goal {what}: {value:.3f}: {'reached' if is_reached else 'MISSED'}" for what, value, is_reached in judged
    ]
    return lines + [f"left out: {entry}" for entry in figures["left_out"]]


if __name__ == "__main__":
    command(main)
