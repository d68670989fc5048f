"""The recipes of papers' rows: what they set and where it comes from, what the papers print, and what runs gave.

python -m finetune.recipes                       # all rows, as --list
python -m finetune.recipes --show NAME           # settings, each stated or reconstructed, and published numbers
python -m finetune.recipes --table RUN [RUN …]   # one table of several runs, ours / published
python -m finetune.recipes --json True           # all of it for programs; with --show, of one
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from finetune.recipes import PAPERS, ROWS, commands_of
from finetune.recipes.base import SOURCES
from finetune.recipes.comparison import table_of, title_of, words_of
from setclip.config import command, parse
from setclip.log import say
from setclip.lookup import look_up


@dataclass(frozen=True, kw_only=True)
class RecipesConfig:
    """What is shown."""

    list: bool = False
    """All rows, which is what is shown anyway."""
    show: str | None = None
    """One recipe or row."""
    table: tuple[Path, ...] = ()
    """Runs of recipes: one table of them."""
    json: bool = False
    """As JSON."""


def described(name: str) -> dict[str, Any]:
    """Returns all that is known of a recipe or row, for JSON."""
    row, recipe = ROWS.get(name), PAPERS.get(name)
    return {
        "name": name,
        "title": title_of(name) if row is not None else PAPERS[name].title,
        "settings": {} if recipe is None else {key: asdict(value) for key, value in recipe.settings.items()},
        "notes": [] if recipe is None else list(recipe.notes),
        "published": None if row is None else asdict(row),
    }


def names() -> list[str]:
    """Returns all recipes and rows, a system's side by side."""
    return sorted({*PAPERS, *ROWS})


def list_table() -> Table:
    """Returns one line a recipe or row."""
    table = Table(title=f"{len(ROWS)} rows of papers", box=None, pad_edge=False)
    for heading in ("name", "row", "published"):
        table.add_column(heading, overflow="fold", no_wrap=heading == "name")
    for name in names():
        row = ROWS.get(name)
        title = title_of(name) if row is not None else f"{PAPERS[name].title} (a part of a row)"
        sums = {} if row is None else {k: v for k, v in row.metrics.items() if k.endswith("rsum")}
        table.add_row(name, title, ", ".join(f"{words_of(k)} {v:g}" for k, v in sums.items()) or "–")
    return table


def show(name: str) -> list[Table | str]:
    """Returns what there is to say of one."""
    row, recipe = ROWS.get(name), PAPERS.get(name)
    found: list[Table | str] = []
    if recipe is not None:
        table = Table(title=f"{recipe.title} ({name})", box=None, pad_edge=False)
        for heading in ("setting", "value", "source", "note"):
            table.add_column(heading, overflow="fold")
        for key, value in recipe.settings.items():
            words = " ".join(map(str, value.value)) if isinstance(value.value, tuple) else str(value.value)
            table.add_row(flag_of(key), words, value.source, value.note)
        found += [table, "; ".join(f"{source}: {words}" for source, words in SOURCES.items())]
        found += [f"note: {note}" for note in recipe.notes]
    if row is not None:
        table = Table(title=f"published: {row.source}, {row.dataset} test", box=None, pad_edge=False)
        table.add_column("metric")
        table.add_column("value", justify="right")
        for metric, number in row.metrics.items():
            table.add_row(words_of(metric), f"{number:.1f}")
        if row.log_variance is not None:
            table.add_row("log circular variance (of which side is not said)", f"{row.log_variance:g}")
        found.append(table)
        found += [f"published: {erratum}" for erratum in row.errata]
        if row.members:
            found.append(f"a sum of two models: {commands_of(name, row.members)}")
    if recipe is not None:
        regions = " --regions DIR" if recipe.config().backbone.image == "regions" else ""
        found.append(f"python -m finetune.run {name}{regions}")
    return found


def flag_of(setting: str) -> str:
    """Returns the flag of a setting: --optim.clip-grad-norm, and "--options blocks" of one option."""
    first, _, rest = setting.partition(".")
    if first.endswith("options"):
        return f"--{first.replace('_', '-')} {rest}"
    return f"--{setting.replace('_', '-')}"


def main() -> None:
    """The command."""
    config: RecipesConfig = parse(RecipesConfig, description=__doc__)
    if config.show is not None:
        look_up({name: name for name in names()}, config.show, "recipe")
    if config.table:
        say(table_of(config.table))
        return
    if config.json:
        chosen = [config.show] if config.show is not None else names()
        say(json.dumps({name: described(name) for name in chosen}, indent=1, ensure_ascii=False))
        return
    console = Console(soft_wrap=False)
    for part in show(config.show) if config.show is not None else [list_table()]:
        console.print(part)


if __name__ == "__main__":
    command(main)
