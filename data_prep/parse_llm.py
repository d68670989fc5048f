"""Has a language model name the objects of captions, and writes them as `objects.llm` beside those by part of speech.

    python -m data_prep.parse_llm DIR --model MODEL
    python -m data_prep.parse_llm DIR --model MODEL --runner http --url http://127.0.0.1:8000/v1

The second parser of AlignCLIP (Zhang, Yan, Ding, ACM MM 2024), with its prompt. Equal captions are asked once; bad answers
are asked again with examples, and then give way to the objects of the parser pos, each counted by reason. Raw answers stay
in `DIR/llm`: running the command again with them starts no engine. Killed at any time, the same command goes on.

Several jobs share the questions with `--part I --parts N` (a Slurm array sets both), each with an engine of its own;
afterwards `--merge True` writes the shards. docs/llm.md says which model to take and what it costs.
"""

import dataclasses
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import tyro

from data_prep import output, pos_config, rewrite
from data_prep.llm import object_answers, places
from data_prep.llm.account import UNSAID, Account
from data_prep.llm.agreement import agreement
from data_prep.llm.config import RunnerConfig, answer_settings, merge_command, settings_line
from data_prep.llm.prompts import OBJECTS_FIRST, OBJECTS_SECOND
from data_prep.parallel import run_tasks
from data_prep.parts import part_of
from data_prep.pos_config import PosConfig
from data_prep.rewrite import ObjectLists, Rewrite
from setclip.config import command, parse
from setclip.errors import InputError
from setclip.files import remove_partial, sha256_of, write_json
from setclip.log import say
from setclip.manifest import WORK_NAME, Manifest, check_shards
from setclip.shards import Sample, Shard, ShardInfo

NAME = "llm"  # of this parser in samples, objects.parquet and the manifest
PART_RESULTS_NAME = "results.parquet"


@dataclass(frozen=True, kw_only=True)
class ParseLlmConfig(RunnerConfig):
    """Has a language model name the objects of the captions of a folder of shards."""

    folder: tyro.conf.Positional[Path]
    """Folder with shards and manifest.json."""
    part: int | None = None
    """Number of this job, from 0; SLURM_ARRAY_TASK_ID where that is set. Jobs of several parts only ask."""
    parts: int | None = None
    """Number of jobs that share the questions; SLURM_ARRAY_TASK_COUNT where that is set."""
    merge: bool = False
    """Whether to write the shards from the answers of all parts; asks nothing, and takes their settings."""
    wordnet: Path | None = None
    """Folder of WordNet's database (/usr/share/wordnet after `apt install wordnet-base`): an object that is a synonym of a
    word of the caption then counts as mentioned. Without it synonyms are not known and carry the flag."""
    processes: int = 0
    """Processes that read and write shards; 0 takes the CPUs of this job. The output does not depend on it."""


def parse_llm(config: ParseLlmConfig) -> Manifest | None:
    """Asks about this job's captions and, where it is the only job or `config.merge`, writes the shards' objects.

    Returns the manifest, or None where this is one of several parts. Raises InputError where the folder has no shards, was
    not parsed by part of speech, or another job is at the same part.
    """
    manifest = rewrite.load(config.folder)
    if pos_config.NAME not in manifest.parsers:
        raise InputError(
            f"expected captions that are parsed by part of speech (bad answers fall back to that), found parsers "
            f"{sorted(manifest.parsers) or 'none'} in {config.folder}; run `python -m data_prep.parse {config.folder}` first"
        )
    part, parts = (0, 1) if config.merge else part_of(config.part, config.parts)
    begun_by = _unfinished(config.folder)
    base = places.folder_of(config.folder, config.model, "objects")
    if begun_by is not None and parts > 1:
        say(f"all parts are done, and the shards half written; go on with {begun_by['command']}")
        return None
    is_answered = config.merge or begun_by is not None  # half written shards cannot be read
    if is_answered:
        parts = places.begun_parts(base, config.model)
    places.check_parts(base, parts)
    if not is_answered and not (places.part_folder(base, part, parts) / PART_RESULTS_NAME).exists():
        from data_prep.llm import client

        client.check(config)  # before all captions are read
    (base / WORK_NAME).mkdir(parents=True, exist_ok=True)
    if not is_answered:
        with output.locked(base, part, parts):
            _ask_part(config, manifest, base, part, parts)
        if parts > 1:
            say(f"part {part} of {parts} is done; after the last one: {_merge_command(config)}")
            return None
    with output.locked(base):
        return _write(config, base, parts)


