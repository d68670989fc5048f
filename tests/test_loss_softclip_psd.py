"""softclip and psd: values and every gradient against plain float64, on 1, 2 and 4 ranks, and by hand."""

import itertools
import math
from collections import Counter

import loss_reference as reference
import pytest
import torch
from loss_reference import BATCHES, batch_sets, features, weights, with_gradients
from ranks import on_ranks

from pretrain.losses import BatchSets, LossConfig, Moment, blocks, contrastive_loss, prepare_targets
from pretrain.losses.blockwise import blockwise_loss
from pretrain.losses.exchange import agree
from pretrain.losses.operators import make_targets
from pretrain.losses.self_distillation import distil, draw_hard, hard_share_at
from pretrain.losses.softclip import make_softclip_targets, softclip_loss
from setclip import distributed

SCALES = [1.0, 1 / 0.07, 100.0]
CONFIGS = [
    LossConfig(name="softclip", beta=0.3),
    LossConfig(name="softclip", beta=0.3, equal_texts="negatives"),
    LossConfig(name="softclip", beta=0.05, temperature=0.5, negatives_weight=0.0),
    LossConfig(name="softclip", beta=0.9, temperature=0.1, negatives_weight=2.5, weights="frequency"),
    LossConfig(name="psd"),
    LossConfig(name="psd", equal_texts="negatives", hard_share=(0.5, 0.0)),
    LossConfig(name="psd", teacher_temperature=0.02, hard_share=(0.9, 0.4)),
]
PROGRESS, SEED = 0.6, 5


def hard_pairs(counts, config):
    """psd's pairs with one-hot targets, of ranks that hold `counts` pairs."""
    return draw_hard(counts, hard_share_at(PROGRESS, config.hard_share), SEED).tolist()


def wanted(config, scale, batch, pair=None, counts=None):
    """The reference's loss, and gradients by image, text and logarithm of the scale."""
    images, texts = pair or features(size=len(batch[0]))
    theta = torch.tensor([math.log(scale)], dtype=torch.float64, requires_grad=True)
    loss = reference.loss(images, texts, theta, *batch, config, is_hard=hard_pairs(counts or [len(batch[0])], config))
    return with_gradients(loss, images, texts, theta)


def ours(images, texts, scale, sets, config, progress=PROGRESS):
    """The loss of this rank, and its targets."""
    layout, gathered = agree(sets)
    made = gathered, config, layout, weights(config), torch.promote_types(images.dtype, torch.float32)
    if config.name == "softclip":
        targets = make_softclip_targets(*made)
        return softclip_loss(images, texts, scale, targets, layout), targets
    is_hard = draw_hard(layout.counts, hard_share_at(progress, config.hard_share), SEED)
    targets = distil(make_targets(*made), images, texts, config, layout, is_hard)
    return blockwise_loss(images, texts, scale, targets, layout), targets


def found(config, scale, batch, pair=None, dtype=torch.float64):
    """Ours, as `wanted`."""
    images, texts = pair or features(dtype, size=len(batch[0]))
    theta = torch.tensor([math.log(scale)], dtype=torch.promote_types(dtype, torch.float32), requires_grad=True)
    return with_gradients(ours(images, texts, theta.exp(), batch_sets(*batch), config)[0], images, texts, theta)


