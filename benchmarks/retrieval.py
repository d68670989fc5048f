"""Time and memory of comparing sets of embeddings, ranking with them and searching among them, in CPU time of one thread.

    python -m benchmarks.retrieval [--quick] [--peer DIR] [--embeddings FILE] [--json FILE] [--plot FILE]

1. The similarity matrix of 1,000 × 5,000 sets of four elements, D = 1,024, against the bare product of the same elements
   (4,000 × 1,024 by 1,024 × 20,000), and the peak memory of one of 5,000 × 25,000 above its inputs and its output.
2. The whole evaluation, both directions and six recalls, against the functions of DivE's official repository. DIR is a
   checkout of it (github kdwonn/DivE); its `eval.py` and `similarity.py` are imported from there and never copied. What had
   to be put in place for them to run on a CPU is in the JSON file.
3. Which number formats this processor multiplies faster than float32, as the goal of the search rests on units for bf16.
   Then exact search of the top 10 in two stages against scoring everything in full, on random and on real sets. FILE holds
   {"image_sets": (N, K, D), "text_sets": (N', K, D), "what": what they are}, written by torch.save. Without it the sets are
   made from $SETCLIP_REAL_DATA/flickr8k/dev: fixed random projections of the quarters of each photograph and of the words
   in the quarters of each caption. They have real data's clusters but know nothing of which caption belongs to which.

Measurements take turns; a ratio is of the two that follow each other, and the median is what counts.
"""

import contextlib
import importlib
import io
import json
import math
import os
import statistics
import subprocess
import sys
import tarfile
import time
import types
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch
from torch import Tensor

from eval_suite.metrics import recall_at_k, retrieval_ranks
from eval_suite.set_scores import set_scores
from eval_suite.two_stage import SetSearch, Stage
from setclip.config import command, parse
from setclip.errors import InputError
from setclip.files import replacing, write_json
from setclip.log import say
from setclip.provenance import describe
from setclip.similarity import make_similarity, similarity_matrix
from setclip.similarity.bounds import has_bf16_units

GOALS = {"matrix": 1.25, "memory_gb": 0.2, "evaluation": 12.0, "two_stage": 2.5}
ELEMENTS, WIDTH, CAPTIONS = 4, 1_024, 5
FULL_SIZE = 1_000  # images that the goals are about; for memory five times as many
TIMED = ("smooth_chamfer", "mil", "chamfer", "match_prob_cos", "match_prob_l2", "maxpair", "avg")
KS = (1, 5, 10)
STAGES: tuple[Stage, ...] = ("auto", "bf16")
Seconds = list[float]


@dataclass(frozen=True, kw_only=True)
class BenchmarkConfig:
    """Measures comparing, ranking and searching."""

    quick: bool = False
    """Few sets, in under a minute: figures are not those of the goals."""
    repeats: int = 5
    """Measurements of each kind."""
    peer: Path | None = None
    """A checkout of DivE's official repository."""
    embeddings: Path | None = None
    """Real sets for the search, written by torch.save."""
    json: Path | None = None
    """File for the figures."""
    plot: Path | None = None
    """Picture of the times, .svg or .png."""
    memory_of: int = 0
    """Used by the benchmark itself: prints the peak memory of a matrix of so many images with five texts each."""

    def __post_init__(self) -> None:
        if self.repeats < 1:
            raise ValueError(f"repeats must be at least 1, found {self.repeats}")


def main() -> None:
    """The command."""
    config = parse(BenchmarkConfig, description=__doc__)
    torch.set_num_threads(1)
    if config.memory_of:
        print_peak_memory(config.memory_of)
        return
    num_images, repeats = (100, 2) if config.quick else (1_000, config.repeats)
    images, texts = graded_sets(num_images)
    figures: dict[str, Any] = {
        "goals": GOALS,
        "images": num_images,
        "texts": len(texts),
        "elements": ELEMENTS,
        "width": WIDTH,
        "processor": torch.backends.cpu.get_cpu_capability(),
        "bf16_units": search_has_units(),
        "provenance": describe(),
    }
    with torch.no_grad():
        figures["products"] = measure_products(repeats)
        figures["matrix"] = measure_matrix(images, texts, repeats)
        figures["memory"] = measure_memory(250 if config.quick else 5_000)
        figures["evaluation"] = measure_evaluation(images, texts, repeats, config.peer)
        figures["two_stage"] = [
            measure_search(what, queries, gallery, stage, repeats)
            for what, queries, gallery in searched(num_images, config.embeddings)
            for stage in STAGES
        ]
    if config.json is not None:
        write_json(config.json, figures)
    if config.plot is not None:
        draw(figures, config.plot)


