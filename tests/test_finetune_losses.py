"""Losses of fine-tuning: each against its plain formula in float64 with all gradients, by hand, and what must hold of it."""

import itertools
import math

import loss_reference as reference
import pytest
import torch
from torch.nn.functional import normalize

from finetune.losses import (
    LOSSES,
    BatchObjects,
    DhSetDiversityConfig,
    GaussianKlConfig,
    GramConfig,
    HybridTripletConfig,
    LossStep,
    MmdConfig,
    Pairs,
    PcmeConfig,
    TripletConfig,
    UniformityConfig,
    Weighted,
    gaussian_kl,
    share_objects,
    total_loss,
)
from finetune.losses.contrastive import contrastive_loss_of_scores
from finetune.losses.dhset_diversity import dhset_diversity_loss
from finetune.losses.gram import gram_loss
from finetune.losses.mmd import mmd_loss
from finetune.losses.objects import object_iou
from finetune.losses.pcme import pcme_loss
from finetune.losses.triplet import triplet_loss
from finetune.losses.uniformity import uniformity_loss
from pretrain.losses import LossConfig, Moment, contrastive_loss
from pretrain.losses.self_distillation import draw_hard, hard_share_at
from setclip.errors import InputError
from setclip.models.heads import SideWidths, make_pair


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def the_same(found, expected, leaves):
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    for one, other in zip(*(torch.autograd.grad(x, leaves, allow_unused=True) for x in (found, expected)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-12)


# --- triplet

# Three images with five captions each; by hand, margin 0.2.
HAND = torch.tensor(
    [
        [0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.1, 0.1, 0.1, 0.1, 0.0, 0.0, 0.0, 0.0, 0.0],
        [0.1, 0.1, 0.1, 0.1, 0.6, 0.9, 0.9, 0.9, 0.9, 0.9, 0.2, 0.2, 0.2, 0.2, 0.2],
        [0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0, 1.0, 1.0, 1.0, 0.3],
    ],
    dtype=torch.float64,
)
FIVE = Pairs.of_captions(3, 5)


def test_triplets_of_three_images_with_five_captions_worked_out_by_hand():
    """Images: row 0's hardest negative is 0.4: its captions cost 0, 0, 0, 0, 0.1; row 1's is 0.6: nothing; row 2's 0:
    nothing. Captions: number 4 has 0.5 against 0.6: 0.3; number 14 has 0.3 against 0.2: 0.1.
    """
    for reduction, divisor in (("sum", 1), ("mean", 15)):
        found = triplet_loss(HAND, FIVE, TripletConfig(reduction=reduction))
        assert found.item() == pytest.approx((0.1 + 0.3 + 0.1) / divisor)


def test_all_negatives_of_the_same_worked_out_by_hand():
    """Caption 4 of row 0 (0.5) is violated by 0.4 alone: 0.1. The captions' negatives: number 4 by 0.6 (0.3), 14 by 0.2
    (0.1). Means are over 3 × 5 × 10 triplets of images and 15 × 2 of captions.
    """
    found = triplet_loss(HAND, FIVE, TripletConfig(mining="all", reduction="sum"))
    assert found.item() == pytest.approx(0.5)
    found = triplet_loss(HAND, FIVE, TripletConfig(mining="all", reduction="mean"))
    assert found.item() == pytest.approx(0.1 / 150 + 0.4 / 30)


def plain_triplet(scores, image_of_text, is_negative, mining, reduction, margin=0.2):
    total = 0.0
    for direction in (0, 1):
        costs = []
        for t, i in enumerate(image_of_text):
            if direction == 0:
                mine = [margin + scores[i, o] - scores[i, t] for o in range(scores.shape[1]) if is_negative(i, o)]
            else:
                mine = [margin + scores[o, t] - scores[i, t] for o in range(scores.shape[0]) if is_negative(o, t)]
            if mining == "hardest":
                costs += [max([c.clamp_min(0) for c in mine])] if mine else []
            elif mining == "all":
                costs += [c.clamp_min(0) for c in mine]
            else:
                costs += [c.clamp(0, margin) for c in mine if c > 0]
        total = total + sum(costs) / (len(costs) if reduction == "mean" else 1)
    return total


OPTIONS = list(itertools.product(("hardest", "all", "semi_hard"), ("mean", "sum")))


@pytest.mark.parametrize(("mining", "reduction"), OPTIONS)
@pytest.mark.parametrize("case", ["captions", "drawn captions", "excluded"])
def test_the_triplet_loss_is_its_plain_formula(case, mining, reduction):
    scores = (draw(4, 8, seed=1) / 4).requires_grad_()
    image_of_text = [0, 0, 1, 2, 2, 2, 3, 1]
    ids = [7, 8, 7, 9] if case == "drawn captions" else [0, 1, 2, 3]
    excluded = torch.rand(4, 8, generator=torch.Generator().manual_seed(0)) < 0.4

    def is_negative(i, t):
        return ids[i] != ids[image_of_text[t]] and not (case == "excluded" and bool(excluded[i, t]))

    pairs = Pairs(
        torch.tensor(image_of_text),
        torch.tensor(ids) if case == "drawn captions" else None,
        excluded if case == "excluded" else None,
    )
    found = triplet_loss(scores, pairs, TripletConfig(mining=mining, reduction=reduction))
    the_same(found, plain_triplet(scores, image_of_text, is_negative, mining, reduction), [scores])


def test_captions_of_one_image_are_never_negatives_unless_history_is_wanted():
    """Rows 0 and 1 hold the same image, whose captions score higher than the match."""
    scores = torch.tensor([[0.5, 0.9, 0.0], [0.9, 0.5, 0.0], [0.0, 0.0, 0.9]])
    pairs = Pairs(torch.arange(3), torch.tensor([4, 4, 5]))
    assert triplet_loss(scores, pairs, TripletConfig(reduction="sum")).item() == 0
    historic = TripletConfig(reduction="sum", same_image_negatives=True)
    assert triplet_loss(scores, pairs, historic).item() == pytest.approx(4 * 0.6)


def test_mining_begins_with_all_negatives_and_mixes_over_epochs():
    scores = draw(4, 8, seed=1) / 4
    pairs = Pairs.of_captions(4, 2)
    every, hardest = (triplet_loss(scores, pairs, TripletConfig(mining=m)) for m in ("all", "hardest"))
    config = TripletConfig(all_epochs=1, mix_epochs=2)
    for epoch, share in ((0, 0), (0.99, 0), (1, 0), (1.5, 0.25), (2, 0.5), (3, 1), (9, 1)):
        found = triplet_loss(scores, pairs, config, epoch)
        torch.testing.assert_close(found, share * hardest + (1 - share) * every)
    sudden = TripletConfig(all_epochs=1)
    torch.testing.assert_close(triplet_loss(scores, pairs, sudden, 1.0), hardest)
    ramped = TripletConfig(ramp_epoch=1)
    for epoch, factor in ((0.5, 1), (1, 0), (1.25, 0.25), (2, 1)):
        torch.testing.assert_close(triplet_loss(scores, pairs, ramped, epoch), factor * hardest)


def test_a_batch_without_negatives_costs_nothing_and_has_gradient_zero():
    scores = draw(1, 5).requires_grad_()
    for mining in ("hardest", "all", "semi_hard"):
        found = triplet_loss(scores, Pairs.of_captions(1, 5), TripletConfig(mining=mining))
        assert found.item() == 0
        assert not torch.autograd.grad(found, scores)[0].any()


def test_objects_in_common_take_a_pair_out_of_the_negatives():
    image_sets, text_sets = [{1, 2}, {3}, set()], [{1, 2, 3}, {3, 4}, set()]
    found = share_objects(reference.ids(image_sets), reference.ids(text_sets), 0.5)
    assert found.tolist() == [[True, False, False], [False, True, False], [False, False, False]]
    # 2/3, 0, -; 1/3, 1/2, -; -
    found = share_objects(reference.ids(image_sets), reference.ids(text_sets), 0.6)
    assert found.nonzero().tolist() == [[0, 0]]
    iou = object_iou(reference.ids(image_sets), reference.ids(text_sets))
    torch.testing.assert_close(iou, torch.tensor([[2 / 3, 0, 0], [1 / 3, 1 / 2, 0], [0, 0, 0]], dtype=torch.float64))
    weighted = LossConfig(weights="frequency")
    iou = object_iou(reference.ids(image_sets), reference.ids(text_sets), reference.weights(weighted))
    expected = [[reference.iou(a, b, weighted) for b in text_sets] for a in image_sets]
    torch.testing.assert_close(iou, torch.tensor(expected, dtype=torch.float64))


# --- maximum mean discrepancy


@pytest.mark.parametrize("kernel", ["laplace", "gauss"])
def test_mmd_is_its_plain_formula(kernel):
    x, y = draw(6, 4, seed=1).requires_grad_(), draw(9, 4, seed=2).requires_grad_()

    def mean(a, b):
        total = 0.0
        for i, p in enumerate(a):
            for j, q in enumerate(b):
                if a is b and i == j:
                    total = total + 1.0
                    continue
                d = (p - q).square().sum()
                total = total + (-0.5 * (d.sqrt() if kernel == "laplace" else d)).exp()
        return total / (len(a) * len(b))

    found = mmd_loss(x, y, MmdConfig(kernel=kernel))
    the_same(found, mean(x, x) - 2 * mean(x, y) + mean(y, y), [x, y])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("kernel", ["laplace", "gauss"])
def test_mmd_of_equal_sets_is_zero_and_coincident_points_have_finite_gradients(kernel, dtype):
    for size in (5, 40):  # above 25 rows torch computes distances in another way
        x = normalize(draw(size, 16), dim=1).to(dtype).requires_grad_()
        y = x.detach().clone().requires_grad_()
        found = mmd_loss(x, y, MmdConfig(kernel=kernel))
        assert abs(found.item()) < 1e-6
        assert all(g.isfinite().all() for g in torch.autograd.grad(found, [x, y]))
    point = torch.ones(40, 16, dtype=dtype).requires_grad_()
    assert torch.autograd.grad(mmd_loss(point, point.detach(), MmdConfig(kernel=kernel)), point)[0].isfinite().all()


# --- diversity


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_uniformity_is_its_plain_formula(reduction):
    sets = draw(3, 4, 5).requires_grad_()
    total = 0.0
    for one in sets:
        unit = [e / e.norm() for e in one]
        values = [(-2 * (a - b).square().sum()).exp() for a, b in itertools.combinations(unit, 2)]
        total = total + sum(values) / (6 if reduction == "mean" else 1) / 3
    the_same(uniformity_loss(sets, UniformityConfig(reduction=reduction)), total, [sets])


def test_gram_diversity_is_its_plain_formula():
    sets = draw(3, 4, 5).requires_grad_()
    total = 0.0
    for one in sets:
        unit = torch.stack([e / e.norm() for e in one])
        total = total + ((unit @ unit.T - torch.eye(4)).square().sum() + 0).sqrt() / 16 / 3
    found = gram_loss(sets)
    torch.testing.assert_close(found, total)
    torch.testing.assert_close(torch.autograd.grad(found, sets), torch.autograd.grad(total, sets))


def test_diversity_of_one_point_is_large_of_orthogonal_elements_small_and_of_one_element_zero():
    point, apart = torch.ones(2, 4, 8, requires_grad=True), torch.eye(4, requires_grad=True)[None].expand(2, -1, -1)
    assert uniformity_loss(point).item() == pytest.approx(1)
    assert uniformity_loss(apart).item() == pytest.approx(math.exp(-4))
    assert gram_loss(point).item() == pytest.approx(math.sqrt(12) / 16)
    assert gram_loss(apart).item() == 0
    single = draw(3, 1, 5).requires_grad_()
    for loss in (uniformity_loss, gram_loss):
        for sets in (point, single):
            gradient = torch.autograd.grad(loss(sets), sets)[0]
            assert gradient.isfinite().all()
        assert loss(single).item() == 0
        torch.autograd.grad(loss(apart), apart)[0].isfinite().all()


def test_diversity_of_sub_spaces_is_its_plain_formula():
    profiles, words = draw(3, 5).abs().requires_grad_(), draw(4, 6, 5, seed=1).requires_grad_()
    mask = torch.tensor([[1, 1], [1, 0], [1, 1], [0, 1]]).bool().repeat_interleave(3, 1)  # two words of three vectors
    cos = torch.cosine_similarity
    pairs = list(itertools.combinations(range(3), 2))
    first = sum(cos(profiles[i], profiles[j], dim=0) for i, j in pairs) / 3
    groups = [words[b, 3 * p : 3 * p + 3] for b in range(4) for p in range(2) if mask[b, 3 * p]]
    second = sum(cos(g[i], g[j], dim=0).clamp_min(0) for g in groups for i, j in pairs) / 3 / len(groups)
    found = dhset_diversity_loss(profiles, words, mask, DhSetDiversityConfig(eta=0.7))
    the_same(found, first + 0.7 * second, [profiles, words])


def test_diversity_of_one_sub_space_is_zero():
    profiles, words = draw(1, 5).requires_grad_(), draw(4, 1, 5).requires_grad_()
    found = dhset_diversity_loss(profiles, words)
    assert found.item() == 0
    assert all(not g.any() for g in torch.autograd.grad(found, [profiles, words]))


# --- PCME


def plain_pcme(x, y, a, b, matched, negative):
    total = 0.0
    for i in range(len(x)):
        for t in range(len(y)):
            values = []
            for z in x[i]:
                for w in y[t]:
                    power = -a * ((z - w).square().sum() + 1e-6).sqrt() + b
                    values.append(power.exp() / (power.exp() + (-power).exp()))
            p = sum(values) / len(values)
            if matched[i][t]:
                total = total - 2 * p.log()
            elif negative[i][t]:
                total = total - 2 * (1 - p).log()
    return total


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_pcme_is_its_plain_formula(reduction):
    x, y = draw(3, 2, 4, seed=1).requires_grad_(), draw(4, 3, 4, seed=2).requires_grad_()
    a, b = (
        torch.tensor(1.3, dtype=torch.float64).requires_grad_(),
        torch.tensor(2.1, dtype=torch.float64).requires_grad_(),
    )
    of_text, ids = [0, 1, 2, 0], [5, 6, 5]
    matched = [[of_text[t] == i for t in range(4)] for i in range(3)]
    negative = [[ids[of_text[t]] != ids[i] for t in range(4)] for i in range(3)]
    expected = plain_pcme(x, y, a, b, matched, negative)
    if reduction == "mean":
        expected = expected / (sum(map(sum, matched)) + sum(map(sum, negative)))
    pairs = Pairs(torch.tensor(of_text), torch.tensor(ids))
    the_same(pcme_loss(x, y, a, b, pairs, PcmeConfig(reduction=reduction)), expected, [x, y, a, b])


def test_pcme_is_finite_where_probabilities_round_to_nought_and_one():
    x = (100 * draw(3, 7, 4)).float().requires_grad_()
    y = x.detach().flip(0).clone().requires_grad_()
    found = pcme_loss(x, y, torch.tensor(15.0), torch.tensor(15.0), Pairs.of_captions(3, 1))
    assert found.isfinite()
    assert all(g.isfinite().all() for g in torch.autograd.grad(found, [x, y]))


def test_the_kl_of_gaussians_is_torchs():
    mean, log_sigma = draw(3, 4), draw(3, 4, seed=1)
    normal = torch.distributions.Normal
    expected = torch.distributions.kl_divergence(
        normal(mean, log_sigma.exp()), normal(torch.zeros(3, 4), torch.ones(3, 4))
    )
    torch.testing.assert_close(gaussian_kl(mean, log_sigma), expected.sum(1).mean())


# --- pretraining's losses on scores

OF_PAIRS = [
    *reference.CONFIGS,
    LossConfig(name="softclip"),
    LossConfig(name="softclip", beta=0.5, negatives_weight=0.3),
]


@pytest.mark.parametrize("config", OF_PAIRS, ids=lambda c: f"{c.full_name} {c.weights}")
def test_on_cosines_of_pairs_it_is_pretrainings_loss(config):
    images, texts = reference.features()
    scale, bias = (torch.tensor([x], dtype=torch.float64).requires_grad_() for x in (5.0, -2.0))
    weights = reference.weights(config) if config.weights == "frequency" else None
    sets = reference.batch_sets(reference.IMAGE_SETS, reference.TEXT_SETS)
    biased = {"logit_bias": bias} if config.name == "siglip" else {}
    expected = contrastive_loss(images, texts, scale, sets, config, weights=weights, **biased).loss
    found = contrastive_loss_of_scores(
        images @ texts.T,
        scale,
        Pairs(torch.arange(len(images))),
        config,
        BatchObjects(sets.image_objects, sets.text_objects, weights),
        bias,
    )
    leaves = [images, texts, scale, *([bias] if biased else [])]
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9)
    for one, other in zip(*(torch.autograd.grad(x.sum(), leaves) for x in (found, expected)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)


def test_on_cosines_psd_is_pretrainings():
    config = LossConfig(name="psd", teacher_temperature=0.2)
    images, texts = reference.features()
    scale, moment = torch.tensor([5.0], dtype=torch.float64).requires_grad_(), Moment(0.6, 3)
    is_hard = draw_hard([12], hard_share_at(0.6, config.hard_share), 3).tolist()
    expected = reference.loss(
        images, texts, scale.log(), reference.IMAGE_SETS, reference.TEXT_SETS, None, config, is_hard=is_hard
    )
    found = contrastive_loss_of_scores(images @ texts.T, scale, Pairs(torch.arange(12)), config, moment=moment)
    the_same(found.sum(), expected.sum(), [images, texts, scale])


def test_several_captions_share_what_a_row_gives_to_its_true_pairs():
    scores = draw(3, 6).requires_grad_()
    found = contrastive_loss_of_scores(scores, torch.tensor(4.0), Pairs.of_captions(3, 2), LossConfig(name="hard"))
    rows, columns = (4 * scores).log_softmax(1), (4 * scores).log_softmax(0)
    total = 0.0
    for i in range(3):
        total = total - (rows[i, 2 * i] + rows[i, 2 * i + 1]) / 2 / 3
        total = total - (columns[i, 2 * i] + columns[i, 2 * i + 1]) / 6
    the_same(found, total / 2, [scores])


def test_soft_targets_of_several_captions_are_their_plain_formula():
    """Budget, β = 0.2: the true pairs of a row share 0.8, the others 0.2 by their IoU; rows without overlap are hard."""
    image_sets, text_sets = [{1, 2}, {2, 3}, {9}], [{1}, {2}, {2, 3}, {1, 3}, {9}, {7}]
    scores = draw(3, 6).requires_grad_()
    found = contrastive_loss_of_scores(
        scores,
        torch.tensor(4.0),
        Pairs.of_captions(3, 2),
        LossConfig(name="object_iou", target="budget", beta=0.2),
        BatchObjects(reference.ids(image_sets), reference.ids(text_sets)),
    )
    iou = torch.tensor([[len(a & b) / len(a | b) for b in text_sets] for a in image_sets], dtype=torch.float64)
    true = torch.eye(3).repeat_interleave(2, 1).bool()
    total = 0.0
    for similarity, is_true, logits in ((iou, true, 4 * scores), (iou.T, true.T, 4 * scores.T)):
        for f, own, row in zip(similarity, is_true, logits, strict=True):
            apart = f.masked_fill(own, 0)
            share = own.double() / own.sum()
            q = share if apart.sum() == 0 else 0.8 * share + 0.2 * apart / apart.sum()
            total = total - (q * row.log_softmax(0)).sum() / len(logits) / 2
    the_same(found, total, [scores])


@pytest.mark.parametrize("name", ["hard", "label_smoothing", "object_iou", "softclip", "psd", "siglip"])
def test_pairs_that_are_excluded_from_a_contrastive_loss_have_no_part_in_it(name):
    """Of two pairs of images that exclude each other, each is as if the others of its row were not there."""
    sets = reference.ids([{1}, {1, 2}, {3}, {3, 4}])
    config = LossConfig(name=name, **({"hard_share": (1.0, 1.0)} if name == "psd" else {}))
    scores, bias = draw(4, 4).requires_grad_(), torch.tensor(-1.0)

    def loss(values, objects, excluded):
        pairs = Pairs(torch.arange(len(values)), None, excluded)
        given = BatchObjects(objects, objects)
        return contrastive_loss_of_scores(values, torch.tensor(4.0), pairs, config, given, bias, Moment(0.5, 3))

    block = torch.arange(4) // 2
    whole = loss(scores, sets, block[:, None] != block)
    parts = [loss(scores[rows, rows], sets[rows], None) for rows in (slice(0, 2), slice(2, 4))]
    the_same(whole, sum(parts) / 2, [scores])
    assert (torch.autograd.grad(loss(scores, sets, block[:, None] != block), scores)[0][:2, 2:] == 0).all()


# --- the dict of names

EVERY = {
    "triplet": TripletConfig(),
    "triplet_hybrid": HybridTripletConfig(),
    "contrastive": LossConfig(name="object_iou"),
    "pcme": PcmeConfig(),
    "gaussian_kl": GaussianKlConfig(),
    "mmd": MmdConfig(),
    "uniformity": UniformityConfig(),
    "gram": GramConfig(),
    "dhset_diversity": DhSetDiversityConfig(),
}


def step_of(head, dtype=torch.float32, **given):
    torch.manual_seed(0)
    similarity = {"similarity": given.pop("similarity")} if "similarity" in given else {}
    pair = make_pair(head, SideWidths(8, 6), SideWidths(8, 6), width=12, **similarity)
    local, pooled = draw(4, 5, 8).to(dtype), draw(4, 6).to(dtype)
    words, sentence = draw(8, 6, 8, seed=1).to(dtype), draw(8, 6, seed=2).to(dtype)
    images, texts = pair.image(local, None, pooled), pair.text(words, None, sentence)
    sets = reference.ids([{1}, {2}, {1, 2}, {3}])
    return pair, LossStep(
        pair.scores(images, texts),
        Pairs.of_captions(4, 2),
        images,
        texts,
        similarity=pair.similarity,
        logit_scale=torch.tensor(10.0),
        objects=BatchObjects(sets, sets.repeat_interleave(2, 0)),
        **given,
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_every_loss_of_the_dict_gives_finite_gradients_and_their_sum_is_weighted(dtype):
    assert set(EVERY) == set(LOSSES)
    for head, names, options in (
        ("slot", ["triplet", "contrastive", "mmd", "uniformity", "gram"], {}),
        ("pcme", ["pcme", "gaussian_kl"], {}),
        ("dhset", ["triplet", "dhset_diversity", "mmd"], {}),
        ("dhset_fragment", ["triplet", "dhset_diversity"], {}),
    ):
        pair, step = step_of(head, dtype, **options)
        out = total_loss(step, {name: Weighted(EVERY[name], 0.5) for name in names})
        assert list(out.parts) == names
        torch.testing.assert_close(out.loss.detach(), sum(out.parts.values()) / 2)
        out.loss.backward()
        assert all(p.grad.isfinite().all() for p in pair.parameters() if p.grad is not None)
        assert any(p.grad is not None and p.grad.any() for p in pair.parameters())


def test_the_hybrid_triplet_loss_is_that_of_the_hybrid_scores():
    _, step = step_of("dhset", hybrid_scores=draw(4, 8))
    found = total_loss(step, {"triplet_hybrid": Weighted(HybridTripletConfig(margin=0.3))}).loss
    expected = triplet_loss(step.hybrid_scores, step.pairs, TripletConfig(margin=0.3))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    ("head", "terms", "message"),
    [
        ("slot", {}, "expected at least one loss, found none"),
        ("slot", {"tripled": Weighted(TripletConfig())}, "unknown loss 'tripled', perhaps 'triplet'"),
        ("slot", {"mmd": Weighted(TripletConfig())}, "expected options of MmdConfig for mmd, found TripletConfig"),
        ("slot", {"dhset_diversity": Weighted(DhSetDiversityConfig())}, "expected a dhset head for dhset_diversity"),
        ("slot", {"pcme": Weighted(PcmeConfig())}, "expected similarity match_prob_l2 for pcme, found SmoothChamfer"),
        ("slot", {"triplet_hybrid": Weighted(HybridTripletConfig())}, "expected hybrid scores for triplet_hybrid"),
        (
            "gpo",
            {"uniformity": Weighted(UniformityConfig())},
            r"expected heads with residuals \(slot, transformer, pie\)",
        ),
    ],
)
def test_a_loss_that_lacks_something_says_what(head, terms, message):
    _, step = step_of(head)
    with pytest.raises(InputError, match=message):
        total_loss(step, terms)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: triplet_loss(draw(3, 4), FIVE), r"expected scores \(B, T\) of 15 texts, found \(3, 4\)"),
        (lambda: triplet_loss(draw(2, 15), FIVE), r"expected images of texts in 0 to 1, found 0 to 2"),
        (
            lambda: triplet_loss(draw(3, 15), Pairs(FIVE.image_of_text, torch.arange(4))),
            r"image_ids of shape \(3,\), found",
        ),
        (lambda: TripletConfig(mining="easy"), "expected mining to be one of hardest, all, semi_hard, found 'easy'"),
        (lambda: MmdConfig(gamma=0), "expected gamma above 0"),
        (
            lambda: contrastive_loss_of_scores(HAND, torch.tensor(1.0), FIVE, LossConfig()),
            "expected objects for object_iou/budget, found none",
        ),
        (
            lambda: contrastive_loss_of_scores(HAND, torch.tensor(1.0), FIVE, LossConfig(name="psd"), moment=Moment()),
            "one text an image, found a moment and 15 texts of 3 images",
        ),
    ],
)
def test_what_does_not_fit_a_loss_is_an_error_that_says_so(call, message):
    with pytest.raises(InputError, match=message):
        call()
