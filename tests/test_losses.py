"""Losses: values and every gradient against ten lines of float64 on Python sets, on 1, 2 and 4 ranks."""

import math

import open_clip
import pytest
import torch
from ranks import on_ranks

from pretrain.losses import LOSSES, LossConfig, contrastive_loss
from pretrain.losses.objects import iou_matrix
from setclip import distributed
from setclip.errors import InputError

CONFIGS = [
    LossConfig(name="hard"),
    LossConfig(name="label_smoothing", smoothing=0.2),
    LossConfig(name="label_smoothing", smoothing=0.3, smoothing_split="all"),
    LossConfig(name="object_iou", target="budget", beta=0.2),
    LossConfig(name="object_iou", target="budget", beta=0.5, no_overlap="uniform"),
    LossConfig(name="object_iou", target="l1"),
]
SCALES = [math.log(1 / 0.07), math.log(100.0)]

# Empty sets, equal sets, disjoint ones, a large one, and text sides that differ from the image sides.
IMAGE_SETS = [{1, 2}, {2}, set(), {1, 2}, {3, 4, 5}, set(), {9}, {2, 3}, set(range(20)), {7}, {1}, {5, 6}]
TEXT_SETS = [{1}, {2}, {8}, {1, 2}, {4}, set(), {9}, {3}, set(range(0, 20, 2)), set(), {1}, {6, 7, 8}]


def reference_targets(rows, columns, config):
    """Q as the docstrings define it, by loops over Python sets, in float64."""
    size = len(rows)
    targets = torch.zeros(size, size, dtype=torch.float64)
    for i, a in enumerate(rows):
        iou = [1.0 if i == j else (len(a & b) / len(a | b) if a | b else 0.0) for j, b in enumerate(columns)]
        others = sum(v for j, v in enumerate(iou) if j != i)
        for j in range(size):
            if config.name == "hard":
                q = float(i == j)
            elif config.name == "label_smoothing" and config.smoothing_split == "others":
                q = 1 - config.smoothing if i == j else config.smoothing / (size - 1)
            elif config.name == "label_smoothing":
                q = (1 - config.smoothing) * (i == j) + config.smoothing / size
            elif config.target == "l1":
                q = iou[j] / sum(iou)
            elif others > 0:
                q = 1 - config.beta if i == j else config.beta * iou[j] / others
            elif config.no_overlap == "one_hot":
                q = float(i == j)
            else:
                q = 1 - config.beta if i == j else config.beta / (size - 1)
            targets[i, j] = q
    return targets


def reference_loss(images, texts, theta, image_sets, text_sets, config):
    logits = theta.exp() * images @ texts.T
    q_images, q_texts = (
        reference_targets(image_sets, text_sets, config),
        reference_targets(text_sets, image_sets, config),
    )
    cross_entropy = (
        -(q_images * logits.log_softmax(1)).sum(1).mean() - (q_texts * logits.T.log_softmax(1)).sum(1).mean()
    )
    return cross_entropy / 2


def features(dtype=torch.float64, size=12, width=16):
    random = torch.Generator().manual_seed(0)
    texts = torch.randn(size, width, generator=random, dtype=torch.float64)
    # Near their pairs, but far from certain: a test on saturated probabilities would show nothing.
    images = texts + 1.5 * torch.randn(size, width, generator=random, dtype=torch.float64)
    return [torch.nn.functional.normalize(x, dim=1).to(dtype).requires_grad_() for x in (images, texts)]


def ids(sets):
    padded = torch.full((len(sets), max(map(len, sets), default=0) or 1), -1)
    for row, values in enumerate(sets):
        padded[row, : len(values)] = torch.tensor(sorted(values), dtype=torch.int64)
    return padded


def with_gradients(loss, *leaves):
    return [loss.detach(), *torch.autograd.grad(loss, leaves)]


def cases():
    return [(config, scale) for config in CONFIGS for scale in SCALES]


def losses_of_rank(dtype):
    """Runs on each rank: the loss of its part, and gradients averaged over ranks as an engine does."""
    world = distributed.start("cpu")
    results = []
    for config, scale in cases():
        images, texts = features(dtype)
        theta = torch.tensor([scale], dtype=dtype, requires_grad=True)
        size = len(images) // world.size
        mine = slice(world.rank * size, (world.rank + 1) * size)
        # The sets of a rank are padded to its own widest, as a loader does.
        output = contrastive_loss(
            images[mine], texts[mine], theta.exp(), ids(IMAGE_SETS[mine]), ids(TEXT_SETS[mine]), config
        )
        values = with_gradients(output.loss, images, texts, theta)
        results.append([distributed.mean_over_ranks(value) for value in values])
    return results


