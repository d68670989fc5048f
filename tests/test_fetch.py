"""Downloads by the real img2dataset from a real server on this machine: what becomes of each row, retries, and kills."""

import dataclasses
import fcntl
import hashlib
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from http_server import Server, picture
from PIL import Image

from data_prep import fetch_environment
from data_prep.fetch import FETCH_NAME, READERS, FetchConfig, State, TsvConfig, YfccClipConfig, fetch
from data_prep.fetch_guard import ascii_url
from data_prep.fetch_run import GIVEN_UP, sweep
from data_prep.fetch_status import REASONS, reason_of
from setclip.errors import InputError

ROOT = Path(__file__).parents[1]
ENVIRONMENT = Path(os.environ.get(fetch_environment.VARIABLE) or ROOT / fetch_environment.DEFAULT)


@pytest.fixture
def environment(monkeypatch) -> Path:
    """The place of img2dataset's environment; tests that need it are skipped where there is none."""
    try:
        fetch_environment.python_of(ENVIRONMENT)
    except InputError as error:
        pytest.skip(str(error))
    for name in ("http_proxy", "https_proxy", "all_proxy"):  # this machine's own server is asked for directly
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    return ENVIRONMENT


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as server:
        yield server


def write_list(folder: Path, urls: list[str]) -> Path:
    path = folder / "list.tsv"
    path.write_text("".join(f"{url}\tcaption of row {row}\n" for row, url in enumerate(urls)), encoding="utf-8")
    return path


def config_of(folder: Path, urls: list[str] | None, environment: Path, **settings: Any) -> TsvConfig:
    defaults: dict[str, Any] = {
        "list": folder / "list.tsv" if urls is None else write_list(folder, urls),
        "out": folder / "out",
        "env": environment,
        "processes": 1,
        "threads": 8,
        "timeout": 2,
        "deadline": 4.0,
        "min_free_gb": 0.0,
    }
    return TsvConfig(**{**defaults, **settings})


def status_of(out: Path) -> list[dict[str, Any]]:
    return pq.read_table(out / "status.parquet").to_pylist()


def image_of(out: Path, row: dict[str, Any]) -> tuple[bytes, dict[str, Any]]:
    """Returns the image and the JSON of a row that succeeded, from the place that its status names."""
    with tarfile.open(out / row["tar"]) as tar:
        image, record = (tar.extractfile(f"{row['key']}.{end}").read() for end in ("jpg", "json"))
    return image, json.loads(record)


# --- rows and their reasons


