"""What a run of a paper's row gives beside what the paper prints: results.md and an entry of results.json in the run's folder.

Used by the commands of fine-tuning, ensembles and recipes. Nothing is compared in silence that is not comparable: other data, a
part of them, settings that were changed and what the recipe has otherwise than its source stand beneath the table.
"""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from eval_suite.protocols import DIRECTIONS, RECALLS
from eval_suite.results import RUN_RESULTS_NAME, protocol_words, split_protocol
from finetune.recipes import PAPERS, ROWS, Row
from finetune.recipes.parts import GLOVE
from setclip import config as configuration
from setclip.errors import InputError
from setclip.files import replacing, write_json
from setclip.models.backbones import RECURRENT

TABLE_NAME = "results.md"
ENTRY = "published"
"""Of results.json"""
NOT_ALIKE = "the numbers do not compare"
"""Of remarks that take the differences away"""

_WHERE_AND_HOW_FAST = (
    *("model", "data", "regions", "val", "test", "out", "seed", "seeds", "resume", "overwrite", "ranks", "device", "workers"),
    *("log", "guard", "log_every_steps", "save_every_minutes", "keep", "accumulate", "allow_partial"),
    "backbone.glove",  # which has a remark of its own
)  # fmt: skip
_COCO_TEST = 5_000
"""Pictures of which COCO's rows are: all for 5K, and in five folds for 1K"""
_VARIANCES = {"variance_image_log_of_mean": "images", "variance_text_log_of_mean": "texts"}


def compared(name: str, content: Mapping[str, Any], folder: Path | None = None) -> dict[str, Any]:
    """Returns the comparison of a row with the content of a results file, of one run or of several seeds.

    `folder`: the run's, where diagnostics may lie. Raises InputError where there is no such row.
    """
    if name not in ROWS:
        raise InputError(
            f"expected results of a recipe of a paper's row, found {name!r}; `python -m finetune.recipes --list` lists them"
        )
    row = ROWS[name]
    ours = _with_sums(_values(content), row.metrics)
    entries = [
        {
            "metric": metric,
            "ours": ours.get(metric, {}).get("value"),
            "standard_deviation": ours.get(metric, {}).get("standard_deviation"),
            "interval_95": ours.get(metric, {}).get("interval_95"),
            "published": value,
        }
        for metric, value in row.metrics.items()
    ]
    if row.log_variance is not None:
        found = _diagnosed(folder, content["dataset"])
        entries += [
            {"metric": metric, "ours": found.get(metric), "published": row.log_variance} for metric in _VARIANCES
        ]
    remarks = _remarks(name, row, content)
    for entry in entries:
        both = entry["ours"] is not None and not any(NOT_ALIKE in remark for remark in remarks)
        entry["difference"] = entry["ours"] - entry["published"] if both else None
    return {
        "row": name,
        "title": title_of(name),
        "source": row.source,
        "metrics": entries,
        "errata": list(row.errata),
        "remarks": remarks,
    }


def title_of(name: str) -> str:
    """Returns a row in words."""
    members = ROWS[name].members
    if not members:
        return PAPERS[name].title
    return f"{re.sub(r' [it]-[it] [A-Z]+', '', PAPERS[members[0]].title)}, {len(members)} models summed"


def write_comparison(folder: Path, name: str) -> str:
    """Adds the comparison to a run's results.json, writes results.md beside it, and returns its text. Call on rank 0 alone."""
    path = folder / RUN_RESULTS_NAME
    content = json.loads(path.read_text(encoding="utf-8"))
    found = compared(name, content, folder)
    if "details" in content:
        content["details"][ENTRY] = found
    else:
        content[ENTRY] = found
    write_json(path, content)
    text = text_of(found)
    with replacing(folder / TABLE_NAME) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")
    return text


def text_of(found: Mapping[str, Any]) -> str:
    """Returns Markdown of a comparison."""
    lines = [
        f"**{found['title']}** (row `{found['row']}`; published: {found['source']})",
        "",
        "| metric | ours | published | difference |",
        "| --- | ---: | ---: | ---: |",
    ]
    for entry in found["metrics"]:
        lines.append(
            f"| {words_of(entry['metric'])} | {_number(entry)} | {_printed(entry['published'])} | {_signed(entry)} |"
        )
    lines += [f"- Published: {erratum}." for erratum in found["errata"]]
    lines += [f"- Ours: {remark}." for remark in found["remarks"]]
    first = 4 + len(found["metrics"])
    return "\n".join([*lines[:first], *([""] if lines[first:] else []), *lines[first:]])