# --- 1. the matrix


def graded_sets(num_images: int, likeness: float = 0.18) -> tuple[Tensor, Tensor]:
    """Returns random image sets, (n, 4, 1024), and the sets of five texts each, a little like their image's."""
    generator = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    shared = likeness * noise(num_images, 1, WIDTH)
    images = noise(num_images, ELEMENTS, WIDTH) + shared
    texts = noise(num_images * CAPTIONS, ELEMENTS, WIDTH) + shared.repeat_interleave(CAPTIONS, 0)
    return unit(images), unit(texts)


def unit(vectors: Tensor) -> Tensor:
    """Returns vectors of length 1."""
    return torch.nn.functional.normalize(vectors, dim=-1)


def measure_matrix(images: Tensor, texts: Tensor, repeats: int) -> dict[str, Any]:
    """Measures each similarity's matrix against the bare product, with its output in new and in used memory."""
    rows, columns = images.flatten(0, 1), texts.flatten(0, 1).T
    used = torch.empty(len(rows), columns.shape[1])
    ways: dict[str, Callable[[], Any]] = {
        "bare product": lambda: rows @ columns,
        "bare product into used memory": lambda: torch.mm(rows, columns, out=used),
    }
    for name in TIMED:
        ways[name] = partial(similarity_matrix, make_similarity(name), images, texts)
    found = seconds(ways, repeats)
    ratios = {name: ratio_of(found[name], found["bare product"]) for name in TIMED}
    against_used = ratio_of(found["smooth_chamfer"], found["bare product into used memory"])
    say(f"similarity matrix, {len(images):,} x {len(texts):,} sets, {repeats} repeats, against the bare product")
    for name, ratio in ratios.items():
        goal = verdict("matrix", ratio <= GOALS["matrix"], len(images)) if name == "smooth_chamfer" else ""
        say(f"    {name:16} {ratio:6.3f}  ({spread(found[name], found['bare product'])}){goal}")
    say(f"    smooth_chamfer against a product into memory that is in use already: {against_used:.3f}")
    return {"cpu_seconds": found, "ratios": ratios, "smooth_chamfer_against_used_memory": against_used}


def print_peak_memory(num_images: int) -> None:
    """Makes one matrix and prints the peak of resident memory above inputs and output, in bytes."""
    make_similarity("smooth_chamfer")(torch.ones(1, 4, 8), torch.ones(1, 4, 8))  # what the libraries take at first use
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(num_images, ELEMENTS, WIDTH, generator=generator).div_(math.sqrt(WIDTH / 3))
    texts = torch.rand(num_images * CAPTIONS, ELEMENTS, WIDTH, generator=generator).div_(math.sqrt(WIDTH / 3))
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far
    before = _status("VmRSS")
    scores = similarity_matrix(make_similarity("smooth_chamfer"), images, texts)
    say(str(_status("VmHWM") - before - scores.numel() * scores.element_size()))


