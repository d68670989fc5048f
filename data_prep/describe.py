"""Has a language model describe how objects look, for `descriptions.parquet`: by default those of the tail.

    python -m data_prep.describe DIR --model MODEL
    python -m data_prep.describe DIR --model MODEL --of all --objects llm

The appearance texts of AlignCLIP (Zhang, Yan, Ding, ACM MM 2024), with its prompt. Bad answers are asked again with examples,
and then stay empty, each counted by reason. Raw answers stay in `DIR/llm`: running the command again with them starts no
engine. Killed at any time, the same command goes on.

Several jobs share the questions with `--part I --parts N` (a Slurm array sets both), each with an engine of its own;
afterwards `--merge True` writes the file. docs/llm.md says which model to take and what it costs.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tyro

from data_prep import output
from data_prep.llm import description_answers, places
from data_prep.llm.account import Account
from data_prep.llm.config import RunnerConfig
from data_prep.llm.prompts import DESCRIPTION_FIRST, DESCRIPTION_SECOND, request_id
from data_prep.parts import part_of
from setclip.config import command, parse
from setclip.descriptions import (
    DESCRIPTIONS_NAME,
    Description,
    DescriptionTable,
    read_descriptions,
    write_descriptions,
)
from setclip.errors import InputError
from setclip.files import remove_partial, write_json
from setclip.log import say
from setclip.manifest import WORK_NAME, Manifest
from setclip.objects import read_objects

PART_NAME = "descriptions.parquet"
PART_ACCOUNT_NAME = "account.json"  # written last


@dataclass(frozen=True, kw_only=True)
class DescribeConfig(RunnerConfig):
    """Has a language model describe the objects of a folder of shards."""

    folder: tyro.conf.Positional[Path]
    """Folder with objects.parquet."""
    of: Literal["tail", "all"] = "tail"
    """Which objects: the rarest 30 %, or all."""
    objects: Literal["pos", "llm"] = "pos"
    """The parser whose objects are described."""
    part: int | None = None
    """Number of this job, from 0; SLURM_ARRAY_TASK_ID where that is set. Jobs of several parts only ask."""
    parts: int | None = None
    """Number of jobs that share the questions; SLURM_ARRAY_TASK_COUNT where that is set."""
    merge: bool = False
    """Whether to write descriptions.parquet from the answers of all parts; asks nothing."""


def describe(config: DescribeConfig) -> DescriptionTable | None:
    """Asks about this job's objects and, where it is the only job or `config.merge`, writes descriptions.parquet.

    Returns what was written, or None where this is one of several parts.
    """
    Manifest.load(config.folder)  # raises at once where there are no shards, or half written ones
    names = _names(config)
    part, parts = (0, 1) if config.merge else part_of(config.part, config.parts)

    base = places.folder_of(config.folder, config.model, "descriptions")
    if config.merge:
        begun = places.begun_parts(base)
        if begun is None:
            raise InputError(
                f"expected answers of {config.model} in {base}, found none; ask first: the same command without --merge"
            )
        parts = begun
    places.check_parts(base, parts)
    (base / WORK_NAME).mkdir(parents=True, exist_ok=True)
    if not config.merge:
        with output.locked(base, part, parts):
            _ask_part(config, names, base, part, parts)
        if parts > 1:
            say(f"part {part} of {parts} is done; after the last one: the same command with --merge True alone")
            return None
    with output.locked(base):
        return _write(config, names, base, parts)


def _names(config: DescribeConfig) -> list[str]:
    table = read_objects(config.folder, config.objects)
    chosen = table.is_tail if config.of == "tail" else [True] * len(table.names)
    names = [name for name, is_chosen in zip(table.names, chosen, strict=True) if is_chosen]
    if not names:
        raise InputError(
            f"expected objects to describe, found {len(table.names)} objects of parser {config.objects} in {config.folder}, "
            f"none of them {'in the tail; describe --of all' if table.names else 'at all; parse captions first'}"
        )
    return names


def _ask_part(config: DescribeConfig, names: Sequence[str], base: Path, part: int, parts: int) -> None:
    from data_prep.llm import questions

    for question in (DESCRIPTION_FIRST, DESCRIPTION_SECOND):
        question.room(config.max_model_len, config.max_tokens)
    texts = {request_id(DESCRIPTION_FIRST, name): name for name in names}
    mine = {identity: name for identity, name in texts.items() if places.is_mine(identity, part, parts)}
    say(f"{len(mine):,} objects" + (f" of part {part} of {parts}" if parts > 1 else ""))

    def check(pairs: Sequence[tuple[str, Any]]) -> list[Any]:
        return [description_answers.check(name, answer) for name, answer in pairs]

    folder = places.part_folder(base, part, parts)
    remove_partial(folder)
    outcomes, account = questions.ask_twice(
        mine, (DESCRIPTION_FIRST, DESCRIPTION_SECOND), folder, questions.runner_of(config), check, "descriptions"
    )
    rows = [
        Description(
            mine[identity],
            outcome.value or "",
            outcome.flags if outcome.value else outcome.reasons,
            ("", DESCRIPTION_FIRST.name, DESCRIPTION_SECOND.name)[outcome.question],
        )
        for identity, outcome in outcomes.items()
    ]
    account.say("descriptions", "left empty")
    write_descriptions(
        folder / PART_NAME, DescriptionTable(places.model_name(config.model), config.objects, config.of, rows)
    )
    write_json(folder / PART_ACCOUNT_NAME, {"version": _version(config), "account": account.to_dict()})


def _write(config: DescribeConfig, names: Sequence[str], base: Path, parts: int) -> DescriptionTable:
    """Joins the parts' descriptions."""

    from data_prep import report

    folders = [places.part_folder(base, part, parts) for part in range(parts)]
    missing = [str(part) for part, folder in enumerate(folders) if not (folder / PART_ACCOUNT_NAME).exists()]
    if missing:
        more = f" and {len(missing) - 10} more" if len(missing) > 10 else ""
        raise InputError(
            f"expected the descriptions of all {parts} parts in {base}, found none of part {', '.join(missing[:10])}{more}; "
            f"start these again with --part and --parts {parts}, then merge"
        )
    account = Account()
    found: dict[str, Description] = {}
    for part, folder in enumerate(folders):
        notes = json.loads((folder / PART_ACCOUNT_NAME).read_text(encoding="utf-8"))
        if notes["version"] != _version(config):
            raise InputError(
                f"expected descriptions made as {_version(config)}, found those of part {part} made as {notes['version']}; "
                "start each part again with the same flags (answers that are there are not asked again), then merge"
            )
        account.add(Account.from_dict(notes["account"]))
        found.update((row.name, row) for row in read_descriptions(folder / PART_NAME).rows)
    if absent := [name for name in names if name not in found]:
        raise InputError(
            f"expected a description of each of {len(names):,} objects, found none of {absent[0]!r} and {len(absent) - 1:,} "
            "others (the objects have changed since); start each part again, then merge"
        )
    table = DescriptionTable(
        places.model_name(config.model), config.objects, config.of, [found[name] for name in names]
    )
    remove_partial(config.folder / places.FOLDER, "descriptions")
    for stem in ("descriptions", "llm", "report"):  # what a run that was killed here was writing
        remove_partial(config.folder, stem)
    write_descriptions(config.folder / DESCRIPTIONS_NAME, table)
    write_json(
        config.folder / places.FOLDER / places.DESCRIPTION_ACCOUNT_NAME,
        {"model": table.model, "version": _version(config), "account": account.to_dict()},
    )
    if parts > 1:
        account.say("descriptions", "left empty")
    report.write_report(config.folder, Manifest.load(config.folder))
    say(f"{len(table.texts):,} of {len(names):,} objects described: {config.folder / DESCRIPTIONS_NAME}")
    return table


def _version(config: DescribeConfig) -> str:

    return (
        f"{places.model_name(config.model)}, max {config.max_tokens} of {config.max_model_len} tokens, prompts "
        f"{DESCRIPTION_FIRST.name} and {DESCRIPTION_SECOND.name}, answer rules {description_answers.RULES_VERSION}, "
        f"{config.of} of {config.objects}"
    )


def main() -> None:
    """The command."""
    describe(parse(DescribeConfig, description=__doc__))


if __name__ == "__main__":
    command(main)
