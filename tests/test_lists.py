"""Published lists: which rows are read, which are counted as bad, and mistaken columns."""

import bz2
import gzip
import os
from pathlib import Path

import pytest

from data_prep.fetch import READERS
from data_prep.lists import (
    EMPTY_CAPTION,
    EMPTY_URL,
    LISTS,
    NOT_A_URL,
    NOT_UTF8,
    TOO_FEW_COLUMNS,
    BadRow,
    ListRow,
    read_tsv,
    tsv_columns,
)
from setclip.errors import InputError


def write(tmp_path: Path, text: str | bytes, name: str = "list.tsv") -> Path:
    path = tmp_path / name
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def test_every_list_can_be_read_and_none_is_without_a_place():
    assert set(READERS) == set(LISTS)
    assert all(entry.published_at for entry in LISTS.values())


def test_the_published_numbers_of_pairs_are_those_of_their_authors():
    assert {name: entry.pairs for name, entry in LISTS.items()} == {
        "cc3m": 3_318_333,
        "cc12m": 12_423_374,
        "yfcc15m-clip": 14_829_396,
        "yfcc15m-declip": 15_388_848,
        "tsv": None,
    }


def test_cc3m_has_the_caption_first_and_cc12m_the_url(tmp_path):
    expected = [ListRow(0, "http://a/b.jpg", ("a dog",))]
    for name, text in {"cc3m": "a dog\thttp://a/b.jpg\n", "cc12m": "http://a/b.jpg\ta dog\n"}.items():
        path = write(tmp_path, text)
        columns = (LISTS[name].url_column, LISTS[name].caption_column)
        assert list(read_tsv(path, *columns)) == expected, name


@pytest.mark.parametrize(("name", "other"), [("cc3m", "cc12m"), ("cc12m", "cc3m")])
def test_mistaken_columns_are_found_before_anything_is_downloaded(tmp_path, name, other):
    row = "a dog\thttp://a/b.jpg\n" if other == "cc3m" else "http://a/b.jpg\ta dog\n"
    path = write(tmp_path, row * 200)
    url = int(LISTS[name].url_column)
    with pytest.raises(InputError, match=rf"expected urls in column {url} .*, found them in column {3 - url}"):
        tsv_columns(path, LISTS[name].url_column, LISTS[name].caption_column)


def test_every_bad_row_keeps_its_number_and_its_reason(tmp_path):
    lines = [
        b"http://a/0.jpg\ta dog",
        b"http://a/1.jpg",
        b"\ta cat",
        b"ftp://a/3.jpg\ta cat",
        b"file:///etc/hostname\ta cat",
        b"http://a/5.jpg\t \t",
        b"http://a/6.jpg\tcaf\xe9",
        b"HTTPS://a/7.jpg\ta \"quoted\" 'cat'\r",
    ]
    rows = list(read_tsv(write(tmp_path, b"\n".join(lines)), "1", "2"))
    assert [row.row for row in rows] == list(range(8))
    assert [row.reason if isinstance(row, BadRow) else None for row in rows] == [
        None,
        TOO_FEW_COLUMNS,
        EMPTY_URL,
        NOT_A_URL,
        NOT_A_URL,
        EMPTY_CAPTION,
        NOT_UTF8,
        None,
    ]
    assert rows[7] == ListRow(7, "HTTPS://a/7.jpg", ("a \"quoted\" 'cat'",))


def test_quotation_marks_and_odd_line_breaks_do_not_join_rows(tmp_path):
    text = 'http://a/0.jpg\t"a dog\nhttp://a/1.jpg\ta\x0bb\u2028c\u0085d\rd"\n'
    rows = list(read_tsv(write(tmp_path, text), "1", "2"))
    assert [row.captions[0] for row in rows] == ['"a dog', 'a\x0bb\u2028c\u0085d\rd"']


def test_a_header_that_guides_tell_people_to_add_is_no_row(tmp_path):
    path = write(tmp_path, "caption\turl\na dog\thttp://a/b.jpg\n")
    assert list(read_tsv(path, "2", "1")) == [ListRow(0, "http://a/b.jpg", ("a dog",))]
    assert list(read_tsv(path, "1", "2")) == [ListRow(0, "http://a/b.jpg", ("a dog",))]


def test_columns_may_be_named(tmp_path):
    path = write(tmp_path, "ID\tTEXT\tURL\n7\ta dog\thttp://a/b.jpg\n")
    assert list(read_tsv(path, "url", "text")) == [ListRow(0, "http://a/b.jpg", ("a dog",))]
    with pytest.raises(InputError, match=r"first line with columns 'url' and 'caption' .* found"):
        tsv_columns(path, "url", "caption")
    with pytest.raises(InputError, match="two numbers or two names"):
        tsv_columns(path, "3", "text")
    with pytest.raises(InputError, match="two different columns"):
        tsv_columns(path, "2", "2")


@pytest.mark.parametrize("compress", [gzip.compress, bz2.compress])
def test_compressed_lists_are_read_by_their_content_and_a_cut_one_is_an_error(tmp_path, compress):
    lines = b"".join(b"http://a/%d.jpg\tcaption %d\n" % (i, i * i) for i in range(5000))
    whole = write(tmp_path, compress(lines), "misnamed.tsv")
    assert len(list(read_tsv(whole, "1", "2"))) == 5000
    cut = write(tmp_path, compress(lines)[:-200], "cut.tsv")
    with pytest.raises(InputError, match="expected a whole compressed file"):
        list(read_tsv(cut, "1", "2"))


def test_a_list_without_urls_an_empty_one_and_none_at_all_are_errors(tmp_path):
    with pytest.raises(InputError, match="found none in the first 3 rows; the first is 'a dog"):
        tsv_columns(write(tmp_path, "a dog\ta cat\n" * 3), "1", "2")
    with pytest.raises(InputError, match="found an empty file"):
        tsv_columns(write(tmp_path, ""), "1", "2")
    with pytest.raises(InputError, match="found no such file; give its place with --list"):
        tsv_columns(tmp_path / "absent.tsv", "1", "2")


def test_real_lists_are_read_to_the_last_row():
    if "SETCLIP_REAL_DATA" not in os.environ:
        pytest.skip("SETCLIP_REAL_DATA names no folder with real data")
    folder = Path(os.environ["SETCLIP_REAL_DATA"]) / "captions"
    cc3m = list(read_tsv(folder / "cc3m_val_first8000.tsv.gz", "1", "2"))
    assert len(cc3m) == 8000
    assert all(isinstance(row, ListRow) for row in cc3m)
    laion = list(read_tsv(folder / "laion_10k.tsv.gz", "1", "2"))
    assert len(laion) == 10_000
    assert [row.reason for row in laion if isinstance(row, BadRow)] == [NOT_A_URL]
    with pytest.raises(InputError, match="found them in column 1"):
        tsv_columns(folder / "cc3m_val_first8000.tsv.gz", "2", "1")
