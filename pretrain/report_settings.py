"""With what a run was made, as sections of its report: differences to its recipe and between runs, all settings,
provenance. Used by pretrain.report.
"""

from collections.abc import Sequence
from typing import Any

from markupsafe import Markup

from pretrain.checkpoints import best_of
from pretrain.report_runs import Run, recipe_settings
from setclip import report
from setclip.checkpoint import checkpoints_of

_ABSENT = "–"


def against_recipe(run: Run) -> list[Markup]:
    """Returns in what the settings of a run differ from those of its recipe."""
    if not run.settings:
        return [report.paragraph(f"{run.name}: there is no config.yaml in the run folder.")]
    wanted = recipe_settings(run.recipe)
    named = f"recipe {run.recipe}" if run.recipe else "the defaults (the recipe is not known)"
    names = [
        name for name in {**wanted, **run.settings} if wanted.get(name) != run.settings.get(name, wanted.get(name))
    ]
    if not names:
        return [report.paragraph(f"{run.name}: all settings are those of {named}.")]
    rows: list[list[str | Markup]] = [
        [flag(name), value_text(run.settings[name]), value_text(wanted[name]) if name in wanted else _ABSENT]
        for name in names
    ]
    return [report.table(report.Table(f"{run.name} against {named}", ["", "this run", "recipe"], rows, "wide-words"))]


def between_runs(runs: Sequence[Run]) -> list[Markup]:
    """Returns the settings in which several runs differ."""
    names = list(dict.fromkeys(name for run in runs for name in run.settings))
    rows: list[list[str | Markup]] = []
    for name in names:
        values = [value_text(run.settings[name]) if name in run.settings else _ABSENT for run in runs]
        if len(set(values)) > 1:
            rows.append([flag(name), *values])
    if not rows:
        return [report.paragraph("All settings of these runs are the same.")]
    return [report.table(report.Table("Settings that differ", ["", *(run.name for run in runs)], rows, "wide-words"))]


def all_settings(run: Run) -> Markup:
    """Returns every setting of a run, behind a title."""
    rows: list[list[str | Markup]] = [[flag(name), value_text(value)] for name, value in run.settings.items()]
    table = report.table(report.Table(run.name, ["", "value"], rows, "words"))
    return report.unfolding(f"All {len(rows)} settings of {run.name}", table)


def provenance(run: Run) -> list[Markup]:
    """Returns a table of what made a run: code, versions, data, checkpoints."""
    facts, data = run.facts, run.facts.get("data") or {}
    made = facts.get("provenance") or {}
    best = best_of(run.folder)
    commits = dict.fromkeys(
        commit for s in (*(session.facts for session in run.sessions), facts) if (commit := _commit(s))
    )
    present, listed = data.get("pairs_present"), data.get("pairs_listed")
    found: dict[str, Any] = {
        "run folder": run.folder,
        "recipe": facts.get("recipe"),
        "model": facts.get("model"),
        "loss": _loss(facts.get("loss")),
        "data": data.get("source"),
        "pairs": f"{present:,} of {listed:,} listed" if present and listed else None,
        "digest of the data": data.get("digest"),
        "objects parsed by": ", ".join(f"{name}: {version}" for name, version in (data.get("parsers") or {}).items()),
        "checkpoints": ", ".join(path.name for path in checkpoints_of(run.folder)),
        "best checkpoint": f"step {best['step']:,} ({best['metric']} {best['value']:.2f})" if best else None,
        "commit": ", ".join(commits),
        "versions": ", ".join(
            [f"Setclip {made.get('setclip', '?')}", *(f"{k} {v}" for k, v in (made.get("versions") or {}).items())]
        ),
    }
    rows: list[list[str | Markup]] = [[name, str(value)] for name, value in found.items() if value not in (None, "")]
    return [report.table(report.Table(f"{run.name}: made from", ["", "value"], rows, "words"))]


def flag(name: str) -> str:
    """Returns a setting's name as it is typed."""
    return f"--{name.replace('_', '-')}"


def value_text(value: Any) -> str:
    """Returns a setting's value as it is typed."""
    if isinstance(value, list):
        return " ".join(map(value_text, value))
    return str(value)


def _commit(facts: dict[str, Any]) -> str | None:
    return (facts.get("provenance") or {}).get("commit")


def _loss(loss: Any) -> str | None:
    return str(loss["name"]) if isinstance(loss, dict) and "name" in loss else loss