@pytest.mark.slow
def test_each_row_has_its_reason_and_only_those_asked_for_are_asked_again(tmp_path, server, environment, capsys):
    expected: list[tuple[str, str | None]] = [
        (server.url("good", 0), None),
        (server.url("large", 1), None),
        (server.url("png", 2), None),
        (server.url("redirect", 3), None),
        (server.url("good", 4) + "?q=ä b", None),
        (server.url("gone", 5), "http_404"),
        (server.url("forbidden", 6), "http_403"),
        (server.url("busy", 7), "http_429"),
        (server.url("broken", 8), "http_5xx"),
        (server.url("teapot", 9), "http_other"),
        (server.url("loop", 10), "http_other"),
        (server.url("html", 11), "not_an_image"),
        (server.url("empty", 12), "not_an_image"),
        (server.url("small", 13), "too_small"),
        (server.url("wide", 14), "aspect"),
        (server.url("robots", 15), "disallowed"),
        (server.url("trickle", 16), "timeout"),
        (server.url("trickle-header", 17), "timeout"),
        (server.url("silent", 18), "timeout"),
        (server.url("truncated", 19), "connection"),
        (server.url("reset", 20), "connection"),
        ("http://127.0.0.1:9/nobody-listens.jpg", "connection"),
        (server.url("huge", 22), "too_large"),
        (server.url("huge-unsaid", 23), "too_large"),
        (server.url("bomb", 24), "too_large"),
        ("http://no-such-host.invalid/a.jpg", "dns"),
        (server.url("good", 26).replace("http:", "https:"), "tls"),
        ("nothing like a url", "list_not_a_url"),
    ]
    settings: dict[str, Any] = {"min_size": 10, "max_aspect": 10.0, "max_bytes": 1_000_000}
    config = config_of(tmp_path, [url for url, _ in expected], environment, **settings)
    fetch("tsv", config)
    rows = status_of(config.out)
    assert [(row["url"], row["reason"]) for row in rows] == expected
    assert [row["row"] for row in rows] == list(range(28))
    assert [row["status"] for row in rows] == ["success"] * 5 + ["failed"] * 22 + ["not tried"]
    assert [row["attempts"] for row in rows] == [1] * 27 + [0]
    assert all(row["message"] for row in rows[5:27])
    assert "5 of 28 pairs present (17.9%)" in capsys.readouterr().out

    # The bytes of small JPEGs are the server's; large ones are resized, other formats become JPEG; both keep the hash.
    image, record = image_of(config.out, rows[0])
    assert image == picture(0)
    assert (record["url"], record["caption"], record["row"], record["id"]) == (
        expected[0][0],
        "caption of row 0",
        0,
        None,
    )
    image, record = image_of(config.out, rows[1])
    assert Image.open(io.BytesIO(image)).size == (768, 512)
    assert record["sha256"] == hashlib.sha256(picture(1, 1200, 800)).hexdigest()
    image, record = image_of(config.out, rows[2])
    assert Image.open(io.BytesIO(image)).format == "JPEG"
    assert image_of(config.out, rows[4])[0] == picture(4)

    # Again: nothing is asked for twice.
    server.asked.clear()
    fetch("tsv", config)
    assert server.asked == []
    assert "all of it was asked for already (1 attempts)" in capsys.readouterr().out

    # The server gets better; two reasons are asked for again, and only they.
    server.mend()
    fetch("tsv", config_of(tmp_path, None, environment, retry="failed", reason="connection,http_5xx", **settings))
    assert sorted(server.asked) == ["/broken/8.jpg", "/reset/20.jpg", "/truncated/19.jpg"]
    again = status_of(config.out)
    changed = [row["row"] for row, before in zip(again, rows, strict=True) if row != before]
    assert changed == [8, 19, 20, 21]
    assert [again[row]["status"] for row in changed] == ["success", "success", "success", "failed"]
    assert {again[row]["attempts"] for row in changed} == {2}
    assert image_of(config.out, again[8])[0] == picture(8)
    assert again[8]["tar"] == "attempt-2/00000.tar"
    assert again[0]["tar"] == "attempt-1/00000.tar"

    # All that failed: what has an image is left alone.
    server.asked.clear()
    fetch("tsv", config_of(tmp_path, None, environment, retry="failed", **settings))
    assert len(server.asked) == 16  # of 19; three do not reach a web server at all
    last = status_of(config.out)
    still = {row["row"]: row["reason"] for row in last if row["status"] != "success"}
    assert still == {21: "connection", 25: "dns", 26: "tls", 27: "list_not_a_url"}
    assert [attempt.rows for attempt in State.load(config.out).attempts] == [27, 4, 19]


# --- kills


