"""The losses as ten lines of float64 over Python sets, and object sets to hold them against. Used by the tests of losses."""

import random

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from pretrain.losses import BatchSets, LossConfig, ObjectWeights

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
    LossConfig(target="budget", weights="frequency"),
    LossConfig(target="budget", beta=0.5, no_overlap="uniform", weights="frequency"),
    LossConfig(target="mix", beta=0.3, weights="frequency"),
    LossConfig(target="l1", weights="frequency"),
    LossConfig(target="softmax", temperature=0.2, weights="frequency"),
    LossConfig(name="multi_positive", weights="frequency", threshold=0.4),
    LossConfig(name="siglip"),
    LossConfig(name="siglip", target="iou", beta=0.5),
    LossConfig(name="siglip", target="iou", beta=0.3, weights="frequency"),
]

# Empty sets, equal sets, disjoint ones, a large one, and text sides that differ from the image sides.
IMAGE_SETS = [{1, 2}, {2}, set(), {1, 2}, {3, 4, 5}, set(), {9}, {2, 3}, set(range(20)), {7}, {1}, {5, 6}]
TEXT_SETS = [{1}, {2}, {8}, {1, 2}, {4}, set(), {9}, {3}, set(range(0, 20, 2)), set(), {1}, {6, 7, 8}]


# Where texts have equal ids they are equal: pairs 2, 5 and 9, and pairs 0 and 3.
TEXT_IDS = [40, 1, 50, 40, 4, 50, 6, 7, 8, 50, 10, 11]


def weight(name, config):
    """What an object counts; one counts nothing."""
    return (name % 7) / 3 if config.weights == "frequency" else 1.0


def iou(a, b, config):
    shared, either = (sum(weight(name, config) for name in names) for names in (a & b, a | b))
    return shared / either if shared else 0.0


def targets(rows, columns, config, text_ids=None):
    """Q as the docstrings define it: (N, N) float64, a row for each query."""
    size, beta = len(rows), config.beta
    text_ids = text_ids if text_ids and config.equal_texts == "positives" else range(size)
    q = torch.zeros(size, size, dtype=torch.float64)
    for i, a in enumerate(rows):
        true = [text_ids[i] == text_ids[j] for j in range(size)]
        m, others = sum(true), size - sum(true)
        one_hot = torch.tensor(true, dtype=torch.float64) / m
        ious = torch.tensor([1.0 if true[j] else iou(a, b, config) for j, b in enumerate(columns)], dtype=torch.float64)
        apart = ious.where(one_hot == 0, 0.0)
        powers = ((ious - 1) / config.temperature).exp()
        slack = 1e-5 if config.weights == "frequency" else 0  # weighted IoUs are no fractions
        positive = ((ious > 0) & (ious >= config.threshold * (1 - slack))).double()
        if config.name == "siglip":
            q[i] = m * one_hot + (beta * apart if config.target == "iou" else 0)
        elif config.name in ("hard", "psd") or others == 0:
            q[i] = one_hot
        elif config.name == "label_smoothing":
            share = config.smoothing / (others if config.smoothing_split == "others" else size)
            q[i] = share + (1 - share * size) * one_hot
        elif config.name == "multi_positive":
            q[i] = positive / positive.sum()
        elif config.target == "l1":
            q[i] = ious / ious.sum()
        elif config.target == "mix":
            q[i] = (1 - beta) * one_hot + beta * ious / ious.sum()
        elif config.target == "softmax":
            q[i] = powers / powers.sum()
        elif config.name == "softclip":
            q[i] = (1 - beta) * one_hot + beta * powers / powers.sum()
        elif apart.sum() > 0:
            q[i] = (1 - beta) * one_hot + beta * apart / apart.sum()
        elif config.no_overlap == "one_hot":
            q[i] = one_hot
        else:
            q[i] = (1 - beta) * one_hot + beta / others * (one_hot == 0).double()
    return q


def loss(images, texts, theta, image_sets, text_sets, text_ids, config, bias=None, is_hard=None):
    """The mean of both directions; `is_hard`: psd's pairs with one-hot targets."""
    cosines = images @ texts.T
    logits = theta.exp() * cosines
    sides = (image_sets, text_sets), (text_sets, image_sets)
    if config.name == "siglip":
        q, z = targets(*sides[0], config, text_ids), logits + bias
        return -(q * z.sigmoid().log() + (1 - q) * (-z).sigmoid().log()).sum() / len(images)
    total = 0.0
    for side, z, s in zip(sides, (logits, logits.T), (cosines, cosines.T), strict=True):
        q = targets(*side, config, text_ids)
        if config.name == "psd":
            teacher = (s.T.detach() / config.teacher_temperature).softmax(1)
            q = torch.where(torch.tensor(is_hard)[:, None], q, teacher)
        if config.name == "softclip":
            off = ~torch.eye(len(q), dtype=torch.bool)
            p_off, q_off = z[off].view(len(q), -1).log_softmax(1), q[off].view(len(q), -1)
            total += both_ways(q, z.log_softmax(1))
            if len(q) > 1:
                total += config.negatives_weight * both_ways(q_off / q_off.sum(1, keepdim=True), p_off)
        else:
            total += -(q * z.log_softmax(1)).sum(1).mean()
    return total / 2


