"""`python -m data_prep.show`: some samples in the terminal and on a page."""

import dataclasses
import re

import pytest
from material import sample, write_shards

from data_prep import show
from data_prep.statistics import counted_shards, write_statistics
from setclip.errors import InputError
from setclip.manifest import Manifest
from setclip.shards import Shard, ShardWriter


@pytest.fixture
def folder(tmp_path):
    folder = write_shards(tmp_path / "data")
    write_statistics(folder, counted_shards(Manifest.load(folder).shards))
    return folder


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    def call(*arguments):
        (tmp_path / "work").mkdir(exist_ok=True)
        monkeypatch.chdir(tmp_path / "work")
        monkeypatch.setattr("sys.argv", ["show", *map(str, arguments)])
        show.main()
        return capsys.readouterr().out

    return call


def keys(text):
    return re.findall(r"^([0-9a-f]{24}) ", text, flags=re.MULTILINE)


def test_keys_captions_and_objects_are_said_and_pictures_lie_in_the_working_directory(run, folder, tmp_path):
    before = sorted(path.name for path in folder.iterdir())
    text = run(folder, "--number", 5)
    shown = {s.key: s for info in Manifest.load(folder).shards for s in Shard(folder / info.name)}
    assert len(keys(text)) == 5
    for key in keys(text):
        for caption, names in zip(shown[key].captions, shown[key].objects["pos"], strict=True):
            assert f"  {caption}\n    pos: {', '.join(names)}\n" in text
    page = tmp_path / "work" / "show.html"
    assert text.endswith(f"pictures: {page}\n")
    html = page.read_text(encoding="utf-8")
    assert html.count("<img ") == 5
    assert all(key in html for key in keys(text))
    assert sorted(path.name for path in folder.iterdir()) == before
    assert "\x1b" not in text


def test_samples_come_from_all_shards_and_the_same_ones_every_time(run, folder):
    text = run(folder, "--number", 8)
    assert set(re.findall(r"train-\d{5}", text)) == {"train-00000", "train-00001", "train-00002"}
    assert run(folder, "--number", 8) == text


def test_a_seed_draws_others_and_again_the_same(run, folder):
    assert keys(run(folder, "--seed", 1)) == keys(run(folder, "--seed", 1))
    assert keys(run(folder, "--seed", 1)) != keys(run(folder, "--seed", 2))


def test_an_object_is_named_by_a_caption_of_each_sample_shown(run, folder):
    for options in ((), ("--seed", 4)):
        text = run(folder, "--object", "boat", "--number", 6, *options)
        blocks = re.split(r"^(?=[0-9a-f]{24} )", text, flags=re.MULTILINE)[1:]
        assert len(blocks) == 6
        assert all(re.search(r"pos: .*\bboat\b", block) for block in blocks)


def test_an_unknown_object_is_answered_with_the_nearest(run, folder):
    with pytest.raises(
        InputError, match="samples with the object 'baot', found none in 3 shards, perhaps 'boat'; choose"
    ):
        run(folder, "--object", "baot")


def test_a_split_is_looked_at_alone_and_an_unknown_one_is_named(run, tmp_path):
    folder = tmp_path / "data"
    first = Manifest.load(write_shards(folder, (5,), "train"))
    second = Manifest.load(write_shards(folder, (4,), "test"))
    Manifest(source="x", shards=first.shards + second.shards, pairs_listed=18, pairs_present=18).save(folder)
    assert len(keys(run(folder, "--split", "test"))) == 4
    with pytest.raises(InputError, match=r"split 'dev', found splits \['train', 'test'\]"):
        run(folder, "--split", "dev")


def test_the_page_goes_where_it_is_told_and_never_among_the_data(run, folder, tmp_path, monkeypatch, capsys):
    run(folder, "--html", tmp_path / "x.html")
    assert (tmp_path / "x.html").exists()
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(show.tempfile, "tempdir", None)
    monkeypatch.chdir(folder)
    monkeypatch.setattr("sys.argv", ["show", "."])
    show.main()
    assert re.search(rf"pictures: {re.escape(str(tmp_path))}/setclip-\w+/show\.html", capsys.readouterr().out)
    assert not (folder / "show.html").exists()


def test_captions_cannot_command_the_terminal_or_the_page(run, tmp_path):
    evil = "\x1b[2Jboo <script>x</script>\n[red]second line[/red]"
    with ShardWriter(tmp_path / "train-00000.tar") as writer:
        writer.add(dataclasses.replace(sample(1, captions=1), captions=[evil], objects={"pos": [["\x1b]0;title\x07"]]}))
    Manifest(source="x", shards=[writer.info], pairs_listed=1, pairs_present=1).save(tmp_path)
    text = run(tmp_path, "--html", tmp_path / "x.html")
    assert "\x1b" not in text
    assert "\N{REPLACEMENT CHARACTER}[2Jboo <script>x</script> [red]second line[/red]" in text
    assert "<script" not in (tmp_path / "x.html").read_text(encoding="utf-8")


def test_a_broken_sample_is_said_and_the_others_are_shown(run, tmp_path):
    folder = write_shards(tmp_path / "data", (3,))
    data = (folder / "train-00000.tar").read_bytes()
    (folder / "train-00000.tar").write_bytes(data.replace(b'{"key"', b'?"key"', 1))
    text = run(folder)
    assert "train-00000.tar row 0: cannot be read" in text
    assert len(keys(text)) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--number", "0"], "expected --number from 1 to 1,000"),
        (["--html", "x.tar"], "expected --html FILE"),
        (["--seed", "-1"], "expected --seed 0 or more"),
    ],
)
def test_wrong_settings_are_refused_with_status_2(run, folder, arguments, message, capsys):
    with pytest.raises(SystemExit) as ended:
        run(folder, *arguments)
    assert ended.value.code == 2
    assert message in " ".join(re.sub("[│╭╮╰╯─]", " ", capsys.readouterr().err).split())