def check(results, references, tolerance, context):
    """Each within `tolerance` of the reference's largest entry, or of 1."""
    for name, value, truth in zip(("loss", "images", "texts", "scale"), results, references, strict=True):
        error = float((value.double() - truth.double()).abs().max())
        assert error <= tolerance * (1 + float(truth.abs().max())), f"{name} off by {error}: {context}"


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks that divide no batch."""
    monkeypatch.setitem(blocks.SHAPES, "cpu", (9, 13))


@pytest.mark.parametrize(
    ("name", "scale"),
    [
        *(("equal texts", scale) for scale in SCALES),
        *(pytest.param(name, 100.0, marks=pytest.mark.slow) for name in BATCHES if name != "equal texts"),
    ],
)
@pytest.mark.usefixtures("small_blocks")
def test_values_and_gradients_equal_the_reference(name, scale):
    for config in CONFIGS:
        check(found(config, scale, BATCHES[name]), wanted(config, scale, BATCHES[name]), 1e-12, config)


@pytest.mark.parametrize("scale", SCALES[1:])
@pytest.mark.parametrize("name", ["equal texts", "duplicates with equal texts", "0 to 64 objects", "one pair"])
@pytest.mark.usefixtures("small_blocks")
def test_fp32_stays_near_the_reference(name, scale):
    batch = BATCHES[name]
    for config in CONFIGS:
        check(found(config, scale, batch, dtype=torch.float32), wanted(config, scale, batch), 5e-5, config)


# --- where digits are easily lost


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_a_row_far_below_all_others_is_not_lost_at_scale_100(config, dtype, tolerance):
    """Its best cosine is −1: its logits lie 200 below the highest, further than fp32 reaches from one shift."""
    batch = BATCHES["equal texts"]
    axis = torch.zeros(12, 16)
    axis[:, 0] = 1
    images, texts = axis.clone(), axis.clone()
    images[3] *= -1
    check_on_equal_features(config, 100.0, batch, images, texts, dtype, tolerance)


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_negatives_far_below_their_own_pair_are_not_lost_at_scale_100(config):
    """Own cosines are 1, all others −0.05 or less, and p of negatives e⁻¹⁰⁵: less than fp32 can tell from 0."""
    size = 12
    centred = torch.eye(size, dtype=torch.float64) - 1 / size
    axes = torch.nn.functional.normalize(centred, dim=1)
    check_on_equal_features(config, 100.0, BATCHES["equal texts"], axes, axes, torch.float32, 1e-4)


def check_on_equal_features(config, scale, batch, images, texts, dtype, tolerance):
    """Ours in a coarse dtype against float64 on the same, rounded features."""
    pair = [x.to(dtype).requires_grad_() for x in (images, texts)]
    exact = [x.detach().double().requires_grad_() for x in pair]
    results = found(config, scale, batch, pair, dtype)
    assert all(bool(torch.isfinite(value).all()) for value in results)
    check(results, wanted(config, scale, batch, exact), tolerance, config)


@pytest.mark.parametrize("name", ["softclip", "psd"])
def test_features_that_are_all_alike_keep_their_gradients_at_scale_100(name):
    """Every logit is 100, and each probability 1 / N: as are psd's targets, and softclip's but for 1 − β of one-hot."""
    size = 2_000
    ones = torch.ones(size, 4) / 2
    images, texts = ones.clone().requires_grad_(), ones.clone().requires_grad_()
    scale = torch.tensor(100.0, requires_grad=True)
    config = LossConfig(name=name, hard_share=(0.0, 0.0), beta=0.25)
    loss, targets = ours(images, texts, scale, batch_sets([{1}] * size, [{1}] * size), config)
    true, other = 0.75 + 0.25 / size, 0.25 / size
    divergence = ((true - 1 / size) * math.log(true * size) + (size - 1) * (other - 1 / size) * math.log(0.25)) / 2
    value = divergence if name == "softclip" else math.log(size)
    assert float(loss.detach()) == pytest.approx(value, rel=1e-5)
    assert targets.entropy == pytest.approx(0 if name == "softclip" else math.log(size), rel=1e-5)
    assert max(float(d.abs().max()) for d in torch.autograd.grad(loss, (images, texts, scale))) < 1e-4


@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize("scale", [10.0, 25.0])
def test_bf16_gradients_hold_where_the_model_is_nearly_sure(config, scale):
    generator = torch.Generator().manual_seed(0)
    texts, noise = (torch.randn(60, 64, generator=generator, dtype=torch.float64) for _ in range(2))
    pair = [torch.nn.functional.normalize(x, dim=1).bfloat16() for x in (texts + 0.3 * noise, texts)]
    exact = [x.double().requires_grad_() for x in pair]
    truth = wanted(config, scale, BATCHES["equal sides"], exact)
    results = found(config, scale, BATCHES["equal sides"], [x.requires_grad_() for x in pair], torch.bfloat16)
    assert max(float((a.double() - b).norm() / b.norm()) for a, b in zip(results, truth, strict=True)) < 0.006


# --- ranks


def losses_of_rank(names):
    """Runs on each rank: the loss of its part, and gradients averaged over ranks as an engine does."""
    world = distributed.start("cpu")
    blocks.SHAPES["cpu"] = 3, 5
    results = []
    for name, config, uneven in rank_cases(names):
        batch, size = BATCHES[name], len(BATCHES[name][0])
        ends = ends_of(size, world.size, uneven)
        mine = slice(ends[world.rank], ends[world.rank + 1])
        images, texts = features(size=size)
        theta = torch.tensor([math.log(30.0)], dtype=torch.float64, requires_grad=True)
        sets = batch_sets(*(part and part[mine] for part in batch))
        loss, targets = ours(images[mine], texts[mine], theta.exp(), sets, config)
        values = [distributed.mean_over_ranks(value) for value in with_gradients(loss, images, texts, theta)]
        results.append((values, numbers_of(targets)))
    return results


def ends_of(size, world_size, uneven):
    """Where each rank's pairs start and, last, where the last's end."""
    return [*range(world_size), size] if uneven else [size * rank // world_size for rank in range(world_size + 1)]


def numbers_of(targets):
    """What is logged of targets."""
    return [targets.entropy, targets.true_pair_mass, targets.similar_pairs, targets.equal_pairs]


def rank_cases(names):
    """Every batch with every config; every other with uneven parts."""
    return [(*case, number % 2 == 0) for number, case in enumerate(itertools.product(names, CONFIGS))]


RANK_BATCHES = ["small sets on both sides", "equal texts", "duplicates with equal texts", "all identical", "all empty"]


@pytest.mark.parametrize(
    "world_size",
    [
        *(pytest.param(size, marks=pytest.mark.slow) for size in (2, 4)),
        pytest.param(8, marks=[pytest.mark.slow, pytest.mark.soak]),
    ],
)
def test_ranks_together_equal_the_reference(world_size):
    """And all ranks draw the same pairs for psd."""
    truths = []
    for name, config, uneven in rank_cases(RANK_BATCHES):
        ends = ends_of(len(BATCHES[name][0]), world_size, uneven)
        counts = [after - before for before, after in itertools.pairwise(ends)]
        truths.append(wanted(config, 30.0, BATCHES[name], counts=counts))
    everywhere = on_ranks(world_size, losses_of_rank, RANK_BATCHES)
    for results in everywhere:
        for case, truth, (values, numbers), (_, first) in zip(
            rank_cases(RANK_BATCHES), truths, results, everywhere[0], strict=True
        ):
            check(values, truth, 1e-12, case)
            assert numbers == first
            if case[1].name == "softclip":
                batch = BATCHES[case[0]]
                alone = ours(*features(size=len(batch[0])), torch.tensor(30.0).double(), batch_sets(*batch), case[1])[1]
                assert numbers == pytest.approx(numbers_of(alone), rel=1e-12, abs=1e-14)


# --- softclip


def test_softclip_of_two_pairs_is_what_a_hand_computes():
    """IoU 1/2 and τ = 1/2: the other gets 0.4 / (1 + e) = 0.1076 of q, and 1/4 of p. One negative has nothing to add."""
    sets, axes = [{1}, {1, 2}], torch.eye(2, dtype=torch.float64)
    config = LossConfig(name="softclip", beta=0.4, temperature=0.5)
    loss, targets = ours(axes, axes, torch.tensor(math.log(3)).double(), batch_sets(sets, sets), config)
    assert float(loss) == pytest.approx(0.5 * (0.25 - 0.10757657) * (math.log(0.89242343 / 0.10757657) - math.log(3)))
    assert targets.true_pair_mass == pytest.approx(0.89242343)
    assert (targets.similar_pairs, targets.equal_pairs, targets.entropy) == (1.0, 0.0, 0.0)


def test_the_term_on_negatives_is_what_a_hand_computes():
    """Powers of similarity are 1, 1 and 1/2: two rows leave 2/3 and 1/3 to negatives, whose p are 1/2; one leaves halves."""
    sets, ones = [{1}, {1}, {2}], torch.ones(3, 4, dtype=torch.float64) / 2
    with_term, without = (
        ours(
            ones,
            ones,
            torch.tensor(9.0).double(),
            batch_sets(sets, sets),
            LossConfig(name="softclip", beta=0.5, temperature=1 / math.log(2), negatives_weight=weight),
        )[0]
        for weight in (1.0, 0.0)
    )
    assert float(with_term - without) == pytest.approx(math.log(2) / 18)
    two_rows = sum((q - 1 / 3) * math.log(3 * q) for q in (0.7, 0.2, 0.1))
    third_row = sum((q - 1 / 3) * math.log(3 * q) for q in (0.75, 0.125, 0.125))
    assert float(without) == pytest.approx((2 * two_rows + third_row) / 6)


def test_softclip_and_its_gradients_are_zero_where_the_model_predicts_the_targets():
    sets = [{1}, {1}]
    axes = torch.eye(2, dtype=torch.float64)
    config = LossConfig(name="softclip", beta=0.4)  # equal sets: q = (0.8, 0.2)
    scale = torch.tensor(math.log(4.0), dtype=torch.float64, requires_grad=True)
    loss, _ = ours(axes.clone().requires_grad_(), axes, scale, batch_sets(sets, sets), config)
    assert float(loss.detach()) == pytest.approx(0, abs=1e-15)
    assert float(torch.autograd.grad(loss, scale)[0]) == pytest.approx(0, abs=1e-15)


def test_softclip_of_pairs_without_objects_pulls_towards_equal_negatives():
    """Without any overlap its targets are those of label smoothing: q of each negative is alike."""
    empty = [set()] * 12
    images, texts = features()
    config = LossConfig(name="softclip", beta=0.3, temperature=0.5)
    _, targets = ours(images, texts, torch.tensor(1.0).double(), batch_sets(empty, empty), config)
    share = 0.3 * math.exp(-2) / (1 + 11 * math.exp(-2))
    assert targets.images.negatives.exp().tolist() == pytest.approx([11 * share] * 12)
    assert targets.images.constant.sub(2).exp().tolist() == pytest.approx([1 / 11] * 12)


def test_weights_that_are_missing_and_targets_of_another_dtype_are_refused():
    images, texts = features()
    layout, sets = agree(batch_sets(reference.IMAGE_SETS, reference.TEXT_SETS))
    config = LossConfig(name="softclip", weights="frequency")
    with pytest.raises(ValueError, match="weights 'frequency' needs the weights of objects"):
        make_softclip_targets(sets, config, layout, None, torch.float64)
    targets = make_softclip_targets(sets, LossConfig(name="softclip"), layout, None, torch.float32)
    with pytest.raises(ValueError, match=r"prepared for torch.float32, the logits are torch.float64"):
        softclip_loss(images, texts, torch.tensor(1.0), targets, layout)


# --- psd


def test_psd_of_two_pairs_is_what_a_hand_computes():
    """Pair 0 is one-hot. Pair 1 takes, for its image, what its text predicts over images, and for its text, its image's."""
    images = torch.eye(2, dtype=torch.float64)
    texts = torch.tensor([[0.6, 0.8], [0.0, 1.0]], dtype=torch.float64)  # cosines: 0.6, 0; 0.8, 1
    config = LossConfig(name="psd", hard_share=(0.5, 0.5), teacher_temperature=1.0)
    layout, sets = agree(BatchSets(torch.full((2, 1), -1), torch.full((2, 1), -1)))
    seed = next(seed for seed in range(20) if draw_hard([2], 0.5, seed)[0])
    one_hot = make_targets(sets, config, layout, None, torch.float64)
    targets = distil(one_hot, images, texts, config, layout, draw_hard([2], 0.5, seed))
    loss = blockwise_loss(images, texts, torch.tensor(1.0).double(), targets, layout)

    near, far = 1 / (1 + math.exp(-0.2)), 1 / (1 + math.exp(-1))  # image 1 on its text; text 1 on its image
    one_hot_terms = math.log(1 + math.exp(-0.6)) + math.log(1 + math.exp(0.2))
    image_1 = -far * math.log(near) - (1 - far) * math.log(1 - near)
    text_1 = -near * math.log(far) - (1 - near) * math.log(1 - far)
    assert float(loss) == pytest.approx((one_hot_terms + image_1 + text_1) / 4)
    entropies = [-p * math.log(p) - (1 - p) * math.log(1 - p) for p in (near, far)]
    assert targets.entropy == pytest.approx(sum(entropies) / 4)
    assert targets.true_pair_mass == pytest.approx((2 + near + far) / 4)


