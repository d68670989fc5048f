"""Bulk export of embeddings: the pictures of a folder, or of shards with their captions, as Parquet or npy.

    python -m eval_suite.embed DIR --checkpoint RUN --out EMBEDDINGS         # any folder of pictures, any nesting
    python -m eval_suite.embed SHARDS --split test --format npy --dtype float16
    python -m eval_suite.embed DIR --out EMBEDDINGS --part 3 --parts 8       # one of eight jobs that share the work

Work goes part by part; a part is written beside and renamed. A killed export started again goes on with the parts that
are missing, and its files are byte for byte those of an undisturbed one. Pictures that cannot be decoded are left out
and listed with the reason; more than --max-bad of them is an error. Letters: B samples of a batch, K elements of a set,
D width.
"""

import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import tyro
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from eval_suite.embed_files import (
    BAD_NAME,
    EMBEDDINGS_NAME,
    FORMAT_VERSION,
    DType,
    Embeddings,
    Format,
    write_lines,
    write_part,
)
from eval_suite.embed_source import Source, SourcePart, open_source
from eval_suite.encode import (
    EncodeImage,
    EncodeText,
    check_unit,
    encode_functions,
    encode_images,
    encode_texts,
    joined,
    largest_shape,
)
from eval_suite.fingerprint import model_identity, model_words
from eval_suite.model import model_to_evaluate
from eval_suite.preprocess import model_pictures
from setclip.config import command, parse
from setclip.decode import DecodeError
from setclip.errors import InputError
from setclip.files import remove, remove_partial, replacing, write_json
from setclip.images import Transform, decode_tensor
from setclip.log import Meter, say

WORK_NAME = ".parts"  # of the folder that says which parts are done, until all are
PLAN_NAME = "plan.json"


@dataclass(frozen=True, kw_only=True)
class EmbedSettings:
    """What decides the bytes of the files, beside model and inputs."""

    format: Format = "parquet"
    dtype: DType = "float32"
    texts: bool = True
    """Captions of shards as well."""
    batch_size: int = 128
    """A feature may depend on its batch in the last bits."""


def embed(
    source: Source,
    out: Path,
    encode_image: EncodeImage,
    encode_text: EncodeText,
    transform: Transform,
    model: Mapping[str, Any],
    settings: EmbedSettings | None = None,
    *,
    part: int = 0,
    parts: int = 1,
    max_bad: float = 0.05,
    workers: int | None = None,
    show_progress: bool = True,
) -> Embeddings | None:
    """Writes the embeddings of `source` to `out`; returns them, or None where other jobs still have parts to do.

    `transform` makes of a picture, (3, height, width) uint8, what `encode_image` takes, in batches of `batch_size`; the
    features, (B, D) or sets (B, K, D), are brought to unit norm; of sets of different sizes zero vectors stand for the elements
    that are not there. `model` says which model it is; its "fingerprint"
    tells it from others. This job does every `parts`-th part, from number `part` on; the last one to end completes the
    folder. Raises InputError where `out` holds parts of another model, of other inputs or settings, and, once the part
    at hand is written, where more than `max_bad` of all pictures are bad.
    """
    check_unit(encode_image)
    settings = settings or EmbedSettings()
    plan = _plan(source, model, settings)
    work = out / WORK_NAME
    if (out / EMBEDDINGS_NAME).exists():
        found = Embeddings.open(out)
        _check_plan(found.description, plan, out)
        remove(work)
        return found
    work.mkdir(parents=True, exist_ok=True)
    if (work / PLAN_NAME).exists():
        plan_before = json.loads((work / PLAN_NAME).read_text(encoding="utf-8"))
        _check_plan(plan_before, plan, out)
        plan = plan_before  # its words for the model's place are the ones that stay
    elif any(out.glob("images-*")) or any(out.glob("texts-*")):
        raise InputError(
            f"expected an empty folder or an unfinished export at {out}, found embeddings of other work; give another --out"
        )
    else:
        write_json(work / PLAN_NAME, plan)

    mine = source.parts[part::parts]
    reports = {p.name: report for p in source.parts if (report := _report_of(work, p, out)) is not None}
    waiting = [p for p in mine if p.name not in reports]
    if parts == 1:
        remove_partial(out)
        remove_partial(work)
    else:  # other jobs may be writing
        for p in waiting:
            for stem in (f"images-{p.name}", f"images-{p.name}.ids", f"texts-{p.name}", f"texts-{p.name}.ids"):
                remove_partial(out, stem)
    total, done = sum(len(p.rows) for p in mine), sum(len(p.rows) for p in mine if p.name in reports)
    meter = Meter(total, "embedding", "pictures", initial=done) if show_progress else None
    try:
        _check_bad(reports.values(), len(source), max_bad, out)
        batches = _batches(source, waiting, transform, settings.batch_size, workers)
        for p in waiting:
            rows = _encoded_part(source, p, batches, encode_image, settings, meter)
            reports[p.name] = _write_part(source, p, rows, encode_text, out, settings)
            write_json(work / f"{p.name}.json", reports[p.name])
            _check_bad(reports.values(), len(source), max_bad, out)
    finally:
        if meter is not None:
            meter.close()
    return _complete(source, out, plan)


