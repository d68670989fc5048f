"""Shows how far a chain of Slurm jobs is: stage, state, progress, rate, time left, and the last error.

    python -m setclip.jobs                 # every chain that slurm/pipeline.sh has submitted from here
    python -m setclip.jobs cc12m

Whether a stage is done is told by its files, whether it waits or runs by squeue, and how it fares by its log and metrics.jsonl.
slurm/pipeline.sh keeps the chain in slurm/logs: chain-NAME.tsv (stage, the place that it makes) and chain-NAME.jobs (stage,
job id; the last line of a stage counts), and asks here, with --plain True, what is left to submit (with --plan, of a chain
that it has not written there).
"""

import json
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro
import yaml

from setclip.config import CONFIG_NAME, command, parse
from setclip.errors import InputError
from setclip.log import duration, say
from setclip.manifest import MANIFEST_NAME, PARSING_NAME, WORK_NAME

_TAIL_BYTES = 200_000  # of a log, in which its last progress and error are looked for
_PROGRESS = re.compile(
    r"^(?P<what>[\w ,-]+): (?P<done>[\d,]+)(?:/(?P<total>[\d,]+))? (?P<unit>\w+), (?P<rate>[\d,.]+ \w+/s)"
    r"(?:, (?P<left>[^,]+) left)?"
)
_ENDED = re.compile(r"^=== ended with status (\d+)")
_BEGUN = re.compile(r"^=== \S+, job \S+, attempt (\d+)")
_PART = re.compile(r"^part \d+ of (\d+) is done; ")
_ERROR = re.compile(r"^(?:error: |[\w.]*(?:Error|Exception): |slurmstepd: error: |srun: error: )")
_RATES = 50  # lines of a fine-tuning's metrics over which its rate is taken
_ARRAYS = ("parse_llm", "describe")  # whose merge makes the files that show that they are done
_LATE = {"DependencyNeverSatisfied"}  # jobs with this reason are in the queue for a moment only


@dataclass(frozen=True, kw_only=True)
class JobsConfig:
    """Which chain, and how it is shown."""

    name: Annotated[str | None, tyro.conf.Positional] = None
    """The chain, as pipeline.sh was given it; None: all."""
    logs: Path = Path("slurm/logs")
    """Folder of chains and logs."""
    plan: Path | None = None
    """Stages of the chain, in place of those of chain-NAME.tsv."""
    plain: bool = False
    """One line a stage for scripts: stage, state, job ids, separated by tabs."""


@dataclass(frozen=True)
class StageState:
    """What is known of one stage."""

    stage: str
    place: Path
    state: str
    """"done", "running", "waiting", "failed" or "not submitted"."""
    job: str = ""
    """The last job that was submitted for it."""
    progress: str = ""
    rate: str = ""
    left: str = ""
    error: str = ""
    """The last error of its log, where it is not done."""


@dataclass(frozen=True)
class QueuedTask:
    """A job, or an element of an array, in the queue."""

    job: str
    state: str
    reason: str


def states_of(name: str, logs: Path, queue: Sequence[QueuedTask], plan: Path | None = None) -> list[StageState]:
    """Returns the state of each stage of a chain, or of a `plan` for it, in its order.

    Raises InputError where there is no such chain.
    """
    path = logs / f"chain-{name}.tsv"
    if plan is None and not path.exists():
        known = ", ".join(sorted(each.stem.removeprefix("chain-") for each in logs.glob("chain-*.tsv"))) or "none"
        raise InputError(f"expected a chain {name} at {path}, found {known}; submit it: slurm/pipeline.sh {name}")
    submitted = path.with_suffix(".jobs")
    jobs = dict(_columns(submitted)) if submitted.exists() else {}
    return [_state_of(stage, Path(place), jobs.get(stage, ""), logs, queue) for stage, place in _columns(plan or path)]


def read_queue() -> list[QueuedTask]:
    """Returns this user's jobs in Slurm's queue; none where there is no Slurm."""
    if shutil.which("squeue") is None:
        return []
    asked = ["squeue", "--me", "--noheader", "--array", "--format=%F|%T|%r"]
    found = subprocess.run(asked, capture_output=True, text=True, check=False)
    if found.returncode:
        raise InputError(f"expected squeue to answer, found {found.stderr.strip()}; is this a machine of the cluster?")
    return [QueuedTask(*line.split("|", 2)) for line in found.stdout.splitlines()]


def is_done(stage: str, place: Path) -> bool:
    """Whether the files show that a stage has come to its end. `stage`: its kind, with anything behind a colon."""
    return _DONE[stage.partition(":")[0]](place)


# --- what shows that a stage is done


def _fetched(place: Path) -> bool:
    return (place / "status.parquet").exists() or any(place.glob("*.tar"))


def _packed(place: Path) -> bool:
    if _has_manifest(place):
        return True
    done, total = _units(place)
    return total > 0 and done == total


def _merged(place: Path) -> bool:
    return _has_manifest(place) and not (place / WORK_NAME).exists()