@pytest.mark.usefixtures("small_blocks")
def test_the_floor_of_psd_is_reached_where_the_model_agrees_with_its_teacher():
    """Images equal texts, so that both directions predict alike, at the teacher's temperature."""
    batch, texts = BATCHES["equal texts"], features()[1].detach().requires_grad_()
    config = LossConfig(name="psd", hard_share=(0.0, 0.0), teacher_temperature=0.25)
    scale = torch.tensor(4.0, dtype=torch.float64, requires_grad=True)
    loss, targets = ours(texts, texts, scale, batch_sets(*batch), config)
    assert float(loss.detach()) == pytest.approx(targets.entropy, rel=1e-13)
    assert targets.entropy > 0.9
    assert all(float(d.abs().max()) < 1e-14 for d in torch.autograd.grad(loss, (texts, scale)))


@pytest.mark.usefixtures("small_blocks")
def test_the_mass_on_true_pairs_counts_pairs_with_an_equal_text():
    batch, (images, texts) = BATCHES["equal texts"], features()
    config = LossConfig(name="psd", hard_share=(0.4, 0.4), teacher_temperature=0.3)
    targets = ours(images, texts, torch.tensor(5.0).double(), batch_sets(*batch), config)[1]
    text_ids = torch.tensor(batch[2])
    is_true, is_hard = text_ids == text_ids[:, None], torch.tensor(hard_pairs([12], config))
    s = (images @ texts.T).detach() / 0.3
    masses, entropies = [], []
    for teacher in (s.T.softmax(1), s.softmax(1)):
        masses.append(torch.where(is_hard, 1.0, (teacher * is_true).sum(1)).mean())
        entropies.append(torch.where(is_hard, is_true.sum(1).double().log(), -(teacher * teacher.log()).sum(1)).mean())
    assert targets.true_pair_mass == pytest.approx(float(sum(masses)) / 2, rel=1e-13)
    assert targets.entropy == pytest.approx(float(sum(entropies)) / 2, rel=1e-13)