def start(config: TsvConfig) -> subprocess.Popen:
    flags = ["list", "out", "env", "processes", "threads", "timeout", "deadline", "min_free_gb", "shard_size"]
    command = [sys.executable, "-m", "data_prep.fetch", "tsv"]
    for name in flags:
        command += [f"--{name.replace('_', '-')}", str(getattr(config, name))]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def wait_until(holds: Callable[[], bool], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


def processes_about(folder: Path) -> list[int]:
    """Returns the living processes whose command line or open files name `folder`."""
    found = []
    for place in Path("/proc").glob("[0-9]*"):
        try:
            files = [os.readlink(link) for link in (place / "fd").iterdir()]
        except OSError:
            continue
        if any(file.startswith(str(folder)) for file in files):
            found.append(int(place.name))
    return found


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs Linux")
def test_a_killed_download_leaves_no_process_and_goes_on_to_a_complete_result(tmp_path, server, environment):
    urls = [server.url("good", number) for number in range(60)]
    config = config_of(tmp_path, urls, environment, shard_size=10, threads=2, timeout=60, deadline=60.0)
    server.hold = threading.Event()

    def release_some() -> None:  # the first 35 pictures are served, then the server stands still
        wait_until(lambda: len(server.asked) >= 1)
        while len(server.asked) < 35:
            server.hold.set()
            time.sleep(0.001)
        server.hold.clear()

    releasing = threading.Thread(target=release_some)
    releasing.start()
    process = start(config)
    folder = config.out / "attempt-1"
    wait_until(lambda: (folder / "00000_stats.json").exists())
    releasing.join()
    wait_until(
        lambda: len(list(folder.glob("*.tar"))) > len(list(folder.glob("*_stats.json"))) or process.poll() is not None
    )
    assert process.poll() is None, "it was over before it could be killed"
    process.send_signal(signal.SIGKILL)
    process.wait()
    server.hold.set()
    wait_until(lambda: not processes_about(config.out))
    finished = {path.name[:5] for path in folder.glob("*_stats.json")}
    assert not (config.out / "status.parquet").exists()
    asked = len(server.asked)

    fetch("tsv", config)
    assert 0 < len(server.asked) - asked <= 60 - 10 * len(finished)
    rows = status_of(config.out)
    assert [row["status"] for row in rows] == ["success"] * 60
    for row in rows:
        assert image_of(config.out, row)[0] == picture(row["row"])
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        f"{shard:05d}{end}" for shard in range(6) for end in (".tar", ".parquet", "_stats.json")
    )


@pytest.mark.slow
def test_a_shard_that_stands_still_is_given_up_and_comes_back_with_a_retry(tmp_path, server, environment, capsys):
    urls = [server.url("good", number) for number in range(25)]
    urls[4] = server.url("silent", 4)
    config = config_of(tmp_path, urls, environment, shard_size=10, timeout=1000, deadline=1000.0, stall_after=8.0)
    fetch("tsv", config)
    rows = status_of(config.out)
    assert [row["status"] for row in rows] == ["failed"] * 10 + ["success"] * 15
    assert {row["reason"] for row in rows[:10]} == {"timeout"}
    assert rows[0]["message"].startswith(GIVEN_UP)
    said = capsys.readouterr()
    assert "shard 0 is given up" in said.err
    assert "15 of 25 pairs present" in said.out
    server.asked.clear()
    server.mend()
    fetch("tsv", config_of(tmp_path, None, environment, retry="failed", reason="timeout", shard_size=4))
    assert len(server.asked) == 10
    assert {row["status"] for row in status_of(config.out)} == {"success"}
    assert image_of(config.out, status_of(config.out)[4])[0] == picture(4)


@pytest.mark.slow
def test_a_list_shorter_than_the_published_one_says_so_and_a_folder_keeps_to_its_list(
    tmp_path, server, environment, capsys
):
    path = tmp_path / "Train_GCC-training.tsv"
    path.write_text(f"a dog\t{server.url('good')}\na cat\t{server.url('gone')}\n\t{server.url('good')}\n")
    tsv = config_of(tmp_path, [], environment)
    fetch("cc3m", FetchConfig(list=path, out=tsv.out, env=environment, processes=1, threads=2, min_free_gb=0))
    said = capsys.readouterr()
    assert "warning: 3 of 3,318,333 rows of the published list" in said.err
    assert "1 of 3 pairs present (33.3%); the published list has 3,318,333" in said.out
    assert [row["reason"] for row in status_of(tsv.out)] == [None, "http_404", "list_empty_caption"]
    assert State.load(tsv.out).dropped == {"list_empty_caption": 1}

    # The folder remembers what it was begun with.
    again = FetchConfig(list=path, out=tsv.out, env=environment, image_size=300, min_free_gb=0)
    with pytest.raises(InputError, match="image_size 300 in place of 512; give what it was begun with"):
        fetch("cc3m", again)
    path.write_text(path.read_text() * 2)
    with pytest.raises(InputError, match=r"bytes \d+ in place of \d+"):
        fetch("cc3m", dataclasses.replace(again, image_size=512))
    assert json.loads((tsv.out / FETCH_NAME).read_text())["rows_listed"] == 3


# --- what is found before anything is downloaded


