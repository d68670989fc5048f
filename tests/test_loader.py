"""The loader: the same batches on any number of ranks and workers, bad samples skipped, counted and limited."""

import functools
from collections import Counter
from itertools import islice

import numpy as np
import pytest
import simplejpeg
import torch
from material import MODEL_CFG, damage_image, write_shards

from pretrain.data_order import DataOrder
from pretrain.loader import Loader, SamplePipeline, ids_of_texts, to_device
from setclip.errors import InputError
from setclip.images import Augment, AugmentConfig, decode_tensor
from setclip.manifest import open_split
from setclip.models.clip import tokenizer_for
from setclip.objects import object_id

BATCH = 16


@functools.cache
def tokenizer():
    return tokenizer_for(MODEL_CFG)


def loader(folder, rank=0, world_size=1, workers=0, samples_seen=0, skipped=None, lanes=8, augment=None, max_bad=0.05):
    _, shards = open_split(folder, "train")
    order = DataOrder(tuple(map(len, shards)), seed=3, num_lanes=lanes, block_size=4, window_blocks=2)
    augment = Augment(augment or AugmentConfig(kind="resized_crop", scale=(0.5, 1), flip=True), 32)
    pipeline = SamplePipeline(shards, augment, tokenizer(), "pos", seed=3)
    return Loader(order, pipeline, BATCH // world_size, rank, world_size, workers, samples_seen, skipped, max_bad)


def take(source, count):
    return list(islice(source, count))


def merged(parts):
    """Returns one global batch from the ranks' parts: rank r has the places r, r + W, …"""
    size = len(parts)
    return {
        "keys": [parts[j % size].keys[j // size] for j in range(BATCH)],
        "images": torch.stack([parts[j % size].images[j // size] for j in range(BATCH)]),
        "tokens": torch.stack([parts[j % size].tokens[j // size] for j in range(BATCH)]),
        "text_ids": torch.stack([parts[j % size].text_ids[j // size] for j in range(BATCH)]),
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_shards(tmp_path_factory.mktemp("shards"))


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # more workers than a small machine has cores
@pytest.mark.parametrize(("world_size", "workers"), [(2, 0), (4, 0), (8, 0), (1, 1), (1, 3), (2, 2)])
def test_ranks_and_workers_do_not_change_the_batches(folder, world_size, workers):
    one = take(loader(folder), 9)  # 144 samples: over two epochs of 64
    parts = [take(loader(folder, rank, world_size, workers), 9) for rank in range(world_size)]
    for step, batch in enumerate(one):
        other = merged([part[step] for part in parts])
        assert other["keys"] == batch.keys
        assert torch.equal(other["images"], batch.images)
        assert torch.equal(other["tokens"], batch.tokens)
        assert torch.equal(other["text_ids"], batch.text_ids)


def test_each_sample_is_seen_once_an_epoch(folder):
    keys = [key for batch in take(loader(folder), 12) for key in batch.keys]
    for epoch in range(3):
        assert set(Counter(keys[epoch * 64 : (epoch + 1) * 64]).values()) == {1}


@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1), (4, 2), (2, 8)])
def test_a_resume_on_other_ranks_continues_with_the_unseen_samples(folder, before, after):
    whole = [batch.keys for batch in take(loader(folder), 10)]
    first = [take(loader(folder, rank, before), 5) for rank in range(before)]
    rest = [take(loader(folder, rank, after, samples_seen=5 * BATCH), 5) for rank in range(after)]
    resumed = [merged([p[s] for p in first])["keys"] for s in range(5)]
    resumed += [merged([p[s] for p in rest])["keys"] for s in range(5)]
    assert resumed == whole


def test_a_sample_that_cannot_be_decoded_is_skipped_and_named(tmp_path):
    folder = write_shards(tmp_path)
    bad = {damage_image(folder, "train-00001.tar", 5), damage_image(folder, "train-00002.tar", 0)}
    source = loader(folder, max_bad=0.2)
    batches = take(source, 12)
    keys = Counter(key for batch in batches for key in batch.keys)
    skips = [skip for batch in batches for skip in batch.skips]
    assert not bad & set(keys)
    assert {skip.key for skip in skips} == bad
    assert {(skip.shard, skip.reason) for skip in skips} == {
        ("train-00001.tar", "not an image"),
        ("train-00002.tar", "not an image"),
    }
    assert sum(source.skipped.values()) == len(skips)
    assert max(keys.values()) - min(keys.values()) <= 1, "nothing is lost or repeated beside them"


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_resume_after_skips_is_exact(tmp_path, world_size):
    folder = write_shards(tmp_path)
    for row in (1, 7):
        damage_image(folder, "train-00001.tar", row)
    whole = [batch.keys for batch in take(loader(folder, max_bad=0.2), 12)]
    first = loader(folder, max_bad=0.2)
    keys = [batch.keys for batch in take(first, 7)]
    parts = [
        take(loader(folder, rank, world_size, 0, 7 * BATCH, dict(first.skipped), max_bad=0.2), 5)
        for rank in range(world_size)
    ]
    assert keys + [merged([p[s] for p in parts])["keys"] for s in range(5)] == whole


def test_too_many_bad_samples_stop_the_run_with_the_reasons(tmp_path):
    folder = write_shards(tmp_path)
    for row in range(10):
        damage_image(folder, "train-00000.tar", row)
    with pytest.raises(InputError, match=r"at most 5% bad samples, found \d+ of \d+ \(not an image: \d+\)"):
        take(loader(folder), 40)


def test_data_without_one_good_sample_stops(tmp_path):
    folder = write_shards(tmp_path, sizes=(4,))
    for row in range(4):
        damage_image(folder, "train-00000.tar", row)
    with pytest.raises(InputError, match="samples in a row could be used"):
        take(loader(folder), 1)


def test_objects_belong_to_the_caption_that_was_drawn(folder):
    source = loader(folder)
    _, shards = open_split(folder, "train")
    samples = {s.key: s for shard in shards for s in shard}
    tokenizer = tokenizer_for(MODEL_CFG)
    drawn = Counter()
    for batch in take(source, 8):
        for row, key in enumerate(batch.keys):
            sample = samples[key]
            number = next(
                c for c, text in enumerate(sample.captions) if torch.equal(tokenizer([text])[0], batch.tokens[row])
            )
            ids = {int(i) for i in batch.text_objects[row] if i >= 0}
            assert ids == {object_id(name) for name in sample.objects["pos"][number]}
            drawn[number] += 1
    assert min(drawn.values()) > 30, "both captions are drawn"


def test_texts_that_the_model_cannot_tell_apart_have_equal_ids():
    tokenizer = tokenizer_for(MODEL_CFG)
    long = "a dog and a cat and a car and a tree and a boat and"
    texts = ["a dog", "A  Dog ", "a dog.", "a cat", f"{long} a house", f"{long} a ball", ""]
    ids = ids_of_texts(tokenizer(texts)).tolist()
    assert ids[0] == ids[1]
    assert ids[4] == ids[5], "they differ behind the last token that fits"
    assert len(set(ids)) == 5
    assert len(ids_of_texts(tokenizer([""])[:0])) == 0


def test_each_pair_of_a_batch_has_its_texts_id(folder):
    for batch in take(loader(folder), 3):
        assert torch.equal(batch.text_ids, ids_of_texts(batch.tokens))
        assert len(set(batch.text_ids.tolist())) == BATCH, "the captions all differ"
        assert torch.equal(to_device(batch, torch.device("cpu"))["text_ids"], batch.text_ids)


def test_the_tokenizer_forgets_words_and_gives_the_same_tokens(folder, monkeypatch):
    expected = take(loader(folder), 4)
    monkeypatch.setattr("pretrain.loader._WORDS_KEPT", 3)
    special = {word for word, pieces in tokenizer().cache.items() if word == pieces}
    assert special == {"<start_of_text>", "<end_of_text>"}
    again = take(loader(folder), 4)
    assert all(torch.equal(one.tokens, two.tokens) for one, two in zip(expected, again, strict=True))
    assert set(tokenizer().cache) == special


def test_without_a_parser_no_sample_has_objects(folder):
    _, shards = open_split(folder, "train")
    order = DataOrder(tuple(map(len, shards)), 0, 8, 4)
    pipeline = SamplePipeline(shards, Augment(AugmentConfig(), 32), tokenizer_for(MODEL_CFG), None, 0)
    (batch,) = take(Loader(order, pipeline, BATCH), 1)
    assert torch.equal(batch.text_objects, torch.full((BATCH, 1), -1))


def test_the_number_of_ranks_must_divide_the_lanes(folder):
    with pytest.raises(InputError, match=r"divides the 8 lanes of the data order, found 3; nearest: 2 ranks, or .* 9"):
        loader(folder, world_size=3)


def test_shards_without_the_parsers_objects_say_so(folder):
    _, shards = open_split(folder, "train")
    order = DataOrder(tuple(map(len, shards)), 0, 8, 4)
    pipeline = SamplePipeline(shards, Augment(AugmentConfig(), 32), tokenizer_for(MODEL_CFG), "llm", 0)
    with pytest.raises(InputError, match=r"objects of parser 'llm', found \['pos'\]; .*--objects"):
        take(Loader(order, pipeline, BATCH), 1)


def test_a_picture_is_decoded_at_half_its_size_only_where_the_crop_is_not_enlarged():
    random = np.random.default_rng(0)
    pixels = np.kron(random.integers(0, 256, (16, 16, 3), dtype=np.uint8), np.ones((16, 16, 1), np.uint8))
    data = simplejpeg.encode_jpeg(np.ascontiguousarray(pixels), 95)
    for scale, is_whole in (((0.2, 0.25), True), ((1.0, 1.0), False)):
        augment = Augment(AugmentConfig(kind="resized_crop", scale=scale, ratio=(1, 1)), 128)
        for word in range(5):
            whole, found = augment(decode_tensor(data), word), augment.decode(data, word)
            assert found.shape == (3, 128, 128)
            assert torch.equal(whole, found) == is_whole
            assert (whole.int() - found.int()).abs().float().mean() < 4


@pytest.mark.parametrize("kind", ["resized_crop", "shift", "none"])
def test_augmentation_depends_on_the_words_only(kind):
    augment = Augment(AugmentConfig(kind=kind, scale=(0.3, 1.0), flip=True), 24)
    image = torch.arange(3 * 40 * 50, dtype=torch.int64).remainder(251).to(torch.uint8).reshape(3, 40, 50)
    first, again, other = augment(image, 1, 2, 3), augment(image, 1, 2, 3), augment(image, 1, 2, 4)
    assert torch.equal(first, again)
    assert first.shape == (3, 24, 24)
    assert first.dtype == torch.uint8
    if kind != "none":
        assert any(not torch.equal(first, augment(image, 1, 2, w)) for w in range(4, 12))
    assert other.shape == first.shape
