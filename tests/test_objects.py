"""objects.parquet: ids, ranks, head and tail."""

import numpy as np
import pytest

from setclip import objects
from setclip.errors import InputError
from setclip.objects import ObjectTable, num_tail_objects, object_id, read_objects, write_objects


@pytest.mark.parametrize(("total", "tail"), [(109_341, 32_802), (276_123, 82_836), (330_982, 99_294), (0, 0), (3, 0)])
def test_the_tail_is_three_tenths_rounded_down(total, tail):
    """The counts of AlignCLIP's CC3M, CC12M and YFCC15M."""
    assert num_tail_objects(total) == tail


def test_ties_in_frequency_go_by_name():
    counts = {"pear": 1, "fig": 1, "ant": 1, "cow": 9, "dog": 5, "elk": 5, "bee": 2, "hen": 2, "jay": 2, "kid": 3}
    table = ObjectTable.from_counts(counts, "pos", 40)
    assert table.names == ["cow", "dog", "elk", "kid", "bee", "hen", "jay", "ant", "fig", "pear"]
    assert [n for n, tail in zip(table.names, table.is_tail, strict=True) if tail] == ["ant", "fig", "pear"]
    # One place in the tail less, and the tie among the rarest is decided by name, ascending.
    six = ObjectTable.from_counts({n: counts[n] for n in ("pear", "fig", "ant", "cow", "dog", "elk")}, "pos", 40)
    assert [n for n, tail in zip(six.names, six.is_tail, strict=True) if tail] == ["ant"]


def test_groups_of_ten_objects_are_two_five_and_three():
    table = ObjectTable.from_counts({f"o{i}": 100 - i for i in range(10)}, "pos", 1)
    groups = [table.group_of(name) for name in table.names]
    assert groups == ["head"] * 2 + ["middle"] * 5 + ["tail"] * 3
    assert table.group_of("never") == "unseen"


def test_the_file_keeps_each_parsers_table(tmp_path):
    tables = [ObjectTable.from_counts({"b": 2, "a": 2}, "pos", 7), ObjectTable.from_counts({"c": 1}, "llm", 8)]
    write_objects(tmp_path / "objects.parquet", tables)
    for table in tables:
        read = read_objects(tmp_path, table.parser)
        assert (read.names, read.num_captions) == (table.names, table.num_captions)
        assert np.array_equal(read.counts, table.counts)
    with pytest.raises(InputError, match=r"objects of parser 'x', found those of \['pos', 'llm'\]"):
        read_objects(tmp_path, "x")


def test_a_missing_file_names_the_command_that_makes_it(tmp_path):
    with pytest.raises(InputError, match=r"python -m data_prep\.statistics"):
        read_objects(tmp_path / "objects.parquet")


def test_ids_are_stable_and_fit_a_signed_integer():
    assert object_id("dog") == 2072328596179865167
    assert object_id("polar bear") == 5620974726518724435


def test_two_names_of_one_id_are_an_error(monkeypatch):
    monkeypatch.setattr(objects, "object_id", lambda name: 7)
    with pytest.raises(InputError, match="objects 'a' and 'b' share the id 7"):
        ObjectTable.from_counts({"a": 2, "b": 1}, "pos", 3)
