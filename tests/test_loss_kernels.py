"""The GPU's loss without a GPU: its kernels in Triton's interpreter against float64, and compiled for two generations.

The interpreter must be chosen before Triton is imported, and other tests import it: a process of its own runs the checks.
It multiplies and rounds bf16 wrongly (3.9), which the kernels' `_dot` and `_round_to` mend there and only there; so what
it shows of bf16 is the kernels' arithmetic, not that of matrix units.
"""

import importlib.util
import json
import re
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch
import triton
from loss_reference import ids, zipf_sets
from triton.backends.compiler import GPUTarget

from benchmarks import loss_gpu
from pretrain.losses import BatchSets, LossConfig, blocks, blockwise, contrastive_loss, kernels

DTYPES = [torch.float32, torch.bfloat16]
SIZES = {
    "one block": (32, 32, 32, 0),
    "full blocks": (32, 64, 64, 32),
    "cut off everywhere": (41, 103, 48, 17),
    "one row": (1, 35, 16, 34),
    "as many rows as columns": (70, 70, 80, 0),
}
"""Name to B, N, D and the first true pair's column; blocks are 32 × 32, and 64 × 96 of the library's."""


@pytest.fixture(scope="module")
def interpreted() -> Iterator[Callable]:
    """Runs a function of this module where Triton interprets, with small blocks."""
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("TRITON_INTERPRET", "1")
        environment.setenv("OMP_NUM_THREADS", "1")
        with ProcessPoolExecutor(1, get_context("spawn"), initializer=_interpret) as process:

            def run(function: Callable, *arguments: object) -> object:
                return process.submit(function, *arguments).result()

            run(_interpret)  # the process starts here, while the variables are set
            yield run


def _interpret() -> None:
    assert triton.knobs.runtime.interpret
    torch.set_num_threads(1)
    for shapes in (kernels.PRODUCT, kernels.MADE, kernels.ELEMENTWISE, kernels.FUSED):
        shapes.update({kind: kernels.Shape(32, 32, 32, 4, 1) for kind in shapes})
    kernels.SHARE.update(dict.fromkeys(kernels.SHARE, 64))
    blocks.SHAPES["cpu"] = (64, 96)


def problem(dtype: torch.dtype, size: tuple[int, int, int, int], scale: float, noise: float = 2.0) -> tuple:
    """Images near their texts, float64 logits with and without the true pairs, and the shift as blockwise takes it."""
    rows, columns, width, first = size
    generator = torch.Generator().manual_seed(0)
    texts = torch.nn.functional.normalize(torch.randn(columns, width, generator=generator), dim=1)
    images = texts + noise * torch.randn(columns, width, generator=generator) / width**0.5
    all_images, texts = torch.nn.functional.normalize(images, dim=1).to(dtype), texts.to(dtype)
    images = all_images[first : first + rows]
    logits = scale * images.double() @ texts.double().T
    is_true = torch.arange(columns) == (torch.arange(rows) + first)[:, None]
    shift = torch.tensor(max(0.0, scale * 1.02 - 70))
    return images, texts, all_images, torch.tensor(scale), shift, logits, is_true


def assert_near(found: torch.Tensor, truth: torch.Tensor, tolerance: float, what: object = "") -> None:
    assert found.shape == truth.shape
    error = float((found.double() - truth).norm() / truth.norm().clamp_min(1e-30))
    assert error <= tolerance, f"off by {error}: {what}"


# --- sums