def table_of(folders: Sequence[Path]) -> str:
    """Returns Markdown with one line a run, ours and published side by side, for each kind of metrics. Raises InputError."""
    found = []
    for folder in folders:
        path = folder / RUN_RESULTS_NAME
        if not path.is_file():
            raise InputError(
                f"expected a run that has ended at {folder}, found no {RUN_RESULTS_NAME} there; give folders of finetune.run or "
                "finetune.ensemble"
            )
        content = json.loads(path.read_text(encoding="utf-8"))
        entry = content.get("details", content).get(ENTRY)
        if entry is None:
            raise InputError(
                f"expected a run of a paper's row at {folder}, found none in its {RUN_RESULTS_NAME}; `python -m finetune.recipes "
                "--list` lists the recipes that have one"
            )
        found.append((folder, compared(entry["row"], content, folder)))
    tables: dict[str, list[tuple[Path, Mapping[str, Any]]]] = {}
    for folder, each in found:
        tables.setdefault(ROWS[each["row"]].dataset, []).append((folder, each))
    return "\n\n".join(_many(dataset, rows) for dataset, rows in tables.items())


def _many(dataset: str, rows: Sequence[tuple[Path, Mapping[str, Any]]]) -> str:
    names = list(dict.fromkeys(entry["metric"] for _, row in rows for entry in row["metrics"]))
    lines = [
        f"**{dataset}, ours / published**",
        "",
        f"| row | run | {' | '.join(words_of(name) for name in names)} |",
        f"| --- | --- |{' ---: |' * len(names)}",
    ]
    for folder, row in rows:
        by_name = {entry["metric"]: entry for entry in row["metrics"]}
        cells = [
            "" if name not in by_name else f"{_number(by_name[name])} / {_printed(by_name[name]['published'])}"
            for name in names
        ]
        mark = " *" if row["remarks"] else ""
        lines.append(f"| {row['title']}{mark} | {folder} | {' | '.join(cells)} |")
    notes = [
        f"- {folder}: {'; '.join([*row['remarks'], *(f'published: {erratum}' for erratum in row['errata'])])}."
        for folder, row in rows
        if row["remarks"] or row["errata"]
    ]
    return "\n".join([*lines, *([""] if notes else []), *notes])


def words_of(metric: str) -> str:
    """Returns a metric's name in words."""
    if metric in _VARIANCES:
        return f"log circular variance, {_VARIANCES[metric]}"
    protocol, measure = split_protocol(metric)
    words = protocol_words(protocol)
    return f"{words}: {measure.replace('_', ' ')}" if words else measure.replace("_", " ")


def changed_settings(name: str, config: Mapping[str, Any]) -> list[str]:
    """Returns what a run's configuration has otherwise than its recipe, in words; where and how fast it ran aside."""
    recipe = _flat(configuration.to_dict(PAPERS[name].config()))
    own = _flat(config)
    # pictures whose features are kept are not varied; without variation keeping them changes nothing
    is_varied = "none" not in (own.get("augment.kind"), recipe.get("augment.kind"))
    free = (*_WHERE_AND_HOW_FAST, *(() if is_varied else ("backbone.cache_gb",)))
    return [
        f"{key} is {_told(own[key])}, in the recipe {_told(recipe.get(key))}"
        for key in own
        if own[key] != recipe.get(key) and not any(key == each or key.startswith(f"{each}.") for each in free)
    ]


