"""What a reader of a run's figures should look at, each with what to do about it. Used by pretrain.report.

Each rule looks at one thing and returns sentences; docs/pretraining.md has the same advice by figure.
"""

import math
import statistics
from collections.abc import Callable, Sequence

from pretrain.report_runs import Run
from setclip.log import duration

_FEW = 8  # lines with which a rule on the course of a figure has nothing to go by


def remarks(run: Run) -> list[str]:
    """Returns what is worth a look in a run; nothing where all is as it should be."""
    return [text for rule in RULES for text in rule(run)]


def _ending(run: Run) -> list[str]:
    last = run.sessions[-1] if run.sessions else None
    go_on = "the same command with `--resume True` goes on from the last checkpoint"
    if run.state == "failed" and last is not None:
        return [f"It failed at step {run.step:,}: {last.reason}. With that mended, {go_on}."]
    if run.state == "ended without a word":
        return [
            f"It ended without a word (killed, out of memory, or the machine went away): see the job's log; {go_on}."
        ]
    if run.state == "unfinished" and run.total_steps:
        return [f"It has {run.step:,} of {run.total_steps:,} steps, and nothing has been added of late; {go_on}."]
    return []


def _hang(run: Run) -> list[str]:
    if not run.files:
        return []
    return [
        f"A rank hung; hang/ in the run folder has the stacks of {len(run.files)} ranks, the job's log names the one."
    ]


def _bad_steps(run: Run) -> list[str]:
    number = len(run.bad_steps)
    if not number:
        return []
    return [
        f"{number:,} {'step was' if number == 1 else 'steps were'} skipped because loss or gradient was not finite. One in "
        "many thousands is no harm; more call for a lower `--optim.lr`, a longer warm-up, or a look at their samples below."
    ]


def _bad_samples(run: Run) -> list[str]:
    bad, seen = run.last.get("bad_samples", len(run.skips)), run.last.get("samples_seen", 0)
    if not seen or bad / (bad + seen) < 0.005:
        return []
    return [
        f"{100 * bad / (bad + seen):.1f} % of the samples read could not be used ({bad:,}); `python -m data_prep.verify` finds "
        "what is damaged, and can repair it."
    ]


def _data_wait(run: Run) -> list[str]:
    values = [value for _, value in run.values("data_wait_share")][
        1:
    ]  # the first line has the start of the loaders in it
    if not values or (median := statistics.median(values)) < 0.05:
        return []
    return [
        f"{100 * median:.0f} % of the time went into waiting for data (median): more `--data.workers`, smaller pictures in the "
        "shards, or a faster disk; `python -m pretrain.doctor` says which."
    ]