def check_sums(dtype: torch.dtype, size: tuple, scale: float, at_once: int, noise: float = 2.0) -> None:
    kernels.PARTIAL_SUMS = at_once
    images, texts, _, s, shift, logits, is_true = problem(dtype, size, scale, noise)
    assert float(logits.softmax(1)[is_true].mean()) < 0.9  # saturated probabilities would show nothing
    others = (logits - shift).exp().masked_fill(is_true, 0)
    rows, columns, true = kernels.shifted_sums(images, texts, s, shift, size[3])
    assert rows.dtype == columns.dtype == true.dtype == torch.float64
    assert_near(rows, others.sum(1), 2e-5)
    assert_near(columns, others.sum(0), 2e-5)
    assert_near(true, logits[is_true], 1e-6)
    rows, columns = kernels.running_sums(images, texts, s, size[3])
    for found, truth in ((rows, others.sum(1).log()), (columns, others.sum(0).log())):
        assert torch.equal(found.isinf(), truth.isinf())
        assert float((found - truth - shift).nan_to_num(0, 0, 0).abs().max()) < 1e-4


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES)
def test_sums_over_rows_and_columns_equal_the_formula(interpreted, size, dtype):
    interpreted(check_sums, dtype, SIZES[size], 1 / 0.07, 2**24)


def test_sums_are_the_same_where_memory_allows_only_some_rows_at_a_time(interpreted):
    interpreted(check_sums, torch.bfloat16, SIZES["cut off everywhere"], 1 / 0.07, 1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sums_at_scale_100_equal_the_formula(interpreted, dtype):
    interpreted(check_sums, dtype, SIZES["cut off everywhere"], 100.0, 2**24, 6.0)


def check_largest_logits() -> None:
    ones = torch.ones(100, 16) / 4
    rows, columns, true = kernels.shifted_sums(ones, ones, torch.tensor(100.0), torch.tensor(30.0), 0)
    for found in (rows, columns):
        assert float((found.log() - 70 - torch.tensor(99.0).log()).abs().max()) < 1e-4
    assert float((true - 100).abs().max()) < 1e-4


def test_sums_of_the_largest_logits_at_scale_100_are_finite(interpreted):
    interpreted(check_largest_logits)


def check_far_row(dtype: torch.dtype) -> None:
    axis = torch.zeros(40, 16, dtype=dtype)
    axis[:, 0] = 1
    images = axis.clone()
    images[3] *= -1
    scale, shift = torch.tensor(100.0), torch.tensor(30.0)
    rows, _, true = kernels.shifted_sums(images, axis, scale, shift, 0)
    assert true.tolist() == [-100.0 if i == 3 else 100.0 for i in range(40)]
    assert rows[3] == 0  # exp(−130) is nothing in fp32: blockwise sees it
    rows, columns = kernels.running_sums(images, axis, scale, 0)
    wanted = torch.full((40,), 100 + torch.tensor(39.0, dtype=torch.float64).log())
    wanted[3] -= 200
    assert float((rows - wanted).abs().max()) < 1e-4
    assert float(columns[3] - (100 + torch.tensor(39.0).log())) < 1e-4
    assert float((columns - 100 - torch.tensor(38.0).log())[4:].abs().max()) < 1e-4


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_running_maximum_keeps_a_row_that_one_shift_loses(interpreted, dtype):
    interpreted(check_far_row, dtype)


# --- products


def check_products(dtype: torch.dtype, size: tuple, scale: float, ways: tuple[str, ...], has_soft: bool) -> None:
    images, texts, all_images, s, shift, logits, is_true = problem(dtype, size, scale)
    rows_lse = logits.logsumexp(1)
    columns_lse = torch.logaddexp(logits.logsumexp(0), logits.mean(0))  # as if others' images had a part in it
    soft = torch.rand(logits.shape, generator=torch.Generator().manual_seed(1)) / logits.shape[1]
    diagonal = -torch.rand(len(images), generator=torch.Generator().manual_seed(2))
    exact = ((logits - rows_lse[:, None]).exp() + (logits - columns_lse).exp()) / 2 - has_soft * soft.double()
    exact[is_true] = diagonal.double()
    wanted = exact @ texts.double(), exact.T @ images.double(), (exact * logits / scale).sum()
    partners = all_images if dtype == torch.bfloat16 else None
    tolerance = max(2e-6, 1e-7 * scale) if dtype == torch.float32 else 3e-3
    for way in ways:
        for c in (shift.double(), None):
            found = kernels.products(
                images, texts, s, rows_lse, columns_lse, c, diagonal, size[3], partners,
                (lambda rows, columns: soft[rows, columns]) if has_soft else None, way,
            )  # fmt: skip
            for value, truth in zip(found[:2], wanted[:2], strict=True):
                assert value.dtype == torch.float32
                assert_near(value, truth, tolerance, (way, c))
            assert_near(found[2], wanted[2], 1e-5, (way, c))


WAYS = ("chunked", "made", "fused")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES)
def test_products_equal_the_formula_whichever_way_they_are_made(interpreted, size, dtype):
    interpreted(check_products, dtype, SIZES[size], 1 / 0.07, WAYS, False)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_soft_targets_are_taken_off_block_by_block(interpreted, dtype):
    interpreted(check_products, dtype, SIZES["cut off everywhere"], 1 / 0.07, WAYS, True)


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "scale"), [(DTYPES[0], 1 / 0.07), (DTYPES[1], 1.0), (DTYPES[1], 100.0)], ids=str)
def test_larger_products_and_widths_that_need_several_shares_equal_the_formula(interpreted, dtype, scale):
    for size in ((70, 135, 176, 21), (40, 70, 272, 3)):
        interpreted(check_sums, dtype, size, scale, 2**24, 6.0 if scale > 50 else 2.0)
        interpreted(check_products, dtype, size, scale, WAYS, False)


