"""SIGKILL at any moment: the next start finishes, and the folder is byte for byte that of an undisturbed run."""

import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from prep_material import contents, write_tar

from setclip.manifest import Manifest, check_shards

pytestmark = pytest.mark.slow

KINDS = ("reading", "writing", "renaming", "merging")
HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def tars(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("in")
    for tar in range(4):
        write_tar(folder / f"{tar:05d}.tar", [*range(tar * 10, tar * 10 + 9), 1], bad=0)
    return folder


def command(tars: Path, out: Path, *more: str) -> list[str]:
    return ["tars", "--tars", str(tars), "--out", str(out), "--shard-size", "4", "--processes", "1", *more]


def start(kind: str, number: int, log: Path, arguments: list[str]) -> int:
    """Returns the exit status of a run that is killed at that event, or of one that ends by itself."""
    line = [sys.executable, str(HERE / "kill_at.py"), kind, str(number), str(log), *arguments]
    run = subprocess.run(line, cwd=HERE.parent, capture_output=True)
    assert run.returncode in (0, -signal.SIGKILL), run.stderr.decode()
    return run.returncode


def test_killed_ten_times_at_seeded_moments_nothing_is_lost_or_repeated(tars, tmp_path):
    log = tmp_path / "log"
    assert start("none", 0, log, command(tars, tmp_path / "undisturbed")) == 0
    undisturbed = contents(tmp_path / "undisturbed")
    totals = {kind: int(count) for kind, count in (line.split() for line in log.read_text().splitlines())}
    assert totals.keys() == set(KINDS)

    draw = random.Random(20261121)
    killed = []
    # Each chain is one preparation that is killed again and again; within one, work that is done is not done again.
    for chain in (
        ("reading", "writing", "renaming"),
        ("writing", "merging", "merging"),
        ("renaming", "reading"),
        ("merging",) * 2,
    ):
        out = tmp_path / "-".join(chain)
        for place, kind in enumerate(chain):
            most = totals[kind] // (1 if kind == "merging" else len(chain))
            moment = draw.randint(1, most)
            status = start(kind, moment, log, command(tars, out))
            if status:
                killed.append(log.read_text().strip())
                assert not (out / "manifest.json").exists() or kind == "merging", (chain, place)
        assert start("none", 0, log, command(tars, out)) == 0
        assert contents(out) == undisturbed, chain
    assert len(killed) == 10
    assert {line.removeprefix("killed ") for line in killed} == set(KINDS)


def test_killed_with_its_workers_at_work_it_leaves_no_orphans_and_goes_on(tars, tmp_path):
    assert start("none", 0, tmp_path / "log", command(tars, tmp_path / "undisturbed")) == 0
    out = tmp_path / "out"
    line = [sys.executable, "-m", "data_prep.run", *command(tars, out, "--processes", "2")]
    with subprocess.Popen(line, cwd=HERE.parent, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as run:
        deadline = time.monotonic() + 120
        while not list(out.glob(".parts/.00*")):  # a worker writes a unit
            assert time.monotonic() < deadline
            assert run.poll() is None
            time.sleep(0.005)
        workers = children(run.pid)
        run.kill()
    assert workers
    deadline = time.monotonic() + 20
    while any(Path(f"/proc/{pid}/cmdline").exists() and is_alive(pid) for pid in workers):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert not (out / "manifest.json").exists()
    assert start("none", 0, tmp_path / "log", command(tars, out)) == 0
    assert contents(out) == contents(tmp_path / "undisturbed")
    check_shards(out, Manifest.load(out).shards, checksums=True)


def children(pid: int) -> list[int]:
    return [int(n) for task in Path(f"/proc/{pid}/task").iterdir() for n in (task / "children").read_text().split()]


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
