"""The loss on one GPU: checked against float64, then time and memory of ours, open_clip's and Inf-CL's on equal inputs.

    python -m benchmarks.loss_gpu --tune --json loss_gpu.json [--peer INF_CLIP] [--open-clip WHEEL] [--sets FILE]

INF_CLIP is a checkout of github.com/DAMO-NLP-SG/Inf-CLIP. WHEEL is open_clip's (`pip download --no-deps
open_clip_torch==3.3.0`) where it is not installed. FILE holds padded ids of real captions (N, M), written by torch.save; else
sets are drawn by a Zipf law that shares as much as CC3M's. One call takes under ten minutes, and what it has measured by
then is in the file at any moment. Beside this repository it needs torch with CUDA, Triton, numpy and pyarrow; no
installation. --check-only --device cpu checks the blocks of PyTorch on a CPU.

Features are random and unit, D = 512, bf16, each image near its text. A time is the median of CUDA events around forward
and backward. Memory is the peak above the inputs. "targets ready" has them made beforehand, as on a side stream. The
share of the matrix rate counts 5 · 2 N² D operations, whatever is done, against a large product in this call.
"""

import argparse
import importlib
import itertools
import statistics
import sys
import time
import types
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from pretrain.losses import BatchSets, LossConfig, blocks, contrastive_loss, prepare_targets
from setclip.errors import InputError
from setclip.files import write_json

GOALS = {
    "times Inf-CL's speed": 2.0,
    "of Inf-CL's memory": 0.5,
    "soft over hard": {32_768: 1.10, 131_072: 1.02, 262_144: 1.02},
    "share of the matrix rate": 0.50,
}
WIDTH, SCALE = 512, 1 / 0.07
HARD, SOFT = LossConfig(name="hard"), LossConfig()
WAYS = ("chunked", "made", "fused")
SIZES_OF_SETS = (0.01, 0.12, 0.28, 0.29, 0.18, 0.08, 0.03, 0.01)
"""Shares of captions with 0, 1, 2, … objects; 2.9 on average"""

Step = Callable[[], tuple[Tensor, ...]]
"""A forward and backward pass: the loss, and the gradients of images, texts and scale"""


