"""Image–text retrieval: each image ranks all captions, each caption ranks all images.

    python -m eval_suite.retrieval scenes                                    # under $SETCLIP_DATA, newest run
    python -m eval_suite.retrieval coco --checkpoint RUN                     # 5K, 1K in folds, ECCV Caption, CxC
    python -m eval_suite.retrieval --data SHARDS --split dev --checkpoint RUN --out FILE
    python -m eval_suite.retrieval flickr30k --embeddings DIR --similarity smooth_chamfer   # of eval_suite.embed, also sets
    python -m eval_suite.retrieval --checkpoint runs/ft                      # the data that a fine-tuned run reports on
    torchrun --nproc_per_node 8 -m eval_suite.retrieval coco                 # all ranks share; srun does the same

R@1/5/10 both ways, median rank and RSUM, beside chance, with 95 % intervals and under each rule for equal scores; which
captions are right and over which gallery is the protocol's to say (`eval_suite.protocols`). A small FILE.gallery.json holds
some queries with their best answers, and the worst failures, for reports; FILE.queries.npz what became of each query, for
`python -m eval_suite.significance`. `retrieval` is the evaluation as a function over encode functions; training calls it
on its way.
"""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
from torch import Tensor

from eval_suite.embed_files import Embeddings
from eval_suite.embedded import embedded_features
from eval_suite.encode import EncodeImage, EncodeText, encode_functions, encode_images, encode_texts
from eval_suite.feature_similarity import FeatureSimilarity, scores_of, similarity_options_of
from eval_suite.gallery import gallery
from eval_suite.images import ShardImages, image_batches
from eval_suite.judgements import Direction
from eval_suite.model import RUNS_DIR, model_to_evaluate
from eval_suite.per_query import per_query_path, save_per_query
from eval_suite.preprocess import model_pictures
from eval_suite.protocols import HEADLINE_RULE, PROTOCOLS, Protocol, ProtocolOutcome, Queries, Setting, whole_gallery
from eval_suite.ranks import Ranks
from eval_suite.regions import (
    CAPTIONS_OF_PICTURE,
    RegionBatches,
    RegionSplit,
    check_width,
    open_regions,
    usual_split,
)
from eval_suite.relevance import RightAnswers
from eval_suite.results import RUN_RESULTS_NAME, Metric, Results, default_out, markdown_table
from eval_suite.retrieval_data import HELD_OUT_SPLIT, RetrievalData, open_retrieval, read_captions, retrieval_place
from eval_suite.scores import FEW_SCORES, MakeScore, Score, dot_scores, remembered
from eval_suite.sharing import ALONE, join, together
from setclip import distributed
from setclip.checkpoint import CHECKPOINTS_FOLDER, CHOSEN_NAME
from setclip.config import command, parse, to_dict
from setclip.distributed import World
from setclip.errors import InputError
from setclip.files import write_json
from setclip.log import say, warn
from setclip.lookup import look_up
from setclip.shards import Shard
from setclip.similarity import VectorSimilarity

__all__ = ["RetrievalConfig", "RetrievalOutcome", "evaluate", "read_captions", "retrieval", "scores_of"]

KEPT_SCORES = 2**27
"""Scores that a command keeps (512 MB), so that protocols do not compute them anew: enough for COCO's 5,000 × 25,000."""


@dataclass(frozen=True)
class RetrievalOutcome:
    """What an evaluation found."""

    metrics: dict[str, Metric]
    i2t: Ranks
    """Of each image's best caption among all captions."""
    t2i: Ranks
    """Of each caption's image among all images."""
    score: Score
    image_of_text: Tensor
    """(number of captions,) int64."""