def _slower(run: Run) -> list[str]:
    values = [value for _, value in run.values("samples_per_second")]
    if len(values) < 3 * _FEW:
        return []
    early, late = statistics.median(values[: len(values) // 2]), statistics.median(values[-len(values) // 8 :])
    if late > 0.8 * early:
        return []
    return [
        f"It has become slower: {late:,.0f} samples/s of late, {early:,.0f} in the first half. Look at data wait and memory, and "
        "for others on the machine."
    ]


def _memory(run: Run) -> list[str]:
    first_step = run.sessions[-1].step if run.sessions else 0
    found = []
    for key, words in (("cpu_memory_bytes", "the process"), ("loader_memory_bytes", "the loaders")):
        values = [value for step, value in run.values(key) if step > first_step]
        if len(values) < 3 * _FEW:
            continue
        # Pools fill up at first; what still grows later does not end.
        middle, late = statistics.median(values[len(values) // 3 : len(values) // 2]), statistics.median(values[-_FEW:])
        if late > 1.25 * middle and late - middle > 2e8:
            found.append(
                f"Memory of {words} grows: {late / 1e9:.1f} GB, {middle / 1e9:.1f} GB earlier. Until it is found, stop and "
                "resume the run: nothing is lost by that."
            )
    return found


def _collapse(run: Run) -> list[str]:
    batch = run.settings.get("loss.group_size") or run.settings.get("global_batch_size")
    values = [value for _, value in run.values("loss")]
    if not batch or len(values) < _FEW:
        return []
    level = math.log(batch)
    if any(abs(value - level) > 0.005 * level for value in values[-_FEW:]):
        return []
    return [
        f"The loss stays at ln(pairs contrasted) = {level:.3f}: all features are alike (a collapse). Lower `--optim.lr` or "
        "lengthen the warm-up, and look at the captions."
    ]


def _rising(run: Run) -> list[str]:
    values = [value for _, value in run.values("kl")]
    if len(values) < 3 * _FEW:
        return []
    means = [statistics.fmean(values[start : start + _FEW]) for start in range(0, len(values) - _FEW + 1, _FEW)]
    lowest = min(means)
    if means[-1] < 1.15 * lowest + 0.02:
        return []
    step = run.values("kl")[means.index(lowest) * _FEW][0]
    return [
        f"KL has risen from {lowest:.3f} (about step {step:,}) to {means[-1]:.3f}: the run diverges. Go back to a checkpoint of "
        "before, with a lower `--optim.lr` (`--resume True --change True`)."
    ]


def _scale(run: Run) -> list[str]:
    cap = run.settings.get("optim.max_logit_scale")
    values = [value for _, value in run.values("logit_scale")]
    if not cap or len(values) < _FEW or any(value < 0.999 * cap for value in values[-_FEW:]):
        return []
    return [
        f"The logit scale is at its cap of {cap:g}. Late in a long run that is usual; early it is a sign of a learning rate that "
        "is too high or of captions that repeat."
    ]


def _past_its_best(run: Run) -> list[str]:
    values = run.values("zeroshot_top1")
    if len(values) < 3:
        return []
    best_step, best = max(values, key=lambda point: point[1])
    last_step, last = values[-1]
    if last > 0.95 * best or best - last < 1:
        return []
    return [
        f"Zero-shot top-1 was best at step {best_step:,} ({best:.1f} %); at step {last_step:,} it is {last:.1f} %. "
        "`--save.best zeroshot_top1` keeps the best checkpoint."
    ]


def _code(run: Run) -> list[str]:
    told = [(s.facts.get("provenance") or {}).get("commit") for s in run.sessions]
    commits = {str(commit) for commit in told if commit}
    found = []
    if len(commits) > 1:
        found.append(f"The starts ran different code: commits {', '.join(sorted(c[:12] for c in commits))}.")
    if any(str(commit).endswith("+changes") for commit in commits):
        found.append("The code had changes that are in no commit, so that the run cannot be made again from it.")
    return found


def _pairs(run: Run) -> list[str]:
    data = run.facts.get("data") or {}
    present, listed = data.get("pairs_present"), data.get("pairs_listed")
    if not present or not listed or present > 0.98 * listed:
        return []
    return [
        f"The data has {present:,} of the {listed:,} pairs that its source lists ({100 * present / listed:.0f} %): figures of "
        "others may be of more."
    ]


def _waits(run: Run) -> list[str]:
    gaps = [
        following.started - run.sessions[number].started - (run.seconds_of(number) or 0.0)
        for number, following in enumerate(run.sessions[1:])
        if run.seconds_of(number) is not None
    ]
    long = [gap for gap in gaps if gap > 3600]
    if not long:
        return []
    return [f"Between its starts the run waited {duration(sum(long))}, the longest time {duration(max(long))}."]


RULES: Sequence[Callable[[Run], list[str]]] = (
    _ending,
    _hang,
    _collapse,
    _rising,
    _bad_steps,
    _bad_samples,
    _data_wait,
    _slower,
    _memory,
    _scale,
    _past_its_best,
    _pairs,
    _waits,
    _code,
)
