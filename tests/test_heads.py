"""Heads and matching: each against its plain formula in float64, sample by sample without a mask, values and all gradients;
what must hold of all of them; and what is special to one.
"""

import copy
import math

import pytest
import torch
from torch.nn.functional import gelu, layer_norm, normalize

from benchmarks.heads import Backbone, measure, table_of
from eval_suite.head_pictures import slot_cards, slot_words, subspace_pictures
from setclip.errors import InputError
from setclip.models.heads import HEADS, HeadOutput, SideWidths, make_pair, side_by_side
from setclip.models.heads.asa import Asa
from setclip.models.heads.dhset import DhSetImage, DhSetText, hybrid_of
from setclip.models.heads.gpo import Gpo
from setclip.models.heads.local import Local
from setclip.models.heads.pie import Pie
from setclip.models.heads.slot import Slot
from setclip.models.heads.transformer import Transformer
from setclip.models.matching import MATCHINGS, DhSetRows, blocks, make_matching, score_matrix
from setclip.models.matching.dhset import HybridOf
from setclip.models.subspaces import SubSpaces, soft_mask, thresholds
from setclip.similarity import make_similarity

B, N, E, F, D = 5, 7, 8, 6, 10
IMAGE, TEXT = SideWidths(E, F), SideWidths(E, F)
SMALL = {"slot": {"heads": 2, "head_width": 6}, "transformer": {"heads": 2, "head_width": 6}}
VALID = torch.arange(N) < torch.tensor([7, 3, 1, 5, 2])[:, None]


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def inputs(dtype=torch.float64):
    """Local features, some of them padding of another kind than zeros, their mask, and global features."""
    return draw(B, N, E, dtype=dtype), VALID, draw(B, F, seed=1, dtype=dtype)


def shaken(module, seed=3):
    """The module in float64 for evaluation, no parameter of which is 0 or 1."""
    generator = torch.Generator().manual_seed(seed)
    module = module.double().eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return module


def pair_of(name, seed=0, **options):
    torch.manual_seed(seed)
    return make_pair(name, IMAGE, TEXT, width=D, options={**SMALL.get(name, {}), **options})


def the_same(found, expected, leaves):
    """Values, and gradients of a fixed combination of them."""
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)
    weights = draw(*found.shape, seed=9)
    gradients = [
        torch.autograd.grad((x * weights).sum(), leaves, allow_unused=True, retain_graph=True)
        for x in (found, expected)
    ]
    assert any(g is not None and g.abs().max() > 1e-6 for g in gradients[0])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-11)


def outcome(head, local, mask=None, pooled=None):
    return head(local, mask, pooled if head.takes_global else None)


# --- plain formulas, of one sample with the inputs that it has: x (n, E), φ (F,)


def linear(head, name, x):
    bias = dict(head.named_parameters()).get(f"{name}.bias")
    product = x @ head.get_parameter(f"{name}.weight").T
    return product if bias is None else product + bias


def norm(head, name, x):
    weight, bias = head.get_parameter(f"{name}.weight"), head.get_parameter(f"{name}.bias")
    return (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + 1e-5).sqrt() * weight + bias