def _status(name: str) -> int:
    """Returns a size of this process in bytes, as Linux says it: VmRSS now, VmHWM its peak."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1]) * 1024


def measure_memory(num_images: int) -> dict[str, Any]:
    """Measures the peak memory of a matrix in a process of its own."""
    arguments = [sys.executable, "-m", "benchmarks.retrieval", "--memory-of", str(num_images)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(arguments, check=True, capture_output=True, text=True, env=environment)
    peak = int(result.stdout.split()[-1])
    goal = verdict("memory_gb", peak / 1e9 <= GOALS["memory_gb"], num_images)
    size = f"{num_images:,} x {num_images * CAPTIONS:,} sets"
    say(f"peak memory above inputs and output, {size}: {peak / 1e9:.3f} GB{goal}")
    return {"images": num_images, "texts": num_images * CAPTIONS, "bytes": peak}


# --- 2. the whole evaluation


def our_recalls(images: Tensor, texts: Tensor) -> list[float]:
    """Returns recall at 1, 5 and 10 of images and of texts, in percent."""
    image_of_text = torch.arange(len(texts)) // CAPTIONS
    score = set_scores(make_similarity("smooth_chamfer"), images, texts)
    both = retrieval_ranks(score, image_of_text, len(images))
    return [recall_at_k(ranks.by("pessimistic"), k) for ranks in both for k in KS]


def measure_evaluation(images: Tensor, texts: Tensor, repeats: int, peer: Path | None) -> dict[str, Any]:
    """Measures our evaluation and, where there is one, the peer's."""
    say(f"whole evaluation with smooth-Chamfer, {len(images):,} x {len(texts):,} sets, {repeats} repeats")
    recalls: dict[str, list[float]] = {}
    ways: dict[str, Callable[[], Any]] = {"ours": lambda: recalls.update(ours=our_recalls(images, texts))}
    figures: dict[str, Any] = {}
    if peer is not None:
        with peer_modules(peer) as modules:
            theirs = peer_evaluation(modules, images, texts)
        ways["peer"] = lambda: recalls.update(peer=theirs())
        figures["peer"] = {"where": "github kdwonn/DivE", "commit": _commit(peer), "put_in_place": IN_PLACE}
    figures["cpu_seconds"] = seconds(ways, repeats)
    figures["recalls"] = recalls
    say(f"    ours {statistics.median(figures['cpu_seconds']['ours']):8.2f} s   recalls {_recalls(recalls['ours'])}")
    if peer is None:
        figures["peer"] = "not measured: give --peer DIR, a checkout of github kdwonn/DivE"
        say(f"    DivE's functions: {figures['peer']}")
        return figures
    taken = figures["cpu_seconds"]
    figures["times_faster"] = ratio_of(taken["peer"], taken["ours"])
    # percentages of counts, computed in two ways
    figures["same_recalls"] = [round(r, 6) for r in recalls["ours"]] == [round(r, 6) for r in recalls["peer"]]
    same = "the same" if figures["same_recalls"] else "OTHER"
    say(f"    DivE {statistics.median(taken['peer']):8.2f} s   recalls {_recalls(recalls['peer'])}: {same}")
    say(
        f"    times faster {figures['times_faster']:.2f}  ({spread(taken['peer'], taken['ours'])})"
        + verdict("evaluation", figures["times_faster"] >= GOALS["evaluation"], len(images))
    )
    return figures


IN_PLACE = [
    "empty modules vocab, model_pie, model_spm, data and option: eval.py imports them for loading models and data only",
    "Tensor.cuda returns the tensor itself while its similarity is made: the unused match probability calls it",
    "use_gpu=True: its branch with PyTorch, on the CPU; the other has no smooth-Chamfer",
]


@contextlib.contextmanager
def peer_modules(folder: Path) -> Iterator[tuple[types.ModuleType, types.ModuleType]]:
    """Yields DivE's modules eval and similarity, imported from a checkout; leaves nothing behind."""
    for name in ("eval.py", "similarity.py"):
        if not (folder / name).is_file():
            raise InputError(
                f"expected a checkout of DivE's repository with {name} as --peer, found none in {folder}; clone github "
                "kdwonn/DivE and give its folder"
            )
    stand_ins = [_StandIn(name) for name in ("vocab", "model_pie", "model_spm", "data", "option")]
    theirs = [module.__name__ for module in stand_ins] + ["eval", "similarity"]
    before = {name: sys.modules.pop(name) for name in theirs if name in sys.modules}
    sys.path.insert(0, str(folder))
    sys.modules.update({module.__name__: module for module in stand_ins})
    moved = torch.Tensor.cuda
    torch.Tensor.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign]
    try:
        yield importlib.import_module("eval"), importlib.import_module("similarity")
    except ModuleNotFoundError as error:
        raise InputError(
            f"expected the packages that DivE's eval.py imports, found no {error.name}; `pip install {error.name}`"
        ) from error
    finally:
        torch.Tensor.cuda = moved  # type: ignore[method-assign]
        sys.path.remove(str(folder))
        for name in theirs:
            sys.modules.pop(name, None)
        sys.modules.update(before)


