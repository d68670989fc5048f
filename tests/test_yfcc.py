"""YFCC15M: the rules for its texts, CLIP's list joined with the metadata, and DeCLIP's list."""

import bz2
import gzip
import json
from pathlib import Path

import pytest

from data_prep.lists import EMPTY_CAPTION, NOT_A_URL, TOO_FEW_COLUMNS, BadRow, ListRow
from data_prep.yfcc import (
    METADATA_COLUMNS,
    NOT_IN_METADATA,
    NOT_JSON,
    OTHER_HASH,
    VIDEO,
    Join,
    caption_of,
    check_clip,
    clean_text,
    read_clip,
    read_declip,
)
from setclip.errors import InputError

# --- texts


@pytest.mark.parametrize(
    ("raw", "clean"),
    [
        ("My+dog+%26+me", "My dog & me"),
        ("caf%C3%A9+%2B+cake", "café + cake"),
        ("see+%3Ca+href%3D%22http%3A%2F%2Fx%2Fy%22+rel%3D%22nofollow%22%3Ethis%3C%2Fa%3E%21", "see this!"),
        ("one%3Cbr+%2F%3Etwo%3Cp%3Ethree%3C%2Fp%3E", "one two three"),
        ("a%3Cb%3Eb%3C%2Fb%3Ec", "abc"),
        ("I+%3C3+you+%3E+all", "I <3 you > all"),
        ("x%3C%21--+hidden+%3Cb%3E+--%3Ey", "xy"),
        ("Tom+%26amp%3B+Jerry+%26quot%3Bhi%26quot%3B", 'Tom & Jerry "hi"'),
        ("%26lt%3Bb%26gt%3B+means+bold", "<b> means bold"),
        ("%26amp%3Blt%3B", "&lt;"),
        ("++one%0A%0Dtwo%09three%C2%A0four++", "one two three four"),
        ("100%25+%zz", "100% %zz"),
        ("", ""),
    ],
)
def test_a_text_is_decoded_stripped_of_tags_and_collapsed(raw, clean):
    assert clean_text(raw) == clean


def test_title_and_description_are_joined_as_asked():
    assert caption_of("A+dog", "It+runs.") == "A dog It runs."
    assert caption_of("A+dog", "It+runs.", "title") == "A dog"
    assert caption_of("A+dog", "It+runs.", "description") == "It runs."
    assert caption_of("A+dog", "") == caption_of("", "A+dog") == caption_of("A+dog", "A%20dog") == "A dog"
    assert caption_of("%3Cb%3E%3C%2Fb%3E", "+") == ""


# --- CLIP's list


def metadata_line(
    number: int, title: str = "", description: str = "", marker: int = 0, url: str | None = None
) -> bytes:
    fields = [f"x{column}" for column in range(METADATA_COLUMNS)]
    fields[0], fields[1], fields[2] = str(number), str(6_000_000_000 + number), hash_of(number)
    fields[8], fields[9], fields[24] = title, description, str(marker)
    fields[16] = f"http://farm.example/{number}.jpg" if url is None else url
    return "\t".join(fields).encode() + b"\n"


def hash_of(number: int) -> str:
    return f"{number:032x}"


def list_line(number: int, hashed: int | None = None) -> bytes:
    return f"{number}\t{6_000_000_000 + number}\t{hash_of(number if hashed is None else hashed)}\n".encode()


def join(tmp_path: Path, *metadata: Path, **settings) -> Join:
    defaults = {"texts": "title+description", "min_match": 0.0, "memory_gb": 0.5, "folder": tmp_path / "join"}
    return Join(metadata=metadata, **{**defaults, **settings})


def test_the_list_is_joined_in_its_own_order_and_every_miss_has_its_reason(tmp_path):
    lines = [metadata_line(n, f"Title+{n}", "about+%3Cb%3Eit%3C%2Fb%3E") for n in range(20)]
    lines[5] = metadata_line(5)
    lines[6] = metadata_line(6, "a film", marker=1)
    lines[7] = metadata_line(7, "a dog", url="")
    metadata = tmp_path / "yfcc100m_dataset.bz2"
    metadata.write_bytes(bz2.compress(b"".join(lines[:9])) + bz2.compress(b"".join(lines[9:])))  # as pbzip2 writes it
    listed = [list_line(12), list_line(3), list_line(5), list_line(6), list_line(7), list_line(8, hashed=9)]
    path = tmp_path / "yfcc100m_subset_data.tsv.bz2"
    path.write_bytes(bz2.compress(b"".join([*listed, list_line(77), b"broken\n"])))
    rows = list(read_clip(path, join(tmp_path, metadata)))
    assert rows[:2] == [
        ListRow(0, "http://farm.example/12.jpg", ("Title 12 about it",), "6000000012"),
        ListRow(1, "http://farm.example/3.jpg", ("Title 3 about it",), "6000000003"),
    ]
    assert [row.row for row in rows] == list(range(8))
    assert [row.reason for row in rows if isinstance(row, BadRow)] == [
        EMPTY_CAPTION,
        VIDEO,
        "list_empty_url",
        OTHER_HASH,
        NOT_IN_METADATA,
        TOO_FEW_COLUMNS,
    ]
    assert not (tmp_path / "join").exists()