def test_a_missing_environment_is_named_with_the_command_that_makes_it(tmp_path):
    config = config_of(tmp_path, ["http://a/b.jpg"], tmp_path / "no-env")
    with pytest.raises(InputError, match=r"found none; make it with `python -m data_prep.fetch setup --env .*no-env`"):
        fetch("tsv", config)
    (tmp_path / "no-env").mkdir()
    with pytest.raises(InputError, match="found an environment that was not finished"):
        fetch("tsv", config)
    assert not config.out.exists()


def test_setup_refuses_an_interpreter_that_does_not_fit_and_a_folder_that_is_something_else(tmp_path):
    with pytest.raises(InputError, match=r"expected Python 3.11 to 3.12 as .* does not start"):
        fetch_environment.make(tmp_path / "env", tmp_path / "no-python")
    other = tmp_path / "python3.13"
    other.write_text("#!/bin/sh\necho 3 13\n")
    other.chmod(0o755)
    with pytest.raises(InputError, match=r"found 3\.13 as .*--python"):
        fetch_environment.make(tmp_path / "env", other)
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.jpg").write_bytes(b"1")
    with pytest.raises(InputError, match="found something else, which will not be removed"):
        fetch_environment.make(tmp_path / "photos", Path(sys.executable))
    assert (tmp_path / "photos" / "a.jpg").exists()


def test_setup_does_nothing_twice(environment, capsys):
    fetch_environment.make(environment, None)
    assert "is ready" in capsys.readouterr().out


def test_two_downloads_do_not_share_a_folder(tmp_path, environment):
    config = config_of(tmp_path, ["http://127.0.0.1:9/b.jpg"], environment)
    config.out.mkdir()
    with open(config.out / ".lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(InputError, match="found another one at work there"):
            fetch("tsv", config)


def test_too_little_disk_is_found_at_the_start(tmp_path, environment):
    config = config_of(tmp_path, ["http://127.0.0.1:9/b.jpg"], environment, min_free_gb=1e9)
    with pytest.raises(InputError, match=r"GB free at .*; make room"):
        fetch("tsv", config)
    assert not (config.out / "urls.parquet").exists()


def test_the_list_itself_is_looked_at_first(tmp_path):
    config = config_of(tmp_path, ["http://a/b.jpg"], tmp_path)
    swapped = FetchConfig(list=config.list, out=config.out)
    with pytest.raises(InputError, match="found them in column 1"):
        READERS["cc3m"].check(swapped)
    READERS["cc12m"].check(swapped)
    with pytest.raises(InputError, match="expected JSON lines"):
        READERS["yfcc15m-declip"].check(swapped)
    with pytest.raises(InputError, match="photo id, photo hash"):
        READERS["yfcc15m-clip"].check(YfccClipConfig(list=config.list, out=config.out, metadata=(config.list,)))


@pytest.mark.parametrize(
    ("settings", "found"),
    [
        ({"retry": "failed", "reason": "timeout,dsn"}, "expected reasons among .*, found dsn"),
        ({"reason": "timeout"}, "expected --retry failed with --reason"),
        ({"shard_size": 1}, "found shard_size 1"),
        ({"threads": 0, "max_aspect": 0.5}, "found threads 0, max_aspect 0.5"),
    ],
)
def test_flags_that_do_not_fit_are_named(tmp_path, settings, found):
    with pytest.raises(InputError, match=found):
        FetchConfig(list=tmp_path / "list", out=tmp_path, **settings)


# --- small parts


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        ("HTTP Error 404: Not Found", "http_404"),
        ("HTTP Error 410: Gone", "http_other"),
        ("HTTP Error 503: Service Temporarily Unavailable", "http_5xx"),
        ("HTTP Error 504: Gateway timed out", "http_5xx"),
        ("<urlopen error timed out>", "timeout"),
        ("The read operation timed out", "timeout"),
        ("<urlopen error _ssl.c:1112: The handshake operation timed out>", "timeout"),
        ("<urlopen error [Errno 110] Connection timed out>", "timeout"),
        ("<urlopen error [Errno -3] Temporary failure in name resolution>", "dns"),
        ("<urlopen error [Errno -5] No address associated with hostname>", "dns"),
        ("encoding with 'idna' codec failed (UnicodeError: label empty or too long)", "dns"),
        ("<urlopen error [SSL: CERTIFICATE_VERIFY_FAILED] certificate verify failed: certificate has expired>", "tls"),
        ("<urlopen error [SSL: UNEXPECTED_EOF_WHILE_READING] EOF occurred in violation of protocol>", "tls"),
        ("Remote end closed connection without response", "connection"),
        ("<urlopen error [Errno 113] No route to host>", "connection"),
        ("IncompleteRead(12 bytes read)", "connection"),
        ("Image decoding error", "not_an_image"),
        ("image area too large", "too_large"),
        ("no host given", "other"),
        (None, "other"),
    ],
)
def test_a_message_stands_for_one_reason(message, reason):
    assert reason_of(message) == reason
    assert reason in REASONS