def both_ways(q, log_p):
    """KL(q ‖ p) + KL(p ‖ q), halved: the mean over rows."""
    return ((q - log_p.exp()) * (q.log() - log_p)).sum(1).mean() / 2


def entropy(image_sets, text_sets, text_ids, config):
    """The floor of the loss."""
    if config.name == "softclip":
        return torch.tensor(0.0, dtype=torch.float64)
    sides = ((image_sets, text_sets), (text_sets, image_sets))
    found = torch.zeros((), dtype=torch.float64)
    for q in (targets(*side, config, text_ids) for side in sides):
        found -= torch.xlogy(q, q).sum(1).mean() / 2
        if config.name == "siglip":
            found -= torch.xlogy(1 - q, 1 - q).sum(1).mean() / 2
    return found


def with_gradients(value, *leaves):
    """The value and its gradients."""
    return [value.detach(), *torch.autograd.grad(value, leaves)]


def features(dtype=torch.float64, size=12, width=16, noise=1.5):
    """Images near their texts, but far from certain: a test on saturated probabilities would show nothing."""
    generator = torch.Generator().manual_seed(0)
    texts = torch.randn(size, width, generator=generator, dtype=torch.float64)
    images = texts + noise * torch.randn(size, width, generator=generator, dtype=torch.float64)
    return [torch.nn.functional.normalize(x, dim=1).to(dtype).requires_grad_() for x in (images, texts)]


class LargestTensor(TorchDispatchMode):
    """Looks at every tensor that torch makes; `size` is the largest one's number of entries."""

    size = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        for value in made if isinstance(made, tuple | list) else (made,):
            if isinstance(value, torch.Tensor):
                self.size = max(self.size, value.numel())
        return made


def object_ids(names):
    """Ids of objects, spread over the whole range of 63 bits."""
    return [(name * 0x1E3779B97F4A7C15) % 2**63 for name in names]


def ids(sets):
    """Padded ids as a loader makes them."""
    padded = torch.full((len(sets), max(map(len, sets), default=0) or 1), -1)
    for row, values in enumerate(sets):
        padded[row, : len(values)] = torch.tensor(sorted(object_ids(values)), dtype=torch.int64)
    return padded


def batch_sets(image_sets, text_sets, text_ids=None):
    """What the losses take."""
    return BatchSets(ids(image_sets), ids(text_sets), None if text_ids is None else torch.tensor(list(text_ids)))


def weights(config, names=range(300)):
    """What the losses take for the weights above; an unseen object (not among `names`) counts 1."""
    pairs = sorted(zip(object_ids(names), (weight(name, config) for name in names), strict=True))
    return ObjectWeights(
        torch.tensor([i for i, _ in pairs]), torch.tensor([w for _, w in pairs], dtype=torch.float64), 1.0
    )


def zipf_sets(size, most, vocabulary, seed, least=0):
    """Sets of `least` to `most` objects by a Zipf law: many share several."""
    draw = random.Random(seed)
    weights = [1 / (rank + 1) for rank in range(vocabulary)]
    return [
        set(draw.choices(range(vocabulary), weights, k=draw.randint(least, most))) if most else set()
        for _ in range(size)
    ]


# Name to (image sets, text sets, ids of texts).
_mixed, _dense, _shared = zipf_sets(60, 6, 30, 0), zipf_sets(40, 64, 200, 1), set(range(100, 107))
BATCHES = {
    "small sets on both sides": (IMAGE_SETS, TEXT_SETS, None),
    "equal texts": (IMAGE_SETS, TEXT_SETS, TEXT_IDS),
    "equal sides": (_mixed, _mixed, None),
    "texts of one object of the image's": (_mixed, [{min(s)} if s else set() for s in _mixed], None),
    "independent sides": (zipf_sets(50, 5, 20, 2), zipf_sets(50, 9, 20, 3), None),
    "0 to 64 objects": (_dense, _dense, None),
    "one large among small": ([*_mixed[:20], set(range(64))], [*_mixed[:20], set(range(30, 94))], None),
    "seven objects in all": ([_shared | {i} for i in range(24)], [_shared | {i} for i in range(24)], None),
    "all identical": ([{1, 2, 3}] * 16, [{1, 2, 3}] * 16, None),
    "all identical on one side": ([{1, 2, 3}] * 16, _mixed[:16], None),
    "duplicates": (_mixed[:8] * 3, _mixed[:8] * 3, None),
    "all disjoint": ([{i} for i in range(16)], [{i} for i in range(16)], None),
    "all empty": ([set()] * 16, [set()] * 16, None),
    "nothing between the sides": ([{i % 3} for i in range(16)], [{10 + i % 3} for i in range(16)], None),
    "one pair": ([{1}], [{1, 2}], None),
    "duplicates with equal texts": (_mixed[:8] * 3, _mixed[:8] * 3, [*range(8)] * 2 + [*range(4), 20, 21, 22, 23]),
    "all texts equal": (_mixed[:16], _mixed[16:32], [7] * 16),
    "all equal": ([{1, 2, 3}] * 16, [{1, 2, 3}] * 16, [7] * 16),
    "two pairs": ([{1}, {1}], [{1, 2}, set()], None),
}
