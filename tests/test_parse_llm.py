"""`python -m data_prep.parse_llm`: objects by a language model beside those by part of speech, asked once, in any parts.

The model is a real HTTP server that answers by rule (tests/llm_server.py); tests/test_llm_engine.py asks a real engine.
"""

import fcntl
import json
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from llm_server import MODEL, RuleServer
from prep_material import contents, run_killed_at, write_tar

from data_prep.llm import object_answers, places, prompts
from data_prep.llm.account import UNSAID, Account
from data_prep.parse import ParseConfig, parse_again
from data_prep.parse_llm import ParseLlmConfig, main, parse_llm
from data_prep.run import prepare
from data_prep.sources.tars import TarsConfig
from data_prep.statistics import write_statistics
from setclip.errors import InputError
from setclip.manifest import Manifest, check_shards
from setclip.objects import read_objects
from setclip.shards import Shard

ANSWERS = {
    "a teddy bear on a sports car": ("1. Teddy bears\n2. a sports car\n3. road", "stop"),
    "two dogs in a park": ("two dogs in a park", "stop"),  # an echo; the second answer is good
    "a boat on the sea": ("boat, " * 40, "length"),  # a loop, twice
    "a cat sleeps": ("I cannot see the image.", "stop"),  # refused, then nothing but stop words
}
SECOND = {
    "two dogs in a park": ("dog, park", "stop"),
    "a boat on the sea": ("boat, " * 40, "length"),
    "a cat sleeps": ("photo, background", "stop"),
}
CAPTIONS = dict(enumerate([*ANSWERS, "two dogs in a park", "a bird and a ball"]))


def rule(messages: Sequence[dict[str, str]]) -> tuple[str, str]:
    caption = messages[-1]["content"].split("\n", 1)[1]
    known = ANSWERS if len(messages) == 1 else SECOND
    return known.get(caption, ("house, bird", "stop"))


@pytest.fixture(scope="module")
def server():
    with RuleServer(rule) as running:
        yield running


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    """Shards that no test changes."""
    folder = tmp_path_factory.mktemp("shards")
    write_tar(folder / "in" / "0.tar", list(range(6)), captions=CAPTIONS)
    write_tar(folder / "in" / "1.tar", list(range(10, 14)))
    prepare("tars", TarsConfig(out=folder / "out", tars=(str(folder / "in"),), processes=1, shard_size=4))
    return folder / "out"


@pytest.fixture(scope="module")
def parsed(shards, server, tmp_path_factory) -> Path:
    """The same shards after the command; no test changes them."""
    folder = copied(shards, tmp_path_factory.mktemp("parsed"))
    server.asked.clear()
    run(folder, server)
    return folder


def copied(shards: Path, folder: Path) -> Path:
    shutil.copytree(shards, folder / "data")
    return folder / "data"


def run(folder: Path, server: RuleServer | None, **settings) -> Manifest | None:
    url = "http://127.0.0.1:9/v1" if server is None else server.url  # nothing listens at the discard port
    return parse_llm(
        ParseLlmConfig(
            folder=folder,
            processes=1,
            **{"model": MODEL, "runner": "http", "url": url, "patience": 1.0, "retries": 1, **settings},
        )
    )


def samples_of(folder: Path) -> list:
    return [sample for info in Manifest.load(folder).shards for sample in Shard(folder / info.name)]


def objects_of(folder: Path, parser: str = "llm") -> dict[str, list[str]]:
    return {s.captions[0]: s.objects[parser][0] for s in samples_of(folder)}


def account_of(folder: Path) -> dict:
    return json.loads((folder / "llm" / "objects.json").read_text())


def without_traces(folder: Path) -> dict[str, bytes]:
    """Everything but the raw answers, whose order and layout depend on the parts."""
    return {name: data for name, data in contents(folder).items() if not name.startswith(f"llm/{MODEL}")}


def test_good_answers_become_objects_and_bad_ones_give_way_to_those_by_part_of_speech(parsed):
    objects = objects_of(parsed)
    assert objects["a teddy bear on a sports car"] == ["teddy bear", "sports car", "road"]
    assert objects["two dogs in a park"] == ["dog", "park"]
    assert objects["a bird and a ball"] == ["house", "bird"]
    by_pos = objects_of(parsed, "pos")
    for caption in ("a boat on the sea", "a cat sleeps"):
        assert objects[caption] == by_pos[caption] != []


