"""`python -m data_prep.describe`: descriptions of tail objects, and the file that holds them.

The model is a real HTTP server that answers by rule (tests/llm_server.py); tests/test_llm_engine.py asks a real engine.
"""

import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from llm_server import MODEL, RuleServer
from material import sample, write_shards

from data_prep.describe import DescribeConfig, describe, main
from data_prep.llm import description_answers
from data_prep.llm.account import Account
from data_prep.statistics import counted_shards, write_statistics
from setclip.descriptions import (
    Description,
    DescriptionTable,
    read_descriptions,
    write_descriptions,
)
from setclip.errors import InputError
from setclip.manifest import Manifest
from setclip.objects import object_id, read_objects

GOOD = {"dog": "A dog is a furry animal with four legs.", "cat": "It is small and soft, with pointed ears."}


def rule(messages: Sequence[dict[str, str]]) -> tuple[str, str]:
    name = messages[-1]["content"].split("appearance of ")[1].split(" in ordinary")[0]
    is_first = len(messages) == 1
    if name == "boat":  # refused, twice
        return "I'm sorry, but I can't help with that.", "stop"
    if name == "ball" and is_first:  # cut off within its only sentence; then within its second
        return "A ball is a round thing that", "length"
    if name == "ball":
        return "A ball is a round thing. It rolls", "length"
    return GOOD.get(name, f"A {name} is of a plain shape and a dark colour."), "stop"


@pytest.fixture(scope="module")
def server():
    with RuleServer(rule) as running:
        yield running


@pytest.fixture
def folder(tmp_path) -> Path:
    made = write_shards(tmp_path / "data", (12, 9))
    write_statistics(made, counted_shards(Manifest.load(made).shards))
    return made


def run(folder: Path, server: RuleServer | None, **settings) -> DescriptionTable | None:
    url = "http://127.0.0.1:9/v1" if server is None else server.url  # nothing listens at the discard port
    return describe(
        DescribeConfig(
            folder=folder, **{"model": MODEL, "runner": "http", "url": url, "patience": 1.0, "retries": 1, **settings}
        )
    )


def test_by_default_the_tail_is_described(folder, server):
    server.asked.clear()
    run(folder, server)
    objects = read_objects(folder)
    tail = sorted(name for name, is_tail in zip(objects.names, objects.is_tail, strict=True) if is_tail)
    table = read_descriptions(folder)
    assert [row.name for row in table.rows] == tail
    assert 0 < len(tail) < len(objects.names)
    assert (table.model, table.parser, table.chosen) == (MODEL, "pos", "tail")
    assert table.ids.tolist() == [object_id(name) for name in tail]


def test_good_answers_are_kept_with_their_flags_and_bad_ones_stay_empty_with_their_reasons(folder, server):
    run(folder, server, of="all")
    rows = {row.name: row for row in read_descriptions(folder).rows}
    assert rows["dog"] == Description("dog", GOOD["dog"], (), "description 1")
    assert rows["cat"] == Description("cat", GOOD["cat"], (description_answers.UNNAMED,), "description 1")
    assert rows["ball"] == Description(
        "ball", "A ball is a round thing.", (description_answers.CUT,), "description with examples 1"
    )
    assert rows["boat"] == Description("boat", "", (description_answers.REFUSAL,) * 2, "")
    assert rows.keys() == set(read_objects(folder).names)
    assert "boat" not in read_descriptions(folder).texts


def test_everything_is_counted_and_shown(folder, server):
    run(folder, server, of="all")
    account = Account.from_dict(json.loads((folder / "llm" / "descriptions.json").read_text())["account"])
    assert account.asked == 8
    assert account.first_bad == {description_answers.REFUSAL: 1, description_answers.LENGTH: 1}
    assert account.second_bad == {description_answers.REFUSAL: 1}
    assert account.flags == {description_answers.UNNAMED: 1, description_answers.CUT: 1}
    page = (folder / "llm.html").read_text()
    assert "7 of 8 objects (all of parser pos) are described." in page
    assert GOOD["cat"] in page
    assert "without a good answer" in (folder / "report.html").read_text()


def test_the_same_command_again_asks_nothing(folder, server):
    run(folder, server, of="all")
    before = (folder / "descriptions.parquet").read_bytes()
    (folder / "descriptions.parquet").unlink()
    run(folder, None, of="all")
    assert (folder / "descriptions.parquet").read_bytes() == before