class _StandIn(types.ModuleType):
    """A module in which every name is an empty class."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


def peer_evaluation(
    modules: tuple[types.ModuleType, types.ModuleType], images: Tensor, texts: Tensor
) -> Callable[[], list[float]]:
    """Returns a function that evaluates with DivE's functions and returns recalls as `our_recalls`."""
    evaluate, similarity = modules
    similar = similarity.SetwiseSimilarity(ELEMENTS, ELEMENTS, 2, 16).smooth_chamfer_similarity
    repeated = images.repeat_interleave(CAPTIONS, 0)  # each image's row as often as it has texts, as its files have it

    def run() -> list[float]:
        both = [way(repeated, texts, similar, nreps=CAPTIONS, use_gpu=True) for way in (evaluate.i2t, evaluate.t2i)]
        return [float(recall) for found in both for recall in found[:3]]

    return run


def _commit(folder: Path) -> str | None:
    """Returns the commit of a checkout; None where it is none."""
    if not (folder / ".git").exists():
        return None
    arguments = ["git", "-C", str(folder), "rev-parse", "HEAD"]
    result = subprocess.run(arguments, capture_output=True, text=True)
    return result.stdout.strip() or None


def _recalls(values: Sequence[float]) -> str:
    return " ".join(f"{value:.2f}" for value in values)


# --- 3. search


def measure_products(repeats: int) -> dict[str, float]:
    """Returns how many times as fast as in float32 a product of (1,024, D) by (D, 2,048) is, in other formats.

    int8 goes through oneDNN, with results in float32 as a first stage needs them.
    """
    generator = torch.Generator().manual_seed(2)
    rows, columns = (torch.randn(size, WIDTH, generator=generator) for size in (1_024, 2_048))
    ways: dict[str, Callable[[], Any]] = {"float32": lambda: rows @ columns.T}
    for kind in (torch.bfloat16, torch.float16):
        ways[str(kind).removeprefix("torch.")] = partial(torch.mm, rows.to(kind), columns.to(kind).T)
    try:
        ways["int8"] = _int8_product(rows, columns)
        ways["int8"]()
    except (AttributeError, NotImplementedError, RuntimeError) as error:  # no part of PyTorch's public interface
        ways.pop("int8", None)
        say(f"products in int8: not measured, as this PyTorch has none ({str(error).splitlines()[0]})")
    taken = seconds(ways, min(repeats, 3))
    faster = {name: ratio_of(taken["float32"], taken[name]) for name in ways}
    others = ", ".join(f"{name} {ratio:.2f}" for name, ratio in faster.items() if name != "float32")
    say(f"times as fast as a float32 product, {torch.backends.cpu.get_cpu_capability()}: {others}")
    return faster


def _int8_product(rows: Tensor, columns: Tensor) -> Callable[[], Tensor]:
    """Returns a product of both in int8. Columns have 7 bits: with 8 the sums of two overflow on AVX2."""
    a, b = ((part / part.abs().amax() * most).round().to(torch.int8) for part, most in ((rows, 127), (columns, 63)))
    packed = torch.ops.onednn.qlinear_prepack(b, None)
    scales, zeros = torch.ones(len(b)), torch.zeros(len(b), dtype=torch.int64)
    product = torch.ops.onednn.qlinear_pointwise
    return lambda: product(a, 1.0, 0, packed, scales, zeros, None, 1.0, 0, torch.float32, "none", [], "")


