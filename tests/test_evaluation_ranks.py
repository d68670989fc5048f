"""Evaluation on several ranks: the same features, ranks and metrics as of one process, bit for bit."""

import json
import sys
from pathlib import Path

import pytest
import torch
from evaluation_samples import (
    color_of_image,
    color_of_text,
    jpeg,
    write_captioned,
    write_class_folders,
    write_run,
    write_shards,
)
from ranks import on_ranks

from eval_suite import retrieval as retrieval_command
from eval_suite.encode import encode_functions, encode_images, encode_texts
from eval_suite.images import FolderImages, ShardImages, find_class_folders, image_batches
from eval_suite.judgements import judgements
from eval_suite.protocols import PROTOCOLS, Setting
from eval_suite.ranks import TIE_RULES, retrieval_ranks
from eval_suite.relevance import answers_of_class, relevance
from eval_suite.results import Results
from eval_suite.retrieval import read_captions, retrieval
from eval_suite.retrieval_data import read_samples
from eval_suite.scores import dot_scores
from eval_suite.sharing import ALONE, join, own_run
from setclip import distributed
from setclip.checkpoint import load_model
from setclip.errors import InputError
from setclip.images import eval_transform
from setclip.manifest import open_split

BATCH = 5


# What each rank does; each takes a World at the end.


def evaluate_shards(run, data, world):
    loaded = load_model(run)
    _, shards = open_split(data)
    _, captions = read_captions(shards)
    batches = image_batches(ShardImages(shards, eval_transform(32)), BATCH, 0)
    functions = encode_functions(loaded)
    texts = [text for each in captions for text in each]
    features = [
        encode_images(functions[0], batches, len(captions), False, world),
        encode_texts(functions[1], texts, 7, False, world),
    ]
    outcome = retrieval(*functions, batches, captions, resamples=50, show_progress=False, world=world)
    metrics = {name: (m.value, m.interval_95, m.tie_variants) for name, m in outcome.metrics.items()}
    return features, metrics, vars(outcome.i2t), vars(outcome.t2i)


def rank_tables(world):
    generator = torch.Generator().manual_seed(2)
    scores = torch.randint(9, (37, 90), generator=generator).float()
    owners = torch.cat((torch.arange(37), torch.randint(37, (53,), generator=generator)))
    found = []
    for block_size in (8, 64):
        ranks = retrieval_ranks(lambda r, c: scores[r, c], owners, 37, block_size, world)
        found += [torch.stack(list(vars(each).values())) for each in ranks]
        for direction, queries, gallery in (("i2t", 37, 90), ("t2i", 90, 37)):
            right = answers_of_class(torch.arange(queries) % 4, torch.arange(gallery) % 4)
            each = relevance(lambda r, c: scores[r, c], right, direction, queries, True, block_size, world)
            for table in (each.rank, each.r_precision, each.map_at_r):
                found += [table[rule] for rule in TIE_RULES]
    return found


def all_protocols(data, world):
    _, shards = open_split(data)
    samples = read_samples(shards)
    generator = torch.Generator().manual_seed(1)
    features = [torch.randn(n, 8, generator=generator) for n in (len(samples.keys), len(samples.image_of_text))]
    found = {}
    for name, protocol in PROTOCOLS.items():
        setting = Setting(resamples=10, world=world)
        metrics = protocol.run(dot_scores(*features), samples, setting).metrics
        found |= {f"{name} {each}": (m.value, m.interval_95, m.tie_variants) for each, m in metrics.items()}
    return found


def zero_shot_features(folder, world):
    found = find_class_folders(Path(folder))
    batches = image_batches(FolderImages(found.paths, eval_transform(32)), 4, 0)
    return encode_images(color_of_image, batches, len(found.paths), False, world), encode_texts(
        color_of_text, ["a red", "a blue", "grey"], 2, False, world
    )


def encode_with_a_fault_on_rank_one(world):
    def encode(batch):
        if world.rank == 1:
            raise InputError("expected an image, found a fault; replace the file")
        return torch.ones(len(batch), 2)

    return encode_images(encode, torch.arange(12).split(2), 12, False, world)


