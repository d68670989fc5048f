"""Batches from shards in the exact data order: the same samples whatever the number of ranks and workers.

Workers own whole lanes and yield *groups*: the next decodable sample of each of their lanes. The main process takes
the groups in turn and cuts the stream into batches. One pipeline serves the whole run; nothing is made anew at an
epoch's end. Letters: B samples on this rank, L text tokens, M objects of a caption (padded).
"""

import dataclasses
import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from pretrain.blocks import Blocks
from pretrain.data_order import DataOrder, Place
from pretrain.stopping import leave_signals_to_the_parent
from pretrain.text_domains import Domain, DrawnText, TextDomains
from setclip.decode import DecodeError
from setclip.errors import InputError
from setclip.hashing import hash_text, hash_u64
from setclip.images import Augment
from setclip.objects import object_id
from setclip.shards import Shard

PAD = -1  # object ids are never negative

_CAPTION, _AUGMENT = 1, 2  # keep the draws apart
_TEXT = np.array([_CAPTION, 5, 6, 7])  # and the three of text domains, in one call: half the time of four
_WORDS_KEPT = 100_000  # by a tokenizer, about 25 MB: the frequent ones come back at once
_LARGEST_GROUP = 64  # samples a worker hands over at once


@dataclass(frozen=True)
class Skip:
    """A sample that could not be decoded."""

    epoch: int
    shard: str
    key: str
    reason: str


@dataclass
class Batch:
    """B pairs of this rank. All tensors are on the CPU."""

    images: Tensor
    """(B, 3, S, S) uint8"""
    tokens: Tensor
    """(B, L) int64"""
    image_objects: Tensor
    """(B, M) int64 ids of the objects on the image's side, distinct, padded with −1"""
    text_objects: Tensor
    """(B, M') int64, the same for the text's side"""
    text_ids: Tensor
    """(B,) int64, equal where the texts are equal to the model"""
    keys: list[str]
    lanes: list[int]
    domains: list[Domain]
    """Per sample: where its text is from."""
    skips_before: list[int]
    """Per sample: how many its lane skipped just before it."""
    skips: list[Skip]

    @staticmethod
    def concatenate(parts: Sequence["Batch"]) -> "Batch":
        """Returns one batch from several."""
        if len(parts) == 1:
            return parts[0]
        return Batch(
            torch.cat([p.images for p in parts]),
            torch.cat([p.tokens for p in parts]),
            pad_and_concatenate([p.image_objects for p in parts]),
            pad_and_concatenate([p.text_objects for p in parts]),
            torch.cat([p.text_ids for p in parts]),
            *([x for p in parts for x in getattr(p, f)] for f in ("keys", "lanes", "domains", "skips_before", "skips")),
        )

    def split(self, size: int) -> tuple["Batch", "Batch"]:
        """Returns the first `size` samples and the rest; skips go with the sample that they came before."""
        first, rest = {}, {}
        num_skips = sum(self.skips_before[:size])
        for entry in dataclasses.fields(self):
            value = getattr(self, entry.name)
            cut = num_skips if entry.name == "skips" else size
            first[entry.name], rest[entry.name] = value[:cut], value[cut:]
        return Batch(**first), Batch(**rest)

    def __len__(self) -> int:
        return len(self.keys)


def pad_and_concatenate(parts: Sequence[Tensor]) -> Tensor:
    """Returns (ΣB, max M) from (B, M) object ids, padded with −1."""
    width = max(part.shape[1] for part in parts)
    return torch.cat([torch.nn.functional.pad(part, (0, width - part.shape[1]), value=PAD) for part in parts])


def pad_objects(sets: Sequence[Sequence[str]]) -> Tensor:
    """Returns (B, M) int64 distinct ids, padded with −1, from B collections of object names. M is at least 1."""
    ids = [sorted({object_id(name) for name in names}) for names in sets]
    padded = torch.full((len(ids), max(1, *map(len, ids), 1)), PAD, dtype=torch.int64)
    for row, of_row in enumerate(ids):
        padded[row, : len(of_row)] = torch.tensor(of_row, dtype=torch.int64)
    return padded


def ids_of_texts(tokens: Tensor) -> Tensor:
    """Returns (B,) int64 hashes of (B, L) int64 tokens.

    Of tokens rather than captions: what differs only in case, in spaces or behind the last token that fits gives the
    same features, and could not be told apart as a negative. Two of a million different texts share an id once in
    37 million such batches.
    """
    ids = [hashlib.blake2b(row.tobytes(), digest_size=8).digest() for row in tokens.numpy()]
    return torch.tensor([int.from_bytes(digest, "big", signed=True) for digest in ids], dtype=torch.int64)