def test_images_captions_and_other_objects_stay_as_they_are(shards, parsed):
    for before, after in zip(samples_of(shards), samples_of(parsed), strict=True):
        assert after.objects.keys() == {"pos", "llm"}
        del after.objects["llm"]
        assert after == before


def test_manifest_statistics_and_report_follow(shards, parsed):
    manifest = Manifest.load(parsed)
    check_shards(parsed, manifest.shards, checksums=True)
    assert manifest.parsers["llm"].startswith(
        f"{MODEL}, max 128 of 2048 tokens, dtype auto, seed 0, chat options {{}}, engine options {{}}, answers "
    )
    assert ", prompts objects 1 and objects with" in manifest.parsers["llm"]
    assert manifest.parsers["llm"].endswith(f"else pos ({manifest.parsers['pos']})")
    assert manifest.plan == Manifest.load(shards).plan != ""
    assert read_objects(parsed, "llm").count_of("house") == 5
    assert read_objects(parsed, "pos").counts.tolist() == read_objects(shards, "pos").counts.tolist()
    assert "fell back to pos" in (parsed / "report.html").read_text()
    assert not list(parsed.glob(".*"))


def test_equal_captions_are_asked_once_and_bad_answers_once_again(parsed, server):
    first = [text for text in server.asked if text.startswith(f"{prompts.OBJECTS}\n")]
    again = [text for text in server.asked if not text.startswith(f"{prompts.OBJECTS}\n")]
    captions = {caption for sample in samples_of(parsed) for caption in sample.captions}
    assert sorted(text.split("\n", 1)[1] for text in first) == sorted(captions)
    assert sorted(text.split("\n", 1)[1] for text in again) == sorted(SECOND)


def test_everything_is_counted_by_reason(parsed):
    account = Account.from_dict(account_of(parsed)["account"])
    assert account.asked == 9
    assert account.first_bad == {object_answers.ECHO: 1, object_answers.LOOP: 1, object_answers.REFUSAL: 1}
    assert account.second_bad == {object_answers.LOOP: 1, object_answers.NO_OBJECT: 1}
    assert account.repaired == {"numbering": 1, "one a line": 1}
    assert account.objects == 3 + 2 + 5 * 2
    # "road" of the bear; "house, bird" of five captions: "bird" is in one of them for sure
    said = {caption: set(caption.split()) for caption in objects_of(parsed)}
    unsaid = {c: [n for n in ("house", "bird") if n not in w] for c, w in said.items() if c not in {*ANSWERS}}
    assert account.unsaid == 1 + sum(map(len, unsaid.values()))
    assert account.flags == {UNSAID: 1 + sum(map(bool, unsaid.values()))}
    assert account.prompt_tokens > account.completion_tokens > 0


def test_agreement_is_the_mean_iou_over_all_captions(parsed):
    ious = []
    for sample in samples_of(parsed):
        one, other = set(sample.objects["pos"][0]), set(sample.objects["llm"][0])
        ious.append(len(one & other) / len(one | other))
    agreed = account_of(parsed)["agreement"]
    assert agreed["captions"] == 10
    assert agreed["mean_iou"] == pytest.approx(sum(ious) / 10)
    assert agreed["equal"] == ious.count(1)


def test_the_page_shows_both_parsers_side_by_side_and_loads_nothing(parsed):
    page = (parsed / "llm.html").read_text()
    assert f"of all captions {account_of(parsed)['agreement']['mean_iou']:.3f}" in page
    assert "<span class='pill tail'>road (not said)</span>" in page
    assert "second answer (echo of the caption)" in page
    assert "fell back to pos (loop; then loop)" in page
    assert "http" not in page.replace("http-equiv", "").replace("http://www.w3.org/2000/svg", "")


def test_the_same_command_again_asks_nothing_and_changes_nothing(parsed, tmp_path):
    folder = copied(parsed, tmp_path)
    before = without_traces(folder)
    run(folder, server=None)
    assert without_traces(folder) == before


