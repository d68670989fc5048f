"""The engine's state by parameter name: bit-identical on the same layout, equal on any other."""

import itertools

import pytest
import torch
from material import MODEL_CFG as WITH_ALL_TOKENS
from ranks import on_ranks

from pretrain.engine import Engine, EngineConfig, _Capped
from pretrain.losses import BatchSets, LossConfig, contrastive_loss
from pretrain.optim import OptimConfig
from pretrain.state import gather_moments, gather_weights, restore
from setclip import distributed
from setclip.models.clip import build_clip, load_weights

GLOBAL_BATCH = 8
MODEL_CFG = {**WITH_ALL_TOKENS, "text_cfg": {**WITH_ALL_TOKENS["text_cfg"], "vocab_size": 101}}


def make_engine(world, stage, precision, weights=None):
    torch.manual_seed(0)
    model = build_clip(MODEL_CFG)
    model.positional_embedding.requires_grad_(False)  # frozen parameters have no master copy
    if weights is not None:
        load_weights(model, weights, "the test's")
    config = EngineConfig(zero_stage=stage, precision=precision, device="cpu")
    return Engine(model, config, OptimConfig(clip_grad_norm=0.5), GLOBAL_BATCH // world.size, world)


def train(engine, world, first, last):
    losses = []
    for step in range(first, last):
        random = torch.Generator().manual_seed(step)
        images = torch.randn(GLOBAL_BATCH, 3, 32, 32, generator=random)
        tokens = torch.randint(1, 100, (GLOBAL_BATCH, 12), generator=random)
        objects = torch.randint(0, 5, (GLOBAL_BATCH, 1), generator=random)
        mine = slice(world.rank, None, world.size)
        features = engine.forward(images[mine], tokens[mine])
        sets = BatchSets(objects[mine], objects[mine])
        output = contrastive_loss(features.images, features.texts, features.logit_scale, sets, LossConfig())
        engine.step(output.loss, lr=1e-3)
        losses.append(float(distributed.mean_over_ranks(output.loss)))
    return losses


def course(stages, precision, state=None):
    """Runs on each rank: per stage, six steps undisturbed, and three after the state was put into a new engine.

    `state`: (weights, moments) after step 3 of another layout; the three steps then begin from it.
    """
    world = distributed.start("cpu")
    found = {}
    for stage in stages:
        engine = make_engine(world, stage, precision)
        before = gather_moments(engine, 0)
        assert not any(value.any() for value in before.values())
        losses = train(engine, world, 0, 3)
        weights, moments = gather_weights(engine), gather_moments(engine, 3)
        losses += train(engine, world, 3, 6)
        final = gather_weights(engine)
        given = state or (weights, moments)
        again = make_engine(world, stage, precision, given[0])
        restore(again, *given, 3)
        kept = all(torch.equal(gather_weights(again)[name], given[0][name]) for name in given[0])
        kept = kept and all(torch.equal(gather_moments(again, 3)[name], given[1][name]) for name in given[1])
        resumed = train(again, world, 3, 6)
        found[stage] = {
            "losses": losses,
            "state": (weights, moments),
            "state_kept": kept,
            "resumed": resumed,
            "final": final,
            "resumed_final": gather_weights(again),
        }
    return found


@pytest.fixture(scope="module")
def one_rank():
    """Six steps at every stage, on one rank."""
    return on_ranks(1, course, (0, 1, 2, 3), "fp32")[0]


@pytest.fixture(scope="module")
def two_ranks(one_rank):
    """The same on two ranks, resumed from the state of one rank at stage 1."""
    return on_ranks(2, course, (0, 1, 2, 3), "fp32", one_rank[1]["state"])


@pytest.fixture(scope="module")
def four_ranks():
    """The same on four ranks, without a resume."""
    return on_ranks(4, undisturbed, (0, 1, 2, 3))


def undisturbed(stages):
    """Returns, per stage, the losses of six steps and the state after three."""
    world = distributed.start("cpu")
    found = {}
    for stage in stages:
        engine = make_engine(world, stage, "fp32")
        losses = train(engine, world, 0, 3)
        state = gather_weights(engine), gather_moments(engine, 3)
        found[stage] = {"losses": losses + train(engine, world, 3, 6), "state": state}
        engine.close()
    return found


def moved(states, ways):
    """Returns (stage that a state is of, stage to which it goes) → whether it arrived, and the losses of steps 3 to 5.

    `states`: a file, as so many tensors cannot be handed to a process.
    """
    world = distributed.start("cpu")
    found = {}
    loaded = torch.load(states)
    for source, stage in ways:
        given = loaded[source]
        engine = make_engine(world, stage, "fp32", given[0])
        restore(engine, *given, 3)
        kept = all(torch.equal(gather_weights(engine)[name], given[0][name]) for name in given[0])
        kept = kept and all(torch.equal(gather_moments(engine, 3)[name], given[1][name]) for name in given[1])
        found[source, stage] = kept, train(engine, world, 3, 6)
        engine.close()
    return found


def check_moved(found, expected, ways):
    assert list(found) == ways
    for where, (kept, losses) in found.items():
        assert kept, where
        assert losses == pytest.approx(expected[3:], abs=2e-6), where


def check_bit_identical(found):
    for stage, run in found.items():
        assert run["state_kept"], stage
        assert run["resumed"] == run["losses"][3:], stage
        assert all(torch.equal(run["final"][n], run["resumed_final"][n]) for n in run["final"]), stage


@pytest.mark.slow
def test_a_resume_on_the_same_layout_is_bit_identical_at_every_stage(one_rank):
    check_bit_identical(one_rank)


@pytest.mark.slow
@pytest.mark.parametrize(("world_size", "precision"), [(1, "bf16"), (2, "fp32"), (2, "bf16")])
def test_a_resume_is_bit_identical_on_two_ranks_and_in_bf16(world_size, precision):
    stages = (1, 2, 3) if precision == "bf16" else (0, 1, 2, 3)
    for found in on_ranks(world_size, course, stages, precision):
        check_bit_identical(found)


@pytest.mark.slow
def test_ranks_and_stages_give_the_same_losses(one_rank, two_ranks, four_ranks):
    for found in (one_rank, *two_ranks, *four_ranks):
        for run in found.values():
            assert run["losses"] == pytest.approx(one_rank[0]["losses"], abs=2e-6)


@pytest.mark.slow
def test_the_state_moves_from_one_rank_to_two_at_any_stage(one_rank, two_ranks):
    """The state itself arrives bit for bit; the steps after it differ as two undisturbed layouts do."""
    for found in two_ranks:
        for run in found.values():
            assert run["state_kept"]
            assert run["resumed"] == pytest.approx(one_rank[1]["losses"][3:], abs=2e-6)


@pytest.mark.slow
def test_the_state_moves_from_four_ranks_to_two_from_each_stage_and_to_each(one_rank, four_ranks, tmp_path):
    """All sixteen ways are gone from two ranks to one, below: the file does not say how many ranks wrote it."""
    torch.save({stage: run["state"] for stage, run in four_ranks[3].items()}, tmp_path / "states")
    ways = [(0, 2), (1, 3), (2, 0), (3, 1)]
    for found in on_ranks(2, moved, tmp_path / "states", ways):
        check_moved(found, one_rank[0]["losses"], ways)


@pytest.mark.slow
def test_the_state_moves_from_two_ranks_to_one_from_any_stage_to_any(one_rank, two_ranks, tmp_path):
    torch.save({stage: run["state"] for stage, run in two_ranks[1].items()}, tmp_path / "states")
    ways = list(itertools.product(range(4), range(4)))
    check_moved(on_ranks(1, moved, tmp_path / "states", ways)[0], one_rank[0]["losses"], ways)


def test_a_scale_at_its_cap_can_come_down_but_not_rise():
    for value, gradient, wanted in [(120.0, -1.0, 0.0), (120.0, 1.0, 1.0), (80.0, -1.0, -1.0), (80.0, 1.0, 1.0)]:
        scale = torch.tensor([value], requires_grad=True)
        capped = _Capped.apply(scale, 100.0)
        assert capped.item() == min(value, 100.0)
        capped.backward(torch.tensor([gradient]))
        assert scale.grad.item() == wanted


def test_bf16_at_stage_0_is_refused():
    with pytest.raises(ValueError, match=r"bf16 needs --engine\.zero-stage 1, 2 or 3"):
        EngineConfig(precision="bf16", zero_stage=0)
