"""Parquet files with images in their rows: which columns are taken, what is refused, and how files are divided."""

import pickle
import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from img2dataset_material import count_samples, dropped, read_all, records
from material import picture

from data_prep.sources import parquet, untrusted
from data_prep.sources.parquet import DAMAGED, ParquetConfig, plan
from setclip.errors import InputError

HF_IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def hf_images(rows: int) -> pa.Array:
    return pa.array([{"bytes": picture(n), "path": f"{n}.jpg"} for n in range(rows)], HF_IMAGE)


def write(path: Path, columns: dict[str, Any], **settings) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path, **settings)
    return path


def config(tmp_path: Path, *places: object, **settings) -> ParquetConfig:
    return ParquetConfig(out=tmp_path / "out", parquet=tuple(map(str, places)), **settings)


def read(tmp_path: Path, *places: object, **settings) -> list:
    return read_all(plan(config(tmp_path, *places, **settings)).units)


def test_a_file_of_the_hugging_face_kind_gives_bytes_captions_and_splits(tmp_path):
    folder = tmp_path / "data"
    columns = {"image": hf_images(3), "text": ["a dog", "a cat", "a cow"], "url": ["u0", None, "u2"], "id": [7, 8, 9]}
    write(folder / "train-00000-of-00001.parquet", columns)
    write(folder / "validation-00000-of-00002.parquet", columns)
    made = plan(config(tmp_path, folder))
    assert [unit.split for unit in made.units] == ["train", "val"]
    assert made.warnings == [f"{folder}: missing in the series validation-NNNNN-of-00002.parquet: 00001 (1 in all)"]
    items = list(pickle.loads(pickle.dumps(made.units[0])).read())
    assert [item.image for item in items] == [picture(n) for n in range(3)]
    assert [item.captions for item in items] == [["a dog"], ["a cat"], ["a cow"]]
    assert [item.url for item in items] == ["u0", None, "u2"]
    assert items[2].extra == {"source_key": "train-00000-of-00001:2", "id": 9}


@pytest.mark.parametrize("text", [pa.string(), pa.large_string()])
@pytest.mark.parametrize("image", [pa.binary(), pa.large_binary(), HF_IMAGE])
def test_plain_bytes_and_lists_of_captions_are_taken_in_all_their_types(tmp_path, image, text):
    images = hf_images(2) if image == HF_IMAGE else pa.array([picture(0), picture(1)], image)
    columns = {"jpg": images, "captions": pa.array([["one", "two"], ["three"]], pa.list_(text))}
    items = read(tmp_path, write(tmp_path / "a.parquet", columns))
    assert [(item.image, item.captions) for item in items] == [(picture(0), ["one", "two"]), (picture(1), ["three"])]


def test_what_img2dataset_could_not_get_is_absent_and_not_bad(tmp_path):
    columns = {
        "jpg": pa.array([picture(0), None], pa.binary()),
        "txt": ["a dog", None],
        "key": ["000000000", "000000001"],
        "status": ["success", "failed_to_download"],
    }
    items = read(tmp_path, write(tmp_path / "00000.parquet", columns))
    assert dropped(items) == [(untrusted.NOT_DOWNLOADED, "absent", 1, 1)]
    assert records(items)[0].extra == {"source_key": "000000000"}


def test_every_row_is_a_record_or_counted_by_its_reason(tmp_path, monkeypatch):
    monkeypatch.setattr(parquet, "MAX_IMAGE_BYTES", 50_000)
    images = [picture(n) for n in range(8)]
    images[1] = b"x" * 50_001
    texts = ["a dog", "large", None, "x" * 1_000_001, "a\0b", "good", "no image", ""]
    rows = [{"bytes": data, "path": None} for data in images]
    rows[6] = {"bytes": None, "path": "elsewhere.jpg"}
    items = read(tmp_path, write(tmp_path / "a.parquet", {"image": pa.array(rows, HF_IMAGE), "text": texts}))
    assert [record.captions for record in records(items)] == [["a dog"], ["good"], [""]]
    assert [reason for reason, *_ in dropped(items)] == [
        untrusted.LARGE_IMAGE,
        untrusted.NO_CAPTION,
        untrusted.LARGE_TEXT,
        untrusted.NUL,
        untrusted.NO_IMAGE,
    ]
    assert count_samples(items) == 8


def test_a_missing_struct_and_a_text_that_is_none_are_counted(tmp_path):
    images = pa.array([None, {"bytes": picture(1), "path": None}], HF_IMAGE)
    text = pa.array([b"x", b"caf\xe9"], pa.binary()).view(pa.string())  # Arrow does not look
    items = read(tmp_path, write(tmp_path / "a.parquet", {"image": images, "text": text}))
    assert [reason for reason, *_ in dropped(items)] == [untrusted.NO_IMAGE, untrusted.BAD_TEXT]
    lists = pa.array([["a dog", None]], pa.list_(pa.string()))
    items = read(tmp_path, write(tmp_path / "b.parquet", {"image": hf_images(1), "text": lists}))
    assert records(items)[0].captions == ["a dog"]
    assert dropped(items) == [(untrusted.NOT_TEXT + untrusted.CAPTIONS, "filtered", 1, 0)]