def _has_manifest(place: Path) -> bool:
    """Whether shards have their manifest, or what stands in for it while a merge of objects rewrites them."""
    return (place / MANIFEST_NAME).exists() or (place / PARSING_NAME).exists()


def _parsed(place: Path) -> bool:
    path = place / MANIFEST_NAME
    return path.exists() and "llm" in json.loads(path.read_text(encoding="utf-8")).get("parsers", {})


def _described(place: Path) -> bool:
    return (place / "descriptions.parquet").exists()


def _trained(place: Path) -> bool:
    entries = _json_lines(place / "sessions.jsonl")
    return bool(entries) and entries[-1].get("how") == "finished"


def _finetuned(place: Path) -> bool:
    """Whether the results are there, which are written last, and newer than all that they come from."""
    return _is_newest(place / "results.json", place)


def _evaluated(place: Path) -> bool:
    """Whether the results are there, and newer than all that the run in whose `results` they lie comes from."""
    return _is_newest(place, place.parents[1])


def _is_newest(results: Path, run: Path) -> bool:
    """Whether results are there and none older than the newest checkpoints of their run and of the pretrained one behind it."""
    if not results.exists():
        return False
    runs = [run, *run.glob("seed-*")]
    for each in list(runs):
        chosen = each / "checkpoints/chosen/setclip_config.json"
        if chosen.exists():
            source = json.loads(chosen.read_text(encoding="utf-8")).get("from", {}).get("where", "")
            runs += [folder.parent for folder in Path(source).parents if folder.name == "checkpoints"]
    newest = [sorted(each.glob("checkpoints/step-*"))[-1:] for each in runs]
    return all(results.stat().st_mtime >= path.stat().st_mtime for paths in newest for path in paths)


_DONE: Mapping[str, Callable[[Path], bool]] = {
    "fetch": _fetched,
    "prepare": _packed,
    "merge": _merged,
    "parse_llm": _parsed,
    "parse_llm_merge": _parsed,
    "describe": _described,
    "describe_merge": _described,
    "pretrain": _trained,
    "finetune": _finetuned,
    "evaluate": _evaluated,
}


# --- one stage


def _state_of(stage: str, place: Path, job: str, logs: Path, queue: Sequence[QueuedTask]) -> StageState:
    mine = [task for task in queue if task.job == job and task.reason not in _LATE] if job else []
    files = sorted([*logs.glob(f"*-{job}.log"), *logs.glob(f"*-{job}_*.log")]) if job else []
    tails = {file: _tail(file) for file in files}
    error = ""
    if any(task.state != "PENDING" for task in mine):
        state = "running"
    elif mine:
        state = "waiting"
    elif is_done(stage, place) or (stage in _ARRAYS and _is_answered(place, tails)):
        return StageState(stage, place, "done", job)
    elif not job:
        return StageState(stage, place, "not submitted")
    else:
        state = "failed"
        error = "ended without a word: cancelled, or its node failed, or what it waited for failed"
    progress, rate, left = _progress_of(stage, place, tails.values())
    tasks = Counter(task.state.lower() for task in mine)
    if len(tails) + tasks["pending"] > 1:
        ended = Counter(_status_of(lines) for lines in tails.values())
        counts = {**tasks, "done": ended[0], "failed": sum(n for status, n in ended.items() if status)}
        progress = "; ".join(filter(None, [", ".join(f"{n} {what}" for what, n in counts.items() if n), progress]))
    if state == "waiting" and mine[0].reason not in ("None", ""):
        progress = "; ".join(filter(None, [mine[0].reason, progress]))
    attempt = max((_attempt_of(lines) for lines in tails.values()), default=1)
    if attempt > 1:
        progress = "; ".join(filter(None, [progress, f"attempt {attempt}"]))
    errors = [line for lines in tails.values() if _status_of(lines) != 0 for line in _errors_of(lines)[-1:]]
    return StageState(stage, place, state, job, progress, rate, left, errors[-1] if errors else error)


def _is_answered(place: Path, tails: Mapping[Path, Sequence[str]]) -> bool:
    """Whether all tasks of an array have ended well, by their logs, and the shards are no newer: a merge is what is left."""
    told = [int(match[1]) for lines in tails.values() for match in map(_PART.match, lines) if match]
    if len(tails) < max(told, default=1) or any(_status_of(lines) != 0 for lines in tails.values()):
        return False
    path = place / MANIFEST_NAME
    if not path.exists():
        return (place / PARSING_NAME).exists()
    return min(file.stat().st_mtime for file in tails) >= path.stat().st_mtime


def _progress_of(stage: str, place: Path, tails: Any) -> tuple[str, str, str]:
    """Returns (progress, rate, time left) as text, of the stage's own figures where it has some, else of a log's last line."""
    if stage == "pretrain":
        return _training(place)
    if stage.startswith("finetune:"):
        return _finetuning(place)
    if stage == "prepare" and (units := _units(place))[1]:
        return f"{units[0]:,} of {units[1]:,} inputs", "", ""
    lines = [match for tail in tails for match in map(_PROGRESS.match, tail) if match]
    if not lines:
        return "", "", ""
    last = lines[-1]
    of_total = f" of {last['total']}" if last["total"] else ""
    return f"{last['what']} {last['done']}{of_total} {last['unit']}", last["rate"], last["left"] or ""


