"""CC3M, CC12M and YFCC15M as tars: pairs present of pairs published, in each layout in which people have them."""

import json
import pickle
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from img2dataset_material import count_samples, dropped, read_all, records, write_members, write_shard
from material import picture

from data_prep.run import prepare
from data_prep.sources import corpora, tars
from data_prep.sources.corpora import CorpusConfig, YfccConfig
from data_prep.sources.untrusted import NOT_DOWNLOADED
from setclip.errors import InputError
from setclip.shards import Shard


def config(tmp_path: Path, *places: object, **settings) -> CorpusConfig:
    return CorpusConfig(out=tmp_path / "out", tars=tuple(map(str, places)), **settings)


def write_status(folder: Path, rows: list[tuple[str, str | None]]) -> None:
    """Writes status.parquet with the columns that data_prep.fetch gives it."""
    table = {
        "row": list(range(len(rows))),
        "id": [None] * len(rows),
        "url": [f"https://example.org/{n}.jpg" for n in range(len(rows))],
        "status": [status for status, _ in rows],
        "reason": [None if status == "success" else "http_404" for status, _ in rows],
        "message": [None] * len(rows),
        "attempts": [1] * len(rows),
        "tar": [tar for _, tar in rows],
        "key": [None if tar is None else f"{n:09d}" for n, (_, tar) in enumerate(rows)],
    }
    pq.write_table(pa.table(table), folder / "status.parquet")


def write_ready_made(path: Path, numbers: range, with_json: bool = True) -> Path:
    """Writes a tar as pixparse's are: nine digits, jpg, json (not in CC3M's validation split), txt."""
    members = []
    for n in numbers:
        caption = f"a dog number {n}"
        entries = {
            "caption": caption,
            "url": f"https://example.org/{n}",
            "key": f"{n:09d}",
            "status": "success",
            "error_message": None,
            "width": 40,
            "height": 40,
            "exif": "{}",
            "original_width": 80,
            "original_height": 80,
        }
        members += [(f"{n:09d}.jpg", picture(n))]
        members += [(f"{n:09d}.json", json.dumps(entries).encode())] if with_json else []
        members += [(f"{n:09d}.txt", caption.encode())]
    return write_members(path, members)


def test_the_published_numbers_of_pairs_are_the_lists_lengths():
    assert {name: dict(corpus.pairs) for name, corpus in corpora.CORPORA.items()} == {
        "cc3m": {"train": 3_318_333, "val": 15_840},
        "cc12m": {"train": 12_423_374},
        "yfcc15m-clip": {"train": 14_829_396},
        "yfcc15m-declip": {"train": 15_388_848},
    }


def test_a_folder_of_img2dataset_accounts_for_every_row_of_its_list(tmp_path):
    write_shard(tmp_path / "raw", 0, 6, failed=[1, 4])
    write_shard(tmp_path / "raw", 1, 5, failed=range(5))  # nothing came
    write_shard(tmp_path / "raw", 2, 4)
    made = corpora.plan_cc12m(config(tmp_path, tmp_path / "raw"))
    items = read_all(made.units)
    assert (len(records(items)), count_samples(items)) == (8, 15)
    assert dropped(items) == [(NOT_DOWNLOADED, "absent", 2, 2), (NOT_DOWNLOADED, "absent", 5, 5)]
    assert (made.pairs_listed, made.warnings) == (12_423_374, [])
    assert "Conceptual 12M" in made.credits[0]


def test_the_manifest_says_how_many_of_the_published_pairs_are_present(tmp_path):
    write_shard(tmp_path / "raw", 0, 6, failed=[1, 4])
    manifest = prepare("cc12m", config(tmp_path, tmp_path / "raw", processes=1))
    assert (manifest.pairs_present, manifest.pairs_listed) == (4, 12_423_374)
    assert manifest.dropped == {NOT_DOWNLOADED: 2}
    (sample, *_) = Shard(tmp_path / "out" / manifest.shards[0].name)
    assert sample.image == picture(0)
    assert sample.url == "https://example.org/0/0.jpg"
    assert sample.extra == {"source_key": "000000000", "original_width": 80, "original_height": 120}


def test_a_fetched_pair_that_failed_first_and_came_later_counts_once(tmp_path):
    raw = tmp_path / "raw"
    write_shard(raw / "attempt-1", 0, 4, failed=[1, 3])
    write_shard(raw / "attempt-1", 1, 2, failed=[0, 1])
    write_shard(raw / "attempt-2", 0, 4, failed=[0, 2, 3])  # of four that failed, one came
    first, second = "attempt-1/00000.tar", "attempt-2/00000.tar"
    rows = [
        ("success", first),
        ("success", second),
        ("success", first),
        ("failed", None),
        ("failed", None),
        ("failed", None),
    ]
    write_status(raw, [*rows, ("not tried", None)])
    made = corpora.plan_cc3m(config(tmp_path, raw))
    items = read_all(made.units)
    assert [unit.name for unit in made.units] == [str(raw / name) for name in (first, second, "status.parquet")]
    assert len(records(items)) == 3
    assert dropped(items) == [(NOT_DOWNLOADED, "absent", 4, 4)]
    assert count_samples(items) == 7
    assert made.pairs_listed == 7
    assert made.warnings == ["cc3m was published with 3,318,333 pairs; the list that was fetched has 7, which count"]
    assert pickle.loads(pickle.dumps(made.units))
    # A list of one's own, which no corpus's name fits, is counted alike.
    plain = tars.plan(tars.TarsConfig(out=tmp_path / "out", tars=(str(raw),)))
    assert [unit.name for unit in plain.units] == [unit.name for unit in made.units]
    assert dropped(read_all(plain.units)) == dropped(items)
    assert (plain.pairs_listed, plain.warnings) == (None, [])