def _unfinished(folder: Path) -> dict[str, Any] | None:
    """Returns what began an unfinished parse by a language model. Raises InputError where another parser began one."""
    begun_by = rewrite.unfinished(folder)
    if begun_by is not None and begun_by["parser"] != NAME:
        raise InputError(
            f"expected whole shards in {folder}, found an unfinished parse by {begun_by['version']}; let it end first: "
            f"`{begun_by['command']}`"
        )
    return begun_by


def captions_of(shard: Shard) -> Iterator[list[str]]:
    """Yields the captions of each sample, reading the JSON alone. Raises InputError that names a damaged sample."""
    for row in range(len(shard)):
        place = shard.entry(row)
        try:
            yield json.loads(shard.read_bytes(place["json_offset"], place["json_offset"] + place["json_size"]))[
                "captions"
            ]
        except (ValueError, KeyError, TypeError):
            yield shard.read(row).captions  # raises with shard and key


def _ask_part(config: ParseLlmConfig, manifest: Manifest, base: Path, part: int, parts: int) -> None:
    """Asks what is this part's, and writes its results."""
    from data_prep.llm import object_results, questions
    from data_prep.llm.names import name_parser

    room = OBJECTS_FIRST.room(config.max_model_len, config.max_tokens)
    OBJECTS_SECOND.room(config.max_model_len, config.max_tokens)  # raises now rather than after the first answers
    parser = name_parser(_pos(manifest), config.wordnet)  # raises now where there is no WordNet
    check_shards(config.folder, manifest.shards)
    texts = _texts(config, manifest, room, part, parts)
    say(f"{len(texts):,} distinct captions" + (f" of part {part} of {parts}" if parts > 1 else ""))

    def check(pairs: Sequence[tuple[str, Any]]) -> list[Any]:
        checked = [object_answers.check(caption, answer) for caption, answer in pairs]
        objects = iter(parser.objects([each.value for each in checked if each.value is not None]))
        return [each if each.value is None else _with_objects(each, next(objects)) for each in checked]

    folder = places.part_folder(base, part, parts)
    remove_partial(folder)
    (folder / PART_RESULTS_NAME).unlink(missing_ok=True)  # a merge must not take those of answers that were removed
    outcomes, account = questions.ask_twice(
        texts, (OBJECTS_FIRST, OBJECTS_SECOND), folder, questions.runner_of(config), check, "objects of captions"
    )
    unmentioned = {
        identity: parser.unmentioned(texts[identity], outcome.value)
        for identity, outcome in outcomes.items()
        if outcome.value is not None
    }
    if number := sum(map(bool, unmentioned.values())):
        account.flags[UNSAID] = number
    account.unsaid = sum(map(len, unmentioned.values()))
    account.objects = sum(len(outcome.value) for outcome in outcomes.values() if outcome.value is not None)
    account.say("objects of captions", "with the objects of the parser pos")
    notes = {
        **answer_settings(config),
        "version": _rules(manifest),
        "room": room,
        "synonyms": config.wordnet is not None,
    }
    object_results.write_part(folder / PART_RESULTS_NAME, outcomes, unmentioned, account, notes)


def _with_objects(checked: Any, objects: list[str]) -> Any:
    if not objects:
        return dataclasses.replace(checked, value=None, reason=object_answers.NO_OBJECT, repairs=())
    return dataclasses.replace(checked, value=objects)


def _texts(config: ParseLlmConfig, manifest: Manifest, room: int, part: int, parts: int) -> dict[str, str]:
    """Returns request id to caption for the distinct captions of one part."""
    tasks = [partial(_captions_of_part, config.folder / info.name, room, part, parts) for info in manifest.shards]
    sizes = [info.samples for info in manifest.shards]
    found: dict[str, str] = {}
    for each in run_tasks(tasks, config.processes, description="reading captions", sizes=sizes):
        for identity, caption in each.items():
            found.setdefault(identity, caption)
    return found


def _captions_of_part(path: Path, room: int, part: int, parts: int) -> dict[str, str]:
    from data_prep.llm import object_results

    found: dict[str, str] = {}
    for captions in captions_of(Shard(path)):
        for caption in captions:
            if caption.strip():
                identity = object_results.identity_of(caption, room)
                if places.is_mine(identity, part, parts):
                    found.setdefault(identity, caption)
    return found


