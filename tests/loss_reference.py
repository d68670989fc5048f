"""The losses as ten lines of float64 over Python sets, and object sets to hold them against. Used by the tests of losses."""

import math
import random

import torch

from pretrain.losses import LossConfig

CONFIGS = [
    LossConfig(name="hard"),
    LossConfig(name="label_smoothing", smoothing=0.2),
    LossConfig(name="label_smoothing", smoothing=0.3, smoothing_split="all"),
    LossConfig(target="budget", beta=0.2),
    LossConfig(target="budget", beta=0.5, no_overlap="uniform"),
    LossConfig(target="mix", beta=0.3),
    LossConfig(target="l1"),
    LossConfig(target="softmax"),
    LossConfig(name="multi_positive"),
]

# Empty sets, equal sets, disjoint ones, a large one, and text sides that differ from the image sides.
IMAGE_SETS = [{1, 2}, {2}, set(), {1, 2}, {3, 4, 5}, set(), {9}, {2, 3}, set(range(20)), {7}, {1}, {5, 6}]
TEXT_SETS = [{1}, {2}, {8}, {1, 2}, {4}, set(), {9}, {3}, set(range(0, 20, 2)), set(), {1}, {6, 7, 8}]


def iou(a, b):
    return len(a & b) / len(a | b) if a & b else 0.0


def targets(rows, columns, config):
    """Q as the docstrings define it: (N, N) float64, a row for each query."""
    size, beta = len(rows), config.beta
    q = torch.zeros(size, size, dtype=torch.float64)
    for i, a in enumerate(rows):
        ious = [1.0 if i == j else iou(a, b) for j, b in enumerate(columns)]
        others = sum(v for j, v in enumerate(ious) if j != i)
        powers = [math.exp((v - 1) / config.temperature) for v in ious]
        positive = [v > 0 and v >= config.threshold for v in ious]
        for j in range(size):
            one_hot = float(i == j)
            if config.name == "hard" or size == 1:
                q[i, j] = one_hot
            elif config.name == "label_smoothing" and config.smoothing_split == "others":
                q[i, j] = 1 - config.smoothing if i == j else config.smoothing / (size - 1)
            elif config.name == "label_smoothing":
                q[i, j] = (1 - config.smoothing) * one_hot + config.smoothing / size
            elif config.name == "multi_positive":
                q[i, j] = positive[j] / sum(positive)
            elif config.target == "l1":
                q[i, j] = ious[j] / sum(ious)
            elif config.target == "mix":
                q[i, j] = (1 - beta) * one_hot + beta * ious[j] / sum(ious)
            elif config.target == "softmax":
                q[i, j] = powers[j] / sum(powers)
            elif others > 0:
                q[i, j] = 1 - beta if i == j else beta * ious[j] / others
            elif config.no_overlap == "one_hot":
                q[i, j] = one_hot
            else:
                q[i, j] = 1 - beta if i == j else beta / (size - 1)
    return q


def loss(images, texts, theta, image_sets, text_sets, config):
    """The mean of both directions' cross-entropies."""
    logits = theta.exp() * images @ texts.T
    of_images = (targets(image_sets, text_sets, config) * logits.log_softmax(1)).sum(1).mean()
    of_texts = (targets(text_sets, image_sets, config) * logits.T.log_softmax(1)).sum(1).mean()
    return -(of_images + of_texts) / 2


def entropy(image_sets, text_sets, config):
    """The mean entropy of the targets over both directions."""
    sides = ((image_sets, text_sets), (text_sets, image_sets))
    return sum(-torch.xlogy(q, q).sum(1).mean() / 2 for q in (targets(*side, config) for side in sides))


def with_gradients(value, *leaves):
    """The value and its gradients."""
    return [value.detach(), *torch.autograd.grad(value, leaves)]


def features(dtype=torch.float64, size=12, width=16, noise=1.5):
    """Images near their texts, but far from certain: a test on saturated probabilities would show nothing."""
    generator = torch.Generator().manual_seed(0)
    texts = torch.randn(size, width, generator=generator, dtype=torch.float64)
    images = texts + noise * torch.randn(size, width, generator=generator, dtype=torch.float64)
    return [torch.nn.functional.normalize(x, dim=1).to(dtype).requires_grad_() for x in (images, texts)]


def ids(sets):
    """Padded ids as a loader makes them, spread over the whole range of 63 bits."""
    padded = torch.full((len(sets), max(map(len, sets), default=0) or 1), -1)
    for row, values in enumerate(sets):
        spread = sorted((value * 0x1E3779B97F4A7C15) % 2**63 for value in values)
        padded[row, : len(values)] = torch.tensor(spread, dtype=torch.int64)
    return padded


def zipf_sets(size, most, vocabulary, seed, least=0):
    """Sets of `least` to `most` objects by a Zipf law: many share several."""
    draw = random.Random(seed)
    weights = [1 / (rank + 1) for rank in range(vocabulary)]
    return [
        set(draw.choices(range(vocabulary), weights, k=draw.randint(least, most))) if most else set()
        for _ in range(size)
    ]


# Name to (image sets, text sets).
_mixed, _dense, _shared = zipf_sets(60, 6, 30, 0), zipf_sets(40, 64, 200, 1), set(range(100, 107))
BATCHES = {
    "small sets on both sides": (IMAGE_SETS, TEXT_SETS),
    "equal sides": (_mixed, _mixed),
    "texts of one object of the image's": (_mixed, [{min(s)} if s else set() for s in _mixed]),
    "independent sides": (zipf_sets(50, 5, 20, 2), zipf_sets(50, 9, 20, 3)),
    "0 to 64 objects": (_dense, _dense),
    "one large among small": ([*_mixed[:20], set(range(64))], [*_mixed[:20], set(range(30, 94))]),
    "seven objects in all": ([_shared | {i} for i in range(24)], [_shared | {i} for i in range(24)]),
    "all identical": ([{1, 2, 3}] * 16, [{1, 2, 3}] * 16),
    "all identical on one side": ([{1, 2, 3}] * 16, _mixed[:16]),
    "duplicates": (_mixed[:8] * 3, _mixed[:8] * 3),
    "all disjoint": ([{i} for i in range(16)], [{i} for i in range(16)]),
    "all empty": ([set()] * 16, [set()] * 16),
    "nothing between the sides": ([{i % 3} for i in range(16)], [{10 + i % 3} for i in range(16)]),
    "one pair": ([{1}], [{1, 2}]),
    "two pairs": ([{1}, {1}], [{1, 2}, set()]),
}