def encode_what_can_only_be_walked_through(world):
    return encode_images(
        lambda batch: torch.ones(len(batch), 2), (b for b in torch.arange(6).split(2)), 6, False, world
    )


def sets_of_other_sizes(world):
    def encode(texts):
        features = torch.zeros(len(texts), max(map(len, texts)), 3)
        for row, text in enumerate(texts):
            features[row, : len(text), row % 3] = 1.0 + len(text)
        return features

    return encode_texts(encode, ["a", "bb", "ccc", "dddd", "e"], 2, False, world)


def uneven_rows(world):
    rows = torch.arange(world.rank * 3, dtype=torch.float64).reshape(-1, 3) / 7 + world.rank
    truth = torch.ones(world.rank, dtype=torch.bool)
    return (
        distributed.gather_rows(rows, world.device),
        distributed.gather_rows(truth, world.device),
        distributed.reduce_over_ranks(torch.tensor([1, world.rank]), "sum", world.device),
        distributed.reduce_over_ranks(torch.tensor([-float("inf"), float(world.rank)]), "max", world.device),
    )


def command_of(out, run, data, world):
    """Runs the command in the group that there is; returns nothing, for what counts is what is written."""
    sys.argv = ["retrieval", "--data", data, "--checkpoint", run, "--out", f"{out}/{world.size}/r.json"]
    sys.argv += ["--resamples", "20", "--gallery-queries", "2", "--device", "cpu"]
    retrieval_command.main()


def everything(run, data, coco, folder, world):
    """All pieces in one group of processes, for starting one takes seconds."""
    return {
        "shards": evaluate_shards(run, data, world),
        "counts": rank_tables(world),
        "protocols": all_protocols(coco, world),
        "zero-shot": zero_shot_features(folder, world),
        "sets": sets_of_other_sizes(world),
    }


def faults(world):
    def raised(function):
        with pytest.raises(InputError) as error:
            function(world)
        return str(error.value)

    return [raised(encode_with_a_fault_on_rank_one), raised(encode_what_can_only_be_walked_through)]


def on_a_rank(run, data, coco, folder, out):
    """What each process does; the command comes last, because it leaves the group."""
    world = distributed.start("cpu")
    found = everything(run, data, coco, folder, world), faults(world), uneven_rows(world)
    command_of(out, run, data, world)
    return found


# --- tests


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    """A run, shards, shards with COCO's ids, class folders."""
    root = tmp_path_factory.mktemp("ranks")
    texts_of = judgements("original", "i2t")
    image_of = {text: image for image, texts in texts_of.items() for text in texts}
    first, right = next(iter(judgements("eccv", "i2t").items()))
    images = list(dict.fromkeys([first, *(image_of[text] for text in right), *texts_of]))[:15]
    extras = [{"coco_id": i, "sentids": list(texts_of[i]), "class_id": i % 3 + 1} for i in images]
    captions = [[f"{i} {text}" for text in texts_of[i]] for i in images]
    return (
        str(write_run(root / "runs", "first")),
        str(write_shards(root / "shards", num_samples=23)),
        str(write_captioned(root / "coco", captions, extras)),
        str(write_class_folders(root / "classes")),
    )


@pytest.fixture(scope="module")
def of_one(material, tmp_path_factory):
    """What one process gives, with one thread, as the ranks have; and where its command wrote."""
    out = tmp_path_factory.mktemp("one")
    threads, arguments = torch.get_num_threads(), sys.argv
    torch.set_num_threads(1)
    try:
        found = everything(*material, ALONE)
        command_of(str(out), *material[:2], ALONE)
    finally:
        torch.set_num_threads(threads)
        sys.argv = arguments
    return found, out / "1"


def assert_same(found, expected):
    if isinstance(expected, torch.Tensor):
        assert torch.equal(found, expected)
    elif isinstance(expected, list | tuple):
        assert len(found) == len(expected)
        for each, other in zip(found, expected, strict=True):
            assert_same(each, other)
    elif isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for name in expected:
            assert_same(found[name], expected[name])
    else:
        assert found == expected