def _write(config: ParseLlmConfig, base: Path, parts: int) -> Manifest:
    """Joins the parts' results and writes shards, statistics, report and manifest."""
    from data_prep import report
    from data_prep.llm import object_results

    begun_by = _unfinished(config.folder)
    manifest = rewrite.load(config.folder)  # of now: asking took long
    paths = places.finished_parts(base, parts, PART_RESULTS_NAME)
    accounts, notes = zip(*map(object_results.read_notes, paths), strict=True)
    rules = _rules(manifest)
    places.check_alike(base, notes, rules)
    account = Account()
    for each in accounts:
        account.add(each)
    results = object_results.Results(config.folder / places.FOLDER / places.OBJECT_RESULTS_NAME, notes[0]["room"])
    remove_partial(config.folder / places.FOLDER, "objects")
    if begun_by is None:
        object_results.join(paths, results.path)
        _check_all_asked(config, manifest, results, parts)
    settings = settings_line(places.model_name(config.model), notes[0])
    version = f"{settings}, answers {sha256_of(results.path)[:16]}, {rules}"
    finish = partial(_finish, config, results, account, version)
    job = Rewrite(
        parser=NAME,
        version=version,
        command=_merge_command(config),
        objects=partial(_objects, results=results),
        finish=finish,
    )
    if parts > 1:
        account.say("objects of captions", "with the objects of the parser pos")
    is_written = manifest.parsers.get(NAME) == version
    manifest = rewrite.rewrite(config.folder, job, config.processes)
    if is_written:  # by a run before this one: only the account may be another
        finish(manifest.shards)
        report.write_report(config.folder, manifest)
    return manifest


def _check_all_asked(config: ParseLlmConfig, manifest: Manifest, results: Any, parts: int) -> None:
    tasks = [partial(_never_asked, config.folder / info.name, results) for info in manifest.shards]
    sizes = [info.samples for info in manifest.shards]
    missing = {
        identity
        for each in run_tasks(tasks, config.processes, description="checking answers", sizes=sizes)
        for identity in each
    }
    if missing:
        where = sorted({int(identity, 16) % parts for identity in missing})
        raise InputError(
            f"expected an answer for every caption of {config.folder}, found {len(missing):,} captions that were never asked "
            f"about (the folder has changed since); start part {', '.join(map(str, where[:10]))} of {parts} again, then merge"
        )


def _never_asked(path: Path, results: Any) -> list[str]:
    captions = [caption for each in captions_of(Shard(path)) for caption in each if caption.strip()]
    return results.missing(captions)


def _objects(samples: Sequence[Sample], results: Any) -> list[ObjectLists]:
    """Returns the objects of each sample's captions: those of the model, or where it failed those by part of speech."""
    rows = iter(results.of([caption for sample in samples for caption in sample.captions if caption.strip()]))
    lists: list[ObjectLists] = []
    for sample in samples:
        mine: ObjectLists = []
        for caption, by_pos in zip(sample.captions, _by_pos(sample), strict=True):
            row = next(rows) if caption.strip() else {"objects": []}
            mine.append(by_pos if row["objects"] is None else row["objects"])
        lists.append(mine)
    return lists


def _by_pos(sample: Sample) -> ObjectLists:
    found = sample.objects.get(pos_config.NAME)
    if found is None:
        raise InputError(
            f"sample {sample.key}: expected objects of the parser {pos_config.NAME}, found those of "
            f"{sorted(sample.objects) or 'none'}; run `python -m data_prep.parse` on the folder first"
        )
    return found


def _finish(config: ParseLlmConfig, results: Any, account: Any, version: str, infos: Sequence[ShardInfo]) -> None:
    agreed = agreement([Shard(config.folder / info.name) for info in infos], config.processes)
    write_json(
        config.folder / places.FOLDER / places.OBJECT_ACCOUNT_NAME,
        {
            "model": places.model_name(config.model),
            "version": version,
            "room": results.room,
            "account": account.to_dict(),
            "agreement": agreed,
        },
    )
    say(
        f"agreement of pos and llm: mean IoU {agreed['mean_iou']:.3f} over {agreed['captions']:,} captions, "
        f"{agreed['equal']:,} with equal objects"
    )


def _pos(manifest: Manifest) -> PosConfig:
    """Returns how the folder's captions were parsed by part of speech: names are normalised alike."""
    settings = {name: manifest.config[name] for name in ("compound", "stop_words") if name in manifest.config}
    if "stop_words" in settings:
        settings["stop_words"] = tuple(settings["stop_words"])
    return PosConfig(**settings)


def _rules(manifest: Manifest) -> str:
    """Returns how captions are asked about, and answers checked: with the answers it decides the objects."""
    from data_prep.llm import names

    asked = f"prompts {OBJECTS_FIRST.name} and {OBJECTS_SECOND.name}"
    checked = f"answer rules {object_answers.RULES_VERSION}, name rules {names.RULES_VERSION}"
    return f"{asked}, {checked}; else pos ({manifest.parsers[pos_config.NAME]})"


def _merge_command(config: ParseLlmConfig) -> str:
    return merge_command("data_prep.parse_llm", config.folder, config)


def main() -> None:
    """The command."""
    parse_llm(parse(ParseLlmConfig, description=__doc__))


if __name__ == "__main__":
    command(main)
