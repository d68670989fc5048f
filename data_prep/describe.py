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
from data_prep.llm.config import RunnerConfig, answer_settings, merge_command, settings_line
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
    """Whether to write descriptions.parquet from the answers of all parts; asks nothing, and takes their settings."""


def describe(config: DescribeConfig) -> DescriptionTable | None:
    """Asks about this job's objects and, where it is the only job or `config.merge`, writes descriptions.parquet.

    Returns what was written, or None where this is one of several parts.
    """
    Manifest.load(config.folder)  # raises at once where there are no shards, or half written ones
    names = _names(config)
    part, parts = (0, 1) if config.merge else part_of(config.part, config.parts)
    base = places.folder_of(config.folder, config.model, "descriptions")
    if config.merge:
        parts = places.begun_parts(base, config.model)
    places.check_parts(base, parts)
    if not config.merge and not (places.part_folder(base, part, parts) / PART_ACCOUNT_NAME).exists():
        from data_prep.llm import client

        client.check(config)  # before anything is made for a wrong model
    (base / WORK_NAME).mkdir(parents=True, exist_ok=True)
    if not config.merge:
        with output.locked(base, part, parts):
            _ask_part(config, names, base, part, parts)
        if parts > 1:
            command = merge_command("data_prep.describe", config.folder, config)
            say(f"part {part} of {parts} is done; after the last one: {command}")
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
    (folder / PART_ACCOUNT_NAME).unlink(missing_ok=True)  # a merge must not take those of answers that were removed
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
    notes = {**answer_settings(config), "version": _rules(config), "account": account.to_dict()}
    write_json(folder / PART_ACCOUNT_NAME, notes)


def _write(config: DescribeConfig, names: Sequence[str], base: Path, parts: int) -> DescriptionTable:
    """Joins the parts' descriptions."""
    from data_prep import report

    paths = places.finished_parts(base, parts, PART_ACCOUNT_NAME)
    notes = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
    accounts = [Account.from_dict(each.pop("account")) for each in notes]
    places.check_alike(base, notes, _rules(config))
    account = Account()
    found: dict[str, Description] = {}
    for path, of_part in zip(paths, accounts, strict=True):
        account.add(of_part)
        found.update((row.name, row) for row in read_descriptions(path.with_name(PART_NAME)).rows)
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
        {
            "model": table.model,
            "version": f"{settings_line(table.model, notes[0])}, {_rules(config)}",
            "account": account.to_dict(),
        },
    )
    if parts > 1:
        account.say("descriptions", "left empty")
    report.write_report(config.folder, Manifest.load(config.folder))
    say(f"{len(table.texts):,} of {len(names):,} objects described: {config.folder / DESCRIPTIONS_NAME}")
    return table


def _rules(config: DescribeConfig) -> str:
    """Returns what is asked, and how answers are checked."""
    return (
        f"prompts {DESCRIPTION_FIRST.name} and {DESCRIPTION_SECOND.name}, answer rules "
        f"{description_answers.RULES_VERSION}, {config.of} of {config.objects}"
    )


def main() -> None:
    """The command."""
    describe(parse(DescribeConfig, description=__doc__))


if __name__ == "__main__":
    command(main)