def test_large_files_are_divided_at_row_groups_and_nothing_is_lost(tmp_path, monkeypatch):
    monkeypatch.setattr(parquet, "_ROWS_PER_UNIT", 10)
    columns = {"image": hf_images(25), "text": [f"picture {n}" for n in range(25)]}
    path = write(tmp_path / "a.parquet", columns, row_group_size=4)
    made = plan(config(tmp_path, path))
    assert [unit.name for unit in made.units] == [f"{path}, rows {rows}" for rows in ("0 to 7", "8 to 15", "16 to 24")]
    items = read_all(made.units)
    assert [item.captions[0] for item in items] == columns["text"]
    assert items[9].extra["source_key"] == "a:9"
    (one,) = plan(config(tmp_path, write(tmp_path / "b.parquet", columns, row_group_size=25))).units
    assert one.name == str(tmp_path / "b.parquet")


@pytest.mark.parametrize(
    ("columns", "settings", "found"),
    [
        (
            {"image": hf_images(1), "text": ["a"]},
            {"image_column": "imge"},
            "column 'imge' .* perhaps 'image'; name it",
        ),
        (
            {"picture": hf_images(1), "text": ["a"]},
            {},
            r"a column 'image' \(or jpg, .*found picture \(struct.*--image-column",
        ),
        (
            {"image": hf_images(1), "words": ["a"]},
            {},
            r"a column 'captions' \(or .*, words \(string\).*--caption-column",
        ),
        (
            {"image": ["a.jpg"], "text": ["a"]},
            {},
            r"expected binary, .*'image' .* found string; choose another with --image",
        ),
        (
            {"image": hf_images(1), "text": [1]},
            {},
            r"expected text, .*'text' .* found int64; choose another with --caption",
        ),
        ({"image": hf_images(1), "text": ["a"]}, {"url_column": "link"}, r"column 'link' .*--url-column"),
        (
            {"image": hf_images(0), "text": pa.array([], pa.string())},
            {},
            "expected rows in 1 Parquet files, found none",
        ),
    ],
)
def test_columns_that_do_not_fit_are_shown_beside_those_that_are_there(tmp_path, columns, settings, found):
    path = write(tmp_path / "a.parquet", columns)
    with pytest.raises(InputError, match=found):
        plan(config(tmp_path, path, **settings))


def test_a_file_that_is_no_parquet_is_named(tmp_path):
    (tmp_path / "a.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(InputError, match=r"expected a Parquet file at .*a\.parquet, found .*fetch it again"):
        plan(config(tmp_path, tmp_path))


def test_damage_inside_a_file_costs_the_rows_behind_it_and_every_row_is_accounted_for(tmp_path):
    columns = {"image": hf_images(60), "text": [f"picture {n}" for n in range(60)]}
    path = write(tmp_path / "a.parquet", columns, row_group_size=20, compression="zstd", write_page_checksum=True)
    (unit,) = plan(config(tmp_path, path)).units
    content = path.read_bytes()
    footer = int.from_bytes(content[-8:-4], "little")
    whole = read_all([unit])
    draw = random.Random(3)
    lost = 0
    for _ in range(40):
        data = bytearray(content)
        for _ in range(20):
            data[draw.randrange(4, len(data) - 8 - footer)] ^= 0xFF
        path.write_bytes(data)
        items = read_all([unit])
        assert count_samples(items) == 60
        assert {reason for reason, *_ in dropped(items)} <= {DAMAGED}  # the pages' checksums are looked at
        lost += dropped(items) != []
        assert records(items) == whole[: len(records(items))]
    assert lost == 40


def test_an_image_column_of_large_rows_is_read_in_a_few_megabytes(tmp_path):
    rows = 2_000
    images = pa.array([bytes([n % 256]) * 20_000 for n in range(rows)], pa.binary())
    settings = {"row_group_size": rows, "compression": "none", "use_dictionary": False, "write_batch_size": 10}
    path = write(tmp_path / "a.parquet", {"image": images, "text": ["a dog"] * rows}, **settings)
    (unit,) = plan(config(tmp_path, path)).units
    del images
    before = pa.total_allocated_bytes()
    most = 0
    for count, _ in enumerate(unit.read(), 1):
        if count % 50 == 0:
            most = max(most, pa.total_allocated_bytes() - before)
    assert count == rows
    assert most < 0.25 * path.stat().st_size