def test_psd_is_the_hard_loss_as_long_as_all_pairs_are_hard():
    images, texts = features()
    sets, scale = batch_sets(*BATCHES["equal texts"]), torch.tensor(20.0).double()
    distilled = ours(images, texts, scale, sets, LossConfig(name="psd"), progress=0.0)[0]
    layout, sets = agree(sets)
    targets = make_targets(sets, LossConfig(name="hard"), layout, None, torch.float64)
    assert torch.equal(distilled, blockwise_loss(images, texts, scale, targets, layout))


def test_the_share_of_hard_pairs_follows_a_cosine():
    shares = [hard_share_at(progress, (1.0, 0.2)) for progress in (0.0, 0.25, 0.5, 1.0)]
    assert shares == pytest.approx([1.0, 0.6 + 0.4 * math.sqrt(0.5), 0.6, 0.2])
    with pytest.raises(ValueError, match=r"progress must lie in \[0, 1\], found 1.5"):
        hard_share_at(1.5, (1.0, 0.2))


def test_the_same_pairs_of_the_data_are_hard_on_any_number_of_ranks():
    alone = draw_hard([12], 0.4, 3)
    for ranks in (2, 3, 4):
        drawn = draw_hard([12 // ranks] * ranks, 0.4, 3)
        assert torch.equal(drawn.view(ranks, -1).T.reshape(-1), alone)


def test_hard_pairs_are_drawn_in_their_exact_number_and_anew_with_each_seed():
    drawn = [draw_hard([10], 0.34, seed) for seed in range(400)]
    assert {int(hard.sum()) for hard in drawn} == {3}
    assert torch.equal(drawn[7], draw_hard([10], 0.34, 7))
    often = Counter(place for hard in drawn for place in hard.nonzero()[:, 0].tolist())
    assert len(often) == 10
    assert all(80 <= count <= 160 for count in often.values())  # 120 expected, deviation 9.2
    assert [int(draw_hard([5], share, 0).sum()) for share in (0.0, 1.0)] == [0, 5]


# --- both


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_the_family_gives_them_by_name(config):
    images, texts = features()
    sets, scale = batch_sets(*BATCHES["equal texts"]), torch.tensor(20.0).double()
    given = {"weights": weights(config), "moment": Moment(PROGRESS, SEED)}
    output = contrastive_loss(images, texts, scale, sets, config, **given)
    loss, targets = ours(images, texts, scale, sets, config)
    assert torch.equal(output.loss, loss)
    assert float(output.kl) == pytest.approx(float(loss.detach()) - targets.entropy)
    assert float(output.true_pair_mass) == targets.true_pair_mass
    prepared = prepare_targets(sets, config, given["weights"], torch.float64)
    assert torch.equal(contrastive_loss(images, texts, scale, sets, config, **given, prepared=prepared).loss, loss)
    if config.name == "psd":
        with pytest.raises(ValueError, match="psd needs moment"):
            contrastive_loss(images, texts, scale, sets, config)


@pytest.mark.parametrize("name", ["softclip", "psd"])
def test_nothing_of_the_size_of_all_pairs_is_ever_made(monkeypatch, name):
    """Every tensor that torch makes is looked at, forward and backward."""
    monkeypatch.setitem(blocks.SHAPES, "cpu", (128, 128))
    size = 1024
    drawn = reference.zipf_sets(size, 5, 20_000, 7)
    sets = batch_sets(drawn, drawn)
    images, texts = features(torch.float32, size, 8)
    with reference.LargestTensor() as largest:
        ours(images, texts, torch.tensor(20.0), sets, LossConfig(name=name))[0].backward()
    assert 0 < largest.size < size * size / 16
