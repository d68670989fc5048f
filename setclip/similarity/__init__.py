"""Similarities of sets of embeddings: one interface, a plain dict of names. Training, evaluation and search use them.

    similarity = make_similarity("smooth_chamfer", alpha=16.0)
    scores = similarity(image_sets, text_sets)                     # (Ni, Ki, D), (Nt, Kt, D) → (Ni, Nt)
    scores = similarity_matrix(similarity, image_sets, text_sets)  # the same in blocks, for many sets

Each is a module, so what it learns (the two numbers of match probability) trains and lands in checkpoints. Read `base`
for the interface and the two families, `blocks` for how large matrices are made. Formulas: docs/evaluation.md.
Letters: Ni images, Nt texts, Ki and Kt elements in their sets, D width.
"""

import inspect
from typing import Any

from setclip.errors import InputError
from setclip.lookup import look_up
from setclip.similarity.base import GridSimilarity, SetSimilarity, VectorSimilarity
from setclip.similarity.blocks import similarity_matrix
from setclip.similarity.match_probability import CosineMatchProbability, EuclideanMatchProbability
from setclip.similarity.maxima import Chamfer, MultipleInstance
from setclip.similarity.maxpair import MaxPair
from setclip.similarity.smooth_chamfer import SmoothChamfer
from setclip.similarity.vectors import Average, Cosine, DhSet, DhSetHybrid, Diagonal

__all__ = [
    "SIMILARITIES",
    "GridSimilarity",
    "SetSimilarity",
    "VectorSimilarity",
    "make_similarity",
    "similarity_matrix",
]

SIMILARITIES: dict[str, type[SetSimilarity]] = {
    "cosine": Cosine,
    "mil": MultipleInstance,
    "avg": Average,
    "chamfer": Chamfer,
    "smooth_chamfer": SmoothChamfer,
    "match_prob": CosineMatchProbability,  # the short name is DivE's; PCME's has its own
    "match_prob_cos": CosineMatchProbability,
    "match_prob_l2": EuclideanMatchProbability,
    "maxpair": MaxPair,
    "diagonal": Diagonal,
    "dhset_set": DhSet,
    "dhset_hybrid": DhSetHybrid,
}


def make_similarity(name: str, **options: Any) -> SetSimilarity:
    """Returns a new similarity of that name. Raises InputError on an unknown name, option or value."""
    kind = look_up(SIMILARITIES, name, "similarity")
    known = _options_of(kind)
    unknown = sorted(set(options) - set(known))
    if unknown:
        takes = f"the options {', '.join(known)}" if known else "no options"
        theirs = [name for name, other in SIMILARITIES.items() if unknown[0] in _options_of(other)]
        where = f", which {', '.join(theirs)} can have" if theirs else ""
        raise InputError(
            f"expected for similarity {name!r} {takes}, found {', '.join(unknown)}; leave out {unknown[0]}{where}"
        )
    try:
        return kind(**options)
    except InputError:
        raise
    except (TypeError, ValueError) as error:
        given = ", ".join(f"{option}={value!r}" for option, value in options.items())
        raise InputError(f"expected numbers for the options of similarity {name!r}, found {given} ({error})") from error


def _options_of(kind: type[SetSimilarity]) -> list[str]:
    """Returns the names of a similarity's options; a module without a constructor of its own shows (*args, **kwargs)."""
    return [p.name for p in inspect.signature(kind).parameters.values() if p.kind == p.POSITIONAL_OR_KEYWORD]