def test_objects_are_normalised_again_without_a_model_after_another_parse_by_part_of_speech(parsed, tmp_path, capsys):
    folder = copied(parsed, tmp_path)
    parse_again(ParseConfig(folder=folder, compound=False, processes=1))
    assert objects_of(folder)["a teddy bear on a sports car"] == ["teddy bear", "sports car", "road"]
    run(folder, server=None)
    assert objects_of(folder)["a teddy bear on a sports car"] == ["teddy", "bear", "sport", "car", "road"]
    assert "else pos (rules" in Manifest.load(folder).parsers["llm"]
    assert "compound False" in Manifest.load(folder).parsers["llm"]


def test_parts_merged_equal_one_part(shards, parsed, server, tmp_path, monkeypatch):
    folder = copied(shards, tmp_path)
    for part in (0, 1, 2):
        server.asked.clear()
        monkeypatch.setenv("SLURM_ARRAY_TASK_ID", str(part + 5))
        monkeypatch.setenv("SLURM_ARRAY_TASK_COUNT", "3")
        monkeypatch.setenv("SLURM_ARRAY_TASK_MIN", "5")
        assert run(folder, server) is None
        assert len(server.asked) < 9
    for name in ("ID", "COUNT", "MIN"):
        monkeypatch.delenv(f"SLURM_ARRAY_TASK_{name}")
    run(folder, server=None, merge=True)
    assert without_traces(folder) == without_traces(parsed)


def test_a_part_without_a_caption_is_done_at_once(shards, tmp_path):
    folder = copied(shards, tmp_path)
    room = prompts.OBJECTS_FIRST.room(2048, 128)
    captions = {caption for sample in samples_of(folder) for caption in sample.captions}
    taken = {
        int(prompts.request_id(prompts.OBJECTS_FIRST, prompts.cut(caption, room)), 16) % 50 for caption in captions
    }
    free = min(set(range(50)) - taken)
    assert run(folder, server=None, part=free, parts=50) is None
    assert (folder / "llm" / MODEL / "objects" / f"part-{free:05d}-of-00050" / "results.parquet").exists()


def test_a_merge_names_the_parts_that_are_not_done(shards, server, tmp_path):
    folder = copied(shards, tmp_path)
    with pytest.raises(InputError, match="found none; ask first"):
        run(folder, server=None, merge=True)
    run(folder, server, part=1, parts=3)
    with pytest.raises(InputError, match="found none of part 0, 2; start these again with --part and --parts 3"):
        run(folder, server=None, merge=True)
    assert "llm" not in Manifest.load(folder).parsers


def test_other_answers_come_into_the_shards(parsed, tmp_path):
    folder = copied(parsed, tmp_path)
    shutil.rmtree(folder / "llm" / MODEL)
    with RuleServer(lambda messages: ("kite", "stop")) as other:
        run(folder, other)
    assert all(names == ["kite"] for names in objects_of(folder).values())
    assert read_objects(folder, "llm").names == ["kite"]
    assert account_of(folder)["agreement"]["mean_iou"] == 0


def test_results_of_removed_answers_are_not_merged(shards, server, tmp_path):
    folder = copied(shards, tmp_path)
    for part in (0, 1):
        run(folder, server, part=part, parts=2)
    (folder / "llm" / MODEL / "objects" / "part-00001-of-00002" / "first" / "answers.jsonl").unlink()
    with pytest.raises(InputError, match="found none in"):
        run(folder, server=None, part=1, parts=2, patience=0.1)
    with pytest.raises(InputError, match="found none of part 1;"):
        run(folder, server=None, merge=True)


@pytest.mark.parametrize(
    ("settings", "difference"),
    [
        ({"seed": 1}, r"seed 1 \(part 0: 0\)"),
        ({"chat_options": '{"enable_thinking": false}'}, r"chat_options {'enable_thinking': False} \(part 0: {}\)"),
        ({"max_tokens": 100}, r"max_tokens 100 \(part 0: 128\), room "),
    ],
)
def test_parts_that_were_asked_otherwise_are_not_merged(shards, server, tmp_path, settings, difference):
    folder = copied(shards, tmp_path)
    run(folder, server, part=0, parts=2)
    run(folder, server, part=1, parts=2, **settings)
    with pytest.raises(InputError, match=rf"found in part 1 {difference}.*remove .*part-00001-of-00002 first"):
        run(folder, server=None, merge=True)
    assert "llm" not in Manifest.load(folder).parsers