def retrieval(
    encode_image: EncodeImage,
    encode_text: EncodeText,
    images: Iterable[Tensor],
    captions: Sequence[Sequence[str]],
    make_score: MakeScore = dot_scores,
    resamples: int = 1000,
    seed: int = 0,
    show_progress: bool = True,
    world: World = ALONE,
) -> RetrievalOutcome:
    """Ranks all captions for each image and all images for each caption: the protocol "full".

    `images`: batches as `encode_image` takes them, in the order of `captions`, which has at least one for each image.
    `make_score(image_features, text_features)` makes the Score of the similarity, by default the dot product; features
    may be sets, (N, K, D), and `eval_suite.scores.joint_scores` makes one of a function that judges fragments jointly.
    `resamples` and `seed` are those of the bootstrap. `show_progress=False` where another progress bar is on
    the screen. The ranks of `world` share the work (each calls this; `images` must then be a sequence of batches), and
    each returns what one process would, bit for bit.

    Metrics: `i2t_r1`, `i2t_r5`, `i2t_r10`, `t2i_…` (percent), `rsum` (their sum), `i2t_medr`, `t2i_medr`. Raises
    InputError where the counts do not fit or a feature or score is not finite.
    """
    image_of_text = torch.tensor([image for image, texts in enumerate(captions) for _ in texts], dtype=torch.int64)
    score = score_of(encode_image, encode_text, images, captions, make_score, show_progress, world)
    setting = Setting(resamples=resamples, seed=seed, world=world)
    found = whole_gallery(remembered(score), image_of_text, len(captions), setting)
    assert found.ranks is not None
    return RetrievalOutcome(found.metrics, *found.ranks, score, image_of_text)


def score_of(
    encode_image: EncodeImage,
    encode_text: EncodeText,
    images: Iterable[Tensor],
    captions: Sequence[Sequence[str]],
    make_score: MakeScore = dot_scores,
    show_progress: bool = True,
    world: World = ALONE,
) -> Score:
    """Returns the Score of all images against all captions; arguments as of `retrieval`."""
    texts = [text for of_image in captions for text in of_image]
    text_features = encode_texts(encode_text, texts, show_progress=show_progress, world=world)
    image_features = encode_images(encode_image, images, len(captions), show_progress, world)
    return make_score(image_features, text_features)


# --- the command


