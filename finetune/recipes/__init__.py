"""Named recipes: a plain dict from a name to a configuration, which may depend on the head.

    python -m finetune.run RECIPE --head HEAD
    python -m finetune.recipes --list                       # the papers' rows: settings, sources, published numbers

`general` has ours; the others are rows of papers' tables, one file a system, with each setting's source (`base`) and the
published numbers (`published`), beside which a run's own stand when it ends (`comparison`).
"""

from finetune.config import FinetuneConfig
from finetune.recipes.asa import ASA
from finetune.recipes.base import PaperRecipe, Recipe, Settings, Value, config_of
from finetune.recipes.dive import DIVE
from finetune.recipes.general import GENERAL
from finetune.recipes.patches import PATCHES
from finetune.recipes.pie_nets import PIE_NETS
from finetune.recipes.published import ROWS, Row
from finetune.recipes.scan import SCAN
from finetune.recipes.single_vectors import SINGLE_VECTORS
from setclip.errors import InputError

__all__ = ["PAPERS", "RECIPES", "ROWS", "PaperRecipe", "Recipe", "Row", "Settings", "Value", "config_of"]

PAPERS: dict[str, PaperRecipe] = {**DIVE, **SINGLE_VECTORS, **PIE_NETS, **SCAN, **PATCHES, **ASA}
"""Recipes of papers' rows, and of the models that rows of ensembles sum"""


def _ensemble(name: str) -> Recipe:
    members = ROWS[name].members

    def refuse(head: str | None) -> FinetuneConfig:
        raise InputError(f"expected a recipe of one model, found {name}, which sums two: {commands_of(name, members)}")

    return refuse


def commands_of(name: str, members: tuple[str, ...]) -> str:
    """Returns what to type for the row of an ensemble."""
    if len(set(members)) == 1:
        run = f"runs/{members[0]}"
        return (
            f"`python -m finetune.run {members[0]} --seeds {len(members)} --out {run}`, then `python -m finetune.ensemble "
            f"{' '.join(f'{run}/seed-{seed}' for seed in range(len(members)))} --row {name}`"
        )
    each = ", ".join(f"`python -m finetune.run {member} --out runs/{member}`" for member in members)
    return f"{each}, then `python -m finetune.ensemble {' '.join(f'runs/{m}' for m in members)} --row {name}`"


RECIPES: dict[str, Recipe] = {
    **GENERAL,
    **PAPERS,
    **{name: _ensemble(name) for name, row in ROWS.items() if row.members},
}