# --- the plan: what the files of a folder have in common


def _plan(source: Source, model: Mapping[str, Any], settings: EmbedSettings) -> dict[str, Any]:
    return {
        "model": dict(model),
        "settings": {
            "format": settings.format,
            "dtype": settings.dtype,
            "texts": settings.texts,
            "batch_size": settings.batch_size,
        },
        "inputs": [{"name": p.name, "pictures": len(p.rows), "sha256": p.sha256} for p in source.parts],
    }


def _check_plan(before: Mapping[str, Any], plan: Mapping[str, Any], out: Path) -> None:
    """Raises InputError that says which of model, settings and inputs differs."""
    change = "give another --out, or remove the folder to begin anew"
    if before["model"]["fingerprint"] != plan["model"]["fingerprint"]:
        raise InputError(
            f"{out}: expected the model that its embeddings were begun with, {model_words(before['model'])}, found "
            f"{model_words(plan['model'])}; {change}"
        )
    if before["settings"] != plan["settings"]:
        differing = [
            f"{name} {plan['settings'].get(name)} instead of {value}"
            for name, value in before["settings"].items()
            if plan["settings"].get(name) != value
        ]
        raise InputError(
            f"{out}: expected the settings that its embeddings were begun with, found {', '.join(differing)}; {change}"
        )
    if before["inputs"] != plan["inputs"]:
        old, new = ({entry["name"]: entry for entry in p["inputs"]} for p in (before, plan))
        changed = [name for name in dict.fromkeys((*old, *new)) if old.get(name) != new.get(name)]
        counts = [sum(entry["pictures"] for entry in entries.values()) for entries in (old, new)]
        raise InputError(
            f"{out}: expected the inputs that its embeddings were begun with ({counts[0]:,} pictures), found changed ones "
            f"({counts[1]:,} pictures; {len(changed):,} parts differ, first {changed[0]}); {change}"
        )


def _report_of(work: Path, part: SourcePart, out: Path) -> dict[str, Any] | None:
    """Returns what was written of a finished part, after a look at its files; None where it is not finished."""
    path = work / f"{part.name}.json"
    if not path.exists():
        return None
    report = json.loads(path.read_text(encoding="utf-8"))
    for name, size in report["files"].items():
        if not (out / name).exists() or (out / name).stat().st_size != size:
            return None  # made again
    return report


# --- one part


@dataclass
class _Encoded:
    """What became of the pictures of a part."""

    rows: list[int] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)
    features: list[Tensor] = field(default_factory=list)
    bad: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True)
class _Batch:
    rows: list[int]
    """Of the pictures that could be decoded."""
    keys: list[str]
    images: Tensor | None
    bad: list[tuple[int, str]]
    """Row and reason."""


class _Pictures(Dataset[tuple[int, str, Tensor | str]]):
    """(row, key, picture or the reason why there is none) by row of the source."""

    def __init__(self, source: Source, transform: Transform):
        self.source, self.transform = source, transform

    def __getitem__(self, row: int) -> tuple[int, str, Tensor | str]:
        try:
            key, data = self.source.read(row)
            return row, key, self.transform(decode_tensor(data))
        except DecodeError as error:
            return row, "", str(error)
        except OSError as error:
            return row, "", f"cannot be read ({error.strerror})"


def _collate(samples: Sequence[tuple[int, str, Tensor | str]]) -> _Batch:
    good = [(row, key, image) for row, key, image in samples if isinstance(image, Tensor)]
    return _Batch(
        rows=[row for row, _, _ in good],
        keys=[key for _, key, _ in good],
        images=torch.stack([image for _, _, image in good]) if good else None,
        bad=[(row, reason) for row, _, reason in samples if isinstance(reason, str)],
    )