@pytest.mark.parametrize("world_size", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_ranks_have_what_one_process_has_and_one_of_them_writes_it(material, of_one, tmp_path, world_size):
    expected, written = of_one
    assert expected["shards"][0][0].shape == (23, 16)
    assert expected["sets"].shape == (5, 4, 3)  # in three batches, of which with three ranks each has one
    assert {name.split()[0] for name in expected["protocols"]} == set(PROTOCOLS)
    for found, messages, rows in on_ranks(world_size, on_a_rank, *material, str(tmp_path)):
        for name in expected:
            assert_same(found[name], expected[name])
        check_messages(messages, world_size)
        check_rows(rows, world_size)
    check_files(tmp_path / str(world_size), written, world_size)


def check_messages(messages, world_size):
    """A fault on one rank is raised on all, so that none waits."""
    on_one, on_all = messages
    assert on_one == f"expected an image, found a fault; replace the file (on rank 1 of {world_size})"
    assert (
        f"expected batches that {world_size} ranks can share (a list, or what image_batches gives), found generator"
        in on_all
    )


def check_rows(found, world_size):
    """Rows of any number come together in rank order; ranks may have none."""
    rows, truth, total, most = found
    parts = [torch.arange(3 * r, dtype=torch.float64).reshape(-1, 3) / 7 + r for r in range(world_size)]
    assert torch.equal(rows, torch.cat(parts))
    assert truth.tolist() == [True] * sum(range(world_size))
    assert truth.dtype == torch.bool
    assert total.tolist() == [world_size, sum(range(world_size))]
    assert most.tolist() == [-float("inf"), world_size - 1.0]


def check_files(folder, of_one, world_size):
    """The command's files are those of one process."""
    assert sorted(path.name for path in folder.iterdir()) == ["r.gallery.json", "r.json", "r.queries.npz"]
    one, several = (Results.load(each / "r.json") for each in (of_one, folder))
    assert one.metrics == several.metrics
    assert (one.details, several.details) == ({**several.details, "ranks": 1}, {**one.details, "ranks": world_size})
    galleries = [json.loads((each / "r.gallery.json").read_text()) for each in (of_one, folder)]
    assert galleries[0] == galleries[1]
    assert (of_one / "r.queries.npz").read_bytes() == (folder / "r.queries.npz").read_bytes()


def test_runs_cover_all_pieces_once_and_differ_by_at_most_one():
    for num_pieces in range(9):
        for size in range(1, 12):
            runs = [own_run(num_pieces, distributed.World(rank, size)) for rank in range(size)]
            assert [i for run in runs for i in range(num_pieces)[run]] == list(range(num_pieces))
            lengths = [run.stop - run.start for run in runs]
            assert max(lengths) - min(lengths) <= 1


def test_a_slice_of_batches_decodes_no_others(tmp_path):
    folder = tmp_path / "a" / "red"
    folder.mkdir(parents=True)
    for number in range(7):
        (folder / f"{number}.jpg").write_bytes(jpeg((200, 0, 0), number) if number != 5 else b"no image")
    found = find_class_folders(tmp_path / "a")
    batches = image_batches(FolderImages(found.paths, eval_transform(32)), 2, 0)
    assert [len(batch) for batch in batches[:2]] == [2, 2]
    assert len(batches) == 4
    assert torch.equal(batches[0], next(iter(batches)))
    with pytest.raises(InputError, match=r"5\.jpg: expected an image"):
        list(batches[2:])


def test_one_gpu_for_several_ranks_is_refused_and_one_process_joins_nothing(monkeypatch):
    assert join("cpu") == distributed.World(device=torch.device("cpu"))
    assert not torch.distributed.is_initialized()
    variables = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "here", "MASTER_PORT": "1"}
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=r"expected --device auto, cpu or cuda with several ranks .*, found cuda:1"):
        join("cuda:1")