@dataclass(frozen=True, kw_only=True)
class RetrievalConfig:
    """What is evaluated, on what, and where the results go."""

    name: Annotated[str | None, tyro.conf.Positional] = None
    """Data set: scenes, flickr30k, coco, cub, or any folder of shards under $SETCLIP_DATA. Default, where neither --data nor
    --regions is given: what the fine-tuned run of --checkpoint reports on."""
    data: Path | None = None
    """Folder of shards elsewhere; with a name, of that data set."""
    regions: Path | None = None
    """Folder of region features in SCAN's layout, of a model that was fine-tuned on such."""
    region_captions: int = CAPTIONS_OF_PICTURE
    """Captions of each picture in --regions; of flickr30k and coco five anyway."""
    split: str | None = None
    """Default: test, dev or val, whichever is there first."""
    checkpoint: str | None = None
    """A run, a run's name, a checkpoint folder, or an open_clip NAME:TAG. Default: the newest run under runs/."""
    embeddings: Path | None = None
    """Take these, written by eval_suite.embed, instead of a model's: single vectors or sets."""
    out: Path | None = None
    """Results file. Default: results/ of the run."""
    protocols: tuple[str, ...] = ()
    """full, 5k, 1k-5fold, eccv, cxc, class; the first gives the headline. Default: those of the data set and split."""
    match: Literal["class", "instance"] | None = None
    """What is right on CUB: all of the query's class (the default there), or an image's own captions."""
    similarity: str | None = None
    """Similarity of the features: cosine, smooth_chamfer, … (setclip.similarity). Default: what the checkpoint names,
    else cosine of single vectors and smooth_chamfer of sets."""
    similarity_options: tuple[str, ...] = ()
    """Its options, as alpha=16; a=… and b=… of match_prob. Default: the checkpoint's."""
    allow_partial: bool = False
    """Evaluate even if samples of the data set or protocol are missing; the result is marked partial."""
    gallery_queries: int = 12
    """Queries of each kind in the gallery; 0: no gallery."""
    resamples: int = 1000
    """Bootstrap draws for the intervals."""
    seed: int = 0
    """Of the bootstrap."""
    batch_size: int = 128
    """Images a batch."""
    workers: int | None = None
    """Processes that decode images, a rank; 0: none beside this one. Default: by the number of cores."""
    device: str = "auto"
    """cpu, cuda, cuda:1, …; auto takes CUDA where there is one."""
    timeout_minutes: float = 60.0
    """How long a rank waits for the others."""

    def __post_init__(self) -> None:
        for name in ("resamples", "region_captions"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, found {getattr(self, name)}")
        if self.checkpoint is not None and self.embeddings is not None:
            raise ValueError(
                f"expected --checkpoint or --embeddings, found both ({self.checkpoint}; {self.embeddings}); embeddings "
                "know which model made them"
            )
        if self.regions is not None and (self.data is not None or self.embeddings is not None):
            raise ValueError(
                f"expected --regions, --data or --embeddings, found more than one beside {self.regions}; leave the others out"
            )
        if self.match and self.protocols:
            raise ValueError(
                f"expected --match or --protocols, found both ({self.match}; {', '.join(self.protocols)}); class matching is "
                "the protocol class, instance matching the protocol full"
            )


@dataclass(frozen=True)
class Evaluated:
    """What the command writes."""

    results: Results
    pictures: dict[str, Any] | None
    """The gallery; None where it is not wanted, and on all ranks but 0."""
    keys: list[str]
    queries: dict[str, Mapping[Direction, Queries]] = field(default_factory=dict)
    """By protocol."""
    about_queries: dict[str, Any] = field(default_factory=dict)


def evaluate(config: RetrievalConfig, world: World = ALONE) -> Evaluated:
    """Does what the command does but for writing. Raises InputError, where data are wrong before the model is loaded.

    `world`: who shares the work; by default nobody.
    """
    with together(world):
        config = _with_data_of_run(config)
        regions: RegionSplit | None = None
        shards: list[Shard] = []
        if config.regions is not None:
            split = config.split or usual_split(config.regions)
            regions = open_regions(config.regions, split, config.name, config.allow_partial, config.region_captions)
            name, place = config.name or config.regions.resolve().name, config.regions
            data, usual, is_partial = regions.data, regions.protocols, regions.is_partial
        else:
            name, place = retrieval_place(config.name, config.data)
            split, shards, data, usual, is_partial = open_retrieval(
                config.name, place, config.split, config.allow_partial
            )
        protocols = _protocols(config, usual)
        is_partial |= _check_protocols(protocols, data, config.allow_partial)
        options = similarity_options_of(config.similarity_options)
        loaded = embeddings = None
        if config.embeddings is None:
            loaded = model_to_evaluate(config.checkpoint, str(world.device) if world.size > 1 else config.device)
            identity = loaded.identity
            if regions is not None:
                check_width(loaded, regions.regions)
        else:
            embeddings = Embeddings.open(config.embeddings)
            identity = embeddings.description["model"]
        similarity = FeatureSimilarity(config.similarity, options, identity)
    start = time.monotonic()
    if embeddings is not None:
        with together(world):
            score = similarity(*embedded_features(embeddings, data.keys, data.captions))
    else:
        assert loaded is not None
        batches: Sequence[Tensor]
        if regions is not None:
            batches = RegionBatches(regions.regions, config.batch_size)
        else:
            batches = image_batches(ShardImages(shards, model_pictures(loaded)), config.batch_size, config.workers)
        score = score_of(*encode_functions(loaded), batches, data.captions, similarity, world=world)
    # other similarities keep their scores themselves
    is_asked_anew = isinstance(similarity.similarity, VectorSimilarity) and len(protocols) > 1
    score = remembered(score, KEPT_SCORES // world.size if is_asked_anew else FEW_SCORES)
    setting = Setting(resamples=config.resamples, seed=config.seed, world=world)
    found: dict[str, ProtocolOutcome] = {}
    for each, protocol in protocols.items():
        found[each] = protocol.run(score, data, setting)
    seconds = time.monotonic() - start

    names = [name for number, (_, protocol) in enumerate(protocols.items()) for name in _narrow(protocol, number == 0)]
    results = Results(
        evaluation="retrieval",
        dataset={
            "name": name,
            "place": str(place),
            "split": split,
            "images": len(data.keys),
            "captions": sum(map(len, data.captions)),
            "captions_sha256": data.captions_sha256,
        },
        metrics={name: metric for outcome in found.values() for name, metric in outcome.metrics.items()},
        headline=names,
        checkpoint=dict(identity),
        config=to_dict(config),
        is_partial=is_partial,
        details={
            "protocols": {each: protocol.sentence for each, protocol in protocols.items()},
            **similarity.described,
            "captions_left_out": data.left_out,
            "ranks": world.size,
        },
        seconds=round(seconds, 3),
    )
    pictures = None
    if config.gallery_queries > 0 and regions is None:
        marked = _marked(found, score, data, setting)
        if world.rank == 0:
            ranks, right, what = marked
            chosen = gallery(
                score,
                ranks["i2t"],
                ranks["t2i"],
                data.image_of_text,
                data.keys,
                data.captions,
                config.gallery_queries,
                read_image=_image_reader(shards, data.keys),
                right=right,
            )
            pictures = {"data": str(place), "split": split, "checkpoint": dict(identity), "right": what, **chosen}
    about = {
        "captions_sha256": data.captions_sha256,
        "protocols": results.details["protocols"],
        "dataset": {"name": name, "split": split},
        "is_partial": is_partial,
    }
    return Evaluated(results, pictures, data.keys, {each: of.queries for each, of in found.items()}, about)


def _with_data_of_run(config: RetrievalConfig) -> RetrievalConfig:
    """Returns the settings with the data that the results of a fine-tuned run are of, where no data are named."""
    if config.checkpoint is None or any((config.name, config.data, config.regions, config.embeddings)):
        return config
    places = (Path(config.checkpoint), RUNS_DIR / config.checkpoint)
    run = next((place for place in places if (place / CHECKPOINTS_FOLDER / CHOSEN_NAME).is_dir()), None)
    if run is None:
        return config
    path = run / RUN_RESULTS_NAME
    told = Results.load(path)
    place, split = Path(told.dataset["place"]), told.dataset["split"]
    if split == HELD_OUT_SPLIT:
        raise InputError(
            f"expected a run that reports on a split, found that {path} is of pictures held out of its training data at {place}; "
            "these are its figures; name other data, as --data DIR"
        )
    say(f"data: {place}, {split}, on which {run} reports")
    own = told.config
    which: dict[str, Any] = {"data": place}
    if own.get("regions"):
        which = {"regions": place, "region_captions": own.get("region_captions", CAPTIONS_OF_PICTURE)}
    is_partial = config.allow_partial or own["allow_partial"]
    return replace(config, name=own["dataset"], split=config.split or split, allow_partial=is_partial, **which)


def _marked(
    found: Mapping[str, ProtocolOutcome], score: Score, data: RetrievalData, setting: Setting
) -> tuple[dict[Direction, Tensor], Mapping[Direction, RightAnswers] | None, str]:
    """Returns the ranks of the gallery's queries, what is right for them, and that in words: as the first protocol says.

    Of one on folds, whose ranks are no ranks among all, an image's own captions in the whole gallery are taken.
    """
    name, first = next(iter(found.items()))
    if first.right is not None:
        ranks = {direction: of.rank[HEADLINE_RULE] for direction, of in first.queries.items()}
        return ranks, first.right, PROTOCOLS[name].sentence
    own = first if first.ranks is not None else whole_gallery(score, data.image_of_text, len(data.keys), setting)
    ranks = {direction: of.rank[HEADLINE_RULE] for direction, of in own.queries.items()}
    return ranks, None, PROTOCOLS["full"].sentence


def _protocols(config: RetrievalConfig, usual: Sequence[str]) -> dict[str, Protocol]:
    names = config.protocols or usual
    if config.match is not None:
        names = ("class",) if config.match == "class" else ("full",)
    chosen = {name: look_up(PROTOCOLS, name, "protocol") for name in names}
    prefixes = [protocol.prefix for protocol in chosen.values()]
    twice = [name for name, protocol in chosen.items() if prefixes.count(protocol.prefix) > 1]
    if twice:
        raise InputError(
            f"expected protocols whose numbers have names of their own, found {' and '.join(twice)}, which are the same "
            "ranking; choose one of them"
        )
    return chosen


def _check_protocols(protocols: Mapping[str, Protocol], data: RetrievalData, allow_partial: bool) -> bool:
    """Returns whether samples that a protocol asks for are missing; without `allow_partial` that is an InputError."""
    faults = {name: found for name, protocol in protocols.items() if (found := protocol.faults(data))}
    if faults and not allow_partial:
        texts = "; ".join(f"{name}: {', '.join(found)}" for name, found in faults.items())
        raise InputError(
            f"expected the samples that the protocols ask for, found other ones: {texts}. Evaluate the whole split, choose "
            "other --protocols, or evaluate what is there with --allow-partial True (the result is then marked partial)"
        )
    if faults:
        warn(f"partial: {'; '.join(fault for found in faults.values() for fault in found)}")
    return bool(faults)


def _narrow(protocol: Protocol, is_first: bool) -> list[str]:
    """Returns the names of a protocol's metrics in a narrow table."""
    return protocol.headline() if is_first else [protocol.prefix + name for name in protocol.brief]


def _image_reader(shards: Sequence[Shard], keys: Sequence[str]) -> Callable[[str], bytes]:
    """Returns a function from a sample's key to the bytes of its image."""
    places = ((shard, row) for shard in shards for row in range(len(shard)))
    place_of = dict(zip(keys, places, strict=True))

    def read_image(key: str) -> bytes:
        shard, row = place_of[key]
        return shard.read(row).image

    return read_image


def query_arrays(queries: Mapping[str, Mapping[Direction, Queries]]) -> dict[str, Tensor]:
    """Returns the arrays of `eval_suite.per_query` of each protocol's queries, equal scores against us."""
    arrays: dict[str, Tensor] = {}
    for protocol, directions in queries.items():
        for direction, of in directions.items():
            place = f"{protocol}.{direction}"
            arrays |= {f"{place}.image": of.image, f"{place}.rank": of.rank[HEADLINE_RULE]}
            arrays |= {f"{place}.{name}": by_rule[HEADLINE_RULE] for name, by_rule in of.lists.items()}
            if of.fold is not None:
                arrays[f"{place}.fold"] = of.fold
    return arrays


def main() -> None:
    """Runs the command."""
    config: RetrievalConfig = parse(RetrievalConfig, description=__doc__)
    world = join(config.device, config.timeout_minutes)
    try:
        evaluated = evaluate(config, world)
        if world.rank == 0:
            _write(evaluated, config.out)
    finally:
        distributed.stop()


def _write(evaluated: Evaluated, out: Path | None) -> None:
    results, pictures = evaluated.results, evaluated.pictures
    dataset = f"{results.dataset['name']}_{results.dataset['split']}"
    out = out or default_out("retrieval", dataset, results.checkpoint)
    if pictures is not None:
        gallery_path = out.with_name(f"{out.stem}.gallery.json")
        gallery_path.parent.mkdir(parents=True, exist_ok=True)
        write_json(gallery_path, pictures)
        results.details["gallery"] = gallery_path.name
    queries = per_query_path(out)
    arrays = query_arrays(evaluated.queries)
    save_per_query(queries, kind="retrieval", keys=evaluated.keys, about=evaluated.about_queries, **arrays)
    results.details["queries"] = queries.name
    results.save(out)
    for name, sentence in results.details["protocols"].items():
        say(f"{name}: {sentence}")
    say(f"\n{markdown_table([results])}\nresults: {out}")
    if pictures is not None:
        say(f"gallery: {gallery_path}")


if __name__ == "__main__":
    command(main)
