"""A run that goes on with other ranks at another ZeRO stage: exactly the unseen samples, and the same losses."""

import dataclasses
import shutil

import pytest
import torch
from material import write_model, write_shards
from ranks import on_ranks
from test_pretrain import config_of, losses_of

from pretrain import training
from pretrain.checkpoints import SaveConfig
from pretrain.run import train
from setclip.checkpoint import checkpoints_of

STEPS = 8
MOVES = ((2, 3, 2), (1, 0, 4), (2, 1, 6))
"""Ranks and ZeRO stage that take the run over, and after which step."""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("elastic")
    write_shards(folder / "shards")
    write_model(folder)
    return folder


def trained_keys(config):
    """Trains on this rank; returns step → keys of the samples that it was given."""
    torch.set_num_threads(1)
    seen: dict[int, list[str]] = {}
    count = training.Training._count

    def noted(self, batch):
        count(self, batch)
        seen[self.step] = list(batch.keys)

    training.Training._count = noted
    try:
        train("tiny", config)
    finally:
        training.Training._count = count
    return seen


def of_all_ranks(parts):
    return {step: sorted(key for part in parts for key in part[step]) for step in parts[0]}


def config_for(place, out, stage, **changes):
    base = config_of(place, out, steps=STEPS, save=SaveConfig(every_steps=2, keep=9), **changes)
    return dataclasses.replace(base, engine=dataclasses.replace(base.engine, zero_stage=stage))


@pytest.mark.slow
def test_a_run_that_moves_over_four_layouts_sees_each_sample_once_and_has_the_same_losses(place):
    """4 → 2 → 1 → 2 ranks at stages 2, 3, 0, 1; two epochs of 64 samples."""
    expected = trained_keys(config_for(place, "one", 0))
    assert of_all_ranks(on_ranks(4, trained_keys, config_for(place, "moving", 2))) == of_all_ranks([expected])
    for ranks, stage, last in MOVES:
        for folder in checkpoints_of(place / "moving"):
            if int(folder.name.removeprefix("step-")) > last:
                shutil.rmtree(folder)
        config = config_for(place, "moving", stage, overwrite=False, resume=True)
        parts = on_ranks(ranks, trained_keys, config)
        assert of_all_ranks(parts) == of_all_ranks([{step: expected[step] for step in range(last + 1, STEPS + 1)}])
    assert losses_of(place / "moving") == pytest.approx(losses_of(place / "one"), abs=2e-5)
    epoch = [key for step in range(1, 5) for key in expected[step]]
    assert len(set(epoch)) == len(epoch) == 64