# --- the whole loss


def with_kernels(way: str) -> dict[str, Callable]:
    """What stands in blockwise for its blocks of PyTorch. A count of calls shows that it was used."""
    calls: list[str] = []

    def shifted_sums(*arguments):
        *given, tiles = arguments
        assert tiles is None
        calls.append("sums")
        return *kernels.shifted_sums(*given), torch.zeros((), dtype=torch.float64)

    def running_sums(*arguments):
        calls.append("running")
        return kernels.running_sums(*arguments)

    def products(*arguments):
        *given, tiles = arguments
        assert tiles is None
        calls.append("products")
        return kernels.products(*given, way=way)

    return {"_shifted_sums": shifted_sums, "_running_sums": running_sums, "_products": products, "calls": calls}


def loss_and_gradients(images, texts, scale, sets, config):
    images, texts = (x.detach().requires_grad_() for x in (images, texts))
    s = torch.tensor(scale, requires_grad=True)
    loss = contrastive_loss(images, texts, s, BatchSets(sets, sets), config).loss
    return [loss.detach(), *torch.autograd.grad(loss, (images, texts, s))]


def check_whole_loss(dtype: torch.dtype, kind: str) -> None:
    size = (60, 60, 32, 0)
    scale, noise = {"learning": (1 / 0.07, 1.5), "nearly sure": (1 / 0.07, 0.5), "far row": (100.0, 2.0)}[kind]
    images, texts, *_, logits, is_true = problem(dtype, size, scale, noise)
    sure = float(logits.softmax(1)[is_true].mean())
    assert sure > 0.98 if kind == "nearly sure" else kind == "far row" or 0.05 < sure < 0.9, sure
    if kind == "far row":
        images[3] = -texts.double().mean(0).sign().to(dtype) / 32**0.5
        texts = torch.nn.functional.normalize(texts.double() + texts.double().mean(0).sign(), dim=1).to(dtype)
    sets = ids(zipf_sets(60, 5, 30, 0))
    for config in (LossConfig(name="hard"), LossConfig()):
        truth = loss_and_gradients(images.double(), texts.double(), scale, sets, config)
        plain = loss_and_gradients(images, texts, scale, sets, config)
        for way in WAYS:
            replaced = with_kernels(way)
            with pytest.MonkeyPatch.context() as patch:
                for name in ("_shifted_sums", "_running_sums", "_products"):
                    patch.setattr(blockwise, name, replaced[name])
                found = loss_and_gradients(images, texts, scale, sets, config)
            wanted_calls = ["sums", *(["running"] if kind == "far row" else []), "products"]
            assert replaced["calls"] == wanted_calls
            tolerance = (1e-5, 2e-5, 2e-5, 2e-5) if dtype == torch.float32 else (1e-5, 0.01, 0.01, 1e-4)
            for value, ours, exact, allowed in zip(found, plain, truth, tolerance, strict=True):
                assert value.dtype == ours.dtype
                error, error_in_blocks = (float((x.double() - exact).norm() / exact.norm()) for x in (value, ours))
                assert error <= max(allowed, 1.5 * error_in_blocks), (way, config, error, error_in_blocks)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["learning", "nearly sure", "far row"])