def test_the_tail_is_described_without_a_question_where_all_were_asked_before(folder, server):
    run(folder, server, of="all")
    run(folder, None, of="tail")
    assert len(read_descriptions(folder).rows) == 2


def test_parts_merged_equal_one_part(folder, server, tmp_path):
    run(folder, server, of="all")
    other = write_shards(tmp_path / "other", (12, 9))
    write_statistics(other, counted_shards(Manifest.load(other).shards))
    with pytest.raises(InputError, match="found none; ask first"):
        run(other, None, of="all", merge=True)
    for part in (0, 1, 2):
        assert run(other, server, of="all", part=part, parts=3) is None
        if part == 0:
            with pytest.raises(InputError, match="found none of part 1, 2"):
                run(other, None, of="all", merge=True)
    run(other, None, of="all", merge=True)
    for name in ("descriptions.parquet", "llm/descriptions.json", "llm.html"):
        assert (other / name).read_bytes() == (folder / name).read_bytes()


def test_parts_of_other_objects_are_not_merged(folder, server):
    for part in (0, 1):
        run(folder, server, of="tail", part=part, parts=2)
    with pytest.raises(
        InputError, match=r"all of pos, found those of part 0 checked as .* tail of pos; start each part"
    ):
        run(folder, None, of="all", merge=True)


def test_parts_that_were_asked_otherwise_are_not_merged(folder, server):
    for part in (0, 1):
        run(folder, server, of="all", part=part, parts=2, seed=part)
    with pytest.raises(InputError, match=r"found in part 1 seed 1 \(part 0: 0\); .*remove .*part-00001-of-00002 first"):
        run(folder, None, of="all", merge=True)


def test_the_command_that_a_part_prints_merges_with_all_that_was_set(folder, server, monkeypatch, capsys):
    for part in (0, 1):
        run(folder, server, of="all", part=part, parts=2, max_tokens=100)
    printed = capsys.readouterr().out.split("after the last one: ")[-1].strip()
    monkeypatch.setattr(sys, "argv", shlex.split(printed.removeprefix("python -m ")))
    main()
    assert len(read_descriptions(folder).rows) == 8
    account = json.loads((folder / "llm" / "descriptions.json").read_text())
    assert account["version"].startswith(f"{MODEL}, max 100 of 2048 tokens, dtype auto, seed 0")


def test_a_wrong_model_is_known_at_once_and_leaves_nothing(folder, server):
    with pytest.raises(InputError, match="expected a server of typo"):
        run(folder, server, model="typo")
    assert not (folder / "llm").exists()


def test_objects_of_a_parser_that_was_not_run_are_refused(folder):
    with pytest.raises(InputError, match=r"expected objects of parser 'llm', found those of \['pos'\]"):
        run(folder, None, objects="llm")


def test_a_corpus_without_a_tail_says_so(tmp_path):
    made = write_shards(tmp_path / "data", (1,))
    assert len(sample(0).objects["pos"][0]) == 1
    write_statistics(made, Manifest.load(made).shards)
    with pytest.raises(InputError, match="none of them in the tail; describe --of all"):
        run(made, None)


# --- the file


def test_descriptions_are_read_back_as_they_were_written(tmp_path):
    rows = [
        Description("tree", "A tree is tall.", ("a flag", "another"), "description 1"),
        Description("a", "", ("empty",), ""),
    ]
    write_descriptions(tmp_path / "descriptions.parquet", DescriptionTable("m", "llm", "all", rows))
    for place in (tmp_path, tmp_path / "descriptions.parquet"):
        table = read_descriptions(place)
        assert (table.model, table.parser, table.chosen) == ("m", "llm", "all")
        assert table.rows == rows[::-1]
        assert table.texts == {"tree": "A tree is tall."}
        assert table.ids.tolist() == [object_id("a"), object_id("tree")]


@pytest.mark.parametrize("content", [None, b"no parquet"])
def test_a_file_that_is_not_there_or_not_ours_says_what_makes_it(tmp_path, content):
    if content is not None:
        (tmp_path / "descriptions.parquet").write_bytes(content)
    with pytest.raises(InputError, match=r"make it with `python -m data_prep\.describe .* --model MODEL`"):
        read_descriptions(tmp_path)


def test_a_table_of_something_else_is_refused_with_the_columns_that_it_lacks(folder):
    with pytest.raises(InputError, match=r"found none of \['description', 'flags', 'model', 'prompt_version'\]"):
        read_descriptions(folder / "objects.parquet")