def test_parts_that_knew_other_synonyms_are_not_merged():
    notes = [{"version": "1", "synonyms": False}, {"version": "1", "synonyms": True}]
    with pytest.raises(InputError, match=r"found in part 1 synonyms True \(part 0: False\)"):
        places.check_alike(Path("objects"), notes, "1")


def test_the_command_that_a_part_prints_merges_with_all_that_was_set(shards, server, tmp_path, monkeypatch, capsys):
    folder = copied(shards, tmp_path)
    settings = {"max_tokens": 100, "max_model_len": 1000, "chat_options": '{"enable_thinking": false}'}
    for part in (0, 1):
        run(folder, server, part=part, parts=2, **settings)
    printed = capsys.readouterr().out.split("after the last one: ")[-1].strip()
    run(copied(folder, tmp_path / "plain"), server=None, merge=True)  # the answers say their settings
    monkeypatch.setattr(sys, "argv", shlex.split(printed.removeprefix("python -m ")))
    main()
    said = Manifest.load(folder).parsers["llm"]
    assert said.startswith(
        f'{MODEL}, max 100 of 1000 tokens, dtype auto, seed 0, chat options {{"enable_thinking": false}}'
    )
    assert Manifest.load(tmp_path / "plain" / "data").parsers["llm"] == said


def test_a_start_that_failed_does_not_fix_the_number_of_parts(shards, server, tmp_path):
    folder = copied(shards, tmp_path)
    with pytest.raises(InputError, match="found none in"):
        run(folder, server=None, part=0, parts=3)
    with pytest.raises(InputError, match="found none; ask first"):
        run(folder, server=None, merge=True)
    assert (folder / "llm" / MODEL / "objects" / "part-00000-of-00003").is_dir()
    run(folder, server)
    assert "llm" in Manifest.load(folder).parsers


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model": "typo"}, "expected a server of typo .*, found by-rule"),
        ({"runner": "offline", "url": None, "environment": Path("nowhere")}, "expected vLLM's environment at nowhere"),
    ],
)
def test_a_wrong_model_or_environment_is_known_before_captions_are_read(
    shards, server, tmp_path, capsys, settings, message
):
    folder = copied(shards, tmp_path)
    with pytest.raises(InputError, match=message):
        run(folder, server, **settings)
    assert "captions" not in capsys.readouterr().out
    assert not (folder / "llm").exists()


@pytest.mark.slow
def test_a_parse_by_part_of_speech_while_questions_are_asked_is_not_undone(shards, tmp_path):
    folder = copied(shards, tmp_path)
    meanwhile: list[Manifest] = []

    def slow_rule(messages: Sequence[dict[str, str]]) -> tuple[str, str]:
        if not meanwhile:
            meanwhile.append(parse_again(ParseConfig(folder=folder, compound=False, processes=1)))
        return rule(messages)

    with RuleServer(slow_rule) as server, pytest.raises(InputError, match=r"found those of part 0 checked as .*again"):
        run(folder, server, concurrency=1)
    assert Manifest.load(folder) == meanwhile[0]
    run(folder, server=None)
    assert objects_of(folder)["a teddy bear on a sports car"] == ["teddy", "bear", "sport", "car", "road"]
    assert Manifest.load(folder).config["compound"] is False


def test_another_number_of_parts_is_refused(shards, server, tmp_path):
    folder = copied(shards, tmp_path)
    run(folder, server, part=1, parts=3)
    with pytest.raises(InputError, match="found those of 3; go on with --parts 3"):
        run(folder, server=None, part=0, parts=2)


def test_captions_that_came_later_are_found_before_a_shard_is_written(parsed, server, tmp_path):
    write_tar(tmp_path / "in" / "0.tar", list(range(20, 24)), captions={0: "a caption that is new"})
    prepare("tars", TarsConfig(out=tmp_path / "data", tars=(str(tmp_path / "in"),), processes=1))
    shutil.copytree(parsed / "llm", tmp_path / "data" / "llm")
    with pytest.raises(InputError, match=r"found [34] captions that were never asked"):
        run(tmp_path / "data", server=None, merge=True)
    assert Manifest.load(tmp_path / "data").parsers.keys() == {"pos"}
    run(tmp_path / "data", server)
    assert objects_of(tmp_path / "data")["a caption that is new"] == ["house", "bird"]


