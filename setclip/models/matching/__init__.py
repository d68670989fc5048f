"""Matching of fragments, all inputs of an image with all words, and one dict of all that compares sets.

    similarity = make_matching("scan", direction="t2i", aggregation="lse")
    scores = score_matrix(similarity, image_sets, text_sets, image_mask, text_mask)  # (Ni, Nt), in blocks

These are similarities as `setclip.similarity` defines them, and `MATCHINGS` holds its own, too. Used by `setclip.models.heads`
and by fine-tuning.
"""

import inspect
from typing import Any

from setclip.errors import InputError
from setclip.lookup import look_up
from setclip.models.matching.blocks import score_matrix
from setclip.models.matching.dhset import DhSetFragment, DhSetRows, HybridOf, StoredRows
from setclip.models.matching.laps import Laps
from setclip.models.matching.max_mean import MaxMean
from setclip.models.matching.scan import Scan
from setclip.similarity import SIMILARITIES, SetSimilarity, make_similarity

__all__ = ["MATCHINGS", "DhSetFragment", "DhSetRows", "HybridOf", "make_matching", "score_matrix"]

FRAGMENTS: dict[str, type[SetSimilarity]] = {
    "scan": Scan,
    "max_mean": MaxMean,
    "laps": Laps,
    "dhset_fragment": DhSetFragment,
    "dhset_rows": StoredRows,
}

MATCHINGS: dict[str, type[SetSimilarity]] = {**SIMILARITIES, **FRAGMENTS}


def make_matching(name: str, **options: Any) -> SetSimilarity:
    """Returns a new similarity of that name. Raises InputError on an unknown name, option or value."""
    kind = look_up(MATCHINGS, name, "similarity")
    if name in SIMILARITIES:
        return make_similarity(name, **options)
    known = [] if kind.__init__ is SetSimilarity.__init__ else list(inspect.signature(kind).parameters)
    known = [option for option in known if option not in ("args", "kwargs")]
    unknown = sorted(set(options) - set(known))
    if unknown:
        takes = f"the options {', '.join(known)}" if known else "no options"
        raise InputError(f"expected for similarity {name!r} {takes}, found {', '.join(unknown)}; leave out the latter")
    return kind(**options)
