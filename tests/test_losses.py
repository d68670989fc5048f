"""Losses: values and every gradient against plain float64 over Python sets, on 1, 2, 4 and 8 ranks."""

import dataclasses
import itertools
import math
from dataclasses import replace

import loss_reference as reference
import open_clip
import pytest
import torch
from loss_reference import BATCHES, CONFIGS, IMAGE_SETS, TEXT_SETS, batch_sets, features, weights, with_gradients
from ranks import on_ranks

from pretrain import losses
from pretrain.losses import (
    LOSSES,
    BatchSets,
    LossConfig,
    Moment,
    ObjectWeights,
    blocks,
    blockwise,
    contrastive_loss,
    operators,
    prepare_targets,
)
from pretrain.losses.self_distillation import draw_hard, hard_share_at
from setclip import distributed
from setclip.errors import InputError
from setclip.objects import ObjectTable, object_id

SCALES = [1.0, 1 / 0.07, 100.0]


SMALL = BATCHES["small sets on both sides"]


def wanted(config, scale, batch=SMALL, pair=None):
    """The reference's loss and gradients by image, text, logit scale and, where there is one, bias."""
    images, texts = pair or features(size=len(batch[0]))
    leaves = [images, texts, *scalars(config, scale, torch.float64)]
    return with_gradients(reference.loss(*leaves[:3], *batch, config, *leaves[3:]), *leaves)


def found(config, scale, batch=SMALL, pair=None, dtype=torch.float64):
    """Ours."""
    images, texts = pair or features(dtype, size=len(batch[0]))
    leaves = [images, texts, *scalars(config, scale, dtype)]
    return with_gradients(ours(*leaves[:3], batch_sets(*batch), config, *leaves[3:]).loss, *leaves)


def ours(images, texts, theta, sets, config, bias=None, **more):
    """The output of the loss."""
    return contrastive_loss(images, texts, theta.exp(), sets, config, logit_bias=bias, weights=weights(config), **more)


def scalars(config, scale, dtype):
    """The logarithm of the scale, and the bias where the loss has one."""
    values = [math.log(scale), -0.3 * scale] if config.name == "siglip" else [math.log(scale)]
    return [torch.tensor([value], dtype=dtype, requires_grad=True) for value in values]