def test_long_captions_and_empty_ones_do_no_harm(server, tmp_path):
    long = "a very long caption " * 400
    write_tar(tmp_path / "in" / "0.tar", [1, 2, 3], captions={0: long, 1: long + " that ends otherwise", 2: "two dogs"})
    prepare("tars", TarsConfig(out=tmp_path / "data", tars=(str(tmp_path / "in"),), processes=1))
    server.asked.clear()
    run(tmp_path / "data", server)
    assert len(server.asked) == 2  # equal once cut
    assert all(len(text.encode()) < 2048 - 128 for text in server.asked)
    assert all(names == ["house", "bird"] for names in objects_of(tmp_path / "data").values())


def test_statistics_of_one_parser_leave_those_of_the_other_alone(parsed, tmp_path):
    folder = copied(parsed, tmp_path)
    shards = Manifest.load(folder).shards
    write_statistics(folder, shards[:1], "llm")
    assert read_objects(folder, "llm").num_captions == 4
    assert read_objects(folder, "pos").num_captions == 10
    write_statistics(folder, shards)
    assert (folder / "objects.parquet").read_bytes() == (parsed / "objects.parquet").read_bytes()


def test_statistics_of_a_parser_that_was_not_run_say_what_runs_it(shards, tmp_path):
    folder = copied(shards, tmp_path)
    with pytest.raises(InputError, match=r"found those of \['pos'\].*`python -m data_prep\.parse_llm"):
        write_statistics(folder, Manifest.load(folder).shards, "llm")


def test_a_folder_that_is_not_parsed_by_part_of_speech_is_refused(shards, tmp_path):
    folder = copied(shards, tmp_path)
    content = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**content, "parsers": {}}))
    with pytest.raises(InputError, match=r"run `python -m data_prep\.parse .*` first"):
        run(folder, server=None)


def test_only_one_parse_at_a_time_rewrites_a_folder(parsed, tmp_path):
    folder = copied(parsed, tmp_path)
    with open(folder / ".parsing.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(InputError, match=r"expected no other parse of .* found one at work"):
            parse_again(ParseConfig(folder=folder, compound=False, processes=1))
        assert Manifest.load(folder).config["compound"] is True
    parse_again(ParseConfig(folder=folder, compound=False, processes=1))
    assert not list(folder.glob(".*"))


def test_a_wrong_folder_is_known_before_anything_large_is_imported(tmp_path):
    code = (
        "import sys\nfrom data_prep import describe, parse_llm\n"
        "heavy = ('spacy', 'httpx', 'vllm', 'matplotlib')\n"
        "for module in (parse_llm, describe):\n"
        "    sys.argv = ['x', '/nowhere', '--model', 'm']\n"
        "    try:\n        module.main()\n"
        "    except ValueError as error:\n        print(error)\n"
        "print([name for name in heavy if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    *messages, imported = done.stdout.splitlines()
    assert imported == "[]", done.stderr
    assert len(messages) == 2
    assert all("found no such folder; make them with `python -m data_prep.run" in message for message in messages)


@pytest.mark.slow
def test_killed_at_each_renaming_it_goes_on_and_ends_with_the_same_bytes(shards, parsed, server, tmp_path):
    folder = copied(shards, tmp_path)
    moments = 0
    while status := killed_at(folder, server, number=4 + moments):
        assert status == -signal.SIGKILL
        moments += 1
        if not (folder / "manifest.json").exists():
            with pytest.raises(InputError, match="unfinished parse"):
                Manifest.load(folder)
            with pytest.raises(InputError, match=r"it was begun with \(`python -m data_prep\.parse_llm"):
                parse_again(ParseConfig(folder=folder, processes=1))
    assert moments >= 4
    assert without_traces(folder) == without_traces(parsed)


def killed_at(folder: Path, server: RuleServer, number: int) -> int:
    """Returns the exit status of the command, killed right before its `number`-th renaming if it gets there."""
    return run_killed_at(
        "parse_llm", [folder, "--model", MODEL, "--runner", "http", "--url", server.url, "--processes", 1], number
    )
