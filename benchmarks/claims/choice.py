"""Which setting held-out data choose as the default: the one there is, unless another is better beyond chance.

Others are compared with the default of today seed by seed (a paired t test, adjusted for their number), on the held-out value by
which the experiment chooses, never on what is reported. Used by the pages.
"""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from benchmarks.claims.experiment import Default
from benchmarks.claims.judge import LEVEL, holm, paired


def choose(default: Default, rows: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what was compared and the row that is chosen, as JSON; `rows`: those of a page."""
    compared = []
    first = _by_seed(rows[default.row])
    for name in default.others:
        other = _by_seed(rows[name])
        seeds = [seed for seed in first if seed in other]
        if seeds:
            found = paired([other[seed] for seed in seeds], [first[seed] for seed in seeds])
            compared.append({"row": name, **asdict(found)})
    for each, adjusted in zip(compared, holm([each["p_value"] for each in compared]), strict=True):
        each["p_value_holm"] = adjusted
    better = [e for e in compared if e["mean"] > 0 and e["p_value_holm"] is not None and e["p_value_holm"] < LEVEL]
    chosen = max(better, key=lambda each: each["mean"])["row"] if better else default.row
    return {"what": default.what, "row": default.row, "compared": compared, "chosen": chosen}


def _by_seed(row: Mapping[str, Any]) -> dict[int, float]:
    held_out = row["held_out"]
    return {} if held_out is None else dict(zip(held_out["seeds"], held_out["values"], strict=True))
