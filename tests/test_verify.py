"""`python -m data_prep.verify`: every kind of damage is named with shard and key, and repaired without losing what is whole."""

import dataclasses
import json
import os
import tarfile

import pyarrow.parquet as pq
import pytest
from material import sample, write_shards

from data_prep import repair as repair_module
from data_prep import verify as verify_module
from data_prep.repair import DAMAGED, LOST
from data_prep.shard_check import CheckRules
from setclip import files
from setclip.errors import InputError
from setclip.manifest import Manifest, check_shards
from setclip.objects import read_objects
from setclip.shards import Sample, Shard, ShardWriter

SIZES = (6, 5, 7)
MIDDLE = "train-00001.tar"


@pytest.fixture
def folder(tmp_path):
    return write_shards(tmp_path / "data", SIZES)


@pytest.fixture
def quick(monkeypatch):
    """Spares the drawing of report.html, which takes a second and is tested elsewhere."""
    monkeypatch.setattr(
        repair_module.report,
        "write_report",
        lambda folder, manifest: (folder / "report.html").write_text(manifest.source),
    )


def run(monkeypatch, capsys, *arguments):
    """Runs the command; returns (exit status, result)."""
    monkeypatch.setattr("sys.argv", ["verify", *map(str, arguments), "--processes", "1"])
    with pytest.raises(SystemExit) as ended:
        verify_module.main()
    return ended.value.code, json.loads(capsys.readouterr().out)


def verdict(folder, decode=0.0):
    manifest = Manifest.load(folder)
    return verify_module.verify(folder, manifest, CheckRules.of_manifest(manifest, decode), processes=1)


def found(folder, decode=0.0):
    """Returns (shard, key, what) of every fault."""
    return [dataclasses.astuple(fault) for fault in verdict(folder, decode).faults]


def repaired(folder):
    """Repairs the folder; returns what was done."""
    manifest = Manifest.load(folder)
    seen = verdict(folder)
    rules = CheckRules.of_manifest(manifest, 0.0)
    return repair_module.repair(folder, manifest, seen.reports, seen.repeated, rules, processes=1)


def entries(folder, shard=MIDDLE):
    return pq.read_table((folder / shard).with_suffix(".idx")).to_pylist()


