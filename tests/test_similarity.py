"""Similarities of sets: each against its plain formula in float64, what must hold of them, and blocks against one piece."""

import itertools
import math

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment

from eval_suite.metrics import retrieval_ranks
from eval_suite.set_scores import set_scores
from setclip.errors import InputError
from setclip.similarity import SIMILARITIES, GridSimilarity, make_similarity, similarity_matrix
from setclip.similarity.blocks import Tiles
from setclip.similarity.maxpair import MaxPair

GRIDS = ["mil", "chamfer", "smooth_chamfer", "match_prob", "match_prob_cos", "match_prob_l2", "maxpair"]
OF_ANY_SIZE = [*GRIDS, "avg"]  # sets of several elements on both sides, of different sizes


def unit(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    vectors = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.nn.functional.normalize(vectors, dim=-1).to(dtype)


def sets_for(name: str, num_images: int = 5, num_texts: int = 7, width: int = 6, dtype=torch.float64):
    """Returns image and text sets as the similarity of that name takes them."""
    sizes = {"cosine": (1, 1), "diagonal": (3, 3), "dhset_set": (1, 3), "dhset_hybrid": (1, 3)}.get(name, (4, 3))
    images = unit(num_images, sizes[0], width, seed=1, dtype=dtype)
    texts = unit(num_texts, sizes[1], width, seed=2, dtype=dtype)
    if name.startswith("dhset"):  # whose text elements have any norm
        texts = texts * torch.linspace(0.5, 2.0, texts.shape[1], dtype=dtype)[:, None]
    return images, texts


def masks_for(images: torch.Tensor, texts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns masks with sets of all sizes; element 0 is always there."""
    masks = []
    for sets in (images, texts):
        size = torch.arange(len(sets)) % sets.shape[1] + 1
        masks.append(torch.arange(sets.shape[1]) < size[:, None])
    return masks[0], masks[1]


def plain(name: str, v: list, t: list, options: dict, learned: dict):
    """Returns the similarity of two lists of vectors by its formula, element by element."""
    cos = [[(a * b).sum() for b in t] for a in v]
    flat = [c for row in cos for c in row]
    if name == "cosine":
        return cos[0][0]
    if name == "mil":
        return torch.stack(flat).max()
    if name == "avg":
        return sum(flat) / len(flat)
    columns = [list(column) for column in zip(*cos, strict=True)]
    if name == "chamfer":
        return sum(torch.stack(row).max() for row in cos) / (2 * len(v)) + sum(
            torch.stack(column).max() for column in columns
        ) / (2 * len(t))
    if name == "smooth_chamfer":
        alpha = options.get("alpha", 16.0)
        score = 0.0
        for lines in (cos, columns):
            for line in lines:
                score = score + sum((alpha * c).exp() for c in line).log() / (2 * alpha * len(lines))
        return score - (math.log(len(v) * len(t)) / (2 * alpha) if options.get("subtract_offset") else 0.0)
    if name in ("match_prob", "match_prob_cos"):
        return sum(1 / (1 + (-(learned["a"] * c + learned["b"])).exp()) for c in flat) / len(flat)
    if name == "match_prob_l2":
        total = 0.0
        for a, b in itertools.product(v, t):
            power = -learned["a"] * ((a - b).square().sum() + 1e-6).sqrt() + learned["b"]
            total = total + power.exp() / (power.exp() + (-power).exp())
        return total / len(flat)
    if name == "maxpair":
        scale = options.get("scale", 16.0)
        grid = cos if len(v) <= len(t) else columns
        best = max(
            (
                sum((scale * grid[row][column]).exp() for row, column in enumerate(order))
                for order in itertools.permutations(range(len(grid[0])), len(grid))
            ),
            key=lambda total: total.item(),
        )
        return best if options.get("value") == "sum" else (best / len(grid)).log() / scale
    if name == "diagonal":
        shared = min(len(v), len(t))
        return sum(cos[i][i] for i in range(shared)) / shared
    is_cosine = options.get("norm", "cos") == "cos"
    (vector,) = v
    if name == "dhset_set":
        return sum((vector * w).sum() / (vector.norm() * w.norm() if is_cosine else 1.0) for w in t) / len(t)
    hybrid = sum(t)
    return (vector * hybrid).sum() / (vector.norm() * hybrid.norm() if is_cosine else 1.0)


def plain_matrix(name, images, texts, options, learned, image_mask=None, text_mask=None):
    def elements(sets, mask, i):
        return [e for k, e in enumerate(sets[i]) if mask is None or mask[i, k]]

    return torch.stack(
        [
            torch.stack(
                [
                    plain(name, elements(images, image_mask, i), elements(texts, text_mask, j), options, learned)
                    for j in range(len(texts))
                ]
            )
            for i in range(len(images))
        ]
    )


CASES = [
    *((name, {}) for name in SIMILARITIES),
    ("smooth_chamfer", {"alpha": 3.0, "subtract_offset": True}),
    ("maxpair", {"value": "sum", "scale": 4.0}),
    ("maxpair", {"scale": 60.0}),
    ("dhset_set", {"norm": "none"}),
    ("dhset_hybrid", {"norm": "none"}),
    ("match_prob_l2", {"a": 2.0, "b": 1.5}),
]


@pytest.mark.parametrize("is_masked", [False, True], ids=["whole", "masked"])
@pytest.mark.parametrize(("name", "options"), CASES)
def test_values_and_all_gradients_are_those_of_the_formula(name, options, is_masked):
    images, texts = sets_for(name, 3, 4)
    image_mask, text_mask = masks_for(images, texts) if is_masked else (None, None)
    similarity = make_similarity(name, **options).double()
    weights = unit(3, 4, seed=3)
    found, expected = [], []
    for kind, results in (("ours", found), ("plain", expected)):
        sides = [images.clone().requires_grad_(), texts.clone().requires_grad_()]
        learned = {key: p.detach().clone().requires_grad_() for key, p in similarity.named_parameters()}
        if kind == "ours":
            scores = similarity(*sides, image_mask, text_mask)
            leaves = [*sides, *similarity.parameters()]
        else:
            scores = plain_matrix(name, *sides, options, learned, image_mask, text_mask)
            leaves = [*sides, *learned.values()]
        results += [scores.detach(), *torch.autograd.grad((weights * scores).sum(), leaves)]
    assert len(found) == (5 if name.startswith("match_prob") else 3)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)
        assert float(theirs.abs().max()) > 0


@pytest.mark.parametrize("name", ["match_prob_cos", "match_prob_l2"])
def test_learned_scalars_train_and_land_in_the_state(name):
    similarity = make_similarity(name, a=1.0, b=0.0)
    assert all(parameter.is_leaf for parameter in similarity.parameters())
    before = {key: value.clone() for key, value in similarity.state_dict().items()}
    assert set(before) == {"a", "b"}
    optimizer = torch.optim.SGD(similarity.parameters(), lr=0.5)
    (-similarity(*sets_for(name, dtype=torch.float32)).mean()).backward()
    optimizer.step()
    assert all(not torch.equal(value, before[key]) for key, value in similarity.state_dict().items())


@pytest.mark.parametrize("name", [*GRIDS, "avg", "diagonal"])
def test_of_one_element_each_it_is_a_growing_function_of_the_cosine(name):
    images, texts = unit(6, 1, 8, seed=1), unit(9, 1, 8, seed=2)
    with torch.no_grad():
        scores, cosines = make_similarity(name)(images, texts), make_similarity("cosine")(images, texts)
    if not name.startswith("match_prob"):
        torch.testing.assert_close(scores, cosines, rtol=1e-12, atol=1e-12)
    order = cosines.flatten().argsort()
    assert bool((scores.flatten()[order].diff() >= 0).all())


@pytest.mark.parametrize("name", [*OF_ANY_SIZE, "diagonal"])
def test_images_and_texts_may_change_places(name):
    images, texts = sets_for(name)
    similarity = make_similarity(name)
    with torch.no_grad():
        torch.testing.assert_close(similarity(images, texts), similarity(texts, images).T)


@pytest.mark.parametrize("name", [*OF_ANY_SIZE, "dhset_set", "dhset_hybrid"])
def test_the_order_within_a_set_does_not_matter(name):
    images, texts = sets_for(name)
    similarity = make_similarity(name)
    with torch.no_grad():
        torch.testing.assert_close(similarity(images.flip(1), texts.roll(1, 1)), similarity(images, texts))


@pytest.mark.parametrize("name", SIMILARITIES)
def test_what_stands_in_masked_places_and_how_many_there_are_does_not_matter(name):
    images, texts = sets_for(name, dtype=torch.float32)
    image_mask, text_mask = masks_for(images, texts)
    similarity = make_similarity(name)
    images.requires_grad_()
    expected = similarity(images, texts, image_mask, text_mask)
    garbage = images.detach().masked_fill(~image_mask[:, :, None], math.nan).requires_grad_()
    padded, padded_mask = texts, text_mask
    if name != "cosine":
        padded = torch.cat((texts, texts.new_full((len(texts), 2, texts.shape[2]), math.inf)), 1)
        padded_mask = torch.nn.functional.pad(text_mask, (0, 2))
    if name == "diagonal":  # both sides have one size there
        garbage = torch.cat((garbage.detach(), padded.detach()[: len(garbage), -2:]), 1).requires_grad_()
        image_mask = torch.nn.functional.pad(image_mask, (0, 2))
    found = similarity(garbage, padded, image_mask, padded_mask)
    torch.testing.assert_close(found, expected)
    (gradient,) = torch.autograd.grad(found.sum(), garbage)
    assert bool(gradient.isfinite().all())
    assert float(gradient[~image_mask].abs().sum()) == 0.0
    with torch.no_grad():
        in_blocks = similarity_matrix(similarity, garbage, padded, image_mask, padded_mask, block_size=3)
    torch.testing.assert_close(in_blocks, expected.detach())


@pytest.mark.parametrize("name", SIMILARITIES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_sets_are_compared_in_float32(name, dtype):
    images, texts = (sets.to(dtype) for sets in sets_for(name))
    similarity = make_similarity(name)
    with torch.no_grad():
        expected = similarity(images.double(), texts.double())
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = similarity(images, texts), similarity_matrix(similarity, images, texts)
    for scores in found:
        assert scores.dtype == torch.float32
        torch.testing.assert_close(scores.double(), expected, rtol=2e-6, atol=2e-6)


# --- smooth-Chamfer


@pytest.mark.parametrize(("num_images", "num_texts", "alpha"), [(4, 4, 16.0), (2, 5, 16.0), (3, 3, 0.1), (8, 8, 500.0)])
def test_smooth_chamfer_stays_within_its_bounds(num_images, num_texts, alpha):
    images, texts = unit(20, num_images, 4, seed=1), unit(30, num_texts, 4, seed=2)
    images[0], texts[0], texts[1] = images[0, 0], images[0, 0], -images[0, 0]  # the extremes
    offset = math.log(num_images * num_texts) / (2 * alpha)
    smooth, chamfer = make_similarity("smooth_chamfer", alpha=alpha), make_similarity("chamfer")
    scores = smooth(images, texts)
    assert scores.max() <= 1 + offset + 1e-12
    assert scores.min() >= -1 + offset - 1e-12
    assert scores[0, 0].item() == pytest.approx(1 + offset)
    assert scores[0, 1].item() == pytest.approx(-1 + offset)
    above = scores - chamfer(images, texts)
    assert above.min() >= -1e-12
    assert above.max() <= offset + 1e-12


def test_its_maximum_for_sets_of_four_is_1_0866():
    same = unit(1, 1, 8, seed=1).expand(1, 4, 8)
    assert make_similarity("smooth_chamfer")(same, same).item() == pytest.approx(1.08664, abs=5e-6)


@pytest.mark.parametrize("alpha", [1e2, 1e3, 1e4])
def test_a_large_alpha_gives_chamfer_in_float32(alpha):
    images, texts = unit(9, 4, 16, seed=1, dtype=torch.float32), unit(8, 4, 16, seed=2, dtype=torch.float32)
    images.requires_grad_()
    scores = make_similarity("smooth_chamfer", alpha=alpha)(images, texts)
    expected = make_similarity("chamfer")(images, texts)
    torch.testing.assert_close(scores, expected, rtol=0, atol=math.log(4) / alpha + 1e-6)
    (gradient,) = torch.autograd.grad(scores.sum(), images)
    assert bool(gradient.isfinite().all())
    with torch.no_grad():
        torch.testing.assert_close(
            similarity_matrix(make_similarity("smooth_chamfer", alpha=alpha), images, texts), scores, rtol=0, atol=1e-6
        )


@pytest.mark.parametrize("alpha", [0.01, 1.0, 16.0, 28.0, 29.0, 43.0, 60.0, 87.0, 1e4])
@pytest.mark.parametrize("sizes", [(4, 4), (1, 1), (7, 2), (12, 12)])
def test_the_fast_reduction_neither_overflows_nor_loses_digits(alpha, sizes):
    """Products of sums once underflowed; the extremes of the cosine are what can make them."""
    generator = torch.Generator().manual_seed(0)
    grid = torch.rand(11, sizes[0], sizes[1], 13, generator=generator) * 2 - 1
    grid[0], grid[1] = 1.0, -1.0
    similarity = make_similarity("smooth_chamfer", alpha=alpha)
    expected = similarity.reduce(grid.double())
    found = similarity.reduce_in_place(grid * similarity.grid_scale, 1.0)
    torch.testing.assert_close(found.double(), expected, rtol=3e-6, atol=3e-6 / min(alpha, 1.0))


def test_sets_that_are_longer_than_promised_do_not_overflow():
    images, texts = 3 * unit(6, 4, 8, seed=1, dtype=torch.float32), 4 * unit(7, 4, 8, seed=2, dtype=torch.float32)
    similarity = make_similarity("smooth_chamfer")
    torch.testing.assert_close(similarity_matrix(similarity, images, texts), similarity(images, texts))


def test_only_without_the_offset_do_larger_sets_not_score_higher():
    image = unit(1, 1, 8, seed=1)
    texts = image.expand(2, 4, 8)
    mask = torch.tensor([[True, False, False, False], [True, True, True, True]])
    one, four = make_similarity("smooth_chamfer")(image, texts, None, mask)[0].tolist()
    assert four - one == pytest.approx(math.log(4) / 32)
    one, four = make_similarity("smooth_chamfer", subtract_offset=True)(image, texts, None, mask)[0].tolist()
    assert one == pytest.approx(four) == pytest.approx(1.0)


# --- match probability and MaxPair


def test_match_probability_does_not_overflow_and_keeps_its_gradient():
    images = unit(2, 3, 4, seed=1, dtype=torch.float32).requires_grad_()
    similarity = make_similarity("match_prob_l2", a=1e4, b=1e3)
    scores = similarity(images, images.detach())  # coincident points: the distance's own gradient is infinite
    assert bool(scores.isfinite().all())
    (gradient,) = torch.autograd.grad(scores.sum(), images)
    assert bool(gradient.isfinite().all())


@pytest.mark.parametrize("sizes", [(2, 2), (3, 6), (6, 4), (5, 5), (7, 7), (4, 8)])
def test_maxpair_finds_the_assignment_that_scipy_finds(sizes):
    images, texts = unit(4, sizes[0], 5, seed=1), unit(5, sizes[1], 5, seed=2)
    scores = MaxPair(scale=5.0, value="sum")(images, texts)
    for i, j in np.ndindex(4, 5):
        weights = (5.0 * images[i] @ texts[j].T).exp().numpy()
        rows, columns = linear_sum_assignment(weights, maximize=True)
        assert scores[i, j].item() == pytest.approx(weights[rows, columns].sum(), rel=1e-9)


@pytest.mark.parametrize("size", [4, 7], ids=["by subsets", "by scipy"])
def test_maxpair_sends_gradient_through_the_chosen_pairs_alone(size):
    grid = (torch.rand(1, size, size, 1, generator=torch.Generator().manual_seed(0)) * 2 - 1).requires_grad_()
    (gradient,) = torch.autograd.grad(MaxPair(scale=2.0).reduce(grid).sum(), grid)
    rows, columns = linear_sum_assignment((2.0 * grid).exp().detach()[0, :, :, 0].numpy(), maximize=True)
    assert set(zip(*np.nonzero(gradient[0, :, :, 0].numpy()), strict=True)) == set(zip(rows, columns, strict=True))
    assert gradient.sum().item() == pytest.approx(1.0, rel=1e-5)


def test_maxpair_is_exact_at_large_scales():
    images, texts = unit(3, 4, 6, seed=1, dtype=torch.float32), unit(3, 4, 6, seed=2, dtype=torch.float32)
    largest = make_similarity("mil")(images, texts)
    torch.testing.assert_close(MaxPair(scale=1e4)(images, texts), largest, rtol=0, atol=math.log(4) / 1e4 + 1e-6)


# --- DH-Set


def test_dh_sets_hybrid_is_its_set_similarity_times_k_where_nothing_is_normalised():
    images, texts = sets_for("dhset_set")
    by_set = make_similarity("dhset_set", norm="none")(images, texts)
    hybrid = make_similarity("dhset_hybrid", norm="none")(images, texts)
    torch.testing.assert_close(hybrid, 3 * by_set, rtol=0, atol=1e-12)


def test_dh_sets_similarities_take_one_image_vector():
    images, texts = sets_for("chamfer")
    with pytest.raises(InputError, match=r"image sets of one element.*found 4"):
        make_similarity("dhset_set")(images, texts)
    with pytest.raises(InputError, match="importance matrices"):
        make_similarity("dhset_set", norm="l2")


# --- in blocks


@pytest.mark.parametrize("is_masked", [False, True], ids=["whole", "masked"])
@pytest.mark.parametrize("name", SIMILARITIES)
@pytest.mark.parametrize("block_size", [1, 4, 100, None])
def test_blocks_give_what_one_piece_gives(name, block_size, is_masked):
    images, texts = sets_for(name, 9, 11, dtype=torch.float32)
    masks = masks_for(images, texts) if is_masked else (None, None)
    similarity = make_similarity(name)
    with torch.no_grad():
        expected = similarity(images, texts, *masks)
        found = similarity_matrix(similarity, images, texts, *masks, block_size=block_size)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("name", SIMILARITIES)
def test_blocks_give_the_same_gradients(name):
    weights = unit(9, 11, seed=3)
    similarity = make_similarity(name).double()
    found = []
    for block_size in (4, 100):
        images, texts = (sets.requires_grad_() for sets in sets_for(name, 9, 11))
        masks = masks_for(images, texts)
        scores = similarity_matrix(similarity, images, texts, *masks, block_size=block_size)
        found.append(torch.autograd.grad((weights * scores).sum(), [images, texts, *similarity.parameters()]))
    for in_blocks, in_one in zip(*found, strict=True):
        torch.testing.assert_close(in_blocks, in_one)


def test_training_in_blocks_keeps_no_block_for_the_backward_pass():
    images, texts = (unit(40, 4, 8, seed=seed, dtype=torch.float32).requires_grad_() for seed in (1, 2))
    largest = 0

    def pack(tensor):
        nonlocal largest
        largest = max(largest, tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        similarity_matrix(make_similarity("smooth_chamfer"), images, texts, block_size=8)
    assert 0 < largest <= 40 * 4 * 8  # the sets; a block has 32 · 32 inner products, all have 160 · 160


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(
    ("name", "options"),
    [("smooth_chamfer", {}), ("smooth_chamfer", {"alpha": 200.0}), *((name, {}) for name in GRIDS if name[0] in "mc")],
)
def test_equal_sets_score_equally_wherever_they_stand(name, options, threads):
    """`exp2` and `sigmoid` once gave other last bits at the end of a row, and so did sums."""
    images, texts = unit(300, 4, 19, seed=1, dtype=torch.float32), unit(1_101, 3, 19, seed=2, dtype=torch.float32)
    same = torch.tensor([0, 1, 63, 500, 549, 550, 551, 777, 1_099, 1_100])
    texts[same] = texts[5].clone()
    images[[7, 150, 299]] = images[7].clone()
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch.no_grad():
            scores = similarity_matrix(make_similarity(name, **options), images, texts)
    finally:
        torch.set_num_threads(before)
    assert bool((scores[:, same] == scores[:, 5:6]).all())
    assert bool((scores[[150, 299]] == scores[7]).all())


def test_tiles_are_all_of_one_shape_and_cover_everything():
    images, texts = unit(257, 4, 8, seed=1, dtype=torch.float32), unit(1_025, 4, 8, seed=2, dtype=torch.float32)
    tiles = Tiles(make_similarity("mil"), images, texts)
    assert tiles.sizes == (129, 342)
    whole = tiles.scores(slice(0, 257), slice(0, 1_025))
    torch.testing.assert_close(whole, make_similarity("mil")(images, texts))
    assert torch.equal(tiles.scores(slice(100, 140), slice(300, 1_000)), whole[100:140, 300:1_000])


# --- as scores of retrieval


@pytest.mark.parametrize("name", [*GRIDS, "avg"])
@pytest.mark.parametrize("keep_bytes", [0, 2**30])
def test_scores_do_not_depend_on_the_block_that_is_asked_for(name, keep_bytes):
    images, texts = unit(70, 4, 16, seed=1, dtype=torch.float32), unit(90, 4, 16, seed=2, dtype=torch.float32)
    make = lambda: set_scores(make_similarity(name), images, texts, keep_bytes=keep_bytes)  # noqa: E731
    whole = make()(slice(0, 70), slice(0, 90))
    score = make()
    for rows, columns in ((slice(3, 20), slice(50, 90)), (slice(0, 1), slice(0, 90)), (slice(69, 70), slice(7, 8))):
        assert torch.equal(score(rows, columns), whole[rows, columns])
    assert torch.equal(score(slice(0, 70), slice(0, 90)), whole)


def test_ranks_of_sets_with_duplicates_do_not_depend_on_the_block_size():
    images, texts = unit(40, 4, 16, seed=1, dtype=torch.float32), unit(80, 4, 16, seed=2, dtype=torch.float32)
    texts[40:] = texts[:40]  # each caption twice: one of them belongs to another image
    image_of_text = torch.arange(80) // 2
    for similarity in (make_similarity("smooth_chamfer"), make_similarity("avg")):
        found = [
            retrieval_ranks(set_scores(similarity, images, texts), image_of_text, 40, block_size)
            for block_size in (7, 64)
        ]
        for first, second in zip(*found, strict=True):
            for rule in ("pessimistic", "first_come", "optimistic"):
                assert torch.equal(first.by(rule), second.by(rule))
        assert int(found[0][0].equal.sum()) > 0


@pytest.mark.parametrize("keep_bytes", [0, 2**30])
def test_masked_sets_score_as_in_one_piece(keep_bytes):
    for name in ("smooth_chamfer", "diagonal", "avg"):
        images, texts = sets_for(name, 12, 15, dtype=torch.float32)
        masks = masks_for(images, texts)
        similarity = make_similarity(name)
        score = set_scores(similarity, images, texts, *masks, keep_bytes=keep_bytes)
        torch.testing.assert_close(
            score(slice(2, 9), slice(5, 15)), similarity(images, texts, *masks)[2:9, 5:15], rtol=2e-6, atol=2e-6
        )


# --- what is refused


@pytest.mark.parametrize(
    ("images", "texts", "message"),
    [
        (torch.zeros(3, 4), torch.zeros(3, 2, 4), r"expected image sets of shape \(N, K, D\).*unsqueeze"),
        (torch.zeros(3, 2, 4), torch.zeros(3, 2, 5), "one width, found 4 and 5"),
        (torch.zeros(3, 2, 4).long(), torch.zeros(3, 2, 4), "floating point, found .* of torch.int64"),
    ],
)
def test_sets_that_do_not_fit_are_refused(images, texts, message):
    with pytest.raises(InputError, match=message):
        make_similarity("chamfer")(images, texts)
    with pytest.raises(InputError, match=message):
        similarity_matrix(make_similarity("chamfer"), images, texts)


def test_masks_that_do_not_fit_are_refused():
    sets, similarity = torch.ones(3, 2, 4), make_similarity("mil")
    with pytest.raises(InputError, match=r"mask of image sets of shape \(3, 2\), bool, found \(3, 3\)"):
        similarity(sets, sets, torch.ones(3, 3, dtype=torch.bool))
    with pytest.raises(InputError, match=r"found \(3, 2\) of torch.float32"):
        similarity(sets, sets, None, torch.ones(3, 2))
    mask = torch.tensor([[True, True], [False, False], [False, False]])
    with pytest.raises(InputError, match=r"an element in each text set, found none in 2 of 3 \(first: number 1\)"):
        similarity(sets, sets, None, mask)
    first, second = torch.tensor([[True, False]] * 3), torch.tensor([[False, True]] * 3)
    with pytest.raises(InputError, match="share none"):
        make_similarity("diagonal")(sets, sets, first, second)


def test_unknown_names_and_options_are_refused_with_what_is_known():
    with pytest.raises(InputError, match="unknown similarity 'smooth_chamfr', perhaps 'smooth_chamfer'; known: avg"):
        make_similarity("smooth_chamfr")
    with pytest.raises(InputError, match="options alpha, subtract_offset, found temperature"):
        make_similarity("smooth_chamfer", temperature=16)
    with pytest.raises(InputError, match="no options, found alpha"):
        make_similarity("mil", alpha=1.0)
    with pytest.raises(InputError, match="alpha of smooth_chamfer above 0 and finite, found -1"):
        make_similarity("smooth_chamfer", alpha=-1.0)
    with pytest.raises(InputError, match="scale up to 80"):
        make_similarity("maxpair", value="sum", scale=100.0)
    with pytest.raises(InputError, match="of one element for cosine, found 2 in image"):
        make_similarity("cosine")(torch.ones(1, 2, 3), torch.ones(1, 1, 3))
    with pytest.raises(InputError, match="one size for diagonal, found 2 elements in image and 3"):
        make_similarity("diagonal")(torch.ones(1, 2, 3), torch.ones(1, 3, 3))
    with pytest.raises(InputError, match="block_size of at least 1, found 0"):
        similarity_matrix(make_similarity("mil"), torch.ones(1, 2, 3), torch.ones(1, 3, 3), block_size=0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", SIMILARITIES)
def test_a_gpu_gives_what_the_cpu_gives(name):
    images, texts = sets_for(name, 33, 45, dtype=torch.float32)
    similarity = make_similarity(name)
    with torch.no_grad():
        expected = similarity_matrix(similarity, images, texts)
        found = similarity_matrix(similarity.cuda(), images.cuda(), texts.cuda())
    torch.testing.assert_close(found.cpu(), expected, rtol=1e-5, atol=1e-5)


def test_every_grid_similarity_is_tested_as_one():
    assert {name for name, kind in SIMILARITIES.items() if issubclass(kind, GridSimilarity)} == set(GRIDS)