def _batches(
    source: Source, parts: Sequence[SourcePart], transform: Transform, batch_size: int, workers: int | None
) -> Iterator[_Batch]:
    """Yields the batches of all parts, none across a border; one loader for all, as its processes start slowly."""
    plan = [list(p.rows[i : i + batch_size]) for p in parts for i in range(0, len(p.rows), batch_size)]
    if workers is None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
        workers = 0 if cores <= 2 or len(plan) * batch_size < 2000 else min(8, cores - 1)
    return iter(DataLoader(_Pictures(source, transform), batch_sampler=plan, num_workers=workers, collate_fn=_collate))


def _encoded_part(
    source: Source,
    part: SourcePart,
    batches: Iterator[_Batch],
    encode_image: EncodeImage,
    settings: EmbedSettings,
    meter: Meter | None,
) -> _Encoded:
    found = _Encoded()
    for _ in range(0, len(part.rows), settings.batch_size):
        batch = next(batches)
        found.rows += batch.rows
        found.keys += batch.keys
        found.bad += [{"path": source.path(row), "row": row, "reason": reason} for row, reason in batch.bad]
        if batch.images is not None:
            found.features.append(encode_images(encode_image, [batch.images], len(batch.rows), show_progress=False))
        if meter is not None:
            meter.update(len(batch.rows) + len(batch.bad))
    return found


def _write_part(
    source: Source, part: SourcePart, found: _Encoded, encode_text: EncodeText, out: Path, settings: EmbedSettings
) -> dict[str, Any]:
    """Writes a part's pictures and the captions of these; returns its report."""
    paths = [source.path(row) for row in found.rows]
    files: dict[str, int] = {}
    shape: dict[str, list[int]] = {}
    if found.rows:
        images = _as_array(joined(found.features), settings.dtype)
        shape["images"] = list(images.shape[1:])
        columns: dict[str, list[Any]] = {"key": found.keys, "path": paths}
        files |= write_part(out / f"images-{part.name}", columns, images, settings.format)
    captions = [
        (key, path, number, text)
        for row, key, path in zip(found.rows, found.keys, paths, strict=True)
        for number, text in enumerate(source.captions(row) if settings.texts else ())
    ]
    if captions:
        texts = encode_texts(encode_text, [text for _, _, _, text in captions], show_progress=False)
        array = _as_array(texts, settings.dtype)
        shape["texts"] = list(array.shape[1:])
        columns = dict(zip(("key", "path", "caption", "text"), map(list, zip(*captions, strict=True)), strict=True))
        files |= write_part(out / f"texts-{part.name}", columns, array, settings.format)
    return {
        "name": part.name,
        "images": len(found.rows),
        "texts": len(captions),
        "shape": shape,
        "files": files,
        "bad": found.bad,
    }


def _as_array(features: Tensor, dtype: DType) -> np.ndarray:
    return features.numpy().astype(np.float16 if dtype == "float16" else np.float32)


# --- the end


def _check_bad(reports: Iterable[Mapping[str, Any]], total: int, max_bad: float, out: Path) -> None:
    """Raises InputError with the table of reasons where more than `max_bad` of all pictures are bad already."""
    bad = [entry for report in reports for entry in report["bad"]]
    if len(bad) <= max_bad * total:
        return
    reasons = Counter(entry["reason"] for entry in bad).most_common()
    table = "\n".join(f"  {count:>9,}  {reason}" for reason, count in reasons)
    raise InputError(
        f"expected at most {max_bad:.1%} bad pictures, found {len(bad):,} of {total:,} ({len(bad) / total:.1%}), first "
        f"{bad[0]['path']}:\n{table}\nMend the input, or allow more with --max-bad; the parts that are done stay in {out}"
    )


