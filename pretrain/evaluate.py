"""Zero-shot and retrieval while a model trains, by the evaluation suite's own functions. Used by the loop.

Each rank holds a copy of the master weights for it, so it works at every ZeRO stage, and all share the work: the figures are
those of one process (`eval_suite.sharing`).
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from eval_suite.datasets import TEMPLATES, class_names_of, open_zero_shot
from eval_suite.encode import encode_functions
from eval_suite.images import FolderImages, ShardImages, image_batches
from eval_suite.preprocess import pillow_transform
from eval_suite.retrieval import read_captions, retrieval
from eval_suite.zeroshot import zero_shot
from pretrain.config import EvalConfig
from pretrain.retrieved import Gallery, QueryBook
from setclip import distributed
from setclip.checkpoint import LoadedModel
from setclip.distributed import World
from setclip.images import MEAN, STD
from setclip.manifest import open_split
from setclip.models.clip import build_clip, image_size_of, load_weights, tokenizer_for
from setclip.objects import OBJECTS_NAME, read_objects


class Evaluator:
    """Looks at the evaluation data when it is made (so that a wrong place fails at once), and evaluates when called."""

    def __init__(self, config: EvalConfig, model_cfg: Mapping[str, Any], world: World, parser: str):
        """`parser`: whose counts of objects make a class head, middle or tail."""
        self.config, self.world = config, world
        self._zero_shot = self._retrieval = self._queries = None
        self.retrieved: Gallery | None = None
        """What some queries of the last evaluation found; on rank 0, where there is retrieval."""
        if not config.every_steps:
            return
        self._model = build_clip(model_cfg, scalar_logit_scale=True).eval().to(world.device)
        size = image_size_of(self._model)
        self._transform = pillow_transform(size)
        self._functions = encode_functions(
            LoadedModel(self._model, tokenizer_for(model_cfg), size, MEAN, STD, identity={})
        )
        if config.zeroshot is not None:
            dataset, found, _ = open_zero_shot(None, config.zeroshot)
            names = class_names_of(dataset, found.classes)
            objects = config.zeroshot.parent / OBJECTS_NAME
            table = read_objects(objects, parser) if objects.exists() else None
            groups = [table.group_of(name.lower()) for name in names] if table else None
            self._zero_shot = (found, names, groups)
        if config.retrieval is not None:
            shards = open_split(config.retrieval)[1]
            keys, captions = read_captions(shards)
            self._retrieval = (shards, captions)
            if world.rank == 0:
                self._queries = QueryBook(shards, keys, captions, config.retrieval)

    def wanted(self, step: int, is_last: bool) -> bool:
        """Whether to evaluate after `step`."""
        every = self.config.every_steps
        return bool(every) and (step % every == 0 or is_last)

    def __call__(self, weights: Mapping[str, Tensor]) -> dict[str, float]:
        """Returns metric → value (percent) on every rank. Collective."""
        # Ranks have statistics of batch norm of their own; rank 0's are the checkpoint's.
        buffers = {name: weights[name] for name, _ in self._model.named_buffers() if name in weights}
        load_weights(self._model, {**weights, **distributed.broadcast(buffers)}, "the model in training")
        values: dict[str, float] = {}
        if self._zero_shot is not None:
            found, names, groups = self._zero_shot
            batches = image_batches(FolderImages(found.paths, self._transform), 256, workers=0)
            outcome = zero_shot(
                *self._functions,
                batches,
                found.labels,
                names,
                TEMPLATES["picture"],
                groups,
                show_progress=False,
                world=self.world,
            )
            values |= {f"zeroshot_{name}": metric.value for name, metric in outcome.metrics.items()}
        if self._retrieval is not None:
            shards, captions = self._retrieval
            batches = image_batches(ShardImages(shards, self._transform), 256, workers=0)
            ranked = retrieval(*self._functions, batches, captions, show_progress=False, world=self.world)
            values |= {name: metric.value for name, metric in ranked.metrics.items()}
            if self._queries is not None:
                self.retrieved = self._queries.gallery(ranked)
        return values