def check(results, references, tolerance, context):
    """Each within `tolerance` of the reference's largest entry."""
    assert len(results) == len(references) >= 4
    for name, value, truth in zip(("loss", "images", "texts", "scale", "bias"), results, references, strict=False):
        error = float((value.double() - truth.double()).abs().max())
        assert error <= tolerance * float(truth.abs().max()) + tolerance, f"{name} off by {error}: {context}"


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks that divide no batch."""
    monkeypatch.setitem(blocks.SHAPES, "cpu", (5, 7))


@pytest.mark.parametrize(
    ("name", "scale"),
    [
        ("equal texts", 100.0),
        *(pytest.param(name, 100.0, marks=pytest.mark.slow) for name in BATCHES if name != "equal texts"),
        *itertools.product(("equal texts", "independent sides"), SCALES[:2]),
    ],
)
@pytest.mark.usefixtures("small_blocks")
def test_values_and_gradients_equal_the_reference(name, scale):
    for config in CONFIGS:
        check(found(config, scale, BATCHES[name]), wanted(config, scale, BATCHES[name]), 1e-12, (name, config, scale))


@pytest.mark.parametrize("name", BATCHES)
@pytest.mark.usefixtures("small_blocks")
def test_both_designs_give_the_same(name, monkeypatch):
    monkeypatch.setattr(operators, "_has_many_subsets", lambda *_: True)
    for config in CONFIGS:
        if config.name == "object_iou" and config.weights == "none":
            check(found(config, 30.0, BATCHES[name]), wanted(config, 30.0, BATCHES[name]), 1e-12, (name, config))


@pytest.mark.parametrize(("most", "vocabulary", "is_dense"), [(40, 200, True), (4, 20_000, False)])
def test_captions_of_many_common_objects_take_the_second_design(most, vocabulary, is_dense):
    drawn = reference.zipf_sets(1100, most, vocabulary, 0)
    made = prepare_targets(batch_sets(drawn, drawn), LossConfig()).groups[0].targets
    assert (made.tiles is not None) == is_dense
    assert (made.expansion is not None) == (not is_dense)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.usefixtures("small_blocks")
def test_fp32_stays_near_the_reference(scale):
    for config in CONFIGS:
        check(found(config, scale, dtype=torch.float32), wanted(config, scale), 2e-5, (config, scale))


def test_the_running_maximum_gives_the_same(monkeypatch):
    """What is used where the shift would lose a row."""
    monkeypatch.setattr(blockwise, "_ABOVE_UNDERFLOW", {torch.float64: 700.0})
    monkeypatch.setitem(blocks.SHAPES, "cpu", (5, 1024))
    for config in CONFIGS:
        check(found(config, 30.0), wanted(config, 30.0), 1e-12, config)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_far_below_all_others_is_not_lost_at_scale_100(dtype):
    """Its best cosine is −1: its logits lie 200 below the highest, further than fp32 reaches from one shift."""
    axis = torch.zeros(12, 16)
    axis[:, 0] = 1
    images, texts = axis.clone(), axis.clone()
    images[3] *= -1
    pair = [x.to(dtype).requires_grad_() for x in (images, texts)]
    exact = [x.detach().double().requires_grad_() for x in pair]
    for config in CONFIGS:
        results = found(config, 100.0, pair=pair, dtype=torch.float32)
        assert all(bool(torch.isfinite(value).all()) for value in results)
        check(results, wanted(config, 100.0, pair=exact), 1e-4 if dtype == torch.float32 else 1e-2, config)


def test_features_that_are_all_alike_keep_their_gradients_at_scale_100():
    """Every logit is 100: sums are as large as they can be, and each probability is 1 / N."""
    size = 3_000
    ones = torch.ones(size, 4) / 2
    images, texts = ones.clone().requires_grad_(), ones.clone().requires_grad_()
    scale = torch.tensor(100.0, requires_grad=True)
    sets = batch_sets([{1}] * size, [{1}] * size)
    loss = contrastive_loss(images, texts, scale, sets, LossConfig(name="hard")).loss
    d_images, d_texts, d_scale = torch.autograd.grad(loss, (images, texts, scale))
    assert float(loss.detach()) == pytest.approx(math.log(size), rel=1e-6)
    assert max(float(d.abs().max()) for d in (d_images, d_texts, d_scale)) < 1e-4


@pytest.mark.parametrize("config", [LossConfig(target="l1"), LossConfig(name="label_smoothing")])
def test_fp32_sums_of_many_equal_captions_keep_their_digits(config):
    """Added one after the other, 3,000 equal features would be off by 3e-5 of their sum, and the loss by 1e-3."""
    alike = torch.full((3_000, 64), 1 / 8)
    sets, scale = batch_sets([{1}] * 3_000, [{1}] * 3_000), torch.tensor(100.0)
    loss = contrastive_loss(alike, alike, scale, sets, config).loss
    assert float(loss) == pytest.approx(math.log(3_000), abs=3e-5)


def test_a_sharp_softmax_of_weighted_ious_is_finite():
    config = LossConfig(target="softmax", temperature=0.01, weights="frequency")
    check(found(config, 30.0, dtype=torch.float32), wanted(config, 30.0), 2e-5, config)


# --- bf16


def bf16_errors(config, sets, texts, noise, scale):
    """Relative errors by image, text and scale against float64 on the same features: ours, and rounding P as it is.

    Returns with them the KL and the mean p_ii.
    """
    generator = torch.Generator().manual_seed(1)
    images = texts + noise * torch.randn(texts.shape, generator=generator, dtype=torch.float64)
    pair = [torch.nn.functional.normalize(x, dim=1).bfloat16() for x in (images, texts)]
    exact = [x.double().requires_grad_() for x in pair]
    truth = wanted(config, scale, (sets, sets, None), exact)
    mine = found(config, scale, (sets, sets, None), [x.requires_grad_() for x in pair], torch.float32)
    with torch.no_grad():
        logits = scale * exact[0] @ exact[1].T
        p = (logits.softmax(1) + logits.softmax(0)) / 2
        w = sum(q for q in (reference.targets(sets, sets, config), reference.targets(sets, sets, config).T)) / 2
        naive = scale / len(sets) * (p.bfloat16().double() @ exact[1] - w @ exact[1])
        errors = [float((a.double() - b).norm() / b.norm()) for a, b in zip(mine[1:], truth[1:], strict=True)]
        kl = float(truth[0] - reference.entropy(sets, sets, None, config))
        return errors, float((naive - truth[1]).norm() / truth[1].norm()), kl, float(logits.softmax(1).diag().mean())


def random_texts(size, width=64):
    return torch.randn(size, width, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("scale", [10.0, 14.0, 25.0])
def test_bf16_gradients_hold_where_the_model_is_nearly_sure(scale):
    """Up to p_ii = 1 − 3e-7: P rounded to bf16 less the target is off by more than a tenth of the gradient."""
    sets = BATCHES["equal sides"][0]
    errors, naive, _, probability = bf16_errors(LossConfig(name="hard"), sets, random_texts(60), 0.3, scale)
    assert probability > 0.98
    assert naive > 0.05
    assert max(errors) < 0.004


@pytest.mark.parametrize(("target", "spread", "scale"), [("budget", 0.3, 22.0), ("l1", 0.1, 30.0)])
def test_bf16_gradients_hold_where_the_model_nearly_fits_soft_targets(target, spread, scale):
    """Captions in pairs of one object, whose features are alike: P is near the targets, and little is left."""
    texts = random_texts(32).repeat_interleave(2, 0) + spread * random_texts(64)
    sets = [{i // 2} for i in range(64)]
    errors, naive, kl, _ = bf16_errors(LossConfig(target=target), sets, texts, 0.1, scale)
    assert 0 < kl < 0.05
    assert naive > 0.03
    assert max(errors) < 0.01


@pytest.mark.parametrize("config", [LossConfig(name="siglip", target="iou"), LossConfig(weights="frequency")])
def test_bf16_gradients_of_the_other_ways_hold(config):
    pair = features(torch.bfloat16)
    truth = wanted(config, 30.0, pair=[x.detach().double().requires_grad_() for x in pair])
    for mine, exact in zip(found(config, 30.0, pair=pair, dtype=torch.float32), truth, strict=True):
        assert float((mine.double() - exact).norm()) < 0.004 * float(exact.norm())


# --- ranks


def parts_of(size, world_size, uneven):
    """Which pairs each rank has."""
    if not uneven:
        return [slice(rank * size // world_size, (rank + 1) * size // world_size) for rank in range(world_size)]
    ends = [0, *(rank + 1 for rank in range(world_size - 1)), size]
    return [slice(a, b) for a, b in itertools.pairwise(ends)]


RANK_BATCHES = ["small sets on both sides", "equal texts", "0 to 64 objects", "all identical", "all empty"]


def losses_of_rank(names):
    """Runs on each rank: the loss of its part, and gradients averaged over ranks as an engine does."""
    world = distributed.start("cpu")
    blocks.SHAPES["cpu"] = 3, 5
    results = []
    for name, uneven, config in rank_cases(names):
        batch = BATCHES[name]
        mine = parts_of(len(batch[0]), world.size, uneven)[world.rank]
        images, texts = features(size=len(batch[0]))
        leaves = scalars(config, 100.0 if uneven else 30.0, torch.float64)
        blockwise._ABOVE_UNDERFLOW[torch.float64] = 700.0 if uneven else -640.0  # every other with a running maximum
        # The sets of a rank are padded to its own widest, as a loader does.
        sets = batch_sets(*(part and part[mine] for part in batch))
        output = ours(images[mine], texts[mine], leaves[0], sets, config, *leaves[1:])
        values = with_gradients(output.loss, images, texts, *leaves)
        numbers = (output.kl, output.true_pair_mass, output.similar_pairs, output.equal_pairs)
        results.append([distributed.mean_over_ranks(value) for value in (*values, *numbers)])
    return results


def rank_cases(names):
    return list(itertools.product(names, (False, True), CONFIGS))


@pytest.mark.parametrize(
    "world_size",
    [
        *(pytest.param(size, marks=pytest.mark.slow) for size in (2, 4)),
        pytest.param(8, marks=[pytest.mark.slow, pytest.mark.soak]),
    ],
)
def test_ranks_together_equal_the_reference(world_size):
    check_ranks(world_size, RANK_BATCHES)


def test_two_ranks_equal_the_reference_on_one_batch():
    check_ranks(2, ["equal texts"])


def check_ranks(world_size, names):
    truths = {}
    for name, uneven, config in rank_cases(names):
        alone = prepare_targets(batch_sets(*BATCHES[name]), config, weights(config), torch.float64).groups[0].targets
        truths[name, uneven, config] = wanted(config, 100.0 if uneven else 30.0, BATCHES[name]), alone
    for results in on_ranks(world_size, losses_of_rank, names):
        for (name, uneven, config), (*values, kl, mass, similar, equal) in zip(rank_cases(names), results, strict=True):
            truth, alone = truths[name, uneven, config]
            check(values, truth, 1e-12, (name, uneven, config))
            assert float(kl) == pytest.approx(float(truth[0]) - alone.entropy, abs=1e-12)
            assert [float(mass), float(similar), float(equal)] == pytest.approx(
                [alone.true_pair_mass, alone.similar_pairs, alone.equal_pairs]
            )


# --- groups

GROUPS = [*CONFIGS, LossConfig(name="softclip", beta=0.3), LossConfig(name="psd")]
MOMENT = Moment(0.6, 5)
BATCH_OF_12 = BATCHES["equal texts"]


def wanted_in_groups(config, group_size, ranks):
    """The mean of the reference over groups, and its gradients."""
    images, texts = features(size=12)
    leaves = scalars(config, 30.0, torch.float64)
    is_hard = draw_hard([12 // ranks] * ranks, hard_share_at(MOMENT.progress, config.hard_share), MOMENT.seed).tolist()
    parts = [slice(first, first + group_size) for first in range(0, 12, group_size)]
    of_groups = [
        reference.loss(
            images[part],
            texts[part],
            leaves[0],
            *(side and side[part] for side in BATCH_OF_12),
            config,
            *leaves[1:],
            is_hard=is_hard[part],
        )
        for part in parts
    ]
    return with_gradients(torch.stack(of_groups).mean(), images, texts, *leaves)


def losses_in_groups(group_sizes):
    """Runs on each rank: the loss of its part in groups, and gradients averaged over ranks as an engine does."""
    world = distributed.start("cpu")
    results = []
    for config, group_size in itertools.product(GROUPS, group_sizes):
        mine = parts_of(12, world.size, uneven=False)[world.rank]
        images, texts = features(size=12)
        leaves = scalars(config, 30.0, torch.float64)
        sets = batch_sets(*(part and part[mine] for part in BATCH_OF_12))
        in_groups = replace(config, group_size=group_size)
        output = ours(images[mine], texts[mine], leaves[0], sets, in_groups, *leaves[1:], moment=MOMENT)
        values = with_gradients(output.loss, images, texts, *leaves)
        results.append([distributed.mean_over_ranks(value) for value in values])
    return results


def check_groups(of_ranks, group_sizes):
    for results in of_ranks:
        for (config, size), values in zip(itertools.product(GROUPS, group_sizes), results, strict=True):
            check(values, wanted_in_groups(config, size, len(of_ranks)), 1e-12, (config, size))


def test_the_loss_in_groups_is_the_mean_over_them():
    sizes = (2, 4)
    check_groups([losses_in_groups(sizes)], sizes)


@pytest.mark.parametrize("world_size", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_groups_on_ranks_are_those_of_one_rank_and_need_no_other(world_size):
    sizes = (3,)
    check_groups(on_ranks(world_size, losses_in_groups, sizes), sizes)


def test_meters_in_groups_are_means_over_them():
    images, texts = (x.detach() for x in features(size=12))

    def output(part, config):
        sets = batch_sets(*(side and side[part] for side in BATCH_OF_12))
        theta, *bias = scalars(config, 3.0, torch.float64)
        return ours(images[part], texts[part], theta, sets, config, *bias, moment=Moment(0.0, 5))

    for config in GROUPS:
        found = output(slice(12), replace(config, group_size=4))
        alone = [output(slice(first, first + 4), config) for first in (0, 4, 8)]
        for field in dataclasses.fields(found):
            values = [float(getattr(each, field.name).detach()) for each in alone]
            assert float(getattr(found, field.name).detach()) == pytest.approx(sum(values) / 3, abs=1e-12), (
                config,
                field.name,
            )


def test_a_rank_of_other_groups_is_waited_for_by_nobody(monkeypatch):
    """In groups ranks exchange nothing for the loss."""

    def refuse(*args, **kwargs):
        raise AssertionError("a collective")

    monkeypatch.setattr("setclip.distributed.world_size", lambda: 2)
    monkeypatch.setattr("pretrain.losses.exchange.world_size", lambda: 2)
    for name in ("all_gather", "all_reduce", "all_to_all_single"):
        monkeypatch.setattr(torch.distributed, name, refuse)
    for config in GROUPS:
        if config.name != "psd":  # which asks which rank this is
            found(replace(config, group_size=4), 30.0, BATCH_OF_12)
    with pytest.raises(AssertionError, match="a collective"):
        found(LossConfig(), 30.0, BATCH_OF_12)


def test_psd_in_groups_gives_one_hot_targets_to_the_share_of_the_step(monkeypatch):
    """Not of each group: a fifth of two pairs would be none."""
    seen = []
    distil = losses.distil
    monkeypatch.setattr(losses, "distil", lambda *args: seen.append(args[-1]) or distil(*args))
    images, texts = features(size=12)
    config = LossConfig(name="psd", hard_share=(0.25, 0.25), group_size=2)
    ours(images, texts, torch.ones(1).double(), batch_sets(*BATCH_OF_12), config, moment=MOMENT)
    assert len(seen) == 6
    assert torch.equal(torch.cat(seen), draw_hard([12], 0.25, MOMENT.seed))
    assert int(torch.cat(seen).sum()) == 3


def test_groups_that_do_not_divide_the_pairs_are_refused():
    with pytest.raises(ValueError, match="expected pairs in groups of 5, found 12"):
        found(LossConfig(group_size=5), 30.0)
    with pytest.raises(ValueError, match="group_size must be at least 2, or a pair had no others; found 1"):
        LossConfig(group_size=1)


def bf16_of_rank():
    distributed.start("cpu")
    world = distributed.world_size()
    images, texts = features(torch.bfloat16)
    theta = torch.tensor([3.0], requires_grad=True)
    mine = parts_of(12, world, False)[torch.distributed.get_rank()]
    loss = contrastive_loss(
        images[mine], texts[mine], theta.exp(), batch_sets(IMAGE_SETS[mine], TEXT_SETS[mine]), LossConfig()
    ).loss
    return [distributed.mean_over_ranks(value.float()) for value in with_gradients(loss, images, texts, theta)]


@pytest.mark.slow
def test_ranks_in_bf16_equal_one_rank_but_for_rounding():
    pair = features(torch.bfloat16)
    alone = found(LossConfig(), math.exp(3.0), pair=pair, dtype=torch.float32)
    for results in on_ranks(2, bf16_of_rank):
        check(results, alone, 4e-3, "bf16")


# --- properties


def test_hard_equals_open_clips_loss():
    images, texts = features(torch.float32)
    theta = torch.tensor(3.0, requires_grad=True)
    mine = contrastive_loss(images, texts, theta.exp(), batch_sets(IMAGE_SETS, TEXT_SETS), LossConfig(name="hard")).loss
    theirs = open_clip.loss.ClipLoss()(images, texts, theta.exp())
    for a, b in zip(
        with_gradients(mine, images, texts, theta), with_gradients(theirs, images, texts, theta), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_siglip_equals_open_clips_loss():
    images, texts = features(torch.float32)
    theta, bias = (torch.tensor(value, requires_grad=True) for value in (2.3, -5.0))
    mine = ours(images, texts, theta, batch_sets(IMAGE_SETS, TEXT_SETS), LossConfig(name="siglip"), bias).loss
    theirs = open_clip.loss.SigLipLoss()(images, texts, theta.exp(), bias)
    leaves = images, texts, theta, bias
    for a, b in zip(with_gradients(mine, *leaves), with_gradients(theirs, *leaves), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_label_smoothing_over_all_equals_torchs_own():
    images, texts = features()
    config = LossConfig(name="label_smoothing", smoothing=0.3, smoothing_split="all")
    mine = ours(images, texts, torch.tensor(3.0), batch_sets(*SMALL), config).loss
    logits = math.exp(3.0) * images @ texts.T
    directions = (
        torch.nn.functional.cross_entropy(z, torch.arange(12), label_smoothing=0.3) for z in (logits, logits.T)
    )
    torch.testing.assert_close(mine, sum(directions) / 2, rtol=1e-6, atol=0)


def test_a_prompt_that_occurs_twice_makes_true_pairs():
    """Two images with one text: each is as right as the other, in both directions."""
    images = torch.eye(2, dtype=torch.float64)
    texts = torch.ones(2, 2, dtype=torch.float64) / math.sqrt(2)
    sets, scale = batch_sets([{1}, {2}], [{1}, {2}], [5, 5]), torch.tensor(10.0, dtype=torch.float64)
    shared = contrastive_loss(images, texts, scale, sets, LossConfig(name="hard"))
    assert float(shared.loss) == pytest.approx(math.log(2))
    assert float(shared.kl) == pytest.approx(0, abs=1e-12)
    assert float(shared.true_pair_mass) == 1
    as_clip = LossConfig(name="hard", equal_texts="negatives")
    assert float(contrastive_loss(images, texts, scale, sets, as_clip).kl) == pytest.approx(math.log(2))


def test_weights_that_are_all_alike_change_nothing():
    images, texts = features()
    alike = ObjectWeights(torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.float64), 0.7)
    sets, scale = batch_sets(*SMALL), torch.tensor(20.0, dtype=torch.float64)
    weighted = contrastive_loss(images, texts, scale, sets, LossConfig(weights="frequency"), weights=alike).loss
    torch.testing.assert_close(
        weighted, contrastive_loss(images, texts, scale, sets, LossConfig()).loss, rtol=1e-13, atol=0
    )


def test_weights_come_from_how_many_captions_name_an_object():
    table = ObjectTable.from_counts({"dog": 10, "person": 100, "axolotl": 1}, "pos", 100)
    named = [object_id(name) for name in ("person", "dog", "axolotl", "yeti")]
    found = ObjectWeights.of(table).look_up(torch.tensor(named))
    assert found.tolist() == pytest.approx([0, math.log(10), math.log(100), math.log(100)])


def test_settings_that_a_loss_does_not_use_are_known():
    assert LossConfig(name="label_smoothing", beta=0.5, smoothing=0.1).ignored() == {"beta": 0.5}
    assert LossConfig(name="hard", target="l1").ignored() == {"target": "l1"}
    assert LossConfig(target="softmax", no_overlap="uniform").ignored() == {"no_overlap": "uniform"}
    for config in CONFIGS:
        assert config.ignored() == {}, config


def test_targets_that_were_prepared_before_give_the_same_loss():
    images, texts = features()
    sets = batch_sets(IMAGE_SETS, TEXT_SETS)
    scale = torch.tensor(20.0, dtype=torch.float64)
    prepared = prepare_targets(sets, LossConfig(), dtype=torch.float64)
    ahead = contrastive_loss(images, texts, scale, sets, LossConfig(), prepared=prepared).loss
    assert torch.equal(ahead, contrastive_loss(images, texts, scale, sets, LossConfig()).loss)


def test_nothing_of_the_size_of_all_pairs_is_ever_made(monkeypatch):
    """Every tensor that torch makes is looked at, forward and backward."""
    monkeypatch.setitem(blocks.SHAPES, "cpu", (64, 64))
    size = 2048
    drawn = reference.zipf_sets(size, 5, 20_000, 7)
    sets = batch_sets(drawn, drawn)
    images, texts = features(torch.float32, size, 8)
    with reference.LargestTensor() as largest:
        contrastive_loss(images, texts, torch.tensor(20.0), sets, LossConfig()).loss.backward()
    assert 0 < largest.size < size * size / 16


def test_loss_at_equal_logits_is_the_logarithm_of_the_batch():
    ones = torch.full((12, 4), 0.5)
    for config in CONFIGS:
        if config.name == "siglip":
            continue  # no softmax
        loss = ours(ones, ones, torch.tensor(50.0).log(), batch_sets(*SMALL), config).loss
        assert float(loss) == pytest.approx(math.log(12), abs=1e-5)


def test_budget_equals_label_smoothing_where_all_overlaps_are_equal():
    sets = [{0, 10 + i} for i in range(12)]
    images, texts = features()
    pair = [
        contrastive_loss(images, texts, torch.tensor(20.0, dtype=torch.float64), batch_sets(sets, sets), config).loss
        for config in (LossConfig(beta=0.2), LossConfig(name="label_smoothing", smoothing=0.2))
    ]
    torch.testing.assert_close(pair[0], pair[1], rtol=1e-13, atol=0)


def test_budget_equals_hard_where_nothing_overlaps():
    sets = [{i} for i in range(12)]
    images, texts = features()
    pair = [
        contrastive_loss(images, texts, torch.tensor(20.0, dtype=torch.float64), batch_sets(sets, sets), config).loss
        for config in (LossConfig(beta=0.2), LossConfig(name="hard"))
    ]
    torch.testing.assert_close(pair[0], pair[1], rtol=1e-13, atol=0)


def test_permuting_the_pairs_leaves_the_loss():
    images, texts = features()
    order = torch.randperm(12, generator=torch.Generator().manual_seed(1))
    sets = [IMAGE_SETS[i] for i in order], [TEXT_SETS[i] for i in order]
    scale = torch.tensor(30.0, dtype=torch.float64)
    straight = contrastive_loss(images, texts, scale, batch_sets(IMAGE_SETS, TEXT_SETS), LossConfig()).loss
    permuted = contrastive_loss(images[order], texts[order], scale, batch_sets(*sets), LossConfig()).loss
    torch.testing.assert_close(straight, permuted, rtol=1e-13, atol=0)


def test_the_kl_is_zero_where_the_model_predicts_the_targets():
    """Two pairs that share everything: q = (0.8, 0.2); logits whose softmax is that."""
    config = LossConfig(beta=0.2)
    images = torch.eye(2, dtype=torch.float64)
    scale = torch.tensor(math.log(4.0), dtype=torch.float64)
    output = contrastive_loss(images, images, scale, batch_sets([{1}, {1}], [{1}, {1}]), config)
    assert float(output.kl) == pytest.approx(0, abs=1e-12)
    assert float(output.true_pair_mass) == pytest.approx(0.8)


def test_unknown_names_suggest_the_nearest():
    with pytest.raises(
        InputError,
        match=r"unknown loss 'object_uoi', perhaps 'object_iou'; known: hard, label_smoothing, multi_positive, ",
    ):
        LossConfig(name="object_uoi")
    with pytest.raises(InputError, match="unknown target of object_iou 'bugdet', perhaps 'budget'"):
        LossConfig(target="bugdet")
    with pytest.raises(ValueError, match=r"beta must lie in \[0, 1\), found 1.5"):
        LossConfig(beta=1.5)
    with pytest.raises(ValueError, match="weights must be one of none, frequency, found 'freq'"):
        LossConfig(weights="freq")
    assert set(LOSSES) == {"hard", "label_smoothing", "object_iou", "multi_positive", "softclip", "psd", "siglip"}


def test_what_does_not_fit_together_is_refused():
    images, texts = features()
    sets, scale = batch_sets(*SMALL), torch.tensor(20.0, dtype=torch.float64)

    def refused(match, *given, config=LossConfig(), **more):  # noqa: B008 (frozen)
        with pytest.raises(ValueError, match=match):
            contrastive_loss(*given, config, **more)

    refused(r"B = 12 images and of their texts, found \(12, 16\) and \(10, 16\)", images, texts[:10], scale, sets)
    refused("B = 10 images", images, texts, scale, batch_sets(SMALL[0][:10], SMALL[1][:10]))
    refused("float32, float64 or bfloat16, found torch.float16", images.half(), texts.half(), scale, sets)
    refused("one number as logit_scale", images, texts, torch.ones(2), sets)
    refused("siglip needs logit_bias", images, texts, scale, sets, config=LossConfig(name="siglip"))
    refused("needs the weights of objects", images, texts, scale, sets, config=LossConfig(weights="frequency"))
    refused("12 text ids, found", images, texts, scale, BatchSets(sets.image_objects, sets.text_objects, torch.ones(5)))
    refused("ids of torch.int64", images, texts, scale, BatchSets(sets.image_objects.int(), sets.text_objects))
    refused("B images and of their B texts", images, texts, scale, BatchSets(sets.image_objects, sets.text_objects[:3]))
    prepared = prepare_targets(sets, LossConfig(), dtype=torch.float64)
    refused(
        "found those of object_iou/budget",
        images,
        texts,
        scale,
        sets,
        config=LossConfig(name="hard"),
        prepared=prepared,
    )
    refused("12 pairs and torch.float32, found", images.float(), texts.float(), scale, sets, prepared=prepared)