def plain_code(length, divisor):
    code = torch.zeros(length, E, dtype=torch.float64)
    for place in range(length):
        for i in range(E):
            angle = (place + 1) / (divisor + 1e-6) * 2 * math.pi / 10_000 ** (2 * (i // 2) / E)
            code[place, i] = math.sin(angle) if i % 2 == 0 else math.cos(angle)
    return code


def plain_slot(head, x, phi, code=None, padded=(), over="slots"):
    """`padded`: which places of x are padding that leaks in, as the released code has it."""
    context = norm(head, "input_norm", x)
    keys = linear(head, "to_keys", context if code is None else context + code)
    values = linear(head, "to_values", context)
    slots, per_head = head.slots, keys.shape[1] // head.heads
    for _ in range(head.blocks):
        queries = linear(head, "to_queries", norm(head, "slot_norm", slots))
        taken = []
        for h in range(head.heads):
            part = slice(h * per_head, (h + 1) * per_head)
            m = keys[:, part] @ queries[:, part].T / math.sqrt(per_head)  # (n, K)
            if over == "inputs":
                weights = m.exp() / m.exp().sum(0)
            else:
                a = torch.stack(
                    [torch.full_like(row, 1 / len(row)) if n in padded else row.softmax(0) for n, row in enumerate(m)]
                )
                weights = a / (a.sum(0) + 1e-7)
            taken.append(weights.T @ values[:, part])
        slots = linear(head, "to_out.0", torch.cat(taken, 1)) + slots
        slots = linear(head, "mlp.4", gelu(linear(head, "mlp.1", norm(head, "mlp.0", slots)))) + slots
    residuals = norm(head, "set_norm", slots)
    return normalize(residuals + norm(head, "global_norm", linear(head, "global_projection", phi)), dim=1), residuals


def plain_pie(head, x, phi):
    a = linear(head, "to_maps", linear(head, "to_hidden", x).tanh()).softmax(0)
    r = 1 / (1 + (-linear(head, "to_residuals", a.T @ x)).exp())
    return normalize(norm(head, "norm", linear(head, "global_projection", phi) + r), dim=1)


def plain_gru(head, code, suffix):
    """PyTorch's GRU, a step at a time."""
    w, u = (head.get_parameter(f"gru.weight_{kind}_l0{suffix}") for kind in ("ih", "hh"))
    b, c = (head.get_parameter(f"gru.bias_{kind}_l0{suffix}") for kind in ("ih", "hh"))
    state, states = torch.zeros(32, dtype=torch.float64), []
    for step in code:
        (r, z, n), (hr, hz, hn) = (w @ step + b).chunk(3), (u @ state + c).chunk(3)
        r, z = (r + hr).sigmoid(), (z + hz).sigmoid()
        n = (n + r * hn).tanh()
        state = (1 - z) * n + z * state
        states.append(state)
    return torch.stack(states)


def plain_gpo(head, x, phi):
    code = torch.tensor(
        [
            [(math.sin if i % 2 == 0 else math.cos)(place / 10_000 ** (2 * (i // 2) / 32)) for i in range(32)]
            for place in range(len(x))
        ],
        dtype=torch.float64,
    )
    states = (plain_gru(head, code, "") + plain_gru(head, code.flip(0), "_reverse").flip(0)) / 2
    theta = (states @ head.get_parameter("to_weight.weight")[0] / 0.1).softmax(0)
    values = linear(head, "projection", x).sort(0, descending=True).values
    return normalize(theta @ values, dim=0)[None]


def plain_subspaces(subspaces):
    """The sparse rows, row by row."""
    found = []
    for matrix, alpha in zip(subspaces.weight, subspaces.alpha, strict=True):
        rows = []
        for w in matrix.sigmoid():
            t = w.min() + (w.max() - w.min()) * alpha.sigmoid()
            m = (50 * (w - t)).exp().tanh()
            rows.append(m * w / (m * w).norm())
        found.append(torch.stack(rows))
    return torch.stack(found)


def plain_dhset_text(head, x, phi):
    u = normalize(linear(head, "pool.projection", x).mean(0), dim=0)
    profiles = plain_subspaces(head.subspaces).sum(1)
    return torch.stack(
        [c * normalize(v, dim=0) for c, v in zip(profiles, linear(head, "into", u).chunk(4), strict=True)]
    )


PLAIN = {
    "slot": (Slot, {"heads": 2, "head_width": 6}, lambda h, x, p: plain_slot(h, x, p)[0]),
    "slot with places": (
        Slot,
        {"heads": 2, "head_width": 6, "position": "sine", "num_elements": 3, "blocks": 2},
        lambda h, x, p: plain_slot(h, x, p, plain_code(len(x), len(x)))[0],
    ),
    "transformer": (
        Transformer,
        {"heads": 2, "head_width": 6},
        lambda h, x, p: plain_slot(h, x, p, over="inputs")[0],
    ),
    "pie": (Pie, {"num_elements": 3}, plain_pie),
    "gpo": (Gpo, {}, plain_gpo),
    "local": (Local, {}, lambda h, x, p: normalize(linear(h, "projection", x), dim=1)),
    "dhset": (DhSetText, {}, plain_dhset_text),
}


@pytest.mark.parametrize("name", PLAIN)
def test_a_head_is_its_plain_formula_with_all_gradients(name):
    cls, options, plain = PLAIN[name]
    head = shaken(cls(E, D, F, **options))
    local, mask, pooled = inputs()
    local.requires_grad_()
    pooled.requires_grad_()
    found = outcome(head, local, mask, pooled)
    rows = [plain(head, local[i, mask[i]], pooled[i]) for i in range(B)]
    if found.mask is None:
        found_sets, expected = found.sets, torch.stack(rows)
    else:
        found_sets, expected = found.sets[found.mask], torch.cat(rows)
        assert not found.sets[~found.mask].any()
    leaves = [local, *head.parameters(), *([pooled] if head.takes_global else [])]
    the_same(found_sets, expected, leaves)


def test_residuals_of_slots_are_their_elements_before_the_global_feature_is_added():
    head = shaken(Slot(E, D, F, heads=2, head_width=6))
    local, mask, pooled = inputs()
    found = head(local, mask, pooled)
    for i in range(B):
        torch.testing.assert_close(found.residuals[i], plain_slot(head, local[i, mask[i]], pooled[i])[1])


# --- what holds of all heads


def sides():
    for name in HEADS:
        for side in ("image", "text"):
            yield pytest.param(name, side, id=f"{name}, {side}")


@pytest.mark.parametrize(("name", "side"), list(sides()))
def test_padding_and_batch_mates_have_no_influence(name, side):
    head = shaken(getattr(pair_of(name), side))
    local, mask, pooled = inputs()
    together = outcome(head, local, mask, pooled)
    longer = torch.cat((local.masked_fill(~mask[..., None], torch.nan), torch.full((B, 3, E), 1e4)), 1).double()
    padded = outcome(head, longer, torch.nn.functional.pad(mask, (0, 3)), pooled)
    for i in range(B):
        n = int(mask[i].sum())
        alone = outcome(head, local[i : i + 1, :n], None, pooled[i : i + 1])
        for batch in (together, padded):
            there = batch.sets[i] if batch.mask is None else batch.sets[i, batch.mask[i]]
            torch.testing.assert_close(there, alone.sets[0], rtol=1e-9, atol=1e-12)
            if batch.attention is not None:
                torch.testing.assert_close(batch.attention[i, :, :n], alone.attention[0])
                assert not batch.attention[i, :, n:].any()


@pytest.mark.parametrize("name", HEADS)
def test_the_order_of_image_inputs_has_no_influence_on_the_scores(name):
    pair = shaken(pair_of(name))
    local, mask, pooled = inputs()
    order = torch.randperm(N, generator=torch.Generator().manual_seed(4))
    texts = outcome(pair.text, local, mask, pooled)
    straight, mixed = (
        pair.scores(outcome(pair.image, x, m, pooled), texts)
        for x, m in ((local, mask), (local[:, order], mask[:, order]))
    )
    torch.testing.assert_close(straight, mixed, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("autocast", [False, True], ids=["inputs alone", "autocast"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("name", HEADS)
def test_gradients_are_finite_in_each_precision_and_reach_every_parameter(name, dtype, autocast):
    pair = pair_of(name)
    local, mask, pooled = inputs(dtype)
    # PCME's probabilities of samples far apart have gradients below fp16's smallest number
    local = ((0.5 if name == "pcme" else 8) * local).requires_grad_()
    with torch.autocast("cpu", dtype, enabled=autocast and dtype != torch.float32):
        images, texts = outcome(pair.image, local, None, pooled), outcome(pair.text, local, mask, pooled)
        scores = pair.scores(images, texts)
    assert scores.dtype == images.sets.dtype == texts.sets.dtype == torch.float32
    (scores * draw(B, B, seed=5).float()).sum().backward()
    assert name == "single" or local.grad.isfinite().all()
    # nothing in the whole pair is idle, but what begins as identity: ASA's second half
    idle = {name for name, p in pair.named_parameters() if p.grad is None or not p.grad.any()}
    assert all(p.grad.isfinite().all() for p in pair.parameters() if p.grad is not None)
    assert not {name for name in idle if "attention.0" not in name}


@pytest.mark.parametrize("name", HEADS)
def test_scores_in_half_precision_are_near_those_of_float32(name):
    pair = pair_of(name).eval()
    local, mask, pooled = inputs(torch.float32)
    exact = pair.scores(outcome(pair.image, local, None, pooled), outcome(pair.text, local, mask, pooled))
    with torch.autocast("cpu", torch.bfloat16):
        rough = pair.scores(outcome(pair.image, local, None, pooled), outcome(pair.text, local, mask, pooled))
    assert (exact - rough).abs().max() < 0.05


@pytest.mark.parametrize("name", HEADS)
def test_blocks_give_the_scores_of_one_piece_and_its_gradients(name):
    pair = shaken(pair_of(name))
    local, mask, pooled = inputs()
    images, texts = outcome(pair.image, local, mask, pooled), outcome(pair.text, local, mask, pooled)
    whole = pair.similarity(images.sets, texts.sets, images.mask, texts.mask)
    leaves = list(pair.parameters())
    the_same(pair.scores(images, texts, block_size=2), whole, leaves)
    with torch.no_grad():
        rough = {"rtol": 1e-5, "atol": 1e-5}  # sums of grids are in float32 there
        torch.testing.assert_close(pair.scores(images, texts, block_size=2).double(), whole.double(), **rough)


def test_weights_survive_saving_and_no_tensor_is_saved_twice():
    for name in HEADS:
        for inference in ("set", "hybrid") if HEADS[name].has_hybrid else ("set",):
            pair = make_pair(name, IMAGE, TEXT, width=D, inference=inference)
            state = pair.state_dict()
            assert len({t.data_ptr() for t in state.values()}) == len(state), name
            other = make_pair(name, IMAGE, TEXT, width=D, inference=inference)
            other.load_state_dict(state)
            local, mask, pooled = inputs(torch.float32)
            both = [
                p.eval().scores(outcome(p.image, local, mask, pooled), outcome(p.text, local, mask, pooled), True)
                for p in (pair, other)
            ]
            assert torch.equal(*both), name


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: make_pair("slots", IMAGE, TEXT), r"unknown head 'slots', perhaps 'slot'"),
        (lambda: pair_of("gpo", num_elements=3), r"expected options of head gpo among none, found num_elements"),
        (lambda: make_pair("pie", SideWidths(8), TEXT), r"expected a global_width for Pie.*found none"),
        (
            lambda: make_pair("slot", IMAGE, TEXT, inference="hybrid"),
            r"hybrid of dhset, dhset_fragment, found 'hybrid'",
        ),
        (lambda: pair_of("dhset", pool="sum"), r"expected pool to be one of mean, max, gpo, global, found 'sum'"),
        (lambda: pair_of("mean").image(draw(2, 3, 9)), r"expected local features \(B, N, 8\).*found \(2, 3, 9\)"),
        (lambda: pair_of("slot").image(draw(2, 3, 8)), r"expected global features \(2, 6\) for Slot, found none"),
        (
            lambda: pair_of("mean").image(draw(2, 3, 8), torch.zeros(2, 3, dtype=torch.bool)),
            r"expected an input in each sample, found none in 2 of 2",
        ),
        (
            lambda: pair_of("mean").image(draw(2, 3, 8), torch.ones(2, 3)),
            r"expected a mask \(2, 3\), bool, for Mean, found \(2, 3\) of torch.float32",
        ),
        (lambda: make_matching("scan", direction="up"), r"expected direction to be one of i2t, t2i, found 'up'"),
        (lambda: make_matching("max_mean", alpha=2), r"expected for similarity 'max_mean' no options, found alpha"),
        (
            lambda: pair_of("dhset").bfloat16().text(draw(2, 3, 8)),
            r"expected sub-spaces in float32, found torch.bfloat16",
        ),
    ],
)
def test_what_does_not_fit_is_an_error_that_says_so(call, message):
    with pytest.raises(InputError, match=message):
        call()


# --- slots


def test_slots_share_each_input_and_inputs_share_each_slot():
    head = shaken(Slot(E, D, F, heads=2, head_width=6))
    local, mask, pooled = inputs()
    found = head(local, mask, pooled)
    torch.testing.assert_close(found.auxiliary["competition"].sum(1), mask.double())  # of valid inputs, over slots
    torch.testing.assert_close(found.attention.sum(2), torch.ones(B, 4).double(), rtol=0, atol=1e-5)


def test_compat_lets_padding_leak_in_and_batch_mates_move_places():
    """The released code: a padded input gives each slot 1/K, and places are fractions of the padded length."""
    head = shaken(Slot(E, D, F, heads=2, head_width=6, position="sine", compat=True))
    local, mask, pooled = inputs()
    local.requires_grad_()
    found = head(local, mask, pooled).sets
    expected = torch.stack(
        [
            plain_slot(head, local[i], pooled[i], plain_code(N, N), padded=(~mask[i]).nonzero().flatten().tolist())[0]
            for i in range(B)
        ]
    )
    the_same(found, expected, [local, *head.parameters()])
    fixed = copy.deepcopy(head)
    fixed.compat = fixed.reads_padding = False
    other = fixed(local, mask, pooled).sets
    torch.testing.assert_close(other[0], found[0])  # the longest has no padding
    assert (other[1:] - found[1:]).abs().amax((1, 2)).min() > 0.01


def test_slots_and_smooth_chamfer_together_are_their_plain_formula():
    pair = shaken(pair_of("slot"))
    local, mask, pooled = inputs()
    found = pair.scores(pair.image(local, mask, pooled), pair.text(local, mask, pooled))
    image = [plain_slot(pair.image, local[i, mask[i]], pooled[i])[0] for i in range(B)]
    text = [
        plain_slot(pair.text, local[i, mask[i]], pooled[i], plain_code(int(mask[i].sum()), int(mask[i].sum())))[0]
        for i in range(B)
    ]
    rows = []
    for v in image:
        row = []
        for t in text:
            e = (16 * v @ t.T).exp()
            row.append(e.sum(1).log().sum() / (32 * len(v)) + e.sum(0).log().sum() / (32 * len(t)))
        rows.append(torch.stack(row))
    the_same(found, torch.stack(rows), list(pair.parameters()))


# --- pooling


def test_gpo_with_all_weight_on_the_first_place_is_the_maximum_and_with_equal_weights_the_mean():
    local, mask, _ = inputs()
    gpo = shaken(Gpo(E, D))
    values = gpo.projection(local)
    gpo.weights = lambda lengths, size: torch.nn.functional.one_hot(torch.zeros_like(lengths), size).double()
    expected = torch.stack([values[i, mask[i]].amax(0) for i in range(B)])
    torch.testing.assert_close(gpo(local, mask).sets[:, 0], normalize(expected, dim=1))
    gpo.weights = lambda lengths, size: mask.double() / mask.sum(1, keepdim=True)
    expected = torch.stack([values[i, mask[i]].mean(0) for i in range(B)])
    torch.testing.assert_close(gpo(local, mask).sets[:, 0], normalize(expected, dim=1))


def test_mean_max_and_single_are_what_they_say():
    local, mask, pooled = inputs()
    for name, expected in (
        ("mean", lambda h, i: h.projection(local[i, mask[i]]).mean(0)),
        ("max", lambda h, i: h.projection(local[i, mask[i]]).amax(0)),
        ("single", lambda h, i: h.projection(pooled[i])),
    ):
        head = shaken(pair_of(name).image)
        found = outcome(head, local, mask, pooled)
        torch.testing.assert_close(
            found.sets[:, 0], normalize(torch.stack([expected(head, i) for i in range(B)]), dim=1)
        )


def test_single_takes_the_direction_of_its_input_alone_where_that_is_wanted():
    _, _, pooled = inputs()
    pair = make_pair("single", IMAGE, TEXT, D, image_options={"normalise_input": True}).double()
    found = outcome(pair.image, draw(B, N, E), None, pooled).sets
    expected = pair.image.projection(normalize(pooled, dim=-1))
    torch.testing.assert_close(found[:, 0], normalize(expected, dim=-1))
    assert not torch.allclose(found[:, 0], normalize(pair.image.projection(pooled), dim=-1))


# --- multi-scale self-attention


def plain_asa(part, x, training_rows=None):
    """One scale: x (n, E) of one sample; BatchNorm by its running statistics."""

    def bn(name, y):
        m = getattr(part, name).norm
        return (y - m.running_mean) / (m.running_var + m.eps).sqrt() * m.weight + m.bias

    if part.expand is not None:
        x = bn("expand_norm", linear(part, "expand", x)).clamp_min(0)
    attention = (linear(part, "theta", x) @ linear(part, "phi", x).T).softmax(1)
    z = x + part.gate * bn("back_norm", linear(part, "back", attention @ linear(part, "g", x)))
    return linear(part, "out", z)


@pytest.mark.parametrize("gate", [False, True])
def test_self_attention_of_one_scale_is_its_plain_formula(gate):
    head = shaken(Asa(E, D, gate=gate, candidate_width=12))
    head.attention[0].back_norm.norm.running_mean.uniform_(-1, 1)
    local, mask, _ = inputs()
    local.requires_grad_()
    found = head(local, mask)
    expected = torch.cat([normalize(plain_asa(head.attention[0], local[i, mask[i]]), dim=1) for i in range(B)])
    the_same(found.sets[found.mask], expected, [local, *head.parameters()])


def test_self_attention_begins_as_identity():
    torch.manual_seed(0)
    for gate in (False, True):
        head = Asa(E, D, gate=gate).double()
        local, mask, _ = inputs()
        torch.testing.assert_close(head(local, mask).sets[mask], normalize(head.attention[0].out(local), dim=2)[mask])


def test_batchnorm_of_self_attention_counts_only_inputs_that_are_there():
    head = Asa(E, D, candidate_width=12).double().train()
    local, mask, _ = inputs()
    head(local.masked_fill(~mask[..., None], 1e6), mask)
    rows = head.attention[0].expand(local[mask])
    running = head.attention[0].expand_norm.norm.running_mean
    torch.testing.assert_close(running, 0.1 * rows.mean(0))


@pytest.mark.parametrize("pool", ["max", "avg"])
@pytest.mark.parametrize("fusion", ["instances", "channels"])
def test_finer_maps_are_pooled_to_the_coarsest_grid(pool, fusion):
    head = shaken(Asa(6, D, scales=[(4, 4), (2, 2)], widths=[3, 6], pool=pool, fusion=fusion))
    fine, coarse = draw(B, 3, 4, 4, seed=1), draw(B, 6, 2, 2, seed=2)
    found = head(side_by_side([fine, coarse])).sets
    for i in range(B):
        instances = normalize(plain_asa(head.attention[0], fine[i].flatten(1).T), dim=1).view(4, 4, D)
        corners = [instances[r : r + 2, c : c + 2].reshape(4, D) for r in (0, 2) for c in (0, 2)]
        pooled = torch.stack([x.amax(0) if pool == "max" else x.mean(0) for x in corners])
        last = normalize(plain_asa(head.attention[1], coarse[i].flatten(1).T), dim=1)
        if fusion == "instances":
            expected = normalize(torch.cat((pooled, last)), dim=1)
        else:
            expected = normalize(linear(head, "fuse", torch.cat((pooled, last), 1)), dim=1)
        torch.testing.assert_close(found[i], expected)


def test_a_fine_map_is_attended_to_by_its_2_by_2_maxima():
    head = shaken(Asa(4, D, scales=[(16, 16)]))
    local = draw(1, 256, 4)
    part = head.attention[0]
    keys, content = (
        linear(part, name, local[0]).T.view(2, 8, 2, 8, 2).amax((2, 4)).flatten(1).T for name in ("phi", "g")
    )
    taken = (linear(part, "theta", local[0]) @ keys.T).softmax(1) @ content
    bn = part.back_norm.norm
    z = (
        local[0]
        + (linear(part, "back", taken) - bn.running_mean) / (bn.running_var + bn.eps).sqrt() * bn.weight
        + bn.bias
    )
    torch.testing.assert_close(head(local).sets[0], normalize(linear(part, "out", z), dim=1))


# --- DH-Set: mask and threshold


def test_the_mask_has_the_values_of_tanh_of_exp():
    table = {
        3.0: 1.0,
        2.0: 0.9999992,
        1.0: 0.9913,
        0.0: 0.7616,
        -0.2592: 0.648,
        -0.5991: 0.5,
        -1.0: 0.352,
        -4.605: 0.01,
    }
    for x, expected in table.items():
        assert soft_mask(torch.tensor(x, dtype=torch.float64)).item() == pytest.approx(expected, abs=6e-4)
    slopes = {0.0: 0.4200, 1.0: 0.047, -0.2592: 0.4477, -1.0: 0.322, 2.0: 1.1e-5, 3.0: 0.0}
    for x, expected in slopes.items():
        at = torch.tensor(x, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.grad(soft_mask(at), at)[0].item() == pytest.approx(expected, abs=6e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_the_masks_gradient_is_finite_however_large_its_argument(dtype):
    x = torch.tensor([0.0, 1, 3, 3.9, 4, 11, 12, 88, 89, 200, 1e4], dtype=dtype)
    x = torch.cat((x, -x)).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        value = soft_mask(x)
    assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    (gradient,) = torch.autograd.grad(value.sum(), x)
    assert gradient.isfinite().all()
    assert gradient[5:11].eq(0).all()
    # of what the clamp guards against
    plain = x.detach().float().requires_grad_()
    assert torch.autograd.grad(plain.exp().tanh().sum(), plain)[0].isnan().any()


def test_the_clamp_changes_nothing():
    x = torch.linspace(-20, 700, 7201, dtype=torch.float64)
    torch.testing.assert_close(soft_mask(x), x.exp().tanh(), rtol=0, atol=1e-15)


def test_the_threshold_moves_with_its_row_and_scaling_a_row_is_scaling_the_sharpness():
    rows, alpha = draw(4, 3, 20), draw(4, seed=1)
    t = thresholds(rows, alpha)
    torch.testing.assert_close(thresholds(rows + 5, alpha), t + 5)
    torch.testing.assert_close(thresholds(3 * rows, alpha), 3 * t)
    space, steeper, shifted = (
        SubSpaces(4, 20, 3, sharpness=s, row_activation="identity").double() for s in (10, 30, 10)
    )
    with torch.no_grad():
        space.weight.copy_(3 * rows)
        steeper.weight.copy_(rows)
        shifted.weight.copy_(3 * rows + 5)
    torch.testing.assert_close(space.arguments(space.weight), steeper.arguments(steeper.weight))
    torch.testing.assert_close(space.arguments(space.weight), shifted.arguments(shifted.weight))


def test_sub_spaces_in_float32_have_finite_gradients_at_any_sharpness():
    for sharpness in (50.0, 1e4):
        space = SubSpaces(4, 64, 16, sharpness)
        space.profiles().square().sum().backward()
        assert space.weight.grad.isfinite().all()
        assert space.alpha.grad.isfinite().all()


def test_statistics_of_sub_spaces_tell_alike_from_different():
    space = SubSpaces(2, 40, 1, row_activation="identity")
    with torch.no_grad():
        space.weight.zero_()
        space.weight[0, 0, :20] = 1.0
        space.weight[1, 0, 20:] = 1.0
    apart = space.statistics()
    assert apart["kept"] == 0.5
    assert apart["near_threshold"] == 0
    assert apart["profile_cosine"] == pytest.approx(0, abs=1e-6)
    assert apart["top_overlap"] == 0
    with torch.no_grad():
        space.weight[1] = space.weight[0]
    alike = space.statistics()
    assert alike["profile_cosine"] == pytest.approx(1)
    assert alike["top_overlap"] == 1
    single = SubSpaces(1, 40).statistics()
    assert single["profile_cosine"] == single["top_overlap"] == 0


# --- DH-Set: set and hybrid


def dhset_pair(norm="none", **options):
    pair = make_pair("dhset", IMAGE, TEXT, width=D, options={"norm": norm, **options}, inference="hybrid")
    return shaken(pair)


def test_hybrid_scores_are_set_scores_without_norms():
    """⟨v, Σ c ⊙ u⟩ is exactly Σ over sub-spaces and rows of W̃ (v ⊙ u), and K times the set score."""
    pair = dhset_pair()
    local, mask, _ = inputs()
    images, texts = pair.image(local, mask), pair.text(local, mask)
    v, w = images.sets[:, 0], texts.sets
    rows = plain_subspaces(pair.text.subspaces)
    u = w / rows.sum(1)
    by_rows = torch.einsum("krd,id,tkd->it", rows, v, u)
    torch.testing.assert_close(by_rows, v @ w.sum(1).T, rtol=0, atol=1e-13)
    torch.testing.assert_close(pair.scores(images, texts, inference=True), by_rows, rtol=0, atol=1e-13)
    torch.testing.assert_close(4 * pair.scores(images, texts), by_rows, rtol=0, atol=1e-13)


def test_the_order_of_rows_and_of_sub_spaces_changes_nothing():
    pair = dhset_pair("cos")
    local, mask, _ = inputs()
    mixed = copy.deepcopy(pair)
    order, rows = torch.tensor([2, 0, 3, 1]), torch.randperm(16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        space, into = mixed.text.subspaces, mixed.text.into
        space.weight.copy_(space.weight[order][:, rows])
        space.alpha.copy_(space.alpha[order])
        into.weight.copy_(into.weight.view(4, D, D)[order].flatten(0, 1))
        into.bias.copy_(into.bias.view(4, D)[order].flatten())
    both = [(p, p.image(local, mask), p.text(local, mask)) for p in (pair, mixed)]
    for inference in (False, True):
        torch.testing.assert_close(*(p.scores(i, t, inference) for p, i, t in both))
    torch.testing.assert_close(*(p.text.hybrid(t.sets) for p, _, t in both))
    torch.testing.assert_close(both[0][2].sets[:, order], both[1][2].sets)


def test_hybrid_vectors_alone_give_the_hybrid_scores():
    for norm in ("cos", "l2"):
        pair = dhset_pair(norm)
        local, mask, _ = inputs()
        images, texts = pair.image(local, mask), pair.text(local, mask)
        vectors = pair.text.hybrid(texts.sets)
        torch.testing.assert_close(vectors.norm(dim=1), torch.ones(B).double())
        torch.testing.assert_close(images.sets[:, 0] @ vectors.T, pair.scores(images, texts, inference=True))


def test_hard_mixing_keeps_of_each_dimension_the_sub_space_that_weighs_it_most():
    profiles = torch.tensor([[3.0, 1.0, 2.0], [1.0, 2.0, 5.0]])
    sets = torch.tensor([[[3.0, 4.0, 5.0], [6.0, 7.0, 8.0]]])
    found = hybrid_of(sets, profiles, hard=True)
    torch.testing.assert_close(found, normalize(torch.tensor([[3.0, 7.0, 8.0]]), dim=1))
    torch.testing.assert_close(hybrid_of(sets, profiles), normalize(torch.tensor([[9.0, 11.0, 13.0]]), dim=1))


def test_the_norm_of_x_dim_is_its_plain_formula():
    pair = dhset_pair("l2")
    local, mask, _ = inputs()
    images, texts = pair.image(local, mask), pair.text(local, mask)
    rows = plain_subspaces(pair.text.subspaces)
    expected = torch.zeros(B, B, dtype=torch.float64)
    for i, v in enumerate(images.sets[:, 0]):
        for t, u in enumerate(texts.sets):
            ys = [rows[k] @ (v * u[k]) for k in range(4)]
            expected[i, t] = sum(y.sum() / y.norm() / math.sqrt(16) for y in ys) / 4
    the_same(pair.scores(images, texts), expected, list(pair.parameters()))
    assert isinstance(pair.similarity, DhSetRows)
    assert not list(pair.similarity.parameters())


def test_one_sub_space_works():
    pair = shaken(make_pair("dhset", IMAGE, TEXT, width=D, options={"num_elements": 1}, inference="hybrid"))
    local, mask, _ = inputs()
    images, texts = pair.image(local, mask), pair.text(local, mask)
    torch.testing.assert_close(pair.scores(images, texts), pair.scores(images, texts, inference=True))


def test_dh_set_names_what_learns_faster_and_does_not_decay():
    head = DhSetText(E, D)
    assert head.learning_rate_factors() == {"subspaces.weight": 10.0, "subspaces.alpha": 10.0}
    assert set(head.learning_rate_factors()) == head.without_weight_decay() <= set(dict(head.named_parameters()))
    assert Slot(E, D).learning_rate_factors() == {}


def test_the_image_of_dh_set_is_shared_by_all_sub_spaces():
    for pool in ("mean", "max", "gpo", "global"):
        local, mask, pooled = inputs()
        found = outcome(shaken(DhSetImage(E, D, F, pool=pool)), local, mask, pooled)
        assert found.sets.shape == (B, 1, D)


@pytest.mark.parametrize("norm", ["cos", "none"])
@pytest.mark.parametrize("inference", ["set", "hybrid"])
def test_the_fragment_form_is_its_plain_formula(inference, norm):
    pair = make_pair(
        "dhset_fragment", IMAGE, TEXT, width=D, inference=inference, options={"num_elements": 3},
        similarity_options={"norm": norm},
    )  # fmt: skip
    shaken(pair)
    local, mask, _ = inputs()
    images, texts = pair.image(local, mask), pair.text(local, mask)
    expected = torch.zeros(B, B, dtype=torch.float64)
    tau = pair.similarity.scale

    def alike(a, b):
        return a @ b / (a.norm() * b.norm() if norm == "cos" else 1)

    for i in range(B):
        v = images.sets[i, mask[i]]
        for t in range(B):
            words = texts.sets[t].view(N, 3, D)[mask[t]]
            hybrid = words.sum(1)
            s = normalize(v, dim=1) @ normalize(hybrid, dim=1).T
            s = s.tanh()
            s = torch.where(s > 0, s, 0.1 * s)
            a = (tau * s / s.norm(dim=1, keepdim=True)).softmax(0)  # (n, m): to unit length over words
            scores = []
            for p in range(len(words)):
                seen = normalize(a[:, p] @ v, dim=0)
                if inference == "hybrid":
                    scores.append(alike(seen, hybrid[p]))
                else:
                    scores.append(sum(alike(seen, words[p, k]) for k in range(3)) / 3)
            expected[i, t] = sum(scores) / len(scores)
    the_same(pair.scores(images, texts, inference=True), expected, list(pair.parameters()))


# --- matching of fragments


def unit_sets(seed, n=N):
    return normalize(draw(B, n, D, seed=seed), dim=2)


def plain_scan(v, e, direction, aggregation, l1, l2, slope):
    s = torch.stack([torch.stack([(a * b).sum() for b in e]) for a in v])
    clip = torch.where(s > 0, s, slope * s)
    if direction == "i2t":
        bar = clip / clip.square().sum(0, keepdim=True).sqrt()
        r = [torch.cosine_similarity(v[i], (l1 * bar[i]).softmax(0) @ e, dim=0) for i in range(len(v))]
    else:
        bar = clip / clip.square().sum(1, keepdim=True).sqrt()
        r = [torch.cosine_similarity(e[j], (l1 * bar[:, j]).softmax(0) @ v, dim=0) for j in range(len(e))]
    r = torch.stack(r)
    return {"avg": r.mean, "sum": r.sum, "max": r.max, "lse": lambda: (l2 * r).exp().sum().log() / l2}[aggregation]()


@pytest.mark.parametrize("aggregation", ["avg", "lse", "max", "sum"])
@pytest.mark.parametrize("direction", ["i2t", "t2i"])
def test_scan_is_its_plain_formula_with_all_gradients(direction, aggregation):
    leaves = [unit_sets(1).requires_grad_(), unit_sets(2).requires_grad_()]
    images, texts = (normalize(x, dim=2) for x in leaves)
    image_mask, text_mask = VALID, VALID.flip(0)
    found = make_matching("scan", direction=direction, aggregation=aggregation, steepness_of_lse=5.0)(
        images, texts, image_mask, text_mask
    )
    l1 = 4.0 if direction == "i2t" else 9.0
    expected = torch.stack(
        [
            torch.stack(
                [
                    plain_scan(images[i, image_mask[i]], texts[t, text_mask[t]], direction, aggregation, l1, 5.0, 0.1)
                    for t in range(B)
                ]
            )
            for i in range(B)
        ]
    )
    the_same(found, expected, leaves)


def test_scan_of_two_regions_and_two_words_worked_out_by_hand():
    """Regions (1, 0) and (0, 1), words (0.6, 0.8) and (1, 0): s = [[0.6, 1], [0.8, 0]], to unit length over regions
    [[0.6, 1], [0.8, 0]], over words [[0.514, 0.857], [1, 0]].
    """
    images, texts = torch.eye(2)[None], torch.tensor([[[0.6, 0.8], [1.0, 0.0]]])
    # i2t, λ₁ = 4: region 1 weighs the words softmax(2.4, 4) = (0.168, 0.832), so a = (0.9328, 0.1344), cosine 0.98978;
    # region 2 softmax(3.2, 0) = (0.9608, 0.0392), so a = (0.6157, 0.7687), cosine 0.78050
    found = make_matching("scan", direction="i2t", aggregation="avg")(images, texts)
    assert found.item() == pytest.approx((0.98978 + 0.78050) / 2, abs=2e-4)
    # t2i, λ₁ = 9: word 1 weighs the regions softmax(4.630, 9) = (0.01249, 0.98751), cosine with (0.6, 0.8) 0.80752;
    # word 2 softmax(7.717, 0) = (0.99956, 0.00044), cosine 1.00000
    found = make_matching("scan", direction="t2i", aggregation="avg")(images, texts)
    assert found.item() == pytest.approx((0.80752 + 1.0) / 2, abs=2e-4)


@pytest.mark.parametrize("direction", ["i2t", "t2i"])
def test_a_steep_log_sum_exp_of_scan_is_the_maximum(direction):
    images, texts = unit_sets(1), unit_sets(2)
    steep, largest = (
        make_matching("scan", direction=direction, aggregation=a, steepness_of_lse=1e5)(images, texts, VALID, VALID)
        for a in ("lse", "max")
    )
    assert (steep - largest).min() >= -1e-12
    assert (steep - largest).max() <= math.log(N) / 1e5


def test_max_mean_is_its_plain_formula():
    images, texts = unit_sets(1).requires_grad_(), unit_sets(2).requires_grad_()
    found = make_matching("max_mean")(images, texts, VALID, VALID.flip(0))
    expected = torch.zeros(B, B, dtype=torch.float64)
    for i in range(B):
        for t in range(B):
            c = images[i, VALID[i]] @ texts[t, VALID.flip(0)[t]].T
            c = torch.where(c > 0, c, 0.1 * c)
            expected[i, t] = c.amax(0).mean() + c.amax(1).mean()
    the_same(found, expected, [images, texts])


@pytest.mark.parametrize("class_token", [False, True])
def test_laps_is_its_plain_formula(class_token):
    laps = shaken(make_matching("laps", width=D, num_patches=6, keep=0.5, merge=0.7, class_token=class_token))
    images, texts = draw(B, 6 + class_token, D, seed=1).requires_grad_(), draw(B, N, D, seed=2).requires_grad_()
    found = score_matrix(laps, images, texts, None, VALID)
    expected = torch.zeros(B, B, dtype=torch.float64)
    for i in range(B):
        v = images[i, :6]
        for t in range(B):
            e = texts[t, VALID[t]]
            significance = [
                torch.cosine_similarity(p, v.mean(0), dim=0) + torch.cosine_similarity(p, e.mean(0), dim=0) for p in v
            ]
            significance = torch.stack(significance).detach()
            order = significance.argsort(descending=True)
            kept, others = v[order[:3]], order[3:]
            hidden = gelu(linear(laps, "to_weights.1", norm(laps, "to_weights.0", kept)))
            weights = (laps.scale * linear(laps, "to_weights.3", hidden)).softmax(0)
            fused = significance[others].softmax(0) @ v[others]
            parts = torch.cat([weights.T @ kept, fused[None], images[i, 6:]])
            c = normalize(parts, dim=1) @ normalize(e, dim=1).T
            c = torch.where(c > 0, c, 0.1 * c)
            expected[i, t] = c.amax(0).mean() + c.amax(1).mean()
    assert laps.num_merged == 2
    the_same(found, expected, [images, texts, *laps.parameters()])


def test_a_pair_for_laps_keeps_the_norms_of_patches_and_takes_the_class_token():
    options = {"width": D, "num_patches": N, "class_token": True}
    pair = make_pair(
        "laps", IMAGE, TEXT, width=D, options={"normalise": False}, image_options={"add_global": True},
        similarity="laps", similarity_options=options,
    ).eval()  # fmt: skip
    local, mask, pooled = inputs(torch.float32)
    images, texts = pair.image(local, None, pooled), pair.text(local, mask)
    torch.testing.assert_close(images.sets[:, :N], pair.image.projection(local))
    assert pair.scores(images, texts).shape == (B, B)


def test_what_masked_places_hold_does_not_change_a_matching():
    images, texts = unit_sets(1), unit_sets(2)
    spoilt = texts.masked_fill(~VALID[..., None], torch.nan)
    for name in ("scan", "max_mean"):
        matching = make_matching(name)
        torch.testing.assert_close(matching(images, texts, None, VALID), matching(images, spoilt, None, VALID))


def masked_matching(name):
    """Returns a matching, vectors a word, and masks of few pictures and 12 texts of up to 8 words, with holes."""
    if "dhset" in name:
        matching = make_matching("dhset_fragment")
        k = matching.num_elements
        matching = HybridOf(matching) if "hybrid" in name else matching
    else:
        options = {"scan t2i": {"direction": "t2i"}, "laps": {"width": D, "num_patches": N}}
        matching, k = make_matching(name.split()[0], **options.get(name, {})), 1
    random = torch.Generator().manual_seed(0)
    num_texts, num_words = 12, 12
    mask = torch.rand(num_texts, num_words, generator=random) < 0.7  # with holes
    mask &= torch.arange(num_words) < torch.randint(1, 9, (num_texts, 1), generator=random)
    mask[:, 0] = True
    return matching.double(), k, None if name == "laps" else VALID, mask.repeat_interleave(k, 1)


@pytest.mark.parametrize("num_images", [1, B])
@pytest.mark.parametrize("name", ["scan", "scan t2i", "dhset_fragment", "hybrid of dhset_fragment", "laps"])
def test_texts_of_like_length_are_compared_together_with_the_same_scores(name, num_images, monkeypatch):
    matching, k, image_mask, mask = masked_matching(name)
    image_mask = None if image_mask is None else image_mask[:num_images]
    num_texts, num_words = len(mask), mask.shape[1] // k
    images = normalize(draw(num_images, N, D, seed=1), dim=-1).requires_grad_()
    texts = normalize(draw(num_texts, num_words * k, D, seed=2), dim=-1).requires_grad_()
    expected = matching(images, texts, image_mask, mask)
    monkeypatch.setitem(blocks._PAIRS, "cpu", 9 * N * 3 * k)  # blocks of few texts
    seen = []
    matching.register_forward_pre_hook(lambda module, given: seen.append((len(given[1]), given[1].shape[1] // k)))
    with torch.no_grad():
        found = score_matrix(matching, images, texts, image_mask, mask)
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)
    words = [each for _, each in seen]
    assert max(words) == 8
    assert min(words) < 4
    assert max(number for number, _ in seen) > 1, "one picture is compared with several texts at once"
    found = score_matrix(matching, images, texts.masked_fill(~mask[..., None], torch.nan), image_mask, mask)
    the_same(found, expected, [images, texts, *matching.parameters()])


def test_what_does_not_fit_is_refused_before_texts_are_put_in_order():
    matching, k, _, mask = masked_matching("dhset_fragment")
    images, texts = draw(B, N, D), draw(len(mask), mask.shape[1], D)
    for wrong in (mask[:-1], mask[:, :-k]):
        with pytest.raises(InputError, match=r"expected a mask of text sets of shape \(12, 48\)"):
            score_matrix(matching, images, texts, None, wrong)
    with pytest.raises(InputError, match=r"found none in 1 of 12 \(first: number 7\)"):
        score_matrix(matching, images, texts, None, mask & (torch.arange(12) != 7)[:, None])
    with pytest.raises(InputError, match="expected text sets of 4 elements a word, found 46"):
        score_matrix(matching, images, texts[:, :46], None, mask[:, :46])
    assert score_matrix(make_matching("scan"), images[:0].requires_grad_(), texts, None, mask).shape == (0, 12)


def test_every_similarity_is_a_matching_and_every_head_names_one():
    assert {kind.similarity for kind in HEADS.values()} <= set(MATCHINGS)
    assert torch.equal(
        score_matrix(make_matching("chamfer"), unit_sets(1), unit_sets(2)),
        score_matrix(make_similarity("chamfer"), unit_sets(1), unit_sets(2)),
    )


def test_layer_norm_of_the_plain_formulas_is_torchs():
    head = Slot(E, D)
    x = draw(3, D)
    torch.testing.assert_close(norm(head.double(), "slot_norm", x), layer_norm(x, (D,)))
    assert isinstance(head(draw(2, 3, E)), HeadOutput)


# --- pictures and the table of costs


def test_pictures_show_where_slots_look_and_which_words_they_take():
    head = Slot(E, D, heads=2, head_width=6).eval()
    found = head(draw(2, 16, E))
    photos = [torch.randint(0, 255, (32, 32, 3), dtype=torch.uint8).numpy() for _ in range(2)]
    cards = slot_cards(found, photos, ["a dog", "a cat"], (4, 4))
    assert len(cards) == 2
    assert all(len(of_photo) == 5 for of_photo in cards)  # the photograph and four slots
    row, column = divmod(int(found.attention[0, 0].argmax()), 4)
    assert f"most at row {row + 1}, column {column + 1} of 4 × 4" in cards[0][1].note
    words = slot_words(head(draw(1, 5, E), torch.tensor([[1, 1, 1, 0, 0]]).bool()), [["a", "black", "dog"]], top=2)
    assert len(words[0]) == 4
    assert all(len(of_slot) == 2 and of_slot[0][1] >= of_slot[1][1] > 0 for of_slot in words[0])
    with pytest.raises(InputError, match="expected a head that attends to its inputs"):
        slot_cards(Gpo(E, D).eval()(draw(2, 16, E)), photos, ["a", "b"], (4, 4))


def test_pictures_show_profiles_of_sub_spaces_and_what_they_share():
    drawings = subspace_pictures(SubSpaces(3, 50))
    assert len(drawings) == 3
    assert "Share of the 5 largest dimensions in common" in drawings[1]


def test_the_table_of_costs_counts_parameters_and_operations():
    small = Backbone(4, IMAGE, TEXT, num_words=3)
    figures = {name: measure(name, small, width=D, batch=2, repeats=1) for name in ("slot", "dhset")}
    slot = figures["slot"]
    assert slot["image_parameters"] == sum(p.numel() for p in Slot(E, D, F).parameters())
    # keys and values of 4 inputs, F to D; in each of 4 blocks queries, two products of attention, out, and the MLP
    of_block = 2 * (4 * D * 2048 + 2 * 4 * 4 * 2048 + 4 * 2048 * D + 2 * 4 * D * 4 * D)
    assert slot["image_flops"] == 2 * (2 * 4 * E * 2048 + F * D) + 4 * of_block
    assert slot["pair_flops"] == 2 * 4 * 4 * D
    assert figures["dhset"]["text_elements"] == 4
    assert "hybrid" in table_of(figures).splitlines()[3]