@dataclass(frozen=True)
class Batch:
    """Inputs that want gradients, and object ids."""

    images: Tensor
    texts: Tensor
    scale: Tensor
    sets: BatchSets

    @property
    def leaves(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.images, self.texts, self.scale

    def in_dtype(self, dtype: torch.dtype) -> "Batch":
        """Returns the same numbers in another dtype."""
        images, texts = (x.detach().to(dtype).requires_grad_() for x in (self.images, self.texts))
        scale = self.scale.detach().to(torch.promote_types(dtype, torch.float32)).requires_grad_()
        return Batch(images, texts, scale, self.sets)


def draw_sets(size: int, device: torch.device, seed: int = 0) -> Tensor:
    """Returns (N, M) padded ids: 2.7 % of pairs share one, as in CC3M."""
    generator = torch.Generator(device).manual_seed(seed)
    frequency = 1 / (torch.arange(150_000, dtype=torch.float64, device=device) + 3)
    most = len(SIZES_OF_SETS) - 1
    upto = (frequency / frequency.sum()).cumsum(0)
    points = torch.rand(size, most, dtype=torch.float64, device=device, generator=generator)
    ids = torch.searchsorted(upto, points).clamp_max(len(frequency) - 1)
    sizes = torch.multinomial(torch.tensor(SIZES_OF_SETS, device=device), size, replacement=True, generator=generator)
    return torch.where(torch.arange(most, device=device) < sizes[:, None], ids, -1)


def draw(
    size: int,
    device: torch.device,
    dtype: torch.dtype,
    sets: Tensor | None,
    noise: float = 1.5,
    scale: float = SCALE,
    is_apart: bool = False,
) -> Batch:
    """Returns a batch. At `noise` 1.5 a model is learning: no probability is near 1.

    `is_apart`: all features have a direction in common, but one image has its opposite.
    """
    generator = torch.Generator(device).manual_seed(size)
    texts = torch.randn(size, WIDTH, device=device, generator=generator)
    images = texts + noise * torch.randn(size, WIDTH, device=device, generator=generator)
    if is_apart:
        images, texts = images + 2, texts + 2
        images[3] = -2
    images, texts = (torch.nn.functional.normalize(x, dim=1).to(dtype).requires_grad_() for x in (images, texts))
    if sets is None:
        objects = draw_sets(size, device)
    elif len(sets) >= size:
        objects = sets[:size].to(device)
    else:
        raise InputError(
            f"expected sets of at least {size:,} captions in --sets, found {len(sets):,}; give more, or none"
        )
    return Batch(images, texts, torch.tensor(scale, device=device, requires_grad=True), BatchSets(objects, objects))


# --- what is compared


def ours(batch: Batch, config: LossConfig, prepared: Any = None) -> Step:
    """Our loss; makes its targets where they are not given."""

    def run() -> tuple[Tensor, ...]:
        loss = contrastive_loss(*batch.leaves, batch.sets, config, prepared=prepared).loss
        return loss.detach(), *torch.autograd.grad(loss, batch.leaves)

    return run


def open_clips(batch: Batch, loss: Callable[..., Tensor]) -> Step:
    """open_clip's ClipLoss with one process."""

    def run() -> tuple[Tensor, ...]:
        value = loss(*batch.leaves)
        return value.detach(), *torch.autograd.grad(value, batch.leaves)

    return run


def inf_cls(batch: Batch, module: Any) -> Step:
    """Inf-CL as its README calls it: once for each direction."""

    def run() -> tuple[Tensor, ...]:
        images, texts, scale = batch.leaves
        value = (module.cal_inf_loss(images, texts, scale=scale) + module.cal_inf_loss(texts, images, scale=scale)) / 2
        return value.detach(), *torch.autograd.grad(value, batch.leaves)

    return run


def load_open_clip(path: Path | None) -> Callable[..., Tensor] | str:
    """Returns open_clip's loss, from its one file in a wheel or folder where given; or why there is none."""
    try:
        if path is None:
            return importlib.import_module("open_clip.loss").ClipLoss()
        if path.is_dir():
            (found, *_) = [*path.glob("**/open_clip/loss.py")] or [path / "open_clip/loss.py"]
            source = found.read_text(encoding="utf-8")
        else:
            source = zipfile.ZipFile(path).read("open_clip/loss.py").decode()
        module = types.ModuleType("open_clip_loss")
        exec(compile(source, str(path), "exec"), module.__dict__)
        return module.ClipLoss()
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def load_inf_cl(folder: Path | None) -> Any:
    """Returns the module `inf_cl` of a checkout, in a process group of its own, which it asks for; or why there is none."""
    if folder is None:
        return "no --peer"
    if not (folder / "inf_cl").is_dir():
        raise InputError(
            f"expected a checkout of Inf-CLIP with a folder inf_cl as --peer, found none in {folder}; clone it"
        )
    try:
        sys.path.insert(0, str(folder))
        module = importlib.import_module("inf_cl")
        if not dist.is_initialized():
            dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1)
        return module
    except Exception as error:
        return f"{type(error).__name__}: {error}"


@contextmanager
def way_of(name: str) -> Iterator[None]:
    """Makes our loss by "blocks" of PyTorch, or by one way of the kernels; fails where the kernels were not used."""
    if name == "blocks":
        if not torch.cuda.is_available():
            yield
            return
        kernels = importlib.import_module("pretrain.losses.kernels")
        fit, kernels.fit = kernels.fit, lambda features: False
        try:
            yield
        finally:
            kernels.fit = fit
        return
    kernels = importlib.import_module("pretrain.losses.kernels")
    before, products, calls = kernels.BACKWARD, kernels.products, []

    def counted(*arguments: Any, **keywords: Any) -> Any:
        calls.append(name)
        return products(*arguments, **keywords)

    kernels.BACKWARD, kernels.products = name, counted
    try:
        yield
    finally:
        kernels.BACKWARD, kernels.products = before, products
    assert calls, "the loss did not use the kernels"


# --- correctness


def plain_loss(batch: Batch) -> tuple[Tensor, ...]:
    """The hard loss as it is written, of a small batch in float64."""
    exact = batch.in_dtype(torch.float64)
    logits = exact.scale * exact.images @ exact.texts.T
    both = logits.logsumexp(1).mean() + logits.logsumexp(0).mean()
    loss = both / 2 - logits.diagonal().mean()
    return loss.detach(), *torch.autograd.grad(loss, exact.leaves)


def errors(found: tuple[Tensor, ...], truth: tuple[Tensor, ...]) -> list[float]:
    """Returns the relative errors of loss, images, texts and scale."""
    return [float((a.double() - b.double()).norm() / b.double().norm()) for a, b in zip(found, truth, strict=True)]


