"""What went wrong in a run, as sections of its report: bad samples with their pictures, skipped steps, and its starts.

Used by pretrain.report.
"""

import io
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup
from PIL import Image, ImageFile

from pretrain.report_runs import Run
from setclip import report
from setclip.datasets import locate
from setclip.decode import DecodeError
from setclip.errors import InputError
from setclip.log import duration
from setclip.shards import Shard

MOST_EXAMPLES = 12
_SIDE = 160  # pixels of a picture, at most
_MOST_ROWS = 10
_MOST_STEPS = 40


def bad_samples(run: Run) -> list[Markup]:
    """Returns counts by reason and by shard, and examples with their pictures where these can be shown."""
    if not run.skips:
        return []
    distinct: dict[tuple[str, str], dict[str, Any]] = {}
    for skip in run.skips:
        distinct.setdefault((skip["shard"], skip["key"]), skip)
    firsts = list(distinct.values())
    seen = run.last.get("samples_seen")
    share = f", {100 * len(run.skips) / (len(run.skips) + seen):.2g} % of what was read" if seen else ""
    blocks = [
        report.paragraph(
            f"{len(firsts):,} {'sample' if len(firsts) == 1 else 'different samples'}, met {_times(len(run.skips))}{share}. "
            "Each is left out in every epoch, and another one of its lane takes its place."
        ),
        report.row(
            _counts("By reason", "reason", Counter(skip["reason"] for skip in firsts)),
            _counts("By shard", "shard", Counter(skip["shard"] for skip in firsts)),
        ),
    ]
    some, folder = _examples(firsts), data_folder(run)
    if folder is not None:
        cards = report.sample_cards([_card(skip, folder) for skip in some])
        return [*blocks, report.subtitle("Some of them"), cards]
    rows: list[list[str | Markup]] = [[s["reason"], s["shard"], s["key"], f"{s['step']:,}"] for s in some]
    table = report.table(report.Table("Some of them", ["reason", "shard", "key", "first at step"], rows, "words"))
    return [*blocks, table, report.paragraph("Their pictures are shown by a report that is made where the shards lie.")]


def bad_steps(run: Run) -> list[Markup]:
    """Returns a table of the steps that were skipped."""
    if not run.bad_steps:
        return []
    rows: list[list[str | Markup]] = []
    for entry in run.bad_steps[:_MOST_STEPS]:
        ranks = entry.get("ranks", [])
        bad = [number for number, rank in enumerate(ranks) if not isinstance(rank["loss"], int | float)]
        where = f"loss, rank {', '.join(map(str, bad))}" if bad else "gradient"
        keys = [key for number, rank in enumerate(ranks) if number in bad or not bad for key in rank["keys"]]
        some = ", ".join(keys[:4]) + (f" and {len(keys) - 4:,} more" if len(keys) > 4 else "")
        rows.append([f"step {entry['step']:,}", where, str(entry.get("grad_norm", "–")), some])
    more = len(run.bad_steps) - _MOST_STEPS
    note = [report.paragraph(f"{more:,} more are in bad_steps.jsonl.")] if more > 0 else []
    header = ["", "not finite", "gradient norm", "samples of these ranks"]
    return [report.table(report.Table("Skipped steps", header, rows, "words")), *note]


def starts(run: Run) -> list[Markup]:
    """Returns a table of the starts of a run: when, on what, from which step to which, and how each ended."""
    rows: list[list[str | Markup]] = []
    for number, session in enumerate(run.sessions):
        seconds = run.seconds_of(number)
        ranks = session.facts.get("ranks")
        is_last = number + 1 == len(run.sessions)
        how = session.how or (run.state if is_last else "ended without a word")
        end = session.end_step if session.end_step is not None or not is_last else run.step
        rows.append(
            [
                when(session.started),
                f"{session.step:,} to " + ("–" if end is None else f"{end:,}"),
                duration(seconds) if seconds is not None else "–",
                f"{ranks} × {session.facts.get('device', '?')}" if ranks else "–",
                how + (f": {session.reason}" if session.reason else ""),
            ]
        )
    header = ["started", "steps", "took", "on", "ended"]
    return [report.table(report.Table(f"{run.name}: starts", header, rows, "words"))] if rows else []


def data_folder(run: Run) -> Path | None:
    """Returns where the run's shards lie on this machine; None where they do not."""
    shards, dataset = run.settings.get("data.shards"), run.settings.get("dataset")
    try:
        if isinstance(shards, list):  # bad samples of several sources are named with the folder they are in
            shards = shards[0] if len(shards) == 1 else "."
        folder = Path(shards) if shards else locate(str(dataset)) if dataset else None
    except InputError:
        return None
    return folder if folder is not None and folder.is_dir() else None


def when(seconds: float) -> str:
    """Returns a wall time as text, in UTC."""
    return time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(seconds))


def _times(number: int) -> str:
    return "once" if number == 1 else f"{number:,} times"


def _counts(title: str, what: str, counts: "Counter[str]") -> Markup:
    most = max(counts.values())
    rows: list[list[str | Markup]] = [
        [name, f"{number:,}", report.bar(number / most)] for name, number in counts.most_common(_MOST_ROWS)
    ]
    more = len(counts) - _MOST_ROWS
    if more > 0:
        rest = counts.total() - sum(number for _, number in counts.most_common(_MOST_ROWS))
        rows.append([f"{more:,} more", f"{rest:,}", ""])
    return report.table(report.Table(title, [what, "samples", ""], rows))


def _examples(skips: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns up to MOST_EXAMPLES samples, of each reason in turn."""
    by_reason: dict[str, list[dict[str, Any]]] = {}
    for skip in skips:
        by_reason.setdefault(skip["reason"], []).append(skip)
    turns = max(map(len, by_reason.values()))
    in_turn = [of_reason[turn] for turn in range(turns) for of_reason in by_reason.values() if turn < len(of_reason)]
    return in_turn[:MOST_EXAMPLES]


def _card(skip: dict[str, Any], folder: Path) -> report.SampleCard:
    shard, key = skip["shard"], skip["key"]
    note = f"{shard}, {key}, first at step {skip['step']:,}"
    alt = f"sample {key} of {shard}"
    try:
        data = report.PictureBook([Shard(folder / shard)]).image(key)
    except (InputError, KeyError, OSError):
        return report.SampleCard(report.missing_picture(f"no picture here: {alt}"), skip["reason"], (), note=note)
    return report.SampleCard(_what_is_left(data, alt), skip["reason"], (), note=note)


def _what_is_left(data: bytes, alt: str) -> report.Picture:
    """Returns a picture as far as it can be decoded: of one that was cut short, the upper part."""
    try:
        return report.picture(report.small_jpeg(data, _SIDE), "jpg", alt)
    except DecodeError as error:
        strict, ImageFile.LOAD_TRUNCATED_IMAGES = ImageFile.LOAD_TRUNCATED_IMAGES, True
        try:
            with Image.open(io.BytesIO(data)) as image:
                image.draft("RGB", (_SIDE, _SIDE))
                part = image.convert("RGB")
            part.thumbnail((_SIDE, _SIDE))
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
            return report.missing_picture(f"no picture ({error}): {alt}", ("cannot be", "decoded"))
        finally:
            ImageFile.LOAD_TRUNCATED_IMAGES = strict
        written = io.BytesIO()
        part.save(written, "JPEG", quality=80)
        return report.picture(written.getvalue(), "jpg", f"what is left of {alt}")