def searched(num_images: int, embeddings: Path | None) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Yields (what they are, query sets, gallery sets)."""
    generator = torch.Generator().manual_seed(1)
    images = unit(torch.randn(num_images, ELEMENTS, WIDTH, generator=generator))
    yield "random", images, unit(torch.randn(CAPTIONS * num_images, ELEMENTS, WIDTH, generator=generator))
    real = read_embeddings(embeddings) if embeddings is not None else projected_flickr8k(num_images)
    if real is None:
        say("real sets: not measured: set SETCLIP_REAL_DATA or give --embeddings FILE")
        return
    what, images, texts = real
    yield f"{what}: images search texts", images[:num_images], texts
    yield f"{what}: texts search images", texts[: CAPTIONS * num_images], images


def read_embeddings(path: Path) -> tuple[str, Tensor, Tensor]:
    """Returns what a file says of its sets, and the sets as float32 of length 1."""
    if not path.is_file():
        raise InputError(
            f"expected embeddings at {path}, found no file; write one by torch.save, or leave the flag out"
        )
    content = torch.load(path, weights_only=True)
    if not isinstance(content, dict) or not {"image_sets", "text_sets"} <= set(content):
        raise InputError(f'{path}: expected a dict with "image_sets" and "text_sets", found {type(content).__name__}')
    what = content.get("what", path.name)
    return str(what), unit(content["image_sets"].float()), unit(content["text_sets"].float())


def projected_flickr8k(num_images: int) -> tuple[str, Tensor, Tensor] | None:
    """Returns sets made from Flickr8k's dev photographs and captions as the module says; None without the data."""
    root = os.environ.get("SETCLIP_REAL_DATA")
    folder = Path(root) / "flickr8k" if root else None
    if folder is None or not (folder / "dev.jsonl").is_file():
        return None
    rows = [json.loads(line) for line in (folder / "dev.jsonl").read_text(encoding="utf-8").splitlines()][:num_images]
    rng = np.random.default_rng(0)
    half, words = 8, 4_096
    of_pixels = rng.standard_normal((3 * half * half, WIDTH), dtype=np.float32)
    of_words = rng.standard_normal((words, WIDTH), dtype=np.float32)
    pixels, texts = [], []
    with tarfile.open(folder / "dev.tar") as tar:
        for row in rows:
            file = tar.extractfile(row["file_name"])
            assert file is not None
            picture = PIL.Image.open(io.BytesIO(file.read())).convert("RGB").resize((2 * half, 2 * half))
            quarters = np.asarray(picture, dtype=np.float32).reshape(2, half, 2, half, 3).transpose(0, 2, 1, 3, 4)
            pixels.append(quarters.reshape(ELEMENTS, -1))
            for caption in row["captions"][:CAPTIONS]:
                numbers = [zlib.crc32(word.encode()) % words for word in caption.lower().split()] or [0]
                parts = np.array_split(numbers, ELEMENTS)
                texts.append([of_words[part if len(part) else numbers].sum(0) for part in parts])
    stacked = np.stack(pixels)
    images = (stacked - stacked.mean((0, 1))) @ of_pixels
    what = "random projections of Flickr8k dev (pixels of quarters, words of quarters)"
    return what, unit(torch.from_numpy(images)), unit(torch.from_numpy(np.array(texts, dtype=np.float32)))


