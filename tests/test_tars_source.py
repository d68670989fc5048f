"""WebDataset tars of all kinds: what is read, what is refused and counted, and what damage costs."""

import gzip
import itertools
import json
import os
import pickle
import random
import tarfile
from collections import Counter
from pathlib import Path

import pytest
from img2dataset_material import count_samples, dropped, read_all, records, write_members, write_shard
from material import picture, write_shards
from webdataset.tariterators import group_by_keys, tar_file_expander

from data_prep.plan import Dropped
from data_prep.sources import tars, untrusted
from data_prep.sources.places import find_gaps, split_of
from data_prep.sources.tars import CUT_SHORT, DAMAGED, JOINED, OUTSIDE, REPEATED, TarsConfig, plan, read_tar
from setclip.errors import InputError
from setclip.tar_reader import DamagedTarError, iterate_members


def config(tmp_path: Path, *places: object, **settings) -> TarsConfig:
    return TarsConfig(out=tmp_path / "out", tars=tuple(map(str, places)), **settings)


def whole(name: str, number: int = 1, caption: str = "a dog") -> list[tuple[str, bytes]]:
    return [(f"{name}.jpg", picture(number)), (f"{name}.txt", caption.encode())]


def read(path: Path, **settings) -> list:
    return list(read_tar(str(path), **settings))


# --- what is read


def test_a_tar_of_img2dataset_gives_bytes_captions_urls_and_origin(tmp_path):
    write_shard(tmp_path / "raw", 0, 3, row={0: 70, 1: 71, 2: 72}, id={0: "a", 1: "b", 2: "c"})
    made = plan(config(tmp_path, tmp_path / "raw"))
    assert (made.warnings, made.pairs_listed, [unit.split for unit in made.units]) == ([], None, ["train"])
    items = list(made.units[0].read())
    assert [item.image for item in items] == [picture(n) for n in range(3)]
    assert [item.captions for item in items] == [[f"a dog number {n} of shard 0"] for n in range(3)]
    assert items[1].url == "https://example.org/0/1.jpg"
    assert items[1].extra == {
        "source_key": "000000001",
        "row": 71,
        "id": "b",
        "original_width": 80,
        "original_height": 120,
    }


def test_our_own_shards_read_back_with_all_captions(tmp_path):
    write_shards(tmp_path / "mine", sizes=(5, 3))
    made = plan(config(tmp_path, tmp_path / "mine"))
    items = read_all(made.units)
    assert len(items) == 8
    assert [len(item.captions) for item in items] == [2] * 8
    assert items[0].image == picture(0)
    assert items[0].extra.keys() == {"source_key"}


def test_samples_are_grouped_as_webdataset_groups_them(tmp_path):
    members = []
    for folder, name in itertools.product(("", "./part/", "deep/er/"), ("a", "b-1", "c_2")):
        members += [
            (f"{folder}{name}.{ext}", data) for ext, data in (("jpg", picture(1)), ("txt", b"a dog"), ("cls", b"3"))
        ]
    members += [("d.seg.png", b"mask"), ("d.jpg", picture(2)), ("d.txt", b"a cat"), (".hidden.jpg", b"x")]
    path = write_members(tmp_path / "a.tar", members)
    with open(path, "rb") as file:
        theirs = [
            (sample["__key__"].removeprefix("./"), sample["jpg"], sample["txt"].decode())
            for sample in group_by_keys(tar_file_expander([{"url": "a.tar", "stream": file}]))
            if "jpg" in sample
        ]
    ours = [(record.name, record.image, record.captions[0]) for record in read(path)]
    assert ours == theirs
    assert len(ours) == 10