def check(results, tolerance):
    for (config, scale), found in zip(cases(), results, strict=True):
        images, texts = features()
        theta = torch.tensor([scale], dtype=torch.float64, requires_grad=True)
        wanted = with_gradients(
            reference_loss(images, texts, theta, IMAGE_SETS, TEXT_SETS, config), images, texts, theta
        )
        for value, reference in zip(found, wanted, strict=True):
            torch.testing.assert_close(
                value.double(), reference, rtol=tolerance, atol=tolerance, msg=str((config, scale))
            )


def test_values_and_gradients_equal_the_reference():
    check(losses_of_rank(torch.float64), 1e-12)


def test_fp32_stays_near_the_reference():
    check(losses_of_rank(torch.float32), 2e-5)


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_together_equal_the_reference(world_size):
    for results in on_ranks(world_size, losses_of_rank, torch.float64):
        check(results, 1e-12)


def test_hard_equals_open_clips_loss():
    images, texts = features(torch.float32)
    theta = torch.tensor(3.0, requires_grad=True)
    mine = contrastive_loss(images, texts, theta.exp(), ids(IMAGE_SETS), ids(TEXT_SETS), LossConfig(name="hard")).loss
    theirs = open_clip.loss.ClipLoss()(images, texts, theta.exp())
    for a, b in zip(
        with_gradients(mine, images, texts, theta), with_gradients(theirs, images, texts, theta), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_loss_at_equal_logits_is_the_logarithm_of_the_batch():
    ones = torch.full((12, 4), 0.5)
    for config in CONFIGS:
        loss = contrastive_loss(ones, ones, torch.tensor(50.0), ids(IMAGE_SETS), ids(TEXT_SETS), config).loss
        assert float(loss) == pytest.approx(math.log(12), abs=1e-5)


def test_budget_equals_label_smoothing_where_all_overlaps_are_equal():
    sets = [{0, 10 + i} for i in range(12)]
    images, texts = features()
    pair = [
        contrastive_loss(images, texts, torch.tensor(20.0, dtype=torch.float64), ids(sets), ids(sets), config).loss
        for config in (LossConfig(beta=0.2), LossConfig(name="label_smoothing", smoothing=0.2))
    ]
    torch.testing.assert_close(pair[0], pair[1], rtol=1e-13, atol=0)


def test_budget_equals_hard_where_nothing_overlaps():
    sets = [{i} for i in range(12)]
    images, texts = features()
    pair = [
        contrastive_loss(images, texts, torch.tensor(20.0, dtype=torch.float64), ids(sets), ids(sets), config).loss
        for config in (LossConfig(beta=0.2), LossConfig(name="hard"))
    ]
    torch.testing.assert_close(pair[0], pair[1], rtol=1e-13, atol=0)


def test_permuting_the_pairs_leaves_the_loss():
    images, texts = features()
    order = torch.randperm(12, generator=torch.Generator().manual_seed(1))
    sets = [IMAGE_SETS[i] for i in order], [TEXT_SETS[i] for i in order]
    scale = torch.tensor(30.0, dtype=torch.float64)
    straight = contrastive_loss(images, texts, scale, ids(IMAGE_SETS), ids(TEXT_SETS), LossConfig()).loss
    permuted = contrastive_loss(images[order], texts[order], scale, ids(sets[0]), ids(sets[1]), LossConfig()).loss
    torch.testing.assert_close(straight, permuted, rtol=1e-13, atol=0)


def test_the_kl_is_zero_where_the_model_predicts_the_targets():
    """Two pairs that share everything: q = (0.8, 0.2); logits whose softmax is that."""
    config = LossConfig(beta=0.2)
    images = torch.eye(2, dtype=torch.float64)
    scale = torch.tensor(math.log(4.0), dtype=torch.float64)
    output = contrastive_loss(images, images, scale, ids([{1}, {1}]), ids([{1}, {1}]), config)
    assert float(output.kl) == pytest.approx(0, abs=1e-12)
    assert float(output.true_pair_mass) == pytest.approx(0.8)


def test_iou_by_hand():
    sets = ids([{1, 2}, {2, 3, 4}, set(), {2**62, 5}])
    wanted = [[1, 1 / 4, 0, 0], [1 / 4, 1, 0, 0], [0, 0, 0, 0], [0, 0, 0, 1]]
    torch.testing.assert_close(iou_matrix(sets, sets, torch.float64), torch.tensor(wanted, dtype=torch.float64))


def test_unknown_names_suggest_the_nearest():
    with pytest.raises(
        InputError, match=r"unknown loss 'object_uoi', perhaps 'object_iou'; known: hard, label_smoothing"
    ):
        LossConfig(name="object_uoi")
    with pytest.raises(InputError, match="unknown target of object_iou 'bugdet', perhaps 'budget'"):
        LossConfig(target="bugdet")
    with pytest.raises(ValueError, match=r"beta must lie in \[0, 1\), found 1.5"):
        LossConfig(beta=1.5)
    assert set(LOSSES) == {"hard", "label_smoothing", "object_iou"}