def test_the_whole_loss_and_its_gradients_are_as_exact_as_those_of_blocks(interpreted, kind, dtype):
    interpreted(check_whole_loss, dtype, kind)


# --- compiling


SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024}
"""Bytes that one program may take, by compute capability."""

TYPES = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float64: "*fp64"}


class Recorder:
    """Stands for a kernel, and keeps what it is started with."""

    def __init__(self, kernel, started: list):
        self.kernel, self.started = kernel, started

    def __getitem__(self, grid):
        return lambda **arguments: self.started.append((self.kernel, grid, arguments))


def launches(dtype: torch.dtype, capability: int, width: int, monkeypatch) -> dict[str, tuple]:
    """Returns the first launch of everything that 32,768 pairs start, from features that take no memory."""
    kind = "fp32" if dtype == torch.float32 else "hopper" if capability >= 90 else "bf16"
    monkeypatch.setattr(kernels, "_kind", lambda features: kind)
    monkeypatch.setitem(blocks.SHAPES, "meta", blocks.SHAPES["cuda"])
    started: list[tuple] = []
    for name in ("sums_kernel", "block_kernel", "fused_kernel"):
        monkeypatch.setattr(kernels, name, Recorder(getattr(kernels, name), started))
    size = 32_768
    features = torch.empty(size, width, dtype=dtype, device="meta")
    number, numbers = (torch.empty(shape, device="meta") for shape in ((), (size,)))
    sums = numbers.double()
    partners = features if dtype == torch.bfloat16 else None

    def tile(rows: slice, columns: slice) -> torch.Tensor:
        return torch.empty(rows.stop - rows.start, columns.stop - columns.start, device="meta")

    def products(way: str, shift: torch.Tensor | None, soft: Callable | None) -> None:
        kernels.products(features, features, number, sums, sums, shift, numbers, 0, partners, soft, way)

    found = {}
    for name, start in {
        "sums": lambda: kernels.shifted_sums(features, features, number, number, 0),
        "running": lambda: kernels.running_sums(features, features, number, 0),
        **{way: lambda way=way: products(way, number.double(), None) for way in WAYS},
        "made, soft, running": lambda: products("made", None, tile),
        "fused, running": lambda: products("fused", None, None),
    }.items():
        started.clear()
        start()
        found[name] = started[0]
    return found


def compiled(kernel, arguments: dict, capability: int):
    """Compiles a launch as it would be at run time."""
    signature, constants, attributes = {}, {}, {}
    for place, parameter in enumerate(kernel.params):
        value = arguments[parameter.name]
        if parameter.is_constexpr:
            signature[parameter.name], constants[parameter.name] = "constexpr", value
            continue
        is_tensor = isinstance(value, torch.Tensor)
        signature[parameter.name] = TYPES[value.dtype] if is_tensor else "i32"
        if is_tensor or (not parameter.do_not_specialize and value % 16 == 0):
            attributes[(place,)] = [["tt.divisibility", 16]]
    source = triton.compiler.ASTSource(kernel, signature, constants, attributes)
    options = {name: arguments[name] for name in ("num_warps", "num_stages", "enable_fp_fusion")}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def check_compiled(names: tuple[str, ...], dtype: torch.dtype, capability: int, width: int, monkeypatch) -> None:
    for name, (kernel, grid, arguments) in launches(dtype, capability, width, monkeypatch).items():
        if names and name not in names:
            continue
        result = compiled(kernel, arguments, capability)
        code = result.asm["ptx"]
        assert f".target sm_{capability}" in code
        assert result.metadata.shared <= SHARED_MEMORY[capability], name
        assert grid[0] * grid[1] >= 132, "fewer programs than an H200 has multiprocessors"
        multiplies = name != "chunked"
        is_bf16 = dtype == torch.bfloat16
        unit = r"wgmma\.mma_async\S*\.f32\.bf16\.bf16" if capability >= 90 else r"mma\.sync\S*\.f32\.bf16\.bf16\.f32"
        assert bool(re.search(unit, code)) == (multiplies and is_bf16), f"{name}: matrix units"
        assert "tf32" not in code
        assert "atom" not in re.sub(r"//.*", "", code), f"{name}: sums would depend on the order of programs"