def test_several_parts_of_the_metadata_are_one_and_quotes_and_broken_lines_do_no_harm(tmp_path, capsys):
    parts = [tmp_path / "0.gz", tmp_path / "1"]
    parts[0].write_bytes(gzip.compress(metadata_line(0, '"a') + b"too\tfew\n" + metadata_line(1, 'b"') + b"\xff\t\n"))
    parts[1].write_bytes(metadata_line(2, "c\xff") + metadata_line(3, "d").replace(b"d\t", b"d\xff\t", 1))
    path = tmp_path / "list"
    path.write_bytes(b"".join(list_line(n) for n in range(4)))
    rows = list(read_clip(path, join(tmp_path, *parts)))
    assert [row.captions[0] for row in rows] == ['"a', 'b"', "cÿ", "d\ufffd"]
    assert "2 lines of the metadata do not have 25 columns" in capsys.readouterr().out


def test_too_few_matches_are_an_error_with_the_numbers(tmp_path):
    metadata, path = tmp_path / "metadata", tmp_path / "list"
    metadata.write_bytes(b"".join(metadata_line(n, "a dog") for n in range(8)))
    path.write_bytes(b"".join(list_line(n) for n in range(10)))
    assert len(list(read_clip(path, join(tmp_path, metadata, min_match=0.8)))) == 10
    with pytest.raises(InputError, match=r"at least 90.0% .* found 8 of 10 \(80.0%.*--min-match 0.8"):
        list(read_clip(path, join(tmp_path, metadata, min_match=0.9)))
    assert not (tmp_path / "join").exists()


def test_a_photo_that_the_list_or_the_metadata_has_twice_gives_one_row_for_each_of_the_list(tmp_path):
    metadata, path = tmp_path / "metadata", tmp_path / "list"
    metadata.write_bytes(metadata_line(1, "a dog") * 2 + metadata_line(2, "a cat"))
    path.write_bytes(list_line(1) + list_line(2) + list_line(1))
    assert [row.captions[0] for row in read_clip(path, join(tmp_path, metadata))] == ["a dog", "a cat", "a dog"]


def test_a_join_of_more_than_one_block_finds_all(tmp_path):
    metadata, path = tmp_path / "metadata.bz2", tmp_path / "list"
    metadata.write_bytes(bz2.compress(b"".join(metadata_line(n, f"t{n}", "x" * 200) for n in range(40_000)), 1))
    chosen = range(0, 40_000, 7)
    path.write_bytes(b"".join(list_line(n) for n in chosen))
    rows = list(read_clip(path, join(tmp_path, metadata, min_match=1.0, texts="title")))
    assert [row.captions[0] for row in rows] == [f"t{n}" for n in chosen]


def test_other_layouts_are_found_at_once(tmp_path):
    path, metadata = tmp_path / "list", tmp_path / "metadata"
    path.write_bytes(list_line(1))
    metadata.write_bytes(b"\t".join(metadata_line(1).split(b"\t")[1:]))
    with pytest.raises(InputError, match=r"expected 25 columns .* found 24"):
        check_clip(path, [metadata])
    with pytest.raises(InputError, match="give its place with --metadata"):
        check_clip(path, [tmp_path / "absent"])
    path.write_bytes(b"http://a/b.jpg\ta dog\n")
    with pytest.raises(InputError, match=r"lines of \(line number, photo id, photo hash\)"):
        check_clip(path, [])


# --- DeCLIP's list


def test_declips_captions_stay_as_they_are_one_or_several(tmp_path):
    path = tmp_path / "yfcc15m.json"
    lines = [
        json.dumps({"filename": "a/0.jpg", "caption": "a dog +  a\ncat %20", "url": "http://a/0.jpg"}),
        json.dumps({"filename": "a/1.jpg", "caption": ["a dog", " ", "a cat"], "url": "http://a/1.jpg"}),
        json.dumps({"caption": "", "url": "http://a/2.jpg"}),
        json.dumps({"caption": "a dog", "url": "a/3.jpg"}),
        json.dumps({"caption": "a dog"}),
        '{"caption": "a d',
    ]
    path.write_text("\n".join(lines) + "\n")
    rows = list(read_declip(path))
    assert rows[0] == ListRow(0, "http://a/0.jpg", ("a dog + a cat %20",), "a/0.jpg")
    assert rows[1] == ListRow(1, "http://a/1.jpg", ("a dog", "a cat"), "a/1.jpg")
    assert [row.reason for row in rows[2:]] == [EMPTY_CAPTION, NOT_A_URL, TOO_FEW_COLUMNS, NOT_JSON]


def test_a_list_that_is_not_declips_is_an_error(tmp_path):
    path = tmp_path / "list"
    path.write_text("a dog\thttp://a/b.jpg\n")
    with pytest.raises(InputError, match=r"expected JSON lines such as .* found b'a dog"):
        list(read_declip(path))