def test_captions_come_from_the_json_before_the_txt_and_from_the_keys_that_are_named(tmp_path):
    def entry(name: str, text: bytes | None, **entries) -> list[tuple[str, bytes]]:
        return [
            (f"{name}.jpg", picture(1)),
            *([(f"{name}.txt", text)] if text is not None else []),
            (f"{name}.json", json.dumps(entries).encode()),
        ]

    path = write_members(
        tmp_path / "a.tar",
        [
            *entry("a", b"short", captions=["one", "two"], caption="three"),
            *entry("b", b"txt", caption="json"),
            *entry("c", b"txt", caption=None),
            *entry("d", b"txt", caption=" "),
            *entry("e", None, TEXT="alt text"),
            *entry("f", b"txt", recaption="long", caption="json"),
            *entry("g", b"", caption=None),
        ],
    )
    assert [item.captions for item in read(path)] == [
        ["one", "two"],
        ["json"],
        ["txt"],
        ["txt"],
        ["alt text"],
        ["json"],
        [""],  # the packer counts captions that are empty
    ]
    named = read(path, caption_keys=("recaption", "caption"))
    assert [item.captions for item in records(named)] == [["three"], ["json"], ["txt"], ["txt"], ["long"], [""]]
    assert dropped(named) == [(untrusted.NO_CAPTION, "bad", 1, 1)]  # e has no entry of these names


def test_json_of_another_kind_leaves_the_txt(tmp_path):
    path = write_members(tmp_path / "a.tar", [*whole("a"), ("a.json", b'[{"box": [0, 0, 4, 4]}]')])
    assert read(path)[0].captions == ["a dog"]


def test_units_can_be_sent_to_other_processes(tmp_path):
    write_shard(tmp_path, 0, 2)
    (unit,) = plan(config(tmp_path, tmp_path)).units
    assert list(pickle.loads(pickle.dumps(unit)).read()) == list(unit.read())


# --- which files


def test_folders_files_patterns_and_globs_give_the_same_units(tmp_path):
    for shard in (0, 1, 2):
        write_shard(tmp_path / "in", shard, 1)
    folder = tmp_path / "in"
    names = [str(folder / f"{n:05d}.tar") for n in range(3)]
    for places in (
        [folder],
        names,
        [folder / "{00000..00002}.tar"],
        [folder / "*.tar"],
        [folder / "0000{0,1}.tar", names[2]],
    ):
        assert [unit.name for unit in plan(config(tmp_path, *places)).units] == names
    twice = plan(config(tmp_path, folder, names[1]))
    assert [unit.name for unit in twice.units] == names
    assert twice.warnings == ["1 files were given twice; each is read once"]


def test_a_pattern_names_every_file_that_is_missing(tmp_path):
    write_shard(tmp_path, 1, 1)
    with pytest.raises(
        InputError, match=r"expected 15 files of .*found 1; missing: .*00000\.tar, .*00002\.tar.* and 4 more"
    ):
        plan(config(tmp_path, tmp_path / "{00000..00014}.tar"))


@pytest.mark.parametrize(
    ("place", "found"),
    [
        ("nowhere", "found nothing at .*nowhere; mend --tars"),
        ("*.tar", "expected files that fit .*found none"),
        ("{0..3.tar", "expected a pattern such as"),
        ("{0..99999999}.tar", "at most 1,000,000 files"),
        ("", "expected .tar files in .*found 1 compressed ones"),
    ],
)
def test_a_place_without_tars_is_named(tmp_path, place, found):
    (tmp_path / "a.tar.gz").write_bytes(gzip.compress(b"x"))
    with pytest.raises(InputError, match=found):
        plan(config(tmp_path, tmp_path / place))


def test_hidden_files_and_unfinished_downloads_are_passed_over(tmp_path):
    write_shard(tmp_path / "in", 0, 1)
    write_shard(tmp_path / "in" / ".cache", 1, 1)
    (tmp_path / "in" / "00001.tar.incomplete").write_bytes(b"")
    (tmp_path / "in" / "loop").symlink_to(tmp_path / "in")
    assert len(plan(config(tmp_path, tmp_path / "in")).units) == 1