@dataclass
class SamplePipeline:
    """From a place in the data to what one sample gives a batch. Handed to the workers as it is."""

    shards: Blocks | Sequence[Shard]
    augment: Augment
    tokenizer: Callable[[list[str]], Tensor]
    parser: str | None
    """Whose objects; None: no sample has any"""
    seed: int
    texts: TextDomains | None = None
    """None: all texts are captions"""

    def __call__(self, place: Place) -> tuple[Tensor, DrawnText, list[str], str]:
        """Returns ((3, S, S) uint8, text, the caption's objects, key). Raises DecodeError for what cannot be used."""
        shard = self.shards[place.shard]
        key, _, image_bytes, encoded = shard.read_raw(place.row)
        of_key = hash_text(key) if place.repeat == 0 else int(hash_u64(hash_text(key), place.repeat))
        words = (self.seed, place.epoch, of_key)
        try:
            record = json.loads(encoded)
            captions, objects = record["captions"], record.get("objects", {})
        except (UnicodeDecodeError, json.JSONDecodeError, KeyError) as error:
            raise DecodeError("unreadable JSON") from error
        if not captions:
            raise DecodeError("no caption")
        if self.parser is not None and self.parser not in objects:
            raise InputError(
                f"{shard.path}, sample {key}: expected objects of parser {self.parser!r}, found "
                f"{sorted(objects) or 'none'}; parse the captions, or choose another with --objects"
            )
        draws = _CAPTION if self.texts is None else _TEXT
        of_caption, *of_text = np.ravel(hash_u64(draws, *words)).tolist()
        chosen = of_caption % len(captions)
        caption, names = captions[chosen], objects[self.parser][chosen] if self.parser else []
        text = DrawnText(caption, names, "caption") if self.texts is None else self.texts.draw(caption, names, of_text)
        return self.augment.decode(image_bytes, _AUGMENT, *words), text, names, key


class _Lanes(IterableDataset):
    """The groups of one rank; in a worker, those that are its share."""

    def __init__(
        self,
        order: DataOrder,
        pipeline: SamplePipeline,
        lanes: Sequence[int],
        groups: int,
        cursors: Sequence[int],
        first: int,
    ):
        self.order, self.pipeline, self.lanes = order, pipeline, lanes
        self.bounds = np.linspace(0, len(lanes), groups + 1).round().astype(int)
        self.cursors, self.first = cursors, first  # the lanes before `first` have had their turn in the first round

    def __iter__(self) -> Iterator[Batch]:
        worker = get_worker_info()
        number, count = (worker.id, worker.num_workers) if worker else (0, 1)
        mine = range(number, len(self.bounds) - 1, count)
        readers = {
            i: self._places(self.lanes[i], self.cursors[i])
            for group in mine
            for i in range(self.bounds[group], self.bounds[group + 1])
        }
        if isinstance(self.pipeline.shards, Blocks):
            for i in readers:
                self.pipeline.shards.foresee(next(self.order.windows(self.lanes[i], self.cursors[i])))
        skip_before = self.first
        while True:
            for group in mine:
                yield self._group([i for i in range(*self.bounds[group : group + 2]) if i >= skip_before], readers)
            skip_before = 0

    def _places(self, lane: int, start: int) -> Iterator[Place]:
        """Yields the places of a lane, with the blocks ready in which they lie."""
        shards = self.pipeline.shards
        if not isinstance(shards, Blocks):
            yield from self.order.lane(lane, start)
            return
        for window in self.order.windows(lane, start):
            entered = shards.enter(window)
            shards.foresee(window.following())
            yield from window.places()
            shards.leave(entered)

    def _group(self, indices: Sequence[int], readers: dict[int, Iterator[Place]]) -> Batch:
        images, texts, objects, keys, skips_before, skips = [], [], [], [], [], []
        for i in indices:
            skipped = 0
            while True:
                place = next(readers[i])
                try:
                    image, text, names, key = self.pipeline(place)
                    break
                except DecodeError as error:
                    shard = self.pipeline.shards[place.shard]
                    skips.append(Skip(place.epoch, shard.label, shard.read_raw(place.row)[0], str(error)))
                    skipped += 1
                    if skipped > self.order.num_samples // self.order.num_lanes + 1:
                        raise InputError(
                            f"none of {skipped} samples in a row could be used, last {shard.path} {skips[-1].key}: {error}; "
                            "check the shards"
                        ) from error
            images.append(image)
            texts.append(text)
            objects.append(names)
            keys.append(key)
            skips_before.append(skipped)
        size = self.pipeline.augment.image_size
        tokens = self.pipeline.tokenizer([t.text for t in texts]) if texts else self.pipeline.tokenizer([""])[:0]
        _forget_words(self.pipeline.tokenizer)
        ids = pad_objects(objects)
        are_equal = all(text.objects is names for text, names in zip(texts, objects, strict=True))
        return Batch(
            torch.stack(images) if images else torch.empty(0, 3, size, size, dtype=torch.uint8),
            tokens,
            ids,
            ids if are_equal else pad_objects([text.objects for text in texts]),
            ids_of_texts(tokens),
            keys,
            [self.lanes[i] for i in indices],
            [text.domain for text in texts],
            skips_before,
            skips,
        )


