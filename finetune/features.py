"""Inputs of heads: features of frozen towers, computed once and kept in memory, or pictures and tokens for towers that learn.

Pictures whose features are kept are prepared as evaluation prepares them, without augmentation. Ranks share the work of computing
them. Letters: n pictures or texts, B of a batch, N local features of one, E their width, S side of a picture.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from eval_suite.preprocess import model_pictures
from eval_suite.regions import Regions
from eval_suite.sharing import own_run, together
from finetune.data import Batch, Part, TrainOrder
from pretrain.stopping import leave_signals_to_the_parent
from setclip import distributed
from setclip.checkpoint import LoadedModel
from setclip.decode import DecodeError
from setclip.distributed import World
from setclip.errors import InputError
from setclip.hashing import hash_text
from setclip.images import Augment, AugmentConfig, decode_tensor, normalize
from setclip.log import Meter, say
from setclip.models.backbones import Backbone, Features

_AUGMENT = 24
_AT_A_TIME = 128

Inputs = Features | Tensor
"""Of one side: features, or what the towers take: pictures (B, 3, S, S) uint8, regions (B, N, E), tokens (B, L) int64"""


class RegionStore:
    """Features of regions of n pictures, read from their file as they are asked for."""

    gigabytes = 0.0
    """What it keeps in memory"""

    def __init__(self, regions: Regions):
        self.regions = regions

    def __len__(self) -> int:
        return len(self.regions)

    def of(self, rows: Tensor, device: torch.device) -> Tensor:
        """Returns the regions of some, (B,) int64: (B, N, E) float32."""
        return self.regions.of(rows.numpy()).to(device)


class FeatureStore:
    """Features of n pictures or texts, in float32 on the CPU, those of each as many as it has."""

    def __init__(self, local: Tensor, counts: Tensor, pooled: Tensor | None):
        """`local`: (Σ counts, E), `counts`: (n,) int64, `pooled`: (n, F)."""
        self.local, self.counts, self.pooled = local, counts, pooled
        self._starts = counts.cumsum(0) - counts
        self._size = int(counts[0]) if bool((counts == counts[0]).all()) else None

    def __len__(self) -> int:
        return len(self.counts)

    def of(self, rows: Tensor, device: torch.device) -> Features:
        """Returns the features of some, (B,) int64."""
        pooled = None if self.pooled is None else self.pooled[rows].to(device)
        if self._size is not None:
            local = self.local.view(len(self), self._size, -1)[rows]
            return Features(local.to(device), None, pooled)
        counts = self.counts[rows]
        places = torch.arange(int(counts.max()))
        mask = places < counts[:, None]
        # places beyond a text's words are masked; they only must lie somewhere
        found = (self._starts[rows, None] + places).clamp(max=len(self.local) - 1)
        local = self.local[found]
        return Features(local.masked_fill(~mask[..., None], 0.0).to(device), mask.to(device), pooled)

    @property
    def gigabytes(self) -> float:
        """Its size in 10⁹ bytes."""
        return 4 * (self.local.numel() + (0 if self.pooled is None else self.pooled.numel())) / 1e9


@dataclass
class PartInputs:
    """Where the inputs of a part come from; a store is None where the tower learns, or its features would not fit."""

    part: Part
    images: FeatureStore | RegionStore | None
    texts: FeatureStore | None

    def __post_init__(self) -> None:
        if self.part.regions is not None:
            self.images = RegionStore(self.part.regions)
        starts = [0]
        for texts in self.part.data.captions:
            starts.append(starts[-1] + len(texts))
        self.text_starts = torch.tensor(starts)
        self.all_texts = [text for texts in self.part.data.captions for text in texts]
        self._row_of_text = {text: row for row, text in enumerate(self.all_texts)}

    def rows_of_texts(self, texts: Sequence[str]) -> Tensor:
        """Returns where texts of the part stand in its store; of equal ones the last, whose features are the same."""
        return torch.tensor([self._row_of_text[text] for text in texts])


class Pictures(Dataset[Tensor]):
    """The pictures of a part, uint8, by row as evaluation sees them, or by (row, epoch) as training varies them."""

    def __init__(
        self, part: Part, transform: Callable[[Tensor], Tensor], augment: Augment | None = None, seed: int = 0
    ):
        self.part, self.transform, self.augment, self.seed = part, transform, augment, seed

    def __getitem__(self, place: tuple[int, int]) -> Tensor:
        row, epoch = place
        shard, place_in_shard = self.part.images[row]
        key, _, data, _ = shard.read_raw(place_in_shard)
        try:
            if self.augment is None:
                return self.transform(decode_tensor(data))
            return self.augment.decode(data, _AUGMENT, self.seed, epoch, hash_text(key))
        except DecodeError as error:
            raise InputError(
                f"{shard.path}, sample {key}: expected a picture, found one that cannot be decoded ({error}); leave it out and "
                "prepare the shards again"
            ) from error


def picture_batches(
    pictures: Pictures, places: Iterator[list[tuple[int, int]]], workers: int | None
) -> Iterator[Tensor]:
    """Yields (B, 3, S, S) uint8 of each list of (row, epoch), made by so many processes."""
    if workers is None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
        workers = 0 if cores <= 2 else min(8, cores - 1)
    return iter(
        DataLoader(
            pictures,
            batch_sampler=places,
            num_workers=workers,
            collate_fn=torch.stack,
            worker_init_fn=leave_signals_to_the_parent,
        )
    )


def train_pictures(part: Part, loaded: LoadedModel, augment: AugmentConfig, seed: int) -> Pictures:
    """Returns the pictures of training as the model takes them."""
    transform = model_pictures(loaded)
    varied = None if augment.kind == "none" else Augment(augment, loaded.image_size)
    return Pictures(part, transform, varied, seed)


def own_places(order: TrainOrder, first: int, last: int, world: World) -> Iterator[list[tuple[int, int]]]:
    """Yields (row, epoch) of this rank's pictures of each step from `first` to before `last`."""
    for step in range(first, last):
        batch = order.batch(step)
        yield [(int(row), batch.epoch) for row in batch.rows[own_share(batch, world)]]