def test_numbers_missing_in_a_series_are_named_up_to_a_length(tmp_path):
    def gaps(*names: str) -> list[str]:
        return find_gaps(Path("in") / name for name in names)

    assert gaps("00000.tar", "00001.tar", "other.tar") == []
    assert gaps("a-1.tar", "a-2.tar") == []  # some count from 1
    assert gaps("00000.tar", "00003.tar", "00004.tar", "00006.tar") == [
        "in: missing in the series NNNNN.tar: 00001–00002, 00005 (3 in all)"
    ]
    assert gaps("cc-0003.tar") == ["in: missing in the series cc-NNNN.tar: 0000–0002 (3 in all)"]
    assert gaps("t-00000-of-00003.parquet", "t-00001-of-00003.parquet") == [
        "in: missing in the series t-NNNNN-of-00003.parquet: 00002 (1 in all)"
    ]
    (long,) = gaps(*(f"{n}.tar" for n in range(0, 2000, 2)))
    assert long.endswith("and 989 more ranges (999 in all)")
    write_shard(tmp_path, 0, 1)
    write_shard(tmp_path, 2, 1)
    assert plan(config(tmp_path, tmp_path)).warnings == [
        f"{tmp_path}: missing in the series NNNNN.tar: 00001 (1 in all)"
    ]


@pytest.mark.parametrize(
    ("path", "split"),
    [
        ("in/cc3m-train-0000.tar", "train"),
        ("in/cc3m-validation-0000.tar", "val"),
        ("in/val_00001.tar", "val"),
        ("in/validation/00001.tar", "val"),
        ("in/test/part/00001.tar", "test"),
        ("in/test/train-00001.tar", "train"),
        ("in/test-00000-of-00010.parquet", "test"),
        ("in/valley-00001.tar", None),
        ("in/my-test-photos-00001.tar", None),
        ("in/00001.tar", None),
        ("test/in/00001.tar", None),  # above the folder that was given
    ],
)
def test_the_split_is_what_the_name_or_folder_says(path, split):
    assert split_of(Path(path), Path("test/in") if path.startswith("test") else Path("in")) == split


def test_units_of_a_split_stand_together_and_split_can_be_forced(tmp_path):
    for name in ("a/00000.tar", "test/00000.tar", "z/00000.tar"):
        write_members(tmp_path / "in" / name, whole("a"))
    made = plan(config(tmp_path, tmp_path / "in"))
    assert [unit.split for unit in made.units] == ["train", "train", "test"]
    forced = plan(config(tmp_path, tmp_path / "in", split="held_out"))
    assert {unit.split for unit in forced.units} == {"held_out"}
    with pytest.raises(InputError, match=r"expected letters, digits and _ in --split, found '\.\./up'"):
        config(tmp_path, tmp_path / "in", split="../up")


# --- what is refused