def _training(run: Path) -> tuple[str, str, str]:
    lines = [entry for entry in _json_lines(run / "metrics.jsonl") if "samples_per_second" in entry]
    starts = [entry for entry in _json_lines(run / "sessions.jsonl") if entry.get("event") == "start"]
    if not lines or not starts:
        return "", "", ""
    step, total = lines[-1]["step"], starts[-1]["total_steps"]
    seconds = lines[-1]["seconds_per_step"] * (total - step)
    share = f"step {step:,} of {total:,} ({step / max(1, total):.0%})"
    return share, f"{lines[-1]['samples_per_second']:,.0f} samples/s", duration(seconds) if step < total else ""


def _finetuning(run: Path) -> tuple[str, str, str]:
    """Of several seeds those of the one that is under way."""
    files = sorted(
        [*run.glob("metrics.jsonl"), *run.glob("seed-*/metrics.jsonl")], key=lambda path: path.stat().st_mtime
    )
    entries = _json_lines(files[-1]) if files else []
    lines = [entry for entry in entries if entry.get("epoch") and "loss" in entry]
    settings = files[-1].with_name(CONFIG_NAME) if files else run
    if not lines or not settings.is_file():
        return "", "", ""
    config = yaml.safe_load(settings.read_text(encoding="utf-8"))
    last = lines[-1]
    step, total = last["step"], max(1, round(config["epochs"] * last["step"] / last["epoch"]))
    share = f"step {step:,} of {total:,} ({step / total:.0%})"
    if files[-1].parent != run:
        share = f"{files[-1].parent.name}, {share}"
    best = max((entry["val_rsum"] for entry in entries if "val_rsum" in entry), default=None)
    if best is not None:
        share += f", best rsum {best:.1f}"
    first = last
    for line in reversed(lines[-_RATES:-1]):
        if line["elapsed_seconds"] >= first["elapsed_seconds"]:  # the clock of the attempt before
            break
        first = line
    if first is last:
        return share, "", ""
    seconds = (last["elapsed_seconds"] - first["elapsed_seconds"]) / (step - first["step"])
    left = duration(seconds * (total - step)) if step < total else ""
    return share, f"{config['batch_size'] / seconds:,.0f} pictures/s", left


def _units(place: Path) -> tuple[int, int]:
    """Returns the inputs that are packed and the inputs of an unfinished preparation; 0 of 0 where none is under way."""
    plan = place / WORK_NAME / "plan.json"
    if not plan.exists():
        return 0, 0
    total = len(json.loads(plan.read_text(encoding="utf-8"))["units"])
    return sum(1 for path in plan.parent.glob("[0-9]*/") if path.name.isdigit()), total


def _status_of(lines: Sequence[str]) -> int | None:
    """Returns the status with which a log's last attempt ended; None where it has not."""
    for line in reversed(lines):
        if match := _ENDED.match(line):
            return int(match[1])
        if _BEGUN.match(line):
            return None
    return None


def _attempt_of(lines: Sequence[str]) -> int:
    return next((int(match[1]) for match in map(_BEGUN.match, reversed(lines)) if match), 1)


def _errors_of(lines: Sequence[str]) -> list[str]:
    return [line for line in lines if _ERROR.match(line)]


def _tail(path: Path) -> list[str]:
    with open(path, "rb") as file:
        file.seek(max(0, path.stat().st_size - _TAIL_BYTES))
        return file.read().decode(errors="replace").splitlines()


def _json_lines(path: Path) -> list[dict[str, Any]]:
    """Returns the entries of a file of JSON lines, without a last one that is being written."""
    if not path.exists():
        return []
    found = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found


def _columns(path: Path) -> list[tuple[str, str]]:
    lines = path.read_text(encoding="utf-8").splitlines()
    return [(first, rest) for first, _, rest in (line.partition("\t") for line in lines) if first]


# --- the command


def table(states: Sequence[StageState]) -> str:
    """Returns a table of stages, and behind it the errors."""
    head = ("stage", "state", "job", "progress", "rate", "left")
    rows = [head, *[(s.stage, s.state, s.job, s.progress, s.rate, s.left) for s in states]]
    widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([*lines, *[f"{s.stage} (job {s.job}): {s.error}" for s in states if s.error]])


def main() -> None:
    """The command."""
    config = parse(JobsConfig, description=__doc__)
    names = (
        [config.name] if config.name else sorted(p.stem.removeprefix("chain-") for p in config.logs.glob("chain-*.tsv"))
    )
    if not names:
        raise InputError(f"expected chains in {config.logs}, found none; submit one: slurm/pipeline.sh cc12m")
    queue = read_queue()
    for name in names:
        states = states_of(name, config.logs, queue, config.plan)
        if config.plain:
            for each in states:
                say(f"{each.stage}\t{each.state}\t{each.job}")
        else:
            say(f"{name}\n{table(states)}")


if __name__ == "__main__":
    command(main)