def _forget_words(tokenizer: Callable[[list[str]], Tensor]) -> None:
    """Empties the memory of CLIP's tokenizer once it is full: by itself it keeps every word that it has ever seen.

    Special tokens stay, which are the words that stand for themselves.
    """
    words = getattr(tokenizer, "cache", None)
    if isinstance(words, dict) and len(words) > _WORDS_KEPT:
        for word in [word for word, pieces in words.items() if pieces != word]:
            del words[word]


class Loader:
    """An endless iterator of this rank's batches, from `samples_seen` (over all ranks) on.

    `skipped` (lane → samples skipped so far) belongs to the state of a resume, with `samples_seen`.
    """

    def __init__(
        self,
        order: DataOrder,
        pipeline: SamplePipeline,
        local_batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        num_workers: int = 0,
        samples_seen: int = 0,
        skipped: dict[int, int] | None = None,
        max_bad: float = 0.05,
    ):
        if order.num_lanes % world_size:
            near = [w for w in range(1, order.num_lanes + 1) if order.num_lanes % w == 0]
            raise InputError(
                f"expected a number of ranks that divides the {order.num_lanes} lanes of the data order, found {world_size}; "
                f"nearest: {max(w for w in near if w < world_size)} ranks, or --data.num-lanes "
                f"{-(-order.num_lanes // world_size) * world_size} (for a new run)"
            )
        if samples_seen % world_size:
            raise InputError(
                f"samples_seen {samples_seen} is not a multiple of {world_size} ranks; choose another number"
            )
        self.local_batch_size, self.max_bad = local_batch_size, max_bad
        self.skipped: Counter[int] = Counter(skipped or {})
        self.reasons: Counter[str] = Counter()
        self._bad = self._read = 0

        self._shards = pipeline.shards

        lanes = range(rank, order.num_lanes, world_size)
        turn, first = divmod(samples_seen // world_size, len(lanes))
        cursors = [turn + (i < first) + self.skipped[lane] for i, lane in enumerate(lanes)]
        num_workers = min(num_workers, len(lanes))
        sources = max(1, num_workers)
        groups = min(len(lanes), sources * -(-len(lanes) // (sources * _LARGEST_GROUP)))
        groups -= groups % sources  # the loader asks its workers in turn, so each has as many groups as the others
        self._source = DataLoader(
            _Lanes(order, pipeline, lanes, groups, cursors, first),
            batch_size=None,
            num_workers=num_workers,
            prefetch_factor=4 if num_workers else None,
            persistent_workers=num_workers > 0,
            worker_init_fn=leave_signals_to_the_parent,
        )

    def __iter__(self) -> Iterator[Batch]:
        waiting: list[Batch] = []
        for group in self._source:
            waiting.append(group)
            while sum(map(len, waiting)) >= self.local_batch_size:
                batch, rest = Batch.concatenate(waiting).split(self.local_batch_size)
                waiting = [rest]
                self._account(batch)
                yield batch

    def close(self, is_to_wait: bool = False) -> None:
        """Ends the loader's processes and threads; waits for these where it is told to (`Blocks.close`)."""
        iterator = getattr(self._source, "_iterator", None)
        if iterator is not None:
            iterator._shutdown_workers()
        if isinstance(self._shards, Blocks):
            self._shards.close(is_to_wait)

    def _account(self, batch: Batch) -> None:
        for lane, count in zip(batch.lanes, batch.skips_before, strict=True):
            if count:
                self.skipped[lane] += count
        self.reasons.update(skip.reason for skip in batch.skips)
        self._bad += len(batch.skips)
        self._read += len(batch) + len(batch.skips)
        # A few bad samples at the start are no share yet.
        if self._bad > self.max_bad * max(self._read, 200):
            table = ", ".join(f"{reason}: {count}" for reason, count in self.reasons.most_common())
            raise InputError(
                f"expected at most {self.max_bad:.0%} bad samples, found {self._bad} of {self._read} ({table}); "
                "check the shards, or raise --data.max-bad"
            )


def automatic_workers(cores: int) -> int:
    """Returns loader processes for a rank of so many cores: those that training leaves over, 1 at least, 16 at most."""
    return max(1, min(16, cores - 1))


def to_device(batch: Batch, device: torch.device) -> dict[str, Any]:
    """Returns the batch's five tensors by name on `device`."""
    names = ("images", "tokens", "image_objects", "text_objects", "text_ids")
    return {name: getattr(batch, name).to(device, non_blocking=True) for name in names}