def member(name: str, kind: bytes, target: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


NESTED = b'{"caption": ' + b"[" * 200_000 + b"]" * 200_000 + b"}"


@pytest.mark.parametrize(
    ("members", "reason"),
    [
        ([("/etc/a.jpg", b"x"), ("/etc/a.txt", b"x")], OUTSIDE),
        ([("../a.jpg", b"x"), ("../a.txt", b"x")], OUTSIDE),
        ([("in/../../a.jpg", b"x"), ("in/../../a.txt", b"x")], OUTSIDE),
        ([member("a.jpg", tarfile.SYMTYPE, "/etc/passwd"), ("a.txt", b"x")], untrusted.NO_IMAGE),
        ([member("a.jpg", tarfile.LNKTYPE, "good.jpg"), ("a.txt", b"x")], untrusted.NO_IMAGE),
        ([member("a.jpg", tarfile.CHRTYPE), ("a.txt", b"x")], untrusted.NO_IMAGE),
        ([("a.jpg", picture(1))], untrusted.NO_CAPTION),
        ([("a.jpg", picture(1)), ("a.json", b'{"url": "u"}')], untrusted.NO_CAPTION),
        ([("a.jpg", picture(1)), ("a.json", b'{"captions": []}')], untrusted.NO_CAPTION),
        ([("a.txt", b"a dog")], untrusted.NO_IMAGE),
        ([("a.jpg", picture(1)), ("a.json", b'"' + b"x" * 1_000_000 + b'"')], untrusted.LARGE_JSON),
        ([("a.jpg", picture(1)), ("a.json", NESTED)], untrusted.BAD_JSON),
        ([("a.jpg", picture(1)), ("a.json", b'{"caption": ' + b"9" * 5000 + b"}")], untrusted.BAD_JSON),
        ([("a.jpg", picture(1)), ("a.json", b"\xff\xfe{")], untrusted.BAD_JSON),
        ([("a.jpg", picture(1)), ("a.json", b"")], untrusted.BAD_JSON),
        ([("a.jpg", picture(1)), ("a.txt", b"caf\xe9")], untrusted.BAD_TEXT),
        ([("a.jpg", picture(1)), ("a.txt", b"x" * 1_000_001)], untrusted.LARGE_TEXT),
        ([("a.jpg", picture(1)), ("a.txt", b"a\0dog")], untrusted.NUL),
        ([("a.jpg", picture(1)), ("a.json", b'{"caption": 7}')], untrusted.NOT_TEXT),
    ],
)
def test_each_kind_of_bad_sample_is_counted_by_its_reason(tmp_path, members, reason):
    path = write_members(tmp_path / "a.tar", [*whole("good"), *members, *whole("last")])
    items = read(path)
    assert [record.name for record in records(items)] == ["good", "last"]
    assert dropped(items) == [(reason, "bad", 1, 1)]


def test_single_captions_are_refused_without_the_sample(tmp_path):
    entries = json.dumps({"captions": ["a dog", "a\0cat", None, "a cow"]}).encode()
    items = read(write_members(tmp_path / "a.tar", [("a.jpg", picture(1)), ("a.json", entries)]))
    assert records(items)[0].captions == ["a dog", "a cow"]
    assert dropped(items) == [
        (untrusted.NUL + untrusted.CAPTIONS, "filtered", 1, 0),
        (untrusted.NOT_TEXT + untrusted.CAPTIONS, "filtered", 1, 0),
    ]


def test_an_image_over_the_limit_is_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr(tars, "MAX_IMAGE_BYTES", len(picture(1)) - 1)
    path = write_members(tmp_path / "a.tar", whole("a"))
    assert dropped(read(path)) == [(untrusted.LARGE_IMAGE, "bad", 1, 1)]


def test_what_metadata_claims_is_not_taken_over(tmp_path):
    entries = {"caption": "a dog", "url": ["u"], "key": "k", "objects": {}, "sha256": "0", "width": 9, "row": True}
    entries["id"] = "x" * 201
    path = write_members(tmp_path / "a.tar", [("a.jpg", picture(1)), ("a.json", json.dumps(entries).encode())])
    (record,) = read(path)
    assert (record.url, record.extra) == (None, {"source_key": "a"})


def test_a_name_that_is_no_text_is_spelled_out(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.GNU_FORMAT) as tar:
        for ext, data in (("jpg", picture(1)), ("txt", b"a dog")):
            info = tarfile.TarInfo(f"caf\udce9.{ext}")
            info.size = len(data)
            path = tmp_path / ext
            path.write_bytes(data)
            with open(path, "rb") as file:
                tar.addfile(info, file)
    (record,) = read(tmp_path / "a.tar")
    assert record.name == record.extra["source_key"] == "caf\\xe9"


# --- names that occur twice


def test_of_a_name_that_occurs_twice_the_first_is_kept_wherever_the_second_stands(tmp_path):
    path = write_members(
        tmp_path / "a.tar",
        [
            *whole("a", 1, "first"),
            *whole("a", 2, "at once"),
            *whole("b", 3),
            *whole("a", 4, "later"),
            ("b.jpg", picture(5)),
        ],
    )
    items = read(path)
    assert [(record.name, record.image) for record in records(items)] == [("a", picture(1)), ("b", picture(3))]
    assert records(items)[0].captions == ["first"]
    assert dropped(items) == [(REPEATED, "bad", 1, 1)] * 3


def test_a_member_that_occurs_twice_in_a_sample_costs_a_copy_and_not_the_sample(tmp_path):
    path = write_members(tmp_path / "a.tar", [("a.jpg", picture(1)), ("a.jpg", picture(2)), ("a.txt", b"a dog")])
    items = read(path)
    assert [record.image for record in records(items)] == [picture(1)]
    assert dropped(items) == [(REPEATED, "bad", 1, 1)]


# --- damage


def test_wherever_a_tar_is_cut_all_whole_samples_stay_and_the_loss_is_exact_with_counts(tmp_path):
    tar = write_shard(tmp_path / "in", 0, 6, failed=[1, 4])
    content = tar.read_bytes()
    ends = [m.offset + m.size for m in iterate_members(tar) if m.name.endswith(".txt")]
    # The txt repeats the JSON; only of the first sample can nobody know that it was to come.
    ends[0] = next(m.offset + m.size for m in iterate_members(tar) if m.name.endswith(".json"))
    full = records(read(tar))
    assert len(full) == 4
    end_of_data = -(-ends[-1] // 512) * 512
    for cut in [*range(0, end_of_data, 256), end_of_data]:
        tar.write_bytes(content[:cut])
        items = read(tar)
        kept = sum(end <= cut for end in ends)
        assert records(items) == full[:kept]
        lost = [(CUT_SHORT, "bad", 4 - kept, 4 - kept)] if kept < 4 else []
        assert dropped(items) == [*lost, (untrusted.NOT_DOWNLOADED, "absent", 2, 2)]
        assert count_samples(items) == 6


def test_without_counts_a_cut_is_one_sample_and_the_table_counts_as_well_as_the_statistics(tmp_path):
    tar = write_shard(tmp_path / "in", 0, 6, failed=[1])
    tar.write_bytes(tar.read_bytes()[: tar.stat().st_size // 2])
    kept = len(records(read(tar)))
    assert 0 < kept < 5
    (tmp_path / "in" / "00000_stats.json").unlink()
    assert dropped(read(tar)) == [(CUT_SHORT, "bad", 5 - kept, 5 - kept), (untrusted.NOT_DOWNLOADED, "absent", 1, 1)]
    table = tmp_path / "in" / "00000.parquet"
    table.write_bytes(table.read_bytes()[:-9])  # killed with the tar
    assert dropped(read(tar)) == [(CUT_SHORT, "bad", 1, 1)]


def test_a_damaged_header_costs_what_follows_and_says_so(tmp_path):
    tar = write_shard(tmp_path / "in", 0, 5)
    third = [m for m in iterate_members(tar) if m.name.endswith(".jpg")][2]
    content = bytearray(tar.read_bytes())
    content[third.offset - 512 : third.offset - 500] = b"\xff" * 12
    tar.write_bytes(content)
    items = read(tar)
    assert len(records(items)) == 2
    assert dropped(items) == [(DAMAGED, "bad", 3, 3)]


def test_tars_joined_byte_by_byte_are_noticed(tmp_path):
    one = write_members(tmp_path / "a.tar", whole("a")).read_bytes()
    (tmp_path / "a.tar").write_bytes(one + one)
    items = read(tmp_path / "a.tar")
    assert len(records(items)) == 1
    assert dropped(items) == [(JOINED, "bad", 1, 1)]


def test_a_tar_that_vanishes_is_an_error_that_names_it(tmp_path):
    tar = write_shard(tmp_path / "in", 0, 1)
    (unit,) = plan(config(tmp_path, tmp_path / "in")).units
    tar.unlink()
    with pytest.raises(InputError, match=r"expected a readable file at .*00000\.tar, found No such file"):
        list(unit.read())


@pytest.mark.parametrize("content", [b"no tar at all" * 100, gzip.compress(picture(1) * 2)])
def test_what_is_no_tar_is_refused_while_planning_and_while_reading(tmp_path, content):
    (tmp_path / "a.tar").write_bytes(content)
    with pytest.raises(InputError, match=r"at .*a\.tar, found no tar header \(a compressed file\?\)"):
        plan(config(tmp_path, tmp_path))
    with pytest.raises(InputError, match=r"a\.tar"):
        read(tmp_path / "a.tar")


def test_a_folder_where_a_tar_should_be_is_refused(tmp_path):
    (tmp_path / "a.tar").mkdir()
    with pytest.raises(InputError, match=r"a\.tar"):
        read(tmp_path / "a.tar")


@pytest.mark.parametrize(
    "content", ["{", "[]", '{"count": 3}', '{"count": 1, "successes": 2}', '{"count": "9", "successes": 1}']
)
def test_counts_that_make_no_sense_are_an_error(tmp_path, content):
    tar = write_shard(tmp_path, 0, 1)
    (tmp_path / "00000_stats.json").write_text(content)
    with pytest.raises(InputError, match=r"expected img2dataset's counts in .*00000_stats\.json.*move it away"):
        read(tar)


def test_three_hundred_damaged_tars_end_normally_or_with_a_clear_error(tmp_path):
    draw = random.Random(20)
    tar = write_shard(tmp_path / "in", 0, 5)
    for sibling in ("00000_stats.json", "00000.parquet"):
        (tmp_path / "in" / sibling).unlink()
    content = tar.read_bytes()
    headers = [m.offset - 512 for m in iterate_members(tar)]
    results: Counter[str] = Counter()
    for _ in range(300):
        tar.write_bytes(_damaged(content, headers, draw))
        try:
            items = read(tar)
        except InputError:
            results["error"] += 1
            continue
        total, before_last, is_damaged = _counted(tar)
        assert count_samples(items) in (total + is_damaged, before_last + is_damaged)
        assert all(item.pairs >= item.samples for item in items if isinstance(item, Dropped))
        results["damaged" if is_damaged else "whole"] += 1
    assert min(results[name] for name in ("error", "damaged", "whole")) > 5, results


def _damaged(content: bytes, headers: list[int], draw: random.Random) -> bytes:
    data = bytearray(content)
    kind = draw.randrange(6)
    if kind == 0:
        for _ in range(draw.randrange(1, 20)):
            data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    elif kind == 1:
        del data[draw.randrange(len(data)) :]
    elif kind == 2:  # blocks twice
        start = draw.choice(headers)
        data[start:start] = data[start : start + 512 * draw.randrange(1, 8)]
    elif kind == 3:  # a size of another order, in a header that is valid otherwise
        start = draw.choice(headers)
        size = draw.choice(
            [b"77777777777\0", b"00000000000\0", b"\x80" + b"\xff" * 11, b"\xff" * 11 + b"\x10", b"00007777777\0"]
        )
        data[start + 124 : start + 136] = size
        data[start + 148 : start + 156] = b" " * 8
        data[start + 148 : start + 156] = b"%06o\0 " % sum(data[start : start + 512])
    elif kind == 4:  # another type of member
        start = draw.choice(headers)
        data[start + 156] = draw.choice(b"\x000123456789xgLKSVZ")
        data[start + 148 : start + 156] = b" " * 8
        data[start + 148 : start + 156] = b"%06o\0 " % sum(data[start : start + 512])
    else:
        start = draw.choice([0, *headers])
        data[start : start + draw.randrange(1, 512)] = os.urandom(0) or bytes(draw.randrange(256) for _ in range(64))
    return bytes(data)


def _counted(tar: Path) -> tuple[int, int, int]:
    """Returns samples by names alone, the same without the last run of names, and whether the tar is damaged."""
    keys, is_damaged = [], 0
    try:
        for m in iterate_members(tar):
            base, _, extension = m.name.partition(".")
            if base and extension.lower() in ("jpg", "jpeg", "png", "webp", "txt", "json"):
                keys.append((base, extension.lower()))
    except DamagedTarError:
        is_damaged = 1
    runs = [max(Counter(e for _, e in run).values()) for _, run in itertools.groupby(keys, lambda key: key[0])]
    return sum(runs), sum(runs[:-1]), is_damaged