@pytest.fixture
def fresh_cache(tmp_path, monkeypatch):
    """Compiles, and does not find what was compiled before."""
    monkeypatch.setattr(triton.knobs.cache, "dir", str(tmp_path))


@pytest.mark.usefixtures("fresh_cache")
def test_blocks_compile_for_hopper(monkeypatch):
    check_compiled(("made",), torch.bfloat16, 90, 512, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "capability", "width"),
    [
        *((dtype, capability, 512) for dtype in DTYPES for capability in (80, 90)),
        *((DTYPES[1], 90, w) for w in (80, 1024)),
    ],
    ids=str,
)
@pytest.mark.usefixtures("fresh_cache")
def test_every_kernel_compiles_within_the_chip_s_memory(dtype, capability, width, monkeypatch):
    check_compiled((), dtype, capability, width, monkeypatch)


def test_the_package_imports_without_triton():
    """CPU builds of torch bring none; `kernels` says what is missing."""
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import pretrain.losses\n"
        "assert 'pretrain.losses.kernels' not in sys.modules\n"
        "import pretrain.losses.kernels"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "InputError: expected Triton" in done.stderr
    assert "pip install triton" in done.stderr


# --- the benchmark on GPUs


def test_the_benchmark_says_at_once_that_there_is_no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["loss_gpu"])
    with pytest.raises(SystemExit, match="expected a GPU, found none"):
        loss_gpu.main()
    monkeypatch.setattr(sys, "argv", ["loss_gpu", "--device", "cpu"])
    with pytest.raises(SystemExit, match="give --check-only"):
        loss_gpu.main()


def test_the_benchmark_s_check_runs_on_a_cpu(tmp_path, monkeypatch, capsys):
    figures = tmp_path / "figures.json"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["loss_gpu", "--check-only", "--device", "cpu", "--json", str(figures)])
    loss_gpu.main()
    checks = json.loads(figures.read_text())["check"]
    assert len(checks) == len(loss_gpu.CASES) * 2 * 2  # dtypes and losses
    assert all(0 < max(each["errors"]) < 0.01 for each in checks)
    assert capsys.readouterr().out.count("twice the same: True") == len(checks)


def test_open_clip_s_loss_is_taken_from_a_wheel_that_is_not_installed(tmp_path):
    found = importlib.util.find_spec("open_clip")
    assert found is not None
    assert found.origin is not None
    wheel = tmp_path / "open_clip.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(Path(found.origin).parent / "loss.py", "open_clip/loss.py")
    batch = loss_gpu.draw(64, torch.device("cpu"), torch.float32, None)
    step = loss_gpu.open_clips(batch, loss_gpu.load_open_clip(wheel))
    assert max(loss_gpu.errors(step(), loss_gpu.plain_loss(batch))) < 1e-5
    assert "FileNotFoundError" in loss_gpu.load_open_clip(tmp_path / "none.whl")


def test_sets_are_drawn_that_share_about_as_much_as_those_of_web_captions():
    objects = loss_gpu.draw_sets(1_000, torch.device("cpu"))
    shares = ((objects[:, None, :, None] == objects[None, :, None, :]) & (objects >= 0)[:, None, :, None]).any((2, 3))
    assert 0.02 < float((shares.sum() - shares.diagonal().sum()) / (1_000 * 999)) < 0.035
    assert 2.7 < float((objects >= 0).sum(1).double().mean()) < 3.1