TOLERANCES = {torch.float32: (1e-5, 1e-4, 1e-4, 1e-4), torch.bfloat16: (1e-5, 0.01, 0.01, 1e-3)}
CASES = {
    "learning": (1.5, SCALE, False),
    "nearly sure": (0.6, SCALE, False),
    "scale 100": (5.0, 100.0, False),
    "a row far below": (5.0, 100.0, True),
}
"""Name to noise, scale, and whether one image lies apart: that needs a running maximum"""


def check(device: torch.device, sizes: tuple[int, ...], ways: tuple[str, ...]) -> list[dict[str, Any]]:
    """Compares every way with float64 and returns the errors. Raises where one is too large."""
    found = []
    for size, (case, values), dtype in itertools.product(sizes, CASES.items(), TOLERANCES):
        batch = draw(size, device, dtype, None, *values)
        with way_of("blocks"):
            exact = {"hard": plain_loss(batch), "soft": ours(batch.in_dtype(torch.float64), SOFT)()}
        agreement = max(errors(ours(batch.in_dtype(torch.float64), HARD)(), exact["hard"]))
        assert agreement < 1e-9, f"float64 differs from the formula by {agreement}"
        for way, (name, config) in itertools.product(ways, {"hard": HARD, "soft": SOFT}.items()):
            with way_of(way):
                once, again = ours(batch, config)(), ours(batch, config)()
            made = errors(once, exact[name])
            is_same = all(torch.equal(a, b) for a, b in zip(once, again, strict=True))
            found.append(
                {
                    "n": size,
                    "case": case,
                    "dtype": str(dtype),
                    "way": way,
                    "loss": name,
                    "errors": made,
                    "same": is_same,
                }
            )
            line = "  ".join(
                f"{what} {error:.1e}" for what, error in zip(("loss", "dX", "dY", "ds"), made, strict=True)
            )
            say(f"check N = {size:,} {case}, {str(dtype)[6:]}, {way}, {name}: {line}; twice the same: {is_same}")
            too_large = [e for e, allowed in zip(made, TOLERANCES[dtype], strict=True) if not e <= allowed]
            if too_large:
                raise InputError(
                    f"expected errors of at most {TOLERANCES[dtype]}, found {made} ({case}, {way}, {name}); nothing is timed"
                )
    return found


# --- measuring


def milliseconds(step: Callable[[], Any], repeats: int = 7, seconds: float = 8.0) -> list[float]:
    """Returns the times of some repeats, fewer where they take long, after one that is not counted."""
    step()
    torch.cuda.synchronize()
    found: list[float] = []
    start = time.monotonic()
    while not found or (len(found) < repeats and time.monotonic() - start < seconds):
        events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        events[0].record()
        step()
        events[1].record()
        torch.cuda.synchronize()
        found.append(events[0].elapsed_time(events[1]))
    return found


def measure(step: Step) -> dict[str, Any]:
    """Returns times and the peak of memory above what is there; or what went wrong, such as memory."""
    try:
        times = milliseconds(step)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        torch.cuda.synchronize()
        return {"ms": statistics.median(times), "all_ms": times, "bytes": torch.cuda.max_memory_allocated() - before}
    except torch.OutOfMemoryError:
        return {"error": "out of memory"}
    finally:
        torch.cuda.empty_cache()


def measure_peer(step: Step) -> dict[str, Any]:
    """The same of another's code, which may fail in ways of its own."""
    try:
        return measure(step)
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"[:300]}


def matrix_rate(device: torch.device) -> float:
    """Returns bf16 operations per second of a product of 8,192³."""
    left, right = (torch.randn(8_192, 8_192, device=device, dtype=torch.bfloat16) for _ in range(2))
    return 2 * 8_192**3 / (statistics.median(milliseconds(lambda: left @ right, 20)) / 1e3)