@pytest.mark.parametrize(
    ("url", "sent"),
    [
        ("http://a/b%20c.jpg?x=1&y=%C3%A4", "http://a/b%20c.jpg?x=1&y=%C3%A4"),
        ("http://a/b c.jpg", "http://a/b%20c.jpg"),
        ("http://a/ä.jpg?q=é#part", "http://a/%C3%A4.jpg?q=%C3%A9"),
        ("http://bücher.example/a.jpg", "http://xn--bcher-kva.example/a.jpg"),
        ("http://[broken/ä.jpg", "http://[broken/ä.jpg"),
    ],
)
def test_urls_outside_ascii_are_made_askable(url, sent):
    assert ascii_url(url) == sent


def test_modules_of_ours_do_not_stand_before_pythons_own_in_img2datasets_environment(environment, tmp_path):
    script = Path(fetch_environment.__file__).with_name("fetch_guard.py")
    code = "import statistics, sys; print(statistics.__file__)"
    done = subprocess.run(
        [environment / "bin" / "python", "-c", f"import runpy; runpy.run_path({str(script)!r}, run_name='x'); {code}"],
        capture_output=True,
        text=True,
        check=True,
        cwd=script.parent,
        env=fetch_environment.variables(),
    )
    assert "data_prep" not in done.stdout


def write_shard(folder: Path, shard: int, rows: int) -> Path:
    """Writes a shard as img2dataset leaves it; returns the tar."""
    stem = folder / f"{shard:05d}"
    with tarfile.open(stem.with_suffix(".tar"), "w") as tar:
        for row in range(rows):
            member = tarfile.TarInfo(f"{shard:05d}{row:04d}.jpg")
            member.size = len(picture(row))
            tar.addfile(member, io.BytesIO(picture(row)))
    pq.write_table(pa.table({"row": list(range(rows))}), stem.with_suffix(".parquet"))
    stem.with_name(f"{stem.name}_stats.json").write_text(json.dumps({"count": rows, "successes": rows}))
    return stem.with_suffix(".tar")


def test_only_whole_shards_count_as_done_and_the_rest_is_removed(tmp_path):
    tars = [write_shard(tmp_path, shard, 10) for shard in range(6)]
    tars.append(write_shard(tmp_path, 6, 3))
    for number, keep in ((1, 0.5), (2, 0.0)):
        os.truncate(tars[number], int(tars[number].stat().st_size * keep) // 512 * 512)
    tars[3].with_name("00003_stats.json").write_text('{"count": 10, "succ')
    tars[4].with_name("00004_stats.json").unlink()
    table = tars[5].with_suffix(".parquet")
    os.truncate(table, table.stat().st_size - 10)
    done = sweep(tmp_path, rows=63, shard_size=10)
    assert {shard: stats.count for shard, stats in done.items()} == {0: 10, 6: 3}
    assert sorted(path.name[:5] for path in tmp_path.iterdir()) == ["00000"] * 3 + ["00006"] * 3


def test_a_last_shard_of_another_length_is_not_taken_for_whole(tmp_path):
    write_shard(tmp_path, 0, 10)
    write_shard(tmp_path, 1, 4)
    assert set(sweep(tmp_path, rows=15, shard_size=10)) == {0}