def own_share(batch: Batch, world: World) -> slice:
    """Returns which of a batch's pictures are this rank's."""
    size = len(batch.rows) // world.size
    return slice(world.rank * size, (world.rank + 1) * size)


def pixels_of(pictures: Tensor, loaded: LoadedModel, device: torch.device) -> Tensor:
    """Returns pictures, uint8, as the towers take them."""
    return normalize(pictures.to(device, non_blocking=True), loaded.mean, loaded.std)


def make_inputs(
    part: Part, backbone: Backbone, loaded: LoadedModel, frozen: tuple[bool, bool], cache_gb: float, world: World
) -> PartInputs:
    """Returns the inputs of a part, with the features of (image, text) towers that are frozen, as far as they fit. Collective."""
    device = world.device
    inputs = PartInputs(part, None, None)

    def image_batches(rows: list[range]) -> Iterator[Features]:
        pictures = Pictures(part, model_pictures(loaded))
        places = iter([[(row, 0) for row in run] for run in rows])
        for batch in picture_batches(pictures, places, None):
            yield backbone.image(pixels_of(batch, loaded, device))

    def text_batches(rows: list[range]) -> Iterator[Features]:
        for run in rows:
            yield backbone.text(backbone.tokenizer(inputs.all_texts[run.start : run.stop]).to(device))

    room = cache_gb
    for side, is_frozen, number, batches in (
        ("images", frozen[0], len(part), image_batches),
        ("texts", frozen[1], len(inputs.all_texts), text_batches),
    ):
        if not is_frozen or room <= 0 or getattr(inputs, side) is not None:
            continue
        store = _store(batches, number, room, f"{side} of {part.name} {part.split}", world)
        if store is not None:
            setattr(inputs, side, store)
            room -= store.gigabytes
    return inputs


@torch.no_grad()
def _store(
    batches: Callable[[list[range]], Iterator[Features]], number: int, room: float, what: str, world: World
) -> FeatureStore | None:
    """Returns the features of all, computed by all ranks; None where they would take more room."""
    runs = [range(i, min(i + _AT_A_TIME, number)) for i in range(0, number, _AT_A_TIME)]
    own = runs[own_run(len(runs), world)]
    local, counts, pooled = [], [], []
    size = 0.0
    meter = Meter(-(-number // world.size), f"features of {what}", "samples")
    is_full = False
    with together(world):
        for run, found in zip(own, batches(own), strict=False):
            mask = found.mask
            local.append((found.local.flatten(0, 1) if mask is None else found.local[mask]).float().cpu())
            shape = found.local.shape
            counts.append(torch.full((shape[0],), shape[1]) if mask is None else mask.sum(1).cpu())
            if found.pooled is not None:
                pooled.append(found.pooled.float().cpu())
            size += 4 * (local[-1].numel() + (pooled[-1].numel() if pooled else 0)) / 1e9
            done = run.stop - own[0].start
            if size / done * number > 1.02 * room:
                is_full = True
                break
            meter.update(len(run))
    meter.close()
    if any(distributed.gather_objects(is_full)):
        say(
            f"note: features of {what} would take more than {room:.1f} GB, so the tower runs at every step (--backbone.cache-gb)"
        )
        return None
    parts = [torch.cat(values) if values else torch.empty(0, dtype=torch.int64) for values in (local, counts)]
    gathered = [distributed.gather_rows(values, world.device) for values in parts]
    has_pooled = any(distributed.gather_objects(bool(pooled)))
    of_all = torch.cat(pooled) if pooled else torch.empty(0)
    return FeatureStore(gathered[0], gathered[1], distributed.gather_rows(of_all, world.device) if has_pooled else None)