def measure_search(what: str, queries: Tensor, gallery: Tensor, stage: Stage, repeats: int) -> dict[str, Any]:
    """Measures the top 10 in two stages against scoring everything in full, which takes the same way to its top 10."""
    similarity = make_similarity("smooth_chamfer")
    start = time.process_time()
    search, in_full = (SetSearch(similarity, gallery, first_stage=way) for way in (stage, "none"))
    build = time.process_time() - start
    found: dict[str, Any] = {}
    k = min(10, len(gallery))
    taken = seconds(
        {
            "two stages": lambda: found.update(two=search.search(queries, k)),
            "in full": lambda: found.update(full=in_full.search(queries, k)),
        },
        repeats,
    )
    two, full = found["two"], found["full"]
    plain = similarity_matrix(similarity, queries, gallery).sort(dim=1, descending=True, stable=True)
    figures = {
        "what": what,
        "queries": len(queries),
        "gallery": len(gallery),
        "first_stage": two.first_stage,
        "chosen_by": stage,
        "rescored": two.rescored,
        "build_cpu_seconds": build,
        "cpu_seconds": taken,
        "times_faster": ratio_of(taken["in full"], taken["two stages"]),
        "identical": bool(
            torch.equal(two.indices, full.indices)
            and torch.equal(two.scores, full.scores)
            and torch.equal(two.indices, plain.indices[:, :k])
        ),
    }
    say(f"exact top {k} of {len(gallery):,} for {len(queries):,} sets, {what}, first stage {two.first_stage} ({stage})")
    note = ""
    if two.first_stage == "none":
        note = ": one stage, since this processor has no bf16 units" if not search_has_units() else ": given up"
    elif two.first_stage == "bf16" and not search_has_units():
        note = ": bf16 numbers in float32 products, for want of bf16 units"
    say(
        f"    {figures['times_faster']:.2f} times faster ({spread(taken['in full'], taken['two stages'])}){note}; "
        f"{two.rescored:.2%} scored in full; answers {'identical' if figures['identical'] else 'DIFFERENT'}"
        + verdict(
            "two_stage",
            figures["identical"] and figures["times_faster"] >= GOALS["two_stage"],
            max(len(queries), len(gallery)) // CAPTIONS,
        )
    )
    return figures


def search_has_units() -> bool:
    """Whether this processor multiplies bf16 faster than float32."""
    return has_bf16_units(torch.device("cpu"))


# --- shared


def seconds(ways: dict[str, Callable[[], Any]], repeats: int) -> dict[str, Seconds]:
    """Returns the CPU seconds of each way and repeat. The ways take turns."""
    found: dict[str, Seconds] = {name: [] for name in ways}
    for _ in range(repeats):
        for name, work in ways.items():
            start = time.process_time()
            work()
            found[name].append(time.process_time() - start)
    return found


def ratio_of(one: Seconds, other: Seconds) -> float:
    """Returns the median over repeats of the ratio of two ways."""
    return statistics.median(a / b for a, b in zip(one, other, strict=True))


def spread(one: Seconds, other: Seconds) -> str:
    """Returns the least and the largest ratio, as text."""
    ratios = [a / b for a, b in zip(one, other, strict=True)]
    return f"{min(ratios):.2f} to {max(ratios):.2f}"


def verdict(goal: str, is_reached: bool, num_images: int) -> str:
    """Returns what a line says of its goal; nothing of one that is for more sets."""
    if num_images < FULL_SIZE:
        return ""
    return f"   goal {GOALS[goal]:g} {'reached' if is_reached else 'MISSED'}"


def draw(figures: dict[str, Any], path: Path) -> None:
    """Draws the matrices beside the bare product, and the evaluations beside each other."""
    import matplotlib.pyplot as plt

    plt.switch_backend("agg")
    with plt.rc_context({"svg.hashsalt": "retrieval", "font.size": 9}):
        figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained", width_ratios=(3, 2))
        ratios = figures["matrix"]["ratios"]
        left.barh(list(ratios), list(ratios.values()), color="tab:blue")
        left.axvline(1.0, color="black", lw=1)
        left.axvline(GOALS["matrix"], color="grey", ls=":", lw=1.2)
        size = f"{figures['images']:,} × {figures['texts']:,}"
        left.set(title=f"similarity matrix, {size} sets", xlabel="CPU time / bare product (dotted: goal)")
        left.invert_yaxis()
        times = {name: statistics.median(values) for name, values in figures["evaluation"]["cpu_seconds"].items()}
        names = {"ours": "ours", "peer": "DivE's functions"}
        bars = right.bar(
            [names[name] for name in times], list(times.values()), color=["tab:blue", "tab:grey"][: len(times)]
        )
        right.bar_label(bars, fmt="%.1f s")
        right.set(title="whole evaluation", ylabel="CPU seconds, one thread")
        right.margins(y=0.15)
        for axis in (left, right):
            axis.spines[["top", "right"]].set_visible(False)
        with replacing(path) as temporary:
            figure.savefig(
                temporary, format=path.suffix[1:], metadata={"Date": None} if path.suffix == ".svg" else None
            )
        plt.close(figure)


if __name__ == "__main__":
    command(main)
