"""Pretrains a CLIP model on shards.

    python -m pretrain.run tiny --data.shards data/scenes --out runs/tiny
    torchrun --nproc-per-node 8 -m pretrain.run cc12m --loss.beta 0.3
    srun python -m pretrain.run cc12m --resume True

The first argument names a recipe; its values are the defaults of the flags (RECIPE --help). --config FILE.yaml gives
values between the two. The run folder holds config.yaml, metrics.jsonl and checkpoints/.

Asked to stop (SIGTERM or SIGUSR1 on any rank), all ranks save at the same step and the command exits with status 75;
--resume True goes on. A rank that hangs is named, and ends the job with status 70. docs/pretraining.md tells the rest.
"""

from pathlib import Path

from pretrain.bad_steps import NAME, RollBack
from pretrain.checks import check_start
from pretrain.config import RECIPES, PretrainConfig
from pretrain.plan import make_plan
from pretrain.stopping import StopRequest, run_to_its_end
from pretrain.training import Start, Training, start_of
from setclip import config as configuration
from setclip import distributed
from setclip.log import warn


def train(recipe: str, config: PretrainConfig) -> Path:
    """Runs the training; returns the last checkpoint's folder. All ranks call.

    Raises InputError where something does not fit, Stopped when it was asked to stop and has saved, and FloatingPointError where
    going back did not help against losses or gradients that are not finite.
    """
    world = distributed.start(config.engine.device, timeout_minutes=max(10.0, 1.5 * config.guard.hang_minutes))
    plan = make_plan(recipe, config, world)
    check_start(config, plan, world)
    start = start_of(plan, config, world) if config.resume else Start.anew(plan, config)
    with StopRequest() as request:
        for _ in range(config.guard.rollbacks):
            try:
                return Training(recipe, config, plan, start, world, request).run()
            except RollBack as bad:
                start = start_of(plan, config, world, bad.steps)
                warn(f"{bad}; going back to {start.folder or 'the beginning'} and leaving their batches out")
        try:
            return Training(recipe, config, plan, start, world, request).run()
        except RollBack as bad:
            raise FloatingPointError(
                f"{bad}, and --guard.rollbacks {config.guard.rollbacks} allows no further return to a checkpoint. Their samples "
                f"are in {plan.out / NAME}; look at them, or lower --optim.lr (--resume True --change True)"
            ) from bad


def main() -> None:
    """The command."""
    name, config = configuration.parse_recipe(RECIPES, description=__doc__ or "")
    run_to_its_end(lambda: train(name, config))


if __name__ == "__main__":
    configuration.command(main)