def _complete(source: Source, out: Path, plan: dict[str, Any]) -> Embeddings | None:
    """Writes embeddings.json where all parts are done; the jobs that end last may both do so, with the same bytes."""
    work = out / WORK_NAME
    reports = []
    for part in source.parts:
        try:
            report = _report_of(work, part, out)
        except FileNotFoundError:  # another job has just completed the folder
            report = None
        if report is None:
            return Embeddings.open(out) if (out / EMBEDDINGS_NAME).exists() else None
        reports.append(report)
    shapes: dict[str, set[tuple[int, ...]]] = {}
    for report in reports:
        for what, shape in report["shape"].items():
            shapes.setdefault(what, set()).add(tuple(shape))
    largest = {what: largest_shape(found) for what, found in sorted(shapes.items())}
    is_uneven = any(len(found) > 1 for found in shapes.values())
    named = ("name", "images", "texts", "files", *(("shape",) if is_uneven else ()))
    bad = [entry for report in reports for entry in report["bad"]]
    with replacing(out / BAD_NAME) as temporary:
        write_lines(temporary, iter(bad))
    description = {
        "format_version": FORMAT_VERSION,
        "model": plan["model"],
        "source": {
            "kind": source.kind,
            "place": str(source.place.resolve()),
            "pictures": len(source),
            "other_files": dict(sorted(source.other_files.items())),
        },
        "settings": plan["settings"],
        "shape": {what: list(shape) for what, shape in largest.items()},
        "images": sum(report["images"] for report in reports),
        "texts": sum(report["texts"] for report in reports),
        "bad": dict(sorted(Counter(entry["reason"] for entry in bad).items())),
        "parts": [{name: report[name] for name in named} for report in reports],
        "inputs": plan["inputs"],
    }
    write_json(out / EMBEDDINGS_NAME, description)
    remove(work)
    return Embeddings.open(out)


# --- the command


@dataclass(frozen=True, kw_only=True)
class EmbedConfig(EmbedSettings):
    """What is embedded, with which model, and where it goes."""

    place: Annotated[Path | None, tyro.conf.Positional] = None
    """Folder of pictures (any nesting) or of shards."""
    checkpoint: str | None = None
    """A run, a run's name, a checkpoint folder, or an open_clip NAME:TAG. Default: the newest run under runs/."""
    out: Path | None = None
    """Folder for the embeddings."""
    split: str | None = None
    """Shards of this split alone. Default: all."""
    part_size: int = 10_000
    """Pictures a file, of a folder; of shards each has a file."""
    part: int | None = None
    """Number of this job, from 0, where several share the work."""
    parts: int | None = None
    """Number of these jobs."""
    max_bad: float = 0.05
    """Largest share of pictures that may be bad."""
    workers: int | None = None
    """Processes that decode images; 0: none beside this one. Default: by the number of cores."""
    device: str = "auto"
    """cpu, cuda, cuda:1, …; auto takes CUDA where there is one."""


def main() -> None:
    """Runs the command."""
    config: EmbedConfig = parse(EmbedConfig, description=__doc__)
    if config.place is None or config.out is None:
        raise InputError(
            "expected a folder of pictures or shards and --out, found neither or one of them; for example "
            "`python -m eval_suite.embed photos --out photos-embeddings`"
        )
    if (config.part is None) != (config.parts is None) or not 0 <= (config.part or 0) < (config.parts or 1):
        raise InputError(
            f"expected --part I and --parts N together, with I from 0 to N - 1, found part {config.part} and parts "
            f"{config.parts}"
        )
    if not 0 <= config.max_bad <= 1 or config.batch_size < 1:
        raise InputError(
            f"expected --max-bad from 0 to 1 and --batch-size of at least 1, found {config.max_bad} and {config.batch_size}"
        )
    source = open_source(config.place, config.split, config.part_size)
    others = sum(source.other_files.values())
    if others:
        names = ", ".join(f"{count:,} {name}" for name, count in source.other_files.most_common(3))
        say(f"{others:,} files of {config.place} are no pictures ({names})")
    loaded = model_to_evaluate(config.checkpoint, config.device)
    settings = EmbedSettings(format=config.format, dtype=config.dtype, texts=config.texts, batch_size=config.batch_size)
    found = embed(
        source,
        config.out,
        *encode_functions(loaded),
        model_pictures(loaded),
        model_identity(loaded),
        settings,
        part=config.part or 0,
        parts=config.parts or 1,
        max_bad=config.max_bad,
        workers=config.workers,
    )
    if found is None:
        return say(f"part {config.part} of {config.parts} is done; other jobs still have parts to do")
    return say(summary(found))


def summary(found: Embeddings) -> str:
    """Returns one paragraph for the terminal."""
    content = found.description
    shape = " × ".join(str(size) for size in content["shape"].get("images", [])) or "no"
    lines = [
        f"embeddings: {content['images']:,} pictures, {content['texts']:,} captions, {shape} {content['settings']['dtype']}"
    ]
    if content["bad"]:
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in content["bad"].items())
        lines.append(f"left out: {sum(content['bad'].values()):,} ({reasons}), listed in {found.folder / BAD_NAME}")
    lines.append(f"in {found.folder}")
    return "\n".join(lines)


if __name__ == "__main__":
    command(main)
