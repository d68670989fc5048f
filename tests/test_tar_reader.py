"""Where the members of a tar lie: the same as tarfile finds, and never an end in silence where a tar is damaged."""

import io
import os
import random
import tarfile
from pathlib import Path

import pytest

from setclip.errors import InputError
from setclip.tar_reader import DamagedTarError, Member, TarReader, iterate_members

FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}
NAMES = [
    "000000000.jpg",
    "a/b/c.txt",
    "d" * 99,
    "e" * 60 + "/" + "f" * 60,  # ustar: prefix and name
    "with spaces and.dots.json",
]
LONG_NAMES = ["g" * 300 + ".jpg", "Straße/ж/猫.png", "h/" * 120 + "i"]


def add(tar: tarfile.TarFile, name: str, data: bytes = b"", **fields) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for field, value in fields.items():
        setattr(info, field, value)
    tar.addfile(info, io.BytesIO(data))


def make(seed: int, kind: str, members: int = 6, only_files: bool = False) -> bytes:
    """Returns a tar of `members` random files, between directories and links."""
    rng = random.Random(seed)
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=FORMATS[kind]) as tar:
        for number in range(members):
            names = NAMES if kind == "ustar" else NAMES + LONG_NAMES
            size = rng.choice([0, 1, 511, 512, 513, rng.randrange(3_000)])
            mtime = 1_700_000_000.25 if kind == "pax" and rng.random() < 0.5 else 5
            add(tar, f"{number}{rng.choice(names)}", rng.randbytes(size), mtime=mtime)
            if not only_files and rng.random() < 0.5:
                add(tar, f"folder{number}", type=rng.choice([tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.FIFOTYPE]))
    return buffer.getvalue()


def by_tarfile(path: Path) -> list[Member]:
    """The whole regular files that tarfile finds before it ends or raises."""
    size = path.stat().st_size
    found = []
    try:
        with tarfile.open(path, "r:", encoding="utf-8") as tar:
            for info in tar:
                if info.isreg() and info.offset_data + info.size <= size:
                    found.append(Member(info.name, info.offset_data, info.size))
    except tarfile.TarError:
        pass
    return found


def by_reader(path: Path) -> tuple[list[Member], DamagedTarError | None]:
    found = []
    try:
        for member in iterate_members(path):
            found.append(member)
    except DamagedTarError as error:
        return found, error
    return found, None


def written(tmp_path: Path, data: bytes) -> Path:
    path = tmp_path / "a.tar"
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("kind", FORMATS)
def test_whole_tars_of_every_format_give_what_tarfile_gives(tmp_path, kind):
    for seed in range(40):
        path = written(tmp_path, make(seed, kind))
        assert by_reader(path) == (by_tarfile(path), None)
        assert len(by_tarfile(path)) == 6


@pytest.mark.parametrize("kind", FORMATS)
def test_the_bytes_are_those_that_tarfile_extracts(tmp_path, kind):
    path = written(tmp_path, make(1, kind))
    with tarfile.open(path) as tar, TarReader(path) as reader:
        for info, member in zip((info for info in tar if info.isreg()), reader, strict=True):
            assert reader.read(member) == tar.extractfile(info).read()


def test_members_can_be_read_in_any_order_while_iterating(tmp_path):
    path = written(tmp_path, make(2, "pax", only_files=True))
    with TarReader(path) as reader:
        members = list(reader)
        backwards = [reader.read(member) for member in reversed(members)]
        assert [reader.read(member) for member in reader] == backwards[::-1]


def test_a_global_pax_header_applies_to_all_that_follows(tmp_path):
    buffer = io.BytesIO()
    headers = {"comment": "made by a version control system", "path": "for-all"}
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT, pax_headers=headers) as tar:
        add(tar, "a", b"1")
        add(tar, "b", b"2" * 600)
    path = written(tmp_path, buffer.getvalue())
    found, error = by_reader(path)
    assert error is None
    assert found == by_tarfile(path)
    assert [member.name for member in found] == ["for-all", "for-all"]


def test_pax_headers_may_change_name_and_size(tmp_path):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as tar:
        add(tar, "a", b"1" * 700, pax_headers={"path": "elsewhere", "comment": "x"})
        add(tar, "b", b"2" * 600, pax_headers={"mtime": "1.5", "SCHILY.xattr.user.long": "y" * 2_000})
        add(tar, "c", b"3")
    path = written(tmp_path, buffer.getvalue())
    assert by_reader(path) == (by_tarfile(path), None)
    assert [member.name for member in by_tarfile(path)] == ["elsewhere", "b", "c"]


def header(name: bytes, size: bytes, kind: bytes = b"0", magic: bytes = b"ustar\x0000") -> bytearray:
    block = bytearray(512)
    block[: len(name)] = name
    block[100:124] = b"0000644\x000000000\x000000000\x00"
    block[124 : 124 + len(size)] = size
    block[136:148] = b"00000000000\x00"
    block[156:157] = kind
    block[257:265] = magic
    return signed(block)


def signed(block: bytearray) -> bytearray:
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\x00 " % sum(block)
    return block


@pytest.mark.parametrize(
    "size",
    [b"00000000005\x00", b"          5 ", b"5", b"5\x00garbage", b"0_5", b"+5", b"0o5", b"\x80" + b"\0" * 10 + b"\x05"],
)
@pytest.mark.parametrize("magic", [b"ustar\x0000", b"ustar  \x00", b"\0" * 8])
@pytest.mark.parametrize("kind", [b"0", b"\0", b"7", b"z"])
def test_number_fields_of_any_spelling_are_read_as_tarfile_reads_them(tmp_path, size, magic, kind):
    data = header(b"a.jpg", size, kind, magic) + b"12345".ljust(512, b"\0") + header(b"b/", b"3") + b"678".ljust(512)
    path = written(tmp_path, bytes(data) + bytes(1024))
    assert by_tarfile(path)[-1] == Member("b/", 1_536, 3)
    assert by_reader(path) == (by_tarfile(path), None)


