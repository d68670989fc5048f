"""Exact search for the best of many sets: a cheap score with a proven bound first, then the full score of what is left.

    search = SetSearch(make_similarity("smooth_chamfer"), gallery_sets)   # or sets of one element with "cosine"
    found = search.search(query_sets, k=10)

Stage 1 scores all pairs in a cheap form (`setclip.similarity.bounds`); whatever could still be among a query's first k is
scored in full in stage 2. Scores, indices and order are those of scoring everything in full, and of equal scores the lower
index comes first. In full means: of similarities of one vector a set, inner products in float64, rounded (as
`dot_scores`); of the others the float32 scores of `similarity_matrix(similarity, query_sets, gallery_sets)`.

What stage 1 is depends on the processor, and `Found` says what it was:

- "bf16" where the processor has matrix units for it (AMX, AVX-512 BF16, CUDA);
- "float32" for similarities of one vector a set elsewhere;
- "none": everything is scored in full. Taken for the others elsewhere, and for similarities without a bound
  (`match_prob_l2`, maxpair's plain sum).

Without such units nothing cheaper than a float32 product pays for sets: docs/results.md has what was tried on AVX2.

Used by search over folders and by the retrieval benchmark. Letters: Q queries, N in the gallery, K elements, D width.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

from setclip.errors import InputError
from setclip.similarity.base import (
    UNIT_ROUNDOFF,
    GridSimilarity,
    SetSimilarity,
    VectorSimilarity,
    check_sets,
    filled,
    planes,
)
from setclip.similarity.blocks import Tiles, largest_norm, score_tile
from setclip.similarity.bounds import CheapForm, Plain, Rounded, accumulated, has_bf16_units

Stage = Literal["auto", "none", "float32", "bf16"]

_TOGETHER = 8  # queries whose remaining pairs are scored in one product
_AT_ONCE = 64  # sets of the gallery in such a product
_MANY = 4  # candidates for each of the k, from which on a better threshold pays
_WORTH_IT = 0.3
"""Largest share of pairs that stage 1 may leave: scoring them piece by piece costs more than in one product."""


@dataclass(frozen=True)
class Found:
    """The best k of the gallery for each query."""

    scores: Tensor
    """(Q, k) float32, falling."""
    indices: Tensor
    """(Q, k) int64; of equal scores the lower index first."""
    first_stage: Stage
    """What it was; "none" also if "auto" gave it up on the way."""
    rescored: float
    """Share of all pairs that were scored in full."""


def exact_top_k(
    similarity: SetSimilarity,
    query_sets: Tensor,
    gallery_sets: Tensor,
    k: int,
    query_mask: Tensor | None = None,
    gallery_mask: Tensor | None = None,
    queries: Literal["images", "texts"] = "images",
    first_stage: Stage = "auto",
) -> tuple[Tensor, Tensor]:
    """Returns (scores, indices), (Q, k) each, of the best of the gallery for each query; see `SetSearch`."""
    search = SetSearch(similarity, gallery_sets, gallery_mask, queries, first_stage)
    found = search.search(query_sets, k, query_mask)
    return found.scores, found.indices


class SetSearch:
    """A gallery that can be searched many times; keeps the sets and their cheap form."""

    def __init__(
        self,
        similarity: SetSimilarity,
        gallery_sets: Tensor,
        gallery_mask: Tensor | None = None,
        queries: Literal["images", "texts"] = "images",
        first_stage: Stage = "auto",
    ):
        """`gallery_sets`: (N, K, D), `gallery_mask`: (N, K), as `SetSimilarity.forward` takes them.

        `queries`: what the queries are; the gallery is of the other kind. `first_stage`: "auto" chooses as the module
        says. Raises InputError on a first stage that the similarity cannot have.
        """
        self.similarity, self.queries = similarity, queries
        self.gallery_sets, self.gallery_mask = gallery_sets.detach(), gallery_mask
        check_sets(gallery_sets, gallery_sets, gallery_mask)
        possible = possible_stages(similarity)
        if first_stage != "auto" and first_stage not in possible:
            raise InputError(
                f"expected a first stage of {type(similarity).__name__} among auto, {', '.join(possible)}, found "
                f"{first_stage!r}; auto takes what is fast here"
            )
        self.may_give_up = first_stage == "auto"
        self.first_stage = _fastest(possible, gallery_sets.device) if self.may_give_up else first_stage
        sets, mask = self.gallery_sets, gallery_mask
        if isinstance(similarity, VectorSimilarity):
            self._vectors = self._as_vectors(sets, mask, is_query=False)
            sets, mask = self._vectors[:, None], None
        self._cheap = None if self.first_stage == "none" else _CheapGallery(self.first_stage, sets, mask)

    @torch.no_grad()
    def search(self, query_sets: Tensor, k: int, query_mask: Tensor | None = None) -> Found:
        """Returns the best `k` of the gallery for each query, (Q, K, D) with `query_mask` (Q, K).

        Raises InputError on a `k` that is not in 1 to N, on sets that do not fit and on scores that are not finite.
        """
        num_gallery = len(self.gallery_sets)
        if not 1 <= k <= num_gallery:
            raise InputError(f"expected k from 1 to the {num_gallery} sets of the gallery, found {k}; ask for fewer")
        sides, masks = (query_sets.detach(), self.gallery_sets), (query_mask, self.gallery_mask)
        order = 1 if self.queries == "images" else -1
        check_sets(*sides[::order], *masks[::order])
        self.similarity.check_sizes(*(sets.shape[1] for sets in sides[::order]))
        if len(query_sets) == 0:
            empty = torch.empty(0, k, device=query_sets.device)
            return Found(empty, empty.long(), self.first_stage, 0.0)
        with torch.autocast(query_sets.device.type, enabled=False):
            return self._search(self._full(sides[0], query_mask), k)

    def _search(self, full: "_FullGrid | _FullVectors", k: int) -> Found:
        scores, indices, num_full, stage = [], [], 0, self.first_stage
        for rows in full.row_blocks():
            candidates = None
            if stage != "none":
                assert self._cheap is not None
                candidates, scored = _candidates(full, self._cheap, rows, k)
                num_full += scored
                if _share_together(candidates, full.together) > _WORTH_IT:
                    candidates = None
                    stage = "none" if self.may_give_up else stage
            if candidates is None:
                all_scores = _finite(full.whole(rows))
                num_full += all_scores.numel()
                found = [_best(all_scores, k)]
            else:
                found = []
                for start, columns in _groups(candidates, full.together):
                    some = _finite(full.some(_part(rows, start, full.together), columns))
                    num_full += some.numel()
                    values, places = _best(some, k)
                    found.append((values, columns[places]))
            scores += [values for values, _ in found]
            indices += [places for _, places in found]
        return Found(torch.cat(scores), torch.cat(indices), stage, num_full / (full.num_queries * full.num_gallery))

    def _full(self, query_sets: Tensor, query_mask: Tensor | None) -> "_FullGrid | _FullVectors":
        if isinstance(self.similarity, GridSimilarity):
            return _FullGrid(self.similarity, query_sets, self.gallery_sets, query_mask, self.gallery_mask)
        assert isinstance(self.similarity, VectorSimilarity)
        queries = self._as_vectors(query_sets, query_mask, is_query=True)
        if self.queries == "images":
            divisor = self.similarity.divisor(query_mask, self.gallery_mask)
        else:
            divisor = self.similarity.divisor(self.gallery_mask, query_mask)
            divisor = None if divisor is None else divisor.T
        return _FullVectors(queries, self._vectors, None if divisor is None else divisor.float())

    @torch.no_grad()
    def _as_vectors(self, sets: Tensor, mask: Tensor | None, is_query: bool) -> Tensor:
        assert isinstance(self.similarity, VectorSimilarity)
        is_image = is_query == (self.queries == "images")
        make = self.similarity.image_vectors if is_image else self.similarity.text_vectors
        return make(filled(sets, mask, torch.float32), mask)


def possible_stages(similarity: SetSimilarity) -> list[Stage]:
    """Returns the first stages that a similarity can have."""
    if isinstance(similarity, VectorSimilarity):
        return ["none", "float32", "bf16"]
    has_bound = isinstance(similarity, GridSimilarity) and similarity.steepness() is not None
    return ["none", "bf16"] if has_bound else ["none"]


def _fastest(possible: list[Stage], device: torch.device) -> Stage:
    if "bf16" in possible and has_bf16_units(device):
        return "bf16"
    return "float32" if "float32" in possible else "none"


# --- stage 1


class _CheapGallery:
    """The gallery in a cheap form, in tiles, and what of it could be among a query's first."""

    def __init__(self, stage: Stage, sets: Tensor, mask: Tensor | None):
        width = sets.shape[2]
        self.form: CheapForm = (
            Rounded(width, has_bf16_units(sets.device), sets.is_cuda) if stage == "bf16" else Plain(width)
        )
        self.mask = mask
        self.size = max(1, 2_048 // sets.shape[1])
        self.norm = largest_norm(sets, mask, self.size)
        self.planes, errors = [], []
        for start in range(0, len(sets), self.size):
            part_mask = None if mask is None else mask[start : start + self.size]
            cheap = self.form.of(filled(sets[start : start + self.size], part_mask, torch.float32))
            self.planes.append(planes(cheap.elements))
            errors.append(cheap.error)
        self.error = torch.cat(errors)

    def scores(self, full: "_FullGrid | _FullVectors", rows: slice) -> tuple[Tensor, Tensor]:
        """Returns cheap scores of these queries with the whole gallery, and how far off they may be: (rows, N) each."""
        sets, query_mask = full.queries(rows)
        cheap = self.form.of(sets)
        num_queries, num_elements = sets.shape[:2]
        both = full.query_norm * self.norm
        if not math.isfinite(both):
            raise InputError(
                f"expected finite sets, found a largest norm of {full.query_norm} among queries and {self.norm} in the "
                "gallery; encode them with another checkpoint"
            )
        scores = torch.empty(num_queries, full.num_gallery, device=sets.device)
        largest = torch.zeros(num_queries, device=sets.device)  # inner product
        for number, columns in enumerate(self.planes):
            start = number * self.size
            mask = None if self.mask is None else self.mask[start : start + self.size]
            grid = self.form.product(cheap.elements.flatten(0, 1), columns, full.grid_scale)
            if self.form.relative:
                low, high = grid.view(num_queries, -1).aminmax(dim=1)
                largest = torch.maximum(largest, torch.maximum(-low, high))
            num_columns = min(self.size, full.num_gallery - start)
            grid = grid.view(num_queries, num_elements, -1, num_columns)
            # cheap elements are a little longer at most than the true ones
            scores[:, start : start + num_columns] = full.reduce(grid, 1.1 * both, query_mask, mask)
        # what the two products and reductions do, and the arithmetic with these numbers
        fixed = (self.form.slack + full.slack) * both * full.steepness + 2 * full.rounding
        fixed += 16 * UNIT_ROUNDOFF * max(1.0, both * full.steepness)
        of_query = cheap.error * self.norm + largest * (self.form.relative / full.grid_scale)
        width = of_query[:, None] + full.query_norm * self.error
        width = width.mul_(full.steepness).add_(fixed)
        divisor = full.divisor_of(rows)
        return (scores, width) if divisor is None else (scores / divisor, width / divisor)


def _candidates(full: "_FullGrid | _FullVectors", gallery: _CheapGallery, rows: slice, k: int) -> tuple[Tensor, int]:
    """Returns, (rows, N) bool, what could be among the first `k` of these queries, at least k of each; and how many pairs
    were scored in full on the way.
    """
    scores, width = gallery.scores(full, rows)
    highest = scores + width
    candidates = highest >= (scores - width).topk(k).values[:, -1:]  # k others surely reach that
    if int(candidates.sum()) <= _MANY * k * len(candidates):
        return candidates, 0
    # The full scores of those that look best are a threshold without the error of stage 1.
    looks_best = torch.zeros_like(candidates).scatter_(1, scores.topk(k).indices, True)
    reached, scored = [], 0
    for start, columns in _groups(looks_best, full.together):
        some = _finite(full.some(_part(rows, start, full.together), columns))
        reached.append(some.topk(k).values[:, -1:])
        scored += some.numel()
    return highest >= torch.cat(reached), scored


def _groups(candidates: Tensor, together: int) -> Iterator[tuple[int, Tensor]]:
    """Yields the first row of each `together` rows and the columns that any of them has."""
    for start in range(0, len(candidates), together):
        yield start, candidates[start : start + together].any(0).nonzero()[:, 0]


def _part(rows: slice, start: int, size: int) -> slice:
    return slice(rows.start + start, min(rows.start + start + size, rows.stop))


def _share_together(candidates: Tensor, together: int) -> float:
    """Returns the share of pairs that is scored in full where `together` queries share their candidates."""
    number = sum(int(group.any(0).sum()) * len(group) for group in candidates.split(together))
    return number / candidates.numel()


# --- stage 2


class _FullGrid:
    """Full scores of similarities that reduce a grid: bit for bit those of `similarity_matrix`."""

    def __init__(
        self,
        similarity: GridSimilarity,
        query_sets: Tensor,
        gallery_sets: Tensor,
        query_mask: Tensor | None,
        gallery_mask: Tensor | None,
    ):
        self.similarity, self.gallery_mask = similarity, gallery_mask
        self.tiles = Tiles(similarity, query_sets, gallery_sets, query_mask, gallery_mask)
        self.num_queries, self.num_gallery = len(query_sets), len(gallery_sets)
        self.query_norm = self.tiles.norms[0]
        self.reduce, self.grid_scale = similarity.reduce_in_place, similarity.grid_scale
        num_query, num_gallery, width = query_sets.shape[1], gallery_sets.shape[1], query_sets.shape[2]
        steepness = similarity.steepness()
        self.steepness = 0.0 if steepness is None else steepness
        self.rounding = 0.0 if steepness is None else similarity.rounding(max(num_query, num_gallery))
        self.slack = accumulated(width)
        height, across = self.tiles.sizes
        self.together, self.at_once = min(_TOGETHER, height), min(_AT_ONCE, across)
        whole, part = (
            (height * num_query, across * num_gallery),
            (self.together * num_query, self.at_once * num_gallery),
        )
        if not _adds_up_alike(whole, part, width, gallery_sets.device, torch.get_num_threads()):
            self.together, self.at_once = height, across

    def row_blocks(self) -> Iterator[slice]:
        size = self.tiles.sizes[0]
        for start in range(0, self.num_queries, size):
            yield slice(start, min(start + size, self.num_queries))

    def queries(self, rows: slice) -> tuple[Tensor, Tensor | None]:
        sets, mask = self.tiles.sets[0][rows], self.tiles.masks[0]
        mask = None if mask is None else mask[rows]
        return filled(sets, mask, torch.float32), mask

    def divisor_of(self, rows: slice) -> None:
        return None

    def whole(self, rows: slice) -> Tensor:
        return self.tiles.scores(rows, slice(0, self.num_gallery))

    def some(self, rows: slice, columns: Tensor) -> Tensor:
        sets, mask = self.queries(rows)
        sets, mask = _repeated(sets, self.together), None if mask is None else _repeated(mask, self.together)
        gallery = self.tiles.sets[1]
        num_elements = gallery.shape[1]
        flat, planes_of = gallery.flatten(0, 1), torch.arange(num_elements, device=gallery.device)[:, None]
        result = []
        for part in columns.split(self.at_once):
            number = len(part)
            part = _repeated(part, self.at_once)
            elements = flat.index_select(0, (part * num_elements + planes_of).flatten()).float()  # planes, in one copy
            part_mask = None if self.gallery_mask is None else self.gallery_mask[part]
            if part_mask is not None:
                elements = elements.masked_fill(~part_mask.T.reshape(-1, 1), 0.0)
            scores = score_tile(
                self.similarity,
                sets,
                self.similarity.text_elements(elements).T,
                self.at_once,
                self.tiles.bound,
                mask,
                part_mask,
            )
            result.append(scores[: rows.stop - rows.start, :number])
        return torch.cat(result, 1)


class _FullVectors:
    """Full scores of similarities of one vector a set: those of `set_scores`."""

    reduce = staticmethod(lambda grid, bound, query_mask, gallery_mask: grid[:, 0, 0])
    grid_scale, steepness, rounding, together = 1.0, 1.0, 0.0, _TOGETHER

    def __init__(self, queries: Tensor, gallery: Tensor, divisor: Tensor | None):
        self.vectors, self.gallery, self.divisor = queries, gallery, divisor
        self.num_queries, self.num_gallery = len(queries), len(gallery)
        self.query_norm = largest_norm(queries[:, None], None, 4_096)
        self.slack = 2 * UNIT_ROUNDOFF  # float64, rounded

    def row_blocks(self) -> Iterator[slice]:
        size = max(_TOGETHER, min(1_024, 2**24 // self.num_gallery))
        for start in range(0, self.num_queries, size):
            yield slice(start, min(start + size, self.num_queries))

    def queries(self, rows: slice) -> tuple[Tensor, None]:
        return self.vectors[rows, None], None

    def divisor_of(self, rows: slice) -> Tensor | None:
        return None if self.divisor is None else self.divisor.expand(self.num_queries, self.num_gallery)[rows]

    def whole(self, rows: slice) -> Tensor:
        queries = self.vectors[rows].double()
        scores = torch.cat([(queries @ part.double().T).float() for part in self.gallery.split(8_192)], 1)
        divisor = self.divisor_of(rows)
        return scores if divisor is None else scores / divisor

    def some(self, rows: slice, columns: Tensor) -> Tensor:
        scores = (self.vectors[rows].double() @ self.gallery[columns].double().T).float()
        divisor = self.divisor_of(rows)
        return scores if divisor is None else scores / divisor[:, columns]


def _best(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Returns the `k` highest of each row, (rows, k), and their columns; of equal ones the lower column first."""
    values, places = scores.topk(k)
    # `topk` does not say which of equal values it takes.
    unsure = ((scores >= values[:, -1:]).sum(1) > k).nonzero()[:, 0].tolist()
    for row in unsure:
        reached = (scores[row] >= values[row, -1]).nonzero()[:, 0]
        order = scores[row, reached].sort(descending=True, stable=True).indices[:k]
        places[row] = reached[order]
        values[row] = scores[row, places[row]]
    places, order = places.sort(1)
    values, order = values.gather(1, order).sort(dim=1, descending=True, stable=True)
    return values, places.gather(1, order)


def _finite(scores: Tensor) -> Tensor:
    """Returns scores. Raises InputError if one is not finite: it would sort anywhere."""
    if not bool(scores.isfinite().all()):
        row, column = (~scores.isfinite()).nonzero()[0].tolist()
        raise InputError(
            f"expected finite scores, found {scores[row, column].item()}; the sets hold NaN or infinite features: encode "
            "them with another checkpoint"
        )
    return scores


def _repeated(values: Tensor, size: int) -> Tensor:
    """Returns `values` filled up to `size` rows with its first."""
    missing = size - len(values)
    return values if missing == 0 else torch.cat((values, values[:1].expand(missing, *values.shape[1:])))


@lru_cache(maxsize=64)
def _adds_up_alike(
    whole: tuple[int, int], part: tuple[int, int], width: int, device: torch.device, threads: int
) -> bool:
    """Whether products of a tile's shape and of a smaller one agree in every bit on this machine (with these threads).

    They do where the library adds up in the same order, which none promises: so it is tried. Where they do not, what
    is left is scored in whole tiles.
    """
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(whole[0], width, generator=generator).to(device)
    columns = torch.randn(whole[1], width, generator=generator).to(device)
    product = rows @ columns.T
    (height, across), (bottom, right) = part, whole
    first = rows[:height].clone() @ columns[:across].clone().T
    last = rows[bottom - height :].clone() @ columns[right - across :].clone().T
    return torch.equal(product[:height, :across], first) and torch.equal(
        product[bottom - height :, right - across :], last
    )