def _remarks(name: str, row: Row, content: Mapping[str, Any]) -> list[str]:
    remarks = []
    dataset = content["dataset"]
    # SCAN's release calls COCO's whole test split testall
    splits = ("test", "testall") if row.dataset == "coco" else ("test",)
    if dataset["name"] != row.dataset or dataset.get("split") not in splits:
        remarks.append(f"of {dataset['name']} {dataset.get('split')}, not of {row.dataset} test: {NOT_ALIKE}")
    elif row.dataset == "coco" and dataset.get("images") != _COCO_TEST:
        remarks.append(
            f"of {dataset.get('images', 0):,} pictures, not of all {_COCO_TEST:,} of coco test, which have the protocols 5k and "
            f"1k-5fold: {NOT_ALIKE}"
        )
    if content.get("is_partial"):
        remarks.append(f"a part of the samples was missing: {NOT_ALIKE}")
    members = row.members or (name,)
    summed = content.get("details", {}).get("members", [])
    recipes = [str(member["recipe"]) for member in summed]
    if row.members and sorted(recipes) != sorted(row.members):
        remarks.append(
            f"the models that are summed are of {', '.join(recipes) or 'one'}, the row's of {', '.join(row.members)}"
        )
    configs = [member["config"] for member in summed] or [content.get("config") or {}]
    changes = [change for config in configs if config and _is_run(config) for change in changed_of(members, config)]
    remarks += [f"changed: {change}" for change in dict.fromkeys(changes)]
    reconstructed = {
        setting
        for each in members
        for setting, value in PAPERS[each].settings.items()
        if value.source == "reconstructed"
    }
    if reconstructed:
        remarks.append(f"settings of ours, which no source gives of this row: {', '.join(sorted(reconstructed))}")
    own = [config for config in configs if config and _is_run(config)]
    notes = dict.fromkeys(note for each in members for note in PAPERS[each].notes)
    remarks += [note for note in notes if note != GLOVE]
    begins = {config["backbone"].get("glove") is None for config in own if config["backbone"].get("text") in RECURRENT}
    if GLOVE in notes and True in begins:
        remarks.append("word vectors began at random, where the source begins with GloVe (--backbone.glove)")
    if GLOVE not in notes and False in begins:
        remarks.append("word vectors began with --backbone.glove, of which the source says nothing")
    return remarks


def changed_of(members: Sequence[str], config: Mapping[str, Any]) -> list[str]:
    """Returns the changes against that of the recipes which is nearest."""
    return min((changed_settings(member, config) for member in members), key=len)


def _is_run(config: Mapping[str, Any]) -> bool:
    return "backbone" in config


def _values(content: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Returns the metrics of one run, or of several seeds, whose value is their mean."""
    return {
        name: {**metric, "value": metric["mean"] if "mean" in metric else metric["value"]}
        for name, metric in content["metrics"].items()
    }


def _with_sums(values: dict[str, dict[str, Any]], wanted: Mapping[str, float]) -> dict[str, dict[str, Any]]:
    """Adds sums of recalls that the protocol has not itself (class matching)."""
    for name in wanted:
        if not name.endswith("rsum") or name in values:
            continue
        parts = [f"{name.removesuffix('rsum')}{direction}_{recall}" for direction in DIRECTIONS for recall in RECALLS]
        if all(part in values for part in parts):
            values[name] = {"value": sum(values[part]["value"] for part in parts)}
    return values


def _diagnosed(folder: Path | None, dataset: Mapping[str, Any]) -> dict[str, float]:
    """Returns log circular variances that `eval_suite.diagnostics` has written into the run of these data, if it has."""
    found: dict[str, float] = {}
    for path in sorted((folder / "results").glob("diagnostics_*.json")) if folder is not None else ():
        content = json.loads(path.read_text(encoding="utf-8"))
        if any(content["dataset"].get(key) != dataset.get(key) for key in ("split", "captions_sha256")):
            continue
        metrics = content["metrics"]
        found |= {name: metrics[name]["value"] for name in _VARIANCES if name in metrics}
    return found


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in tree.items():
        found |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return found


def _told(value: Any) -> str:
    return str(yaml.safe_dump(value, default_flow_style=True).removesuffix("\n...\n").strip())


def _number(entry: Mapping[str, Any]) -> str:
    if entry["ours"] is None:
        return "–"
    spread = entry.get("standard_deviation")
    is_log = entry["metric"] in _VARIANCES
    return f"{entry['ours']:.{2 if is_log else 1}f}" + (f" ± {spread:.1f}" if spread is not None else "")


def _printed(value: float | None) -> str:
    return "–" if value is None else f"{value:g}" if value < 0 else f"{value:.1f}"


def _signed(entry: Mapping[str, Any]) -> str:
    return "–" if entry["difference"] is None else f"{entry['difference']:+.1f}"