def flip(path, offset, mask=0x01):
    with open(path, "r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ mask]))


def keys(folder, shard=MIDDLE):
    return Shard(folder / shard).keys


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def samples_of(folder):
    return {s.key: s for info in Manifest.load(folder).shards for s in Shard(folder / info.name)}


# --- what is whole


def test_a_whole_folder_has_no_faults_and_all_pictures_can_be_decoded(folder, monkeypatch, capsys):
    status, result = run(monkeypatch, capsys, folder, "--decode", "all")
    assert status == 0
    assert {name: result[name] for name in ("ok", "shards", "samples", "decoded", "faults")} == {
        "ok": True,
        "shards": 3,
        "samples": 18,
        "decoded": 18,
        "faults": [],
    }


def test_the_share_of_pictures_decoded_is_of_keys_and_the_same_every_time(folder):
    shares = [sum(report.decoded for report in verdict(folder, decode).reports) for decode in (0.0, 0.5, 0.5, 1.0)]
    assert shares[0] == 0
    assert 3 < shares[1] < 15
    assert shares[1] == shares[2]
    assert shares[3] == 18


def test_verifying_changes_nothing(folder, monkeypatch, capsys):
    flip(folder / MIDDLE, 700)
    before = contents(folder)
    run(monkeypatch, capsys, folder)
    assert contents(folder) == before


@pytest.mark.slow
def test_two_processes_find_what_one_finds(folder):
    flip(folder / MIDDLE, 700)
    manifest = Manifest.load(folder)
    rules = CheckRules.of_manifest(manifest, 0.5)
    one, two = (verify_module.verify(folder, manifest, rules, processes) for processes in (1, 2))
    assert one == two
    assert one.faults


# --- damage of samples


def in_image(folder, row):
    place = entries(folder)[row]
    flip(folder / MIDDLE, place["image_offset"] + place["image_size"] // 2)


def in_image_header(folder, row):
    flip(folder / MIDDLE, entries(folder)[row]["start"] + 3)


def in_json_header(folder, row):
    flip(folder / MIDDLE, entries(folder)[row]["json_offset"] - 512 + 130)


def in_json_syntax(folder, row):
    flip(folder / MIDDLE, entries(folder)[row]["json_offset"], 0x20)


def in_json(old, new):
    def damage(folder, row):
        place, path = entries(folder)[row], folder / MIDDLE
        data = bytearray(path.read_bytes())
        start = place["json_offset"]
        part = bytes(data[start : start + place["json_size"]])
        assert old in part
        data[start : start + len(part)] = part.replace(old, new, 1)
        path.write_bytes(data)

    return damage


def in_object(folder, row):
    place = entries(folder)[row]
    part = (folder / MIDDLE).read_bytes()[place["json_offset"] :][: place["json_size"]]
    flip(folder / MIDDLE, place["json_offset"] + part.index(b'"]]}') - 1)  # the last letter of a name


def in_text(folder, row):
    place = entries(folder)[row]
    flip(folder / MIDDLE, place["image_offset"] + -(-place["image_size"] // 512) * 512 + 512)


def in_padding(folder, row):
    flip(folder / MIDDLE, entries(folder)[row]["end"] - 1)


BROKEN = {
    "image": (in_image, "the picture's bytes are not those that were written"),
    "json syntax": (in_json_syntax, "its JSON cannot be read"),
    "caption": (in_json(b'"a ', b'"e '), "JSON and index disagree about sha256 or captions"),
    "object": (in_object, "JSON and index disagree about objects of pos"),
    "parser": (in_json(b'"pos"', b'"pox"'), "JSON and index disagree about objects of pos, objects of pox"),
    "width": (in_json(b'"width":40', b'"width":41'), "the picture has 40 × 40 pixels, its JSON says 41 × 40"),
    "key": (in_json(b'"key":"', b'"kez":"'), "its JSON is of key None"),
}

MENDED = {
    "image header": (in_image_header, "damaged header at byte"),
    "json header": (in_json_header, "damaged header at byte"),
    "text": (in_text, ".txt is not the first caption"),
    "padding": (in_padding, "a header or padding is not as it was written"),
}


@pytest.mark.parametrize("row", [0, 2, 4])
@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_sample_is_named_and_only_it_is_left_out(folder, quick, name, row):
    damage, says = BROKEN[name]
    before, key = samples_of(folder), keys(folder)[row]
    damage(folder, row)
    assert [(shard, k) for shard, k, what in found(folder) if says in what] == [(MIDDLE, key)]
    assert {k for _, k, _ in found(folder)} == {None, key}
    done = repaired(folder)
    assert (done.rewritten, done.lost, done.dropped, done.unproven) == ([MIDDLE], [], 1, 0)
    assert found(folder, decode=1.0) == []
    assert samples_of(folder) == {k: s for k, s in before.items() if k != key}
    manifest = Manifest.load(folder)
    assert manifest.dropped == {DAMAGED: 1}
    assert manifest.pairs_present == 2 * 17
    assert "repaired: 1 damaged samples were left out" in manifest.warnings
    check_shards(folder, manifest.shards, checksums=True)


@pytest.mark.parametrize("row", [0, 2, 4])
@pytest.mark.parametrize("name", MENDED)
def test_damage_around_a_sample_is_named_and_the_sample_is_kept(folder, quick, name, row):
    damage, says = MENDED[name]
    before, key = contents(folder), keys(folder)[row]
    damage(folder, row)
    assert [(shard, k) for shard, k, what in found(folder) if says in what] == [(MIDDLE, key)]
    assert {k for _, k, _ in found(folder)} == {None, key}
    assert repaired(folder).dropped == 0
    assert found(folder, decode=1.0) == []
    after = contents(folder)
    assert [n for n in before if after[n] != before[n]] == []  # the very same bytes, the manifest's too


def test_a_picture_that_cannot_be_decoded_is_found_in_a_tar_that_is_as_it_was_written(tmp_path, quick):
    broken = dataclasses.replace(sample(3), image=sample(3).image[:-200])
    with ShardWriter(tmp_path / "train-00000.tar") as writer:
        for each in (sample(1), broken, sample(2)):
            writer.add(each)
    Manifest(source="x", shards=[writer.info], pairs_listed=6, pairs_present=6).save(tmp_path)
    assert found(tmp_path, decode=0.0) == []
    ((shard, key, what),) = found(tmp_path, decode=1.0)
    assert (shard, key) == ("train-00000.tar", broken.key)
    assert what.startswith("the picture cannot be decoded: ")


@pytest.fixture
def with_resized(tmp_path) -> Sample:
    resized = dataclasses.replace(sample(3), sha256="0" * 64)  # of the source, which was larger
    with ShardWriter(tmp_path / "train-00000.tar") as writer:
        for each in (sample(1), resized, sample(2)):
            writer.add(each)
    config = {"short_side": 40}
    Manifest(source="x", shards=[writer.info], pairs_listed=6, pairs_present=6, resized=1, config=config).save(tmp_path)
    return resized


def test_one_flipped_bit_in_a_resized_picture_is_named(tmp_path, with_resized, quick):
    assert found(tmp_path) == []
    entry = entries(tmp_path, "train-00000.tar")[1]
    flip(tmp_path / "train-00000.tar", entry["image_offset"] + entry["image_size"] // 2)
    assert [key for _, key, _ in found(tmp_path)] == [None, with_resized.key]
    done = repaired(tmp_path)
    assert (done.dropped, done.unproven) == (1, 0)


def test_without_an_index_a_resized_picture_is_kept_if_it_decodes_and_that_is_said(tmp_path, with_resized, quick):
    edited(tmp_path, lambda m: m["shards"][0].update(sha256="0" * 64))
    (tmp_path / "train-00000.idx").unlink()
    done = repaired(tmp_path)
    assert (done.dropped, done.unproven) == (0, 1)
    assert list(samples_of(tmp_path)) == [sample(1).key, with_resized.key, sample(2).key]


# --- damage of shards


@pytest.mark.parametrize("with_index", [True, False])
def test_a_tar_cut_in_the_middle_keeps_what_lies_before_the_cut(folder, quick, with_index):
    before, place = samples_of(folder), entries(folder)[3]
    lost = keys(folder)[3:]
    os.truncate(folder / MIDDLE, place["image_offset"] + 10)
    if not with_index:
        (folder / MIDDLE).with_suffix(".idx").unlink()
    faults = found(folder)
    assert any("cut short in" in what for _, _, what in faults)
    if with_index:
        assert {k for _, k, _ in faults} == {None, *lost}
    assert repaired(folder).dropped == 2
    assert found(folder, decode=1.0) == []
    assert samples_of(folder) == {k: s for k, s in before.items() if k not in lost}


def test_a_missing_tar_is_named_and_its_shard_goes(folder, quick):
    before = samples_of(folder)
    lost = keys(folder)
    (folder / MIDDLE).unlink()
    assert found(folder) == [(MIDDLE, None, "the tar is missing")]
    done = repaired(folder)
    assert (done.lost, done.dropped) == ([MIDDLE], 5)
    assert found(folder) == []
    assert not (folder / MIDDLE).with_suffix(".idx").exists()
    manifest = Manifest.load(folder)
    assert [info.name for info in manifest.shards] == ["train-00000.tar", "train-00002.tar"]
    assert manifest.dropped == {LOST: 5}
    assert samples_of(folder) == {k: s for k, s in before.items() if k not in lost}


@pytest.mark.parametrize("content", [b"", b"no tar at all", bytes(10_240)])
def test_a_tar_that_holds_nothing_is_lost(folder, quick, content):
    (folder / MIDDLE).write_bytes(content)
    assert any("bytes, the manifest says" in what for _, _, what in found(folder))
    assert repaired(folder).lost == [MIDDLE]
    assert found(folder) == []


def no_index(folder):
    (folder / MIDDLE).with_suffix(".idx").unlink()


def torn_index(folder):
    path = (folder / MIDDLE).with_suffix(".idx")
    path.write_bytes(path.read_bytes()[:-100])


def foreign_index(folder):
    (folder / MIDDLE).with_suffix(".idx").write_bytes((folder / "train-00000.idx").read_bytes())


def shifted_index(folder):
    path = (folder / MIDDLE).with_suffix(".idx")
    table = pq.read_table(path)
    place = table.column_names.index("image_offset")
    shifted = [value + (512 if row == 2 else 0) for row, value in enumerate(table.column(place).to_pylist())]
    pq.write_table(table.set_column(place, "image_offset", [shifted]), path)


def other_objects_in_index(folder):
    path = (folder / MIDDLE).with_suffix(".idx")
    table = pq.read_table(path)
    place = table.column_names.index("objects.pos")
    lists = table.column(place).to_pylist()
    lists[2] = [["unicorn"], []]
    pq.write_table(table.set_column(place, "objects.pos", [lists]), path)


def short_index(folder):
    path = (folder / MIDDLE).with_suffix(".idx")
    pq.write_table(pq.read_table(path).slice(0, 4), path)


def reversed_index(folder):
    path = (folder / MIDDLE).with_suffix(".idx")
    pq.write_table(pq.read_table(path).take([4, 3, 2, 1, 0]), path)


@pytest.mark.parametrize(
    ("damage", "row", "says"),
    [
        (no_index, None, "the index is missing"),
        (torn_index, None, "the index cannot be read"),
        (foreign_index, None, "the index is of another shard: none of its 6 keys is in the tar"),
        (shifted_index, 2, "the index has another image_offset"),
        (other_objects_in_index, 2, "JSON and index disagree about objects of pos"),
        (short_index, 4, "is not in the index"),
        (reversed_index, None, "the index has the samples in another order than the tar"),
    ],
)
def test_a_wrong_index_is_named_and_made_again_from_the_tar(folder, quick, damage, row, says):
    before = contents(folder)
    key = None if row is None else keys(folder)[row]
    damage(folder)
    ((shard, k, what),) = found(folder)
    assert (shard, k) == (MIDDLE, key)
    assert says in what
    assert repaired(folder).dropped == 0
    assert found(folder) == []
    after = contents(folder)
    assert [name for name in before if after[name] != before[name]] == []


def test_features_of_the_index_survive_a_repair(tmp_path, quick):
    with ShardWriter(tmp_path / "train-00000.tar") as writer:
        for number in range(4):
            writer.add(sample(number), {"words": 10 + number})
    Manifest(source="x", shards=[writer.info], pairs_listed=8, pairs_present=8).save(tmp_path)
    flip(tmp_path / "train-00000.tar", entries(tmp_path, "train-00000.tar")[1]["image_offset"])
    repaired(tmp_path)
    assert [row["feature.words"] for row in entries(tmp_path, "train-00000.tar")] == [10, 12, 13]


def test_damage_without_an_index_is_survived_by_what_stands_after_it(folder, quick):
    before, all_keys = samples_of(folder), keys(folder)
    in_image_header(folder, 1)
    in_json_header(folder, 3)
    no_index(folder)
    assert repaired(folder).dropped == 2
    assert samples_of(folder) == {k: s for k, s in before.items() if k not in (all_keys[1], all_keys[3])}


# --- keys


def test_a_key_twice_in_a_shard_is_named_and_kept_once(tmp_path, quick):
    with ShardWriter(tmp_path / "train-00000.tar") as writer:
        for number in (1, 2, 1):
            writer.add(sample(number))
    Manifest(source="x", shards=[writer.info], pairs_listed=6, pairs_present=6).save(tmp_path)
    faults = found(tmp_path)
    assert ("train-00000.tar", sample(1).key, "the key occurs twice in this shard") in faults
    assert repaired(tmp_path).dropped == 1
    assert found(tmp_path) == []
    assert keys(tmp_path, "train-00000.tar") == [sample(1).key, sample(2).key]


def test_a_key_in_two_shards_is_named_and_the_first_whole_one_is_kept(tmp_path, quick):
    infos = []
    for shard, numbers in enumerate(((1, 2), (3, 1), (1, 4), (1,))):
        with ShardWriter(tmp_path / f"train-{shard:05d}.tar") as writer:
            for number in numbers:
                writer.add(sample(number))
        infos.append(writer.info)
    Manifest(source="x", shards=infos, pairs_listed=14, pairs_present=14).save(tmp_path)
    key = sample(1).key
    assert found(tmp_path) == [(f"train-0000{n}.tar", key, "train-00000.tar has the key, too") for n in (1, 2, 3)]
    flip(tmp_path / "train-00000.tar", entries(tmp_path, "train-00000.tar")[0]["image_offset"])  # the first is no use
    done = repaired(tmp_path)
    assert (done.dropped, done.lost) == (3, ["train-00003.tar"])
    assert found(tmp_path) == []
    assert sorted(samples_of(tmp_path)) == sorted(sample(n).key for n in range(1, 5))
    assert keys(tmp_path, "train-00001.tar") == [sample(3).key, key]


# --- the manifest


def edited(folder, change):
    path = folder / "manifest.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def test_a_wrong_count_in_the_manifest_is_named_and_set_right_without_a_loss(folder, quick):
    edited(folder, lambda m: m["shards"][1].update(samples=6))
    faults = found(folder)
    assert (MIDDLE, None, "5 samples in the tar, the manifest says 6") in faults
    assert ("manifest.json", None, "its totals are not the sums over its shards") in faults
    assert repaired(folder).dropped == 0
    assert found(folder) == []
    assert Manifest.load(folder).totals()["train"]["samples"] == 18


def test_wrong_captions_and_pairs_in_the_manifest_are_named(folder):
    edited(folder, lambda m: (m["shards"][1].update(captions=9), m.update(pairs_present=99)))
    whats = [what for _, _, what in found(folder)]
    assert "10 captions in the tar, the manifest says 9" in whats
    assert any(what.startswith("says 99 pairs are present, its shards have 35 captions") for what in whats)
    assert any(what.startswith("lists 38 pairs, fewer than are present") for what in whats)


def test_a_manifest_that_leads_out_of_the_folder_is_refused(folder):
    edited(folder, lambda m: m["shards"][1].update(name="../other.tar"))
    with pytest.raises(InputError, match=r"names of shards in the folder, found '\.\./other\.tar'"):
        verdict(folder)


def test_a_checksum_alone_that_differs_is_named_and_taken_as_it_is(folder, quick):
    edited(folder, lambda m: m["shards"][1].update(sha256="0" * 64))
    before = (folder / MIDDLE).read_bytes()
    assert found(folder) == [(MIDDLE, None, "the tar's checksum is not the manifest's")]
    done = repaired(folder)
    assert (done.rewritten, done.dropped) == ([], 0)
    assert (folder / MIDDLE).read_bytes() == before
    assert found(folder) == []


def test_what_lies_beside_the_shards_is_named_and_left_alone(folder, monkeypatch, capsys):
    for name in ("train-00009.tar", "mine.idx", ".train-00003.77.partial.tar", "notes.txt"):
        (folder / name).write_text("x")
    (folder / ".parts").mkdir()
    status, result = run(monkeypatch, capsys, folder)
    assert (status, result["faults"]) == (0, [])
    assert result["notes"][:4] == [
        "mine.idx is not in the manifest",
        "train-00009.tar is not in the manifest",
        ".train-00003.77.partial.tar is left over from a job that was killed",
        ".parts is left over from an unfinished command",
    ]
    assert not any("notes.txt" in note for note in result["notes"])


def test_a_missing_folder_of_class_directories_is_a_fault_that_repair_does_not_mend(folder, quick, monkeypatch, capsys):
    edited(folder, lambda m: m.update(config={"class_folders": ["zeroshot"]}))
    assert found(folder) == [("zeroshot", None, "the folder of class directories is missing")]
    status, result = run(monkeypatch, capsys, folder, "--repair", "True")
    assert (status, result["ok"]) == (1, False)


# --- the command


def test_the_command_says_each_fault_and_repairs_on_request(folder, monkeypatch, capsys, tmp_path):
    key = keys(folder)[2]
    in_image(folder, 2)
    status, result = run(monkeypatch, capsys, folder)
    assert (status, result["ok"]) == (1, False)
    assert {"shard": MIDDLE, "key": key, "what": "the picture's bytes are not those that were written"} in result[
        "faults"
    ]

    file = tmp_path / "result.json"
    monkeypatch.setattr(
        "sys.argv", ["verify", str(folder), "--json", str(file), "--repair", "True", "--processes", "1"]
    )
    with pytest.raises(SystemExit) as ended:
        verify_module.main()
    assert ended.value.code == 0
    said = capsys.readouterr()
    assert said.out == ""
    assert f"{MIDDLE}: {key}: the picture's bytes are not those that were written" in said.err
    assert "1 shards written anew, 0 lost, 1 samples dropped" in said.err
    result = json.loads(file.read_text())
    assert result["repaired"] == {"rewritten": [MIDDLE], "lost": [], "dropped": 1, "unproven": 0}

    assert run(monkeypatch, capsys, folder)[0] == 0
    assert read_objects(folder).num_captions == 2 * 17
    assert "dropped by repair (damaged sample)" in (folder / "report.html").read_text()
    before = contents(folder)
    assert run(monkeypatch, capsys, folder, "--repair", "True")[0] == 0  # nothing is left to do
    assert contents(folder) == before


@pytest.mark.parametrize(
    "arguments", [["--decode", "2"], ["--decode", "some"], ["--processes", "-1"], ["--unknown", "1"]]
)
def test_wrong_usage_ends_with_status_2(folder, arguments, monkeypatch):
    monkeypatch.setattr("sys.argv", ["verify", str(folder), *arguments])
    with pytest.raises(SystemExit) as ended:
        verify_module.main()
    assert ended.value.code == 2


def test_a_folder_without_a_manifest_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["verify", str(tmp_path)])
    with pytest.raises(InputError, match="expected shards with a manifest"):
        verify_module.main()


def test_a_repair_that_would_leave_nothing_changes_nothing(folder, quick):
    for info in Manifest.load(folder).shards:
        (folder / info.name).write_bytes(b"gone")
    before = contents(folder)
    with pytest.raises(InputError, match="found none in any of 3 shards; nothing was changed"):
        repaired(folder)
    assert contents(folder) == before


def test_a_shard_that_the_system_does_not_let_us_read_is_not_taken_for_lost(folder, quick):
    (folder / MIDDLE).unlink()
    (folder / MIDDLE).mkdir()
    ((shard, key, what),) = found(folder)
    assert (shard, key) == (MIDDLE, None)
    assert what.startswith("cannot be read: ")
    with pytest.raises(InputError, match="which says nothing about what they hold"):
        repaired(folder)


class Killed(BaseException):
    """Not an error: nothing in between may catch it."""


@pytest.mark.slow
def test_a_repair_that_is_killed_anywhere_and_started_again_ends_the_same(tmp_path, quick, monkeypatch):
    def damaged(name):
        folder = write_shards(tmp_path / name, SIZES)
        in_image(folder, 1)
        in_image_header(folder, 3)
        flip(folder / "train-00002.tar", entries(folder, "train-00002.tar")[5]["json_offset"])
        (folder / "train-00000.tar").unlink()
        return folder

    undisturbed = damaged("undisturbed")
    assert repaired(undisturbed).dropped == 8
    real_replace, real_unlink = os.replace, os.unlink
    step = 0
    while True:
        folder = damaged(f"killed-{step}")
        steps = iter(range(1_000))

        def dies(function, steps=steps, step=step):
            def call(*arguments, **options):
                if next(steps) == step:
                    raise Killed
                return function(*arguments, **options)

            return call

        with monkeypatch.context() as patch:
            patch.setattr(files.os, "replace", dies(real_replace))
            patch.setattr("pathlib.os.unlink", dies(real_unlink))
            try:
                repaired(folder)
                break
            except Killed:
                pass
        (folder / ".train-00001.99.partial.tar").write_text("half")  # what a real kill leaves
        repaired(folder)
        assert contents(folder) == contents(undisturbed)
        assert found(folder, decode=1.0) == []
        step += 1
    assert step >= 7  # two tars with their indices, statistics, manifest, and files of the lost shard


def test_tars_that_we_write_are_walked_as_tarfile_walks_them(folder):
    with tarfile.open(folder / MIDDLE) as tar:
        names = tar.getnames()
    assert names == [f"{key}.{ext}" for key in keys(folder) for ext in ("jpg", "txt", "json")]
