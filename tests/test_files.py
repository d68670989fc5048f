"""Files appear whole or not at all."""

import pytest

from setclip.files import replacing, sha256_of, write_json


def test_a_failed_write_leaves_the_old_file_and_nothing_beside(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")

    def half():
        with replacing(path) as temporary:
            temporary.write_text("half")
            raise RuntimeError("disk")

    with pytest.raises(RuntimeError, match="disk"):
        half()
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]


def test_a_folder_replaces_a_folder(tmp_path):
    path = tmp_path / "out"
    path.mkdir()
    (path / "stale").write_text("")
    with replacing(path) as temporary:
        temporary.mkdir()
        (temporary / "fresh").write_text("")
    assert [p.name for p in path.iterdir()] == ["fresh"]


def test_json_refuses_nan(tmp_path):
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "a.json", {"x": float("nan")})
    assert not list(tmp_path.iterdir())


def test_sha256_is_that_of_the_bytes(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    assert sha256_of(tmp_path / "a").startswith("ba7816bf")  # FIPS 180-2, the example "abc"