@pytest.mark.parametrize("name", [b"/etc/passwd", b"../../x.jpg", b"a/../b", b"\xff\xfe.jpg", b"a\\b", b" "])
def test_names_are_given_as_they_stand(tmp_path, name):
    path = written(tmp_path, bytes(header(name, b"0")) + bytes(1024))
    (member,) = iterate_members(path)
    assert os.fsencode(member.name) == name


def test_old_signed_checksums_are_accepted(tmp_path):
    block = header(b"\xe9.jpg", b"0")
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\x00 " % sum(byte - 256 if byte > 127 else byte for byte in block)
    path = written(tmp_path, bytes(block) + bytes(1024))
    assert by_reader(path) == (by_tarfile(path), None)
    assert len(by_tarfile(path)) == 1


@pytest.mark.parametrize("kind", FORMATS)
def test_wherever_a_tar_is_cut_the_whole_members_come_first_and_then_the_error(tmp_path, kind):
    data = make(3, kind, members=4)
    members = by_tarfile(written(tmp_path, data))
    end = members[-1].offset + members[-1].size
    for length in {*range(0, len(data), 97), *(m.offset + m.size for m in members), *(m.offset for m in members)}:
        found, error = by_reader(written(tmp_path, data[:length]))
        assert found == [member for member in members if member.offset + member.size <= length], length
        if length < end:
            assert error is not None, length
            assert error.problem == "cut short"


def test_a_tar_without_its_end_is_cut_short(tmp_path):
    data = make(4, "ustar", members=2, only_files=True)
    path = written(tmp_path, data.rstrip(b"\0").ljust(-(-len(data.rstrip(b"\0")) // 512) * 512, b"\0"))
    found, error = by_reader(path)
    assert len(found) == 2
    assert error.problem == "cut short"
    assert f"expected a whole tar at {path}, found the end of its" in str(error)


@pytest.mark.parametrize("kind", FORMATS)
def test_nothing_is_lost_in_silence_where_bytes_change(tmp_path, kind):
    damaged = 0
    for seed in range(150):
        rng = random.Random(seed)
        data = bytearray(make(seed, kind, members=4))
        whole = by_tarfile(written(tmp_path, bytes(data)))
        for _ in range(rng.choice([1, 1, 3])):
            place = rng.randrange(len(data))
            match rng.randrange(4):
                case 0:
                    data[place] ^= 1 << rng.randrange(8)
                case 1:
                    block = place // 512 * 512
                    data[block : block + 512] = bytes(512)  # a hole, as a file system leaves it after a crash
                case 2:
                    data[place:place] = rng.randbytes(rng.randrange(1, 511))
                case 3:
                    del data[place : place + rng.randrange(1, 511)]
        path = written(tmp_path, bytes(data))
        found, error = by_reader(path)
        assert found == by_tarfile(path), seed
        assert error is not None or len(found) == len(whole), seed
        if kind == "ustar" and error is None:  # the other formats keep long names outside what the checksum covers
            assert [member.name for member in found] == [member.name for member in whole], seed
        damaged += error is not None
    assert damaged > 50


def test_headers_with_any_size_and_a_valid_checksum_never_reach_beyond_the_file(tmp_path):
    sizes = [b"\x80" + b"\xff" * 11, b"\xff" * 12, b"77777777777", b"-0000000777", b"\xff" * 11 + b"\0"]
    for kind in (b"0", b"x", b"g", b"L", b"K", b"S", b"5", b"z"):
        for size in sizes:
            data = bytes(header(b"first", b"3")) + b"abc".ljust(512, b"\0") + bytes(header(b"bad", size, kind))
            path = written(tmp_path, data + bytes(header(b"last", b"1")) + b"z".ljust(512, b"\0") + bytes(1024))
            found, error = by_reader(path)
            assert found[0] == Member("first", 512, 3)
            assert all(0 <= m.offset <= m.offset + m.size <= path.stat().st_size for m in found)
            assert error is not None or len(found) == 2, (kind, size)


def test_endless_chains_of_extended_headers_end(tmp_path):
    for kind in (b"x", b"L", b"g"):
        block = bytes(header(b"again", b"0", kind))
        _, error = by_reader(written(tmp_path, block * 3_000 + bytes(1024)))
        assert error is not None


def test_sparse_members_are_refused(tmp_path):
    found, error = by_reader(written(tmp_path, bytes(header(b"holes", b"0", b"S")) + bytes(1024)))
    assert (found, error.problem) == ([], "sparse member")


def test_joined_tars_are_noticed(tmp_path):
    found, error = by_reader(written(tmp_path, make(5, "ustar", members=2) + make(6, "ustar", members=2)))
    assert len(found) == 2
    assert error.problem == "data after its end"
    assert "must be given one by one" in str(error)


@pytest.mark.parametrize(
    ("data", "problem"),
    [(b"", "cut short"), (b"<html>", "cut short"), (b"\x1f\x8b\x08" + b"q" * 2_000, "not a tar"), (bytes(1024), None)],
)
def test_files_that_are_no_tars_are_named(tmp_path, data, problem):
    found, error = by_reader(written(tmp_path, data))
    assert found == []
    assert (error.problem if error else None) == problem


def test_what_is_no_file_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path):
        with pytest.raises(InputError, match=r"expected a tar file at .*, found something else"):
            TarReader(path)
    with pytest.raises(FileNotFoundError):
        TarReader(tmp_path / "nothing.tar")
