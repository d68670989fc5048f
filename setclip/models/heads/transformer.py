"""Learned queries with ordinary attention: softmax over the inputs, the architecture that DivE compares its slots with.

Kim et al. 2023 (DivE, arXiv 2211.08251) print its result and not its details; that all else is as in `slot` is our
reconstruction.
"""

from typing import Literal

from setclip.models.heads.slot import Slot


class Transformer(Slot):
    """As `Slot`, whose queries attend without competing. `auxiliary["competition"]` equals the attention."""

    competes_over: Literal["slots", "inputs"] = "inputs"