def tune(size: int, device: torch.device) -> list[dict[str, Any]]:
    """Tries shapes of programs and of blocks, leaves the fastest set, and returns all times."""
    kernels = importlib.import_module("pretrain.losses.kernels")
    batch = draw(size, device, torch.bfloat16, None)
    images, texts, scale = (x.detach() for x in batch.leaves)
    kind = kernels._kind(images)
    shift = torch.zeros_like(scale)
    rows, columns, true = kernels.shifted_sums(images, texts, scale, shift, 0)
    log_sums = [torch.logaddexp(sums.log(), true) for sums in (rows, columns)]
    diagonal = -(log_sums[0] - true).sigmoid().float()
    found: list[dict[str, Any]] = []

    def backward(way: str) -> Callable[[], Any]:
        return lambda: kernels.products(images, texts, scale, *log_sums, shift.double(), diagonal, 0, images, None, way)

    def try_each(what: str, table: dict, key: str, candidates: list, step: Callable[[], Any]) -> tuple[float, Any]:
        best = (float("inf"), table[key])
        for candidate in dict.fromkeys([table[key], *candidates]):
            table[key] = candidate
            try:
                taken = statistics.median(milliseconds(step, 5, 2.0))
            except Exception as error:  # a shape that this chip or compiler does not take
                found.append({"what": what, "shape": str(candidate), "error": str(error)[:200]})
                say(f"tune {what}: {candidate}: {type(error).__name__}")
                continue
            found.append({"what": what, "shape": str(candidate), "ms": taken})
            say(f"tune {what}: {taken:8.3f} ms  {candidate}")
            best = min(best, (taken, candidate), key=lambda pair: pair[0])
        table[key] = best[1]
        return best

    wide, square = kernels.PRODUCT[kind], kernels.MADE[kind]
    programs = [
        replace(wide, stages=4),
        replace(wide, rows=256, columns=128),
        square,
        replace(square, stages=4),
        replace(square, warps=4),
        replace(square, depth=128, stages=2),
    ]
    try_each("sums", kernels.PRODUCT, kind, programs, lambda: kernels.shifted_sums(images, texts, scale, shift, 0))
    try_each("made", kernels.MADE, kind, [wide, *programs], backward("made"))
    elementwise = kernels.ELEMENTWISE[kind]
    shapes = [replace(elementwise, rows=32), replace(elementwise, columns=256), replace(elementwise, rows=128)]
    try_each("chunked", kernels.ELEMENTWISE, kind, shapes, backward("chunked"))
    fused = kernels.FUSED[kind]
    shapes = [replace(fused, columns=32), replace(fused, columns=32, stages=3), replace(fused, columns=128, stages=1)]
    try_each("fused", kernels.FUSED, kind, shapes, backward("fused"))
    large = [(2_048, 2_048), (4_096, 4_096), (8_192, 8_192), (4_096, 16_384), (8_192, 16_384)]
    each = [try_each(f"blocks of {way}", blocks.SHAPES, "cuda", large, backward(way)) for way in ("made", "chunked")]
    blocks.SHAPES["cuda"] = min(each, key=lambda pair: pair[0])[1]
    return found


def measure_size(
    size: int, device: torch.device, sets: Tensor | None, peers: dict[str, Any], rate: float, deadline: float
) -> dict[str, Any]:
    """Measures everything on one batch and says what it found."""
    batch = draw(size, device, torch.bfloat16, sets)
    rows: dict[str, dict[str, Any]] = {}

    def add(name: str, work: Callable[[], dict[str, Any]]) -> None:
        if time.monotonic() > deadline:
            rows[name] = {"error": "not measured: out of time"}
        else:
            rows[name] = work()
            if "ms" in rows[name]:
                rows[name]["share"] = 5 * 2 * size**2 * WIDTH / (rows[name]["ms"] / 1e3) / rate
        print_row(size, name, rows[name])

    def of_way(way: str, config: LossConfig, prepared: Any) -> dict[str, Any]:
        with way_of(way):
            return measure(ours(batch, config, prepared))

    ready = {config.name: prepare_targets(batch.sets, config) for config in (HARD, SOFT)}
    for way in WAYS:
        add(f"hard, {way}", lambda way=way: of_way(way, HARD, ready["hard"]))
    ways = [way for way in WAYS if "ms" in rows[f"hard, {way}"]]
    fastest = min(ways, key=lambda way: rows[f"hard, {way}"]["ms"]) if ways else WAYS[0]
    add("object_iou, targets ready", lambda: of_way(fastest, SOFT, ready["object_iou"]))
    ready.clear()
    add("object_iou, targets made", lambda: of_way(fastest, SOFT, None))
    if size <= 65_536:
        add("hard, blocks of PyTorch", lambda: of_way("blocks", HARD, None))
    if not isinstance(peers["open_clip"], str):
        add("open_clip", lambda: measure_peer(open_clips(batch, peers["open_clip"])))
    if not isinstance(peers["Inf-CL"], str):
        add("Inf-CL", lambda: measure_peer(inf_cls(batch, peers["Inf-CL"])))
    return {"n": size, "fastest": fastest, "rows": rows, "ratios": ratios(size, rows, fastest)}