def test_tars_of_an_attempt_under_way_are_left_out_and_named(tmp_path):
    raw = tmp_path / "raw"
    write_shard(raw / "attempt-1", 0, 2, failed=[1])
    write_status(raw, [("success", "attempt-1/00000.tar"), ("failed", None)])
    write_shard(raw / "attempt-2", 0, 1)
    made = corpora.plan_cc3m(config(tmp_path, raw))
    assert count_samples(read_all(made.units)) == 2
    assert "1 tars in" in made.warnings[0]
    assert "are of no finished attempt and are left out: attempt-2/00000.tar" in made.warnings[0]


def test_a_fetched_tar_that_is_missing_or_a_download_without_table_is_refused(tmp_path):
    raw = tmp_path / "raw"
    write_shard(raw / "attempt-1", 0, 1)
    with pytest.raises(InputError, match=r"expected status\.parquet beside the attempts .*finish the download"):
        corpora.plan_cc3m(config(tmp_path, raw))
    write_status(raw, [("success", "attempt-1/00000.tar"), ("success", "attempt-1/00001.tar")])
    with pytest.raises(InputError, match=r"expected the 2 tars .* found 1; missing: attempt-1/00001\.tar"):
        corpora.plan_cc3m(config(tmp_path, raw))
    (raw / "status.parquet").write_bytes(b"PAR1 broken")
    with pytest.raises(InputError, match=r"expected the table of a download at .*status\.parquet"):
        corpora.plan_cc3m(config(tmp_path, raw))
    pq.write_table(pa.table({"row": [1]}), raw / "status.parquet")
    with pytest.raises(InputError, match=r"expected columns `status` and `tar` in .*found row"):
        corpora.plan_cc3m(config(tmp_path, raw))


def test_ready_made_tars_give_both_splits_and_name_what_is_missing(tmp_path):
    folder = tmp_path / "cc3m-wds"
    train = [write_ready_made(folder / f"cc3m-train-000{n}.tar", range(3 * n, 3 * n + 3)) for n in range(2)]
    val = write_ready_made(folder / "cc3m-validation-0000.tar", range(100, 102), with_json=False)
    names = {"train": [path.name for path in train] + ["cc3m-train-0002.tar"], "validation": [val.name]}
    info = {"name": "cc3m", "splits": {split: {"name": split, "filenames": names[split]} for split in names}}
    (folder / "_info.json").write_text(json.dumps(info))
    made = corpora.plan_cc3m(config(tmp_path, folder))
    assert [unit.split for unit in made.units] == ["train", "train", "val"]
    assert made.pairs_listed == 3_318_333 + 15_840
    assert made.warnings == [f"1 of 4 tars of {folder / '_info.json'} are missing: cc3m-train-0002.tar"]
    items = read_all(made.units)
    assert len(records(items)) == len(items) == 8
    assert items[0].extra == {"source_key": "000000000", "original_width": 80, "original_height": 80}
    assert items[0].url == "https://example.org/0"
    assert (items[-1].url, items[-1].captions) == (None, ["a dog number 101"])  # CC3M's validation has no JSON


def test_the_validation_split_alone_is_compared_with_its_own_number(tmp_path):
    write_ready_made(tmp_path / "in" / "cc3m-validation-0000.tar", range(2), with_json=False)
    assert corpora.plan_cc3m(config(tmp_path, tmp_path / "in")).pairs_listed == 15_840
    forced = corpora.plan_cc3m(config(tmp_path, tmp_path / "in", split="mine"))
    assert (forced.pairs_listed, forced.units[0].split) == (3_318_333, "mine")


def test_an_info_file_of_another_kind_is_said(tmp_path):
    write_ready_made(tmp_path / "in" / "00000.tar", range(1))
    (tmp_path / "in" / "_info.json").write_text("[1]")
    assert "was not checked" in corpora.plan_cc12m(config(tmp_path, tmp_path / "in")).warnings[0]


@pytest.mark.parametrize(
    ("plan", "raw", "clean"),
    [
        (corpora.plan_yfcc15m_clip, "Sunset+at%20sea&lt;3 <b>bold</b>", "Sunset at sea<3 bold"),
        (corpora.plan_yfcc15m_declip, " 1+1 %20\n sea ", "1+1 %20 sea"),
    ],
)
def test_texts_of_foreign_yfcc_tars_are_cleaned_only_when_asked_for(tmp_path, plan, raw, clean):
    write_members(tmp_path / "in" / "00000.tar", [("a.jpg", picture(1)), ("a.txt", raw.encode())])
    places = (str(tmp_path / "in"),)
    for asked, expected in ((False, raw), (True, clean)):
        made = plan(YfccConfig(out=tmp_path / "out", tars=places, clean_captions=asked))
        (record,) = pickle.loads(pickle.dumps(made.units[0])).read()
        assert record.captions == [expected]
