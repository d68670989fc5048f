"""Shards on servers and several sources: the same batches as from a disk, whatever the server does, and exact shares."""

import dataclasses
import fcntl
import functools
import multiprocessing
import os
import signal
import time
from collections import Counter
from itertools import islice
from pathlib import Path

import fsspec
import psutil
import pytest
import torch
from material import MODEL_CFG, damage_image, write_model, write_shards
from ranks import on_ranks
from shard_server import TROUBLES, serving

from pretrain.data_order import DataOrder
from pretrain.loader import Loader, SamplePipeline
from pretrain.sources import open_sources
from setclip.disk_cache import DiskCache
from setclip.errors import InputError
from setclip.images import Augment, AugmentConfig
from setclip.manifest import Manifest
from setclip.models.clip import tokenizer_for
from setclip.objects import ObjectTable, read_objects, write_objects
from setclip.remote import Patience
from setclip.shards import Shard

BATCH = 16
HASTY = Patience(tries=12, connect_seconds=2.0, stall_seconds=0.25, pause_seconds=0.001)
GB = 10**9


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_shards(tmp_path_factory.mktemp("shards"))


@functools.cache
def tokenizer():
    return tokenizer_for(MODEL_CFG)


def loader(sources, rank=0, world_size=1, workers=0, samples_seen=0, skipped=None, lanes=8, block_size=4, max_bad=0.05):
    sizes = tuple(shard.samples for shard in sources.shards)
    order = DataOrder(sizes, 3, lanes, block_size, 2, sources.shares)
    augment = Augment(AugmentConfig(kind="resized_crop", scale=(0.5, 1), flip=True), 32)
    pipeline = SamplePipeline(sources.open(block_size), augment, tokenizer(), "pos", seed=3)
    return Loader(order, pipeline, BATCH // world_size, rank, world_size, workers, samples_seen, skipped, max_bad)


def opened(places, weights=(), cache=None, cache_bytes=GB, patience=HASTY):
    places = [places] if not isinstance(places, list) else places
    return open_sources(list(map(str, places)), weights, "train", cache, cache_bytes, patience, "pos")


def take(source, count):
    """Takes batches and ends the loader's processes."""
    try:
        return list(islice(source, count))
    finally:
        source.close()


def assert_equal(batches, others):
    assert len(batches) == len(others)
    for one, two in zip(batches, others, strict=True):
        assert one.keys == two.keys
        assert torch.equal(one.images, two.images)
        assert torch.equal(one.tokens, two.tokens)
        assert torch.equal(one.image_objects, two.image_objects)


# --- shards on a server


@pytest.mark.parametrize(
    "workers", [0, pytest.param(2, marks=pytest.mark.filterwarnings("ignore:This DataLoader will"))]
)
def test_batches_from_a_server_that_fails_in_every_way_are_those_from_a_disk(folder, tmp_path, workers):
    here = take(loader(opened(folder)), 9)  # over two epochs
    with serving(folder) as server:
        sources = opened(server.address, cache=tmp_path)
        # Each file's first requests fail, another way each time; the last one works after "slow".
        server.counts.clear()
        server.trouble = lambda name, number: (
            (*TROUBLES, "slow", "slow")[number] if number < len(TROUBLES) + 2 else None
        )
        assert_equal(take(loader(sources, workers=workers), 9), here)
        assert min(server.counts[f"train-{n:05d}.tar"] for n in range(3)) > len(TROUBLES), "all of it has happened"
    assert not list(tmp_path.glob("*.partial")), "nothing half-written is left"


def test_a_resume_in_mid_epoch_on_other_ranks_goes_on_from_a_server(folder, tmp_path):
    whole = take(loader(opened(folder)), 9)
    with serving(folder) as server:
        sources = opened(server.address, cache=tmp_path)
        assert_equal(take(loader(sources), 5), whole[:5])
        parts = [take(loader(sources, rank, 2, samples_seen=5 * BATCH), 4) for rank in range(2)]
    for step, batch in enumerate(whole[5:]):
        assert [parts[j % 2][step].keys[j // 2] for j in range(BATCH)] == batch.keys
        assert torch.equal(torch.stack([parts[j % 2][step].images[j // 2] for j in range(BATCH)]), batch.images)


def test_a_rank_reads_only_its_lanes_and_a_second_epoch_only_the_cache(tmp_path):
    folder = write_shards(tmp_path / "shards", sizes=(64,))
    total = (folder / "train-00000.tar").stat().st_size
    with serving(folder) as server:
        sources = opened(server.address, cache=tmp_path / "cache")
        server.requests.clear()
        reader = loader(sources, rank=1, world_size=4)  # lanes 1 and 5 of 8: 16 samples of 64, in 4 blocks of 16
        assert len(take(reader, 4)) == 4
        read = sum(end - start for name, start, end in server.requests if name.endswith(".tar"))
        assert total / 5 < read < total * 2 / 3, "its lanes, and what they read next"
        take(loader(sources), 4)
        server.requests.clear()
        take(loader(sources), 8)
        assert server.requests == []


def test_the_next_window_is_fetched_before_it_is_needed(folder, tmp_path):
    with serving(folder) as server:
        sources = opened(server.address, cache=tmp_path)
        order = DataOrder(tuple(s.samples for s in sources.shards), 3, 8, 4, 2)
        blocks = sources.open(4)
        window = next(order.windows(0))
        blocks.foresee(window)
        wanted = len(window.blocks())
        ends = time.monotonic() + 10
        while len(list(tmp_path.glob("*.block"))) < wanted and time.monotonic() < ends:
            time.sleep(0.01)
        server.requests.clear()
        blocks.leave(blocks.enter(window))
        assert server.requests == []
        blocks.enter(window)
        assert set(sources.cache._held) == {path.name for path in tmp_path.glob("*.block")}
        blocks.close()
        assert not sources.cache._held


def test_the_cache_stays_within_its_bound_while_all_is_read(folder, tmp_path):
    here = take(loader(opened(folder)), 8)
    total = sum(path.stat().st_size for path in folder.glob("*.tar"))
    with serving(folder) as server:
        sources = opened(server.address, cache=tmp_path, cache_bytes=total // 2)
        source, batches, most = iter(loader(sources, lanes=2, block_size=2)), [], 0
        expected = take(loader(opened(folder), lanes=2, block_size=2), 8)
        for _ in range(8):
            batches.append(next(source))
            files = [*tmp_path.glob("*.block"), *tmp_path.glob("*.idx")]
            most = max(most, sum(path.stat().st_size for path in files if path.exists()))
        assert_equal(batches, expected)
        assert total // 4 < most <= total // 2
        assert sum(server.counts.values()) > 40, "what was removed was fetched again"
    assert len(here) == 8


def test_a_sample_that_is_damaged_on_the_server_is_skipped_as_on_a_disk(tmp_path, capsys):
    folder = write_shards(tmp_path / "shards")
    bad = damage_image(folder, "train-00001.tar", 5)
    here = take(loader(opened(folder), max_bad=0.2), 8)
    with serving(folder) as server:
        batches = take(loader(opened(server.address, cache=tmp_path / "cache"), max_bad=0.2), 8)
    assert_equal(batches, here)
    skips = [skip for batch in batches for skip in batch.skips]
    assert {(skip.shard, skip.key) for skip in skips} == {("train-00001.tar", bad)}
    assert f"train-00001.tar: 1 samples are damaged on the server: {bad}" in "".join(capsys.readouterr())


def test_a_server_that_is_gone_ends_the_run_with_the_shards_name(folder, tmp_path):
    with serving(folder) as server:
        sources = opened(server.address, cache=tmp_path, patience=dataclasses.replace(HASTY, tries=3))
        server.trouble = lambda name, number: "503" if name == "train-00002.tar" else None
        with pytest.raises(InputError, match=r"train-00002\.tar, bytes \d+ to \d+, found in 3 tries: status 503"):
            take(loader(sources), 9)


def test_a_worker_says_which_shard_could_not_be_read(folder, tmp_path):
    with serving(folder) as server:
        sources = opened(server.address, cache=tmp_path, patience=dataclasses.replace(HASTY, tries=2))
        server.trouble = lambda name, number: "cut" if name == "train-00000.tar" else None
        with pytest.raises(InputError, match=r"train-00000\.tar.*in 2 tries"):
            take(loader(sources, workers=1), 9)


@pytest.mark.parametrize(
    ("trouble", "message"),
    [
        ({"manifest.json": "404"}, r"a manifest at http.*/manifest\.json, found status 404"),
        ({"manifest.json": "503"}, r"manifest\.json, found in 2 tries: status 503"),
        ({"train-00000.tar": "404"}, r"the shard http.*/train-00000\.tar that the manifest names, found status 404"),
        ({"train-00000.tar": "whole"}, r"answers requests for a part of a file \(status 206\), found status 200"),
    ],
)
def test_what_cannot_be_had_is_said_at_the_start(folder, tmp_path, trouble, message):
    with serving(folder) as server:
        server.trouble = lambda name, number: trouble.get(name)
        begin = time.monotonic()
        with pytest.raises(InputError, match=message):
            opened(server.address, cache=tmp_path)
        assert time.monotonic() - begin < 5


def test_a_server_that_is_not_there_and_addresses_that_cannot_be_read_are_said(tmp_path):
    with pytest.raises(InputError, match=r"http://127\.0\.0\.1:1/manifest\.json, found in 2 tries: ConnectError"):
        opened("http://127.0.0.1:1", cache=tmp_path)
    with pytest.raises(InputError, match="or an address that starts with https://, s3://, gs://"):
        opened("nothing://bucket/shards", cache=tmp_path)
    with pytest.raises(InputError, match=r"driver for s3://, found none .*[Ii]nstall s3fs"):
        opened("s3://bucket/shards", cache=tmp_path)


def test_shards_in_object_storage_give_the_same_batches(folder, tmp_path):
    storage = fsspec.filesystem("memory")
    for path in folder.iterdir():
        storage.pipe_file(f"/{tmp_path.name}/{path.name}", path.read_bytes())
    here = take(loader(opened(folder)), 5)
    assert_equal(take(loader(opened(f"memory://{tmp_path.name}", cache=tmp_path / "a"), workers=1), 5), here)
    assert_equal(take(loader(opened(f"file://{folder}", cache=tmp_path / "b")), 5), here)
    storage.rm(f"/{tmp_path.name}/train-00001.tar")
    with pytest.raises(InputError, match=r"the shard memory://.*/train-00001\.tar and its index.*found no such file"):
        take(loader(opened(f"memory://{tmp_path.name}", cache=tmp_path / "c")), 5)


def test_a_cache_that_is_too_small_for_the_lanes_is_refused_with_the_size_that_would_do(folder, tmp_path):
    with serving(folder) as server:
        sources = opened(server.address, cache=tmp_path, cache_bytes=20_000)
        with pytest.raises(
            InputError, match=r"a cache of at least .* GB \(8 lanes .* found --data.cache-gb 2e-05; raise it"
        ):
            sources.check_cache(8, 4, 2)
        with pytest.raises(
            InputError, match=r"in use by what the lanes of this machine are reading; raise --data.cache-gb"
        ):
            take(loader(sources), 9)


def test_a_file_that_somebody_removes_from_the_cache_is_fetched_again(folder, tmp_path):
    here = take(loader(opened(folder)), 8)
    with serving(folder) as server:
        source, batches = iter(loader(opened(server.address, cache=tmp_path))), []
        for number in range(8):
            batches.append(next(source))
            for path in tmp_path.glob("*.block"):
                if number % 2:
                    path.unlink(missing_ok=True)
                else:
                    os.truncate(path, 100)
    assert_equal(batches, here)


# --- guarantees


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize(("world_size", "workers"), [(1, 0), (4, 0), (1, 3), (2, 2)])
def test_each_decodable_sample_comes_once_an_epoch_and_the_others_are_listed(tmp_path, world_size, workers):
    folder = write_shards(tmp_path, sizes=(50, 14))  # fewer shards than workers
    bad = {damage_image(folder, "train-00000.tar", row) for row in (3, 30)} | {
        damage_image(folder, "train-00001.tar", 9)
    }
    parts = [take(loader(opened(folder), r, world_size, workers, max_bad=0.3), 16) for r in range(world_size)]
    assert {len(batch) for part in parts for batch in part} == {BATCH // world_size}, (
        "as many batches and samples on each"
    )
    seen = [parts[j % world_size][t].keys[j // world_size] for t in range(16) for j in range(BATCH)]
    counts = Counter(seen)
    assert len(counts) == 61
    assert max(counts.values()) - min(counts.values()) <= 1
    skips = [skip for part in parts for batch in part for skip in batch.skips]
    assert {skip.key for skip in skips} == bad
    by_epoch = Counter((skip.epoch, skip.key) for skip in skips)
    assert set(by_epoch.values()) == {1}, "once an epoch"


def memory_of_workers(place, cache, cache_bytes):
    """Returns epoch → (own bytes, open files) of each of two loader processes at its end, for twenty epochs."""
    source = loader(opened(place, cache=cache, cache_bytes=cache_bytes), workers=2, block_size=4)
    batches, found = iter(source), {}
    try:
        for number in range(1, 21):
            for _ in range(12 * 8 // BATCH):
                next(batches)
            processes = [psutil.Process(worker.pid) for worker in source._source._iterator._workers]
            found[number] = [(p.memory_full_info().uss, p.num_fds()) for p in processes]
    finally:
        source.close()
    return found


@pytest.mark.slow
@pytest.mark.parametrize("is_remote", [False, True])
def test_the_workers_memory_does_not_grow_over_twenty_epochs(tmp_path, is_remote):
    folder = write_shards(tmp_path / "shards", sizes=(12,) * 8)
    with serving(folder) as server:
        place, total = (server.address, (folder / "train-00000.tar").stat().st_size * 8) if is_remote else (folder, GB)
        # In a process without the tests' own memory, whose pages become the workers' when either side touches them.
        (found,) = on_ranks(1, memory_of_workers, place, tmp_path / "cache", total)
    for (before, _), (after, _) in zip(found[3], found[20], strict=True):
        assert after < before * 1.02 + 3e6, f"{before:,} bytes of its own after 3 epochs, {after:,} after 20"
    for worker in range(len(found[3])):
        files = [found[epoch][worker][1] for epoch in range(3, 21)]
        # Connections come and go with what is being fetched; a leak would leave none of the last counts low.
        assert min(files[-6:]) <= max(files[:6]), f"open files after epochs 3 to 20: {files}"


@pytest.mark.slow
def test_a_run_on_a_server_ends_with_the_weights_of_one_on_a_disk_and_its_sources_are_fixed(tmp_path):
    from safetensors.torch import load_file

    from pretrain.config import DataConfig, tiny
    from pretrain.run import train

    a, b = write_shards(tmp_path / "a"), write_shards(tmp_path / "b", first=64)
    base = tiny()

    def run(name, places, weights, **changes):
        data = DataConfig(
            shards=tuple(map(str, places)),
            weights=weights,
            workers=0,
            num_lanes=8,
            cache=tmp_path / "cache",
            cache_gb=0.1,
        )
        model = dataclasses.replace(base.model, name=str(write_model(tmp_path)))
        config = dataclasses.replace(
            base, out=tmp_path / name, data=data, model=model, global_batch_size=16, steps=6, log_every_steps=1,
            engine=dataclasses.replace(base.engine, device="cpu"), **changes,
        )  # fmt: skip
        return load_file(train("tiny", config) / "model.safetensors")

    here = run("here", (a, b), (1.0, 0.5))
    with serving(b) as server:
        there = run("there", (a, server.address), (1.0, 0.5))
    assert all(torch.equal(here[name], there[name]) for name in here)
    with pytest.raises(InputError, match=r"sources was \[\[.*0\.5\]\], is \[\[.*2\.0\]\]"):
        run("here", (a, b), (1.0, 2.0), resume=True)


# --- the cache


def _fill(folder, limit, first, rounds):
    cache = DiskCache(folder, limit)
    for number in range(rounds):
        name = f"{(first + number) % 7}.block"
        path = cache.hold(name, lambda name=name: name.encode() * 1000)
        assert path.read_bytes() == name.encode() * 1000
        cache.release(name)


def test_processes_share_a_cache_and_each_file_is_made_by_one_of_them(tmp_path):
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_fill, args=(tmp_path, 25_000, 3 * n, 60)) for n in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    files = list(tmp_path.glob("*.block"))
    assert 0 < sum(path.stat().st_size for path in files) <= 25_000
    made = []
    cache = DiskCache(tmp_path, 25_000)
    cache.hold("other.block", lambda: made.append(1) or b"x")
    cache.hold("other.block", lambda: made.append(1) or b"x")
    assert made == [1]


def test_a_file_gets_its_name_while_no_other_counts_the_files(tmp_path, monkeypatch):
    rename, seen = os.rename, []

    def watched(old, new):
        with open(tmp_path / ".lock") as file, pytest.raises(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        seen.append(Path(new).name)
        rename(old, new)

    monkeypatch.setattr("setclip.disk_cache.os.rename", watched)
    assert DiskCache(tmp_path, 1000).prepare("a", lambda: b"12")
    assert seen == ["a"]


def test_what_is_held_stays_and_what_was_used_longest_ago_goes_first(tmp_path):
    cache = DiskCache(tmp_path, 1000)
    for number, name in enumerate("abc"):
        cache.hold(name, lambda: b"x" * 300)
        if name != "a":
            cache.release(name)
        os.utime(tmp_path / name, (number, number))
    assert cache.prepare("d", lambda: b"x" * 300)
    assert {path.name for path in tmp_path.glob("?")} == {"a", "c", "d"}, "a is held, b was used before c"
    other = DiskCache(tmp_path, 1000)
    assert not other.prepare("e", lambda: b"x" * 900), "what one process holds another does not remove"
    assert (tmp_path / "a").exists()
    with pytest.raises(InputError, match=r"expected room for 900 bytes"):
        other.hold("e", lambda: b"x" * 900)


def _stall(folder, ready):
    cache = DiskCache(folder, 1000)
    cache.hold("held", lambda: b"y" * 500)

    def fetch():
        ready.set()
        time.sleep(60)

    cache.hold("half", fetch)


def test_a_process_killed_in_mid_download_leaves_no_bad_file_and_holds_nothing(tmp_path):
    context = multiprocessing.get_context("fork")
    ready = context.Event()
    process = context.Process(target=_stall, args=(tmp_path, ready))
    process.start()
    assert ready.wait(20)
    os.kill(process.pid, signal.SIGKILL)
    process.join(20)
    assert not (tmp_path / "half").exists()
    cache = DiskCache(tmp_path, 1000)
    assert cache.hold("half", lambda: b"z" * 700).read_bytes() == b"z" * 700
    assert not (tmp_path / "held").exists(), "the dead process's hold is void"
    assert cache.clean() == 700
    assert not list(tmp_path.glob(".*.partial"))


# --- several sources


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    """Three sources of 20, 17 and 40 samples that share no sample."""
    place = tmp_path_factory.mktemp("three")
    sizes = {"a": (12, 8), "b": (17,), "c": (9, 31)}
    first = 0
    for name, of_name in sizes.items():
        write_shards(place / name, of_name, first=first)
        first += sum(of_name)
    return [place / name for name in sizes]


def keys_of(folder):
    return {key for info in opened(folder).shards for key in Shard(folder / info.name).keys}


@pytest.mark.parametrize("world_size", [1, 2])
def test_an_epoch_has_each_sample_of_a_source_as_often_as_its_weight_says(three, world_size):
    weights = (1.0, 0.5, 2.25)
    sources = opened(three, weights)
    epoch = 20 + 9 + 90  # 17 / 2 is rounded up, 40 × 2.25 = 90
    batches = 8 * epoch // BATCH + 1
    parts = [take(loader(sources, rank, world_size), batches) for rank in range(world_size)]
    seen = [parts[j % world_size][t].keys[j // world_size] for t in range(batches) for j in range(BATCH)]
    a, b, c = map(keys_of, three)
    halves = []
    for number in range(8):
        counts = Counter(seen[number * epoch : (number + 1) * epoch])
        assert {key: counts[key] for key in a} == dict.fromkeys(a, 1)
        assert Counter(counts[key] for key in b) == {1: 9, 0: 8}
        assert Counter(counts[key] for key in c) == {2: 30, 3: 10}
        halves.append(frozenset(key for key in b if counts[key]))
    total = Counter(seen[: 8 * epoch])
    assert {total[key] for key in b} <= {4, 5}, "over epochs all are seen equally often, give or take one"
    assert {total[key] for key in c} == {18}
    assert len(set(halves)) > 2


def test_weighted_sources_resume_exactly_on_other_ranks_and_workers(three):
    sources = opened(three, (1.0, 0.5, 2.25))
    whole = [batch.keys for batch in take(loader(sources), 20)]
    first = [batch.keys for batch in take(loader(sources), 11)]
    parts = [take(loader(sources, rank, 2, 1, samples_seen=11 * BATCH), 9) for rank in range(2)]
    rest = [[parts[j % 2][t].keys[j // 2] for j in range(BATCH)] for t in range(9)]
    assert first + rest == whole


def test_a_sample_that_an_epoch_has_twice_is_drawn_differently(three):
    sources = opened(three[0], (2.0,))
    images: dict[str, list] = {}
    for batch in take(loader(sources), 2 * 20 // BATCH):
        for key, image in zip(batch.keys, batch.images, strict=True):
            images.setdefault(key, []).append(image)
    pairs = [both for both in images.values() if len(both) == 2]
    assert len(pairs) > 5
    assert all(not torch.equal(*both) for both in pairs)


def test_bad_samples_of_several_sources_are_named_with_their_source(tmp_path):
    a, b = write_shards(tmp_path / "a"), write_shards(tmp_path / "b", first=64)
    bad = damage_image(b, "train-00001.tar", 3)
    batches = take(loader(opened([a, b]), max_bad=0.3), 10)
    assert {(skip.shard, skip.key) for batch in batches for skip in batch.skips} == {(f"{b}/train-00001.tar", bad)}


def test_a_folder_and_a_server_go_together(three, tmp_path):
    here = take(loader(opened(three[:2])), 4)
    with serving(three[1]) as server:
        assert_equal(take(loader(opened([three[0], server.address], cache=tmp_path)), 4), here)


def test_objects_of_sources_are_counted_as_often_as_an_epoch_has_them(tmp_path):
    a, b = write_shards(tmp_path / "a"), write_shards(tmp_path / "b", first=64)
    write_objects(a / "objects.parquet", [ObjectTable.from_counts({"dog": 10, "cat": 4}, "pos", 100)])
    write_objects(b / "objects.parquet", [ObjectTable.from_counts({"dog": 1, "boat": 7}, "pos", 50)])
    table = opened([a, b], (1.0, 3.0)).objects("pos")
    assert {name: table.count_of(name) for name in table.names} == {"dog": 13, "boat": 21, "cat": 4}
    assert table.num_captions == 250
    assert read_objects(a).ids[0] == table.ids[table.names.index("dog")]
    with serving(a) as server:
        assert opened(server.address, cache=tmp_path / "cache").objects("pos").count_of("cat") == 4
    with (
        serving(write_shards(tmp_path / "c")) as server,
        pytest.raises(InputError, match=r"objects\.parquet, found no such"),
    ):
        opened(server.address, cache=tmp_path / "cache").objects("pos")


def test_one_source_without_a_weight_has_the_course_that_it_always_had(three):
    assert opened(three[0]).course is None
    assert opened(three[0]).shares == ()
    weighted = opened(three, (1.0, 0.5, 2.0)).course
    assert [weight for _, weight in weighted] == [1.0, 0.5, 2.0]
    assert opened(three, (1.0, 0.5, 1.0)).course != weighted
    assert opened(three).manifest.pairs_present == sum(Manifest.load(folder).pairs_present for folder in three)


def test_sources_that_do_not_fit_each_other_are_refused(three, tmp_path):
    with pytest.raises(InputError, match="a weight for each of 3 sources, found 2"):
        opened(three, (1.0, 2.0))
    with pytest.raises(InputError, match=r"weights above 0, found 0\.0"):
        opened(three, (1.0, 0.0, 1.0)).shares  # noqa: B018
    with pytest.raises(InputError, match="each source once"):
        opened([three[0], three[0]])
    other = write_shards(tmp_path / "other")
    dataclasses.replace(Manifest.load(other), parsers={"pos": "test 2"}).save(other)
    with pytest.raises(InputError, match=r"parsed alike, found for 'pos': .*: test 1; .*: test 2"):
        opened([three[0], other])
    dataclasses.replace(Manifest.load(other), parsers={}).save(other)
    with pytest.raises(InputError, match="not parsed"):
        opened([three[0], other])