def ratios(size: int, rows: dict[str, dict[str, Any]], fastest: str) -> dict[str, float]:
    """Returns what the goals speak of, as far as it was measured, and says it."""

    def quotient(over: str, under: str, what: str) -> float | None:
        above, below = rows.get(over, {}).get(what), rows.get(under, {}).get(what)
        return above / below if above and below else None

    hard = f"hard, {fastest}"
    found = {
        "times Inf-CL's speed": quotient("Inf-CL", hard, "ms"),
        "of Inf-CL's memory": quotient(hard, "Inf-CL", "bytes"),
        "times open_clip's speed": quotient("open_clip", hard, "ms"),
        "of open_clip's memory": quotient(hard, "open_clip", "bytes"),
        "soft over hard": quotient("object_iou, targets ready", hard, "ms"),
        "soft over hard, targets made": quotient("object_iou, targets made", hard, "ms"),
        "share of the matrix rate": rows.get(hard, {}).get("share"),
    }
    for name, value in found.items():
        goal = GOALS.get(name)
        goal = goal.get(size) if isinstance(goal, dict) else goal
        if value is not None:
            say(f"{size:>8,}  {name}: {value:.3f}" + (f"  (goal {goal:g})" if goal else ""))
    return {name: value for name, value in found.items() if value is not None}


def print_row(size: int, name: str, row: dict[str, Any]) -> None:
    """Says one line of the table."""
    if "error" in row:
        say(f"{size:>8,}  {name:28} {row['error']}")
        return
    spread = f"({min(row['all_ms']):.1f}–{max(row['all_ms']):.1f})"
    say(
        f"{size:>8,}  {name:28} {row['ms']:10.2f} ms {spread:18} {row['bytes'] / 2**30:8.3f} GiB"
        f"  {row['share']:6.1%} of the matrix rate"
    )


def say(text: str) -> None:
    """Prints a line at once."""
    print(text, flush=True)


def measure_all(options: argparse.Namespace, device: torch.device) -> None:
    """Checks, tunes if asked to, and measures every size. The file is written after each part."""
    deadline = time.monotonic() + options.seconds
    peers = {"open_clip": load_open_clip(options.open_clip), "Inf-CL": load_inf_cl(options.peer)}
    sets = None if options.sets is None else torch.load(options.sets)
    properties = torch.cuda.get_device_properties(device)
    versions = {name: importlib.import_module(name).__version__ for name in ("torch", "triton")}
    figures: dict[str, Any] = {"device": properties.name, "versions": versions, "goals": str(GOALS), "sizes": []}
    figures["peers"] = {name: peer if isinstance(peer, str) else "measured" for name, peer in peers.items()}
    say(f"{properties.name}, torch {versions['torch']}, triton {versions['triton']}; peers: {figures['peers']}")

    def keep() -> None:
        if options.json is not None:
            write_json(options.json, figures)

    rate = figures["matrix_rate"] = matrix_rate(device)
    say(f"bf16 product of 8,192³: {rate / 1e12:.0f} TFLOP/s")
    figures["check"] = check(device, (777, 9_001), WAYS)
    keep()
    if options.check_only:
        return
    if options.tune:
        figures["tune"] = tune(min(32_768, *options.sizes), device)
        keep()
    for size in options.sizes:
        figures["sizes"].append(measure_size(size, device, sets, peers, rate, deadline))
        keep()


def parse() -> argparse.Namespace:
    """Returns the flags. By argparse: a GPU machine that has torch may lack the parser of the other commands."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[32_768, 65_536, 131_072, 262_144], help="batches")
    parser.add_argument("--json", type=Path, help="file for the figures")
    parser.add_argument("--peer", type=Path, help="a checkout of Inf-CLIP")
    parser.add_argument("--open-clip", type=Path, help="a wheel or folder of open_clip, where it is not installed")
    parser.add_argument("--sets", type=Path, help="padded ids (N, M), written by torch.save")
    parser.add_argument(
        "--tune", action="store_true", help="try shapes of programs and blocks, and measure with the fastest"
    )
    parser.add_argument("--check-only", action="store_true", help="compare with float64, and measure nothing")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: with --check-only")
    parser.add_argument("--seconds", type=float, default=480.0, help="from then on nothing new is measured")
    return parser.parse_args()


def main() -> None:
    """The command."""
    options = parse()
    try:
        if options.device == "cpu":
            if not options.check_only:
                raise InputError("expected a GPU to measure on, found --device cpu; give --check-only to check there")
            found = check(torch.device("cpu"), (300,), ("blocks",))
            if options.json is not None:
                write_json(options.json, {"device": "cpu", "check": found})
        elif not torch.cuda.is_available():
            raise InputError(
                "expected a GPU, found none; run this on one, or check on a CPU: --check-only --device cpu"
            )
        else:
            measure_all(options, torch.device("cuda"))
    except InputError as error:
        sys.exit(f"error: {error}")
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    main()
