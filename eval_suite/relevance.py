"""Ranking where a query has several right answers: the best one's rank, R-Precision and mAP@R, exact under ties.

For a query with right answers G, R = |G|, and its answers in order: R-Precision is the share of G among the first R, mAP@R
is 1/R · Σ over i ≤ R of (right ones among the first i) / i where the i-th is right (Musgrave et al. 2020, arXiv
2003.08505; Chun et al. 2022, arXiv 2204.03359). A group of answers with equal scores is ordered as the tie rule says:
wrong ones first, by index, or right ones first.

Queries are judged by looking up which of the first R answers are right, a bounded number of scores at a time, so thousands of
right answers a query are no harder than five. Used by the protocols of ECCV Caption, CxC and CUB. Letters: Q queries, N
answers.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from eval_suite.ranks import TIE_RULES, TieRule
from eval_suite.scores import BLOCK_SIZE, Score, checked, pieces
from eval_suite.sharing import ALONE, gathered, own_run, together
from setclip.distributed import World
from setclip.errors import InputError

SCORES_AT_A_TIME = 2**22
"""Scores of one piece of work: 17 MB, and about ten times that for what is made of them."""


@dataclass(frozen=True)
class RightAnswers:
    """Which answers are right for some queries of one direction. Made by `listed_answers` or `answers_of_class`."""

    queries: Tensor
    """(Q,) int64, ascending: images (of i2t) or texts (of t2i)."""
    num_right: Tensor
    """(Q,) int64, R of each, at least 1; right answers that are not in the gallery count, too."""
    gallery_size: int
    is_right: Callable[[slice], Tensor]
    """Rows of `queries` to (rows, N) bool."""


@dataclass(frozen=True)
class Relevance:
    """What became of each query, under each rule for equal scores; (Q,) each."""

    rank: dict[TieRule, Tensor]
    """0-based rank of the best right answer, int64."""
    r_precision: dict[TieRule, Tensor]
    """Shares, float64."""
    map_at_r: dict[TieRule, Tensor]


def listed_answers(
    queries: Sequence[int],
    answers: Sequence[Sequence[int]],
    gallery_size: int,
    num_right: Sequence[int] | None = None,
) -> RightAnswers:
    """Returns right answers from lists: `answers[i]` are those of `queries[i]`, without repetition, at least one.

    `num_right`: R of each query, where more answers are right than the gallery has.
    """
    order = sorted(range(len(queries)), key=lambda i: queries[i])
    counts = torch.tensor([len(answers[i]) for i in order], dtype=torch.int64)
    assert len(set(queries)) == len(queries), "a query is listed twice"
    assert all(len(set(answers[i])) == len(answers[i]) > 0 for i in order), "answers are repeated or missing"
    flat = torch.tensor([answer for i in order for answer in answers[i]], dtype=torch.int64)
    starts = torch.cat((torch.zeros(1, dtype=torch.int64), counts.cumsum(0)))

    def is_right(rows: slice) -> Tensor:
        mask = torch.zeros(rows.stop - rows.start, gallery_size, dtype=torch.bool)
        of_row = torch.arange(rows.stop - rows.start).repeat_interleave(counts[rows])
        mask[of_row, flat[starts[rows.start] : starts[rows.stop]]] = True
        return mask

    of_lists = counts if num_right is None else torch.tensor([num_right[i] for i in order], dtype=torch.int64)
    return RightAnswers(torch.tensor([queries[i] for i in order]), of_lists, gallery_size, is_right)


def answers_of_class(query_classes: Tensor, gallery_classes: Tensor) -> RightAnswers:
    """Returns right answers by class: every answer of the query's class; all queries count.

    Both (…,) int64, at least 0. Raises InputError on a query whose class has no answer.
    """
    sizes = gallery_classes.bincount(minlength=int(query_classes.max()) + 1)
    without = (sizes[query_classes] == 0).nonzero().flatten().tolist()
    if without:
        raise InputError(
            f"expected answers of each query's class, found none for {len(without):,} queries (first: number "
            f"{without[0]}, class {int(query_classes[without[0]])}); check the class ids"
        )
    return RightAnswers(
        torch.arange(len(query_classes)),
        sizes[query_classes],
        len(gallery_classes),
        lambda rows: query_classes[rows, None] == gallery_classes,
    )


def relevance(
    score: Score,
    right: RightAnswers,
    direction: Literal["i2t", "t2i"],
    num_queries: int,
    with_lists: bool = True,
    block_size: int = BLOCK_SIZE,
    world: World = ALONE,
) -> Relevance:
    """Ranks the whole gallery for each query of `right`.

    `num_queries`: images (i2t) or texts (t2i) of the score, of which `right` may judge a part. `with_lists=False` leaves
    out R-Precision and mAP@R, which take longer. Scores are asked for in the blocks of `block_size` in which
    `retrieval_ranks` asks for them. The ranks of `world` share the queries; each returns the whole result. Raises
    InputError on a score that is not finite.
    """
    stripes = list(_stripes(right.queries, num_queries, block_size))
    found: list[Tensor] = []
    with together(world):
        for columns, rows in stripes[own_run(len(stripes), world)]:
            scores = _stripe(score, direction, columns, right.gallery_size, block_size)
            of_stripe = right.queries[rows] - columns.start
            step = max(1, SCORES_AT_A_TIME // right.gallery_size)
            for piece in pieces(rows.start, rows.stop, step):
                mine = of_stripe[piece.start - rows.start : piece.stop - rows.start]
                found.append(_judged(scores[mine], right.is_right(piece), right.num_right[piece], with_lists))
    width = len(TIE_RULES) * (3 if with_lists else 1)
    table = gathered(torch.cat(found) if found else torch.zeros(0, width, dtype=torch.float64), world)
    columns_of = iter(table.unbind(1))
    rank = {rule: next(columns_of).long() for rule in TIE_RULES}
    if not with_lists:
        return Relevance(rank, {}, {})
    r_precision = {rule: next(columns_of) for rule in TIE_RULES}
    return Relevance(rank, r_precision, {rule: next(columns_of) for rule in TIE_RULES})


def _stripes(queries: Tensor, num_queries: int, size: int) -> Iterator[tuple[slice, slice]]:
    """Yields (images or texts, rows of `queries` among them) for each run of `size` that has any."""
    for place in pieces(0, num_queries, size):
        first, last = torch.searchsorted(queries, torch.tensor([place.start, place.stop])).tolist()
        if last > first:
            yield place, slice(first, last)


def _stripe(score: Score, direction: str, queries: slice, gallery_size: int, size: int) -> Tensor:
    """Returns (queries, gallery) scores, put together from blocks."""
    answers = pieces(0, gallery_size, size)
    if direction == "i2t":
        return torch.cat([checked(score, queries, columns) for columns in answers], dim=1)
    return torch.cat([checked(score, rows, queries) for rows in answers]).T


def _judged(scores: Tensor, right: Tensor, num_right: Tensor, with_lists: bool) -> Tensor:
    """Returns (q, 3 or 9) float64 from scores (q, N), the mask of right answers and their numbers.

    For each rule the rank; then, `with_lists`, for each R-Precision and for each mAP@R.
    """
    best = torch.where(right, scores, -torch.inf).amax(1, keepdim=True)
    better = (scores > best).sum(1)  # wrong ones all, for none that is right scores higher
    is_equal = scores == best
    equal = (is_equal & ~right).sum(1)
    equal_before = torch.zeros_like(equal)
    tied = equal.nonzero().flatten()
    if len(tied):
        # argmax of whole numbers: the first right answer with the best score
        first = (is_equal[tied] & right[tied]).int().argmax(1, keepdim=True)
        before = torch.arange(scores.shape[1]) < first
        equal_before[tied] = (is_equal[tied] & ~right[tied] & before).sum(1)
    by_rule = {"pessimistic": better + equal, "first_come": better + equal_before, "optimistic": better}
    columns = [by_rule[rule].double() for rule in TIE_RULES]
    if with_lists:
        precisions, averages = [], []
        for is_hit in _first_answers(scores, right, int(num_right.max())):
            places = torch.arange(1, is_hit.shape[1] + 1)
            hits = (is_hit & (places <= num_right[:, None])).double()
            precisions.append(hits.sum(1) / num_right)
            averages.append((hits * hits.cumsum(1) / places).sum(1) / num_right)
        columns += [*precisions, *averages]
    return torch.stack(columns, dim=1)


def _first_answers(scores: Tensor, right: Tensor, depth: int) -> list[Tensor]:
    """Returns for each rule of TIE_RULES whether the first `depth` answers are right, (q, depth) bool."""
    size = scores.shape[1]
    # One more than needed shows a tie across the end.
    values, indices = scores.topk(min(depth + 1, size), dim=1)
    without_ties = right.gather(1, indices[:, :depth])
    tied = (values[:, 1:] == values[:, :-1]).any(1).nonzero().flatten()
    if len(tied) == 0:
        return [without_ties] * len(TIE_RULES)
    # What topk takes of equal values is not said: such rows are sorted whole, of equal scores the lower index first.
    values, indices = torch.sort(scores[tied], dim=1, descending=True, stable=True)
    is_hit = right[tied].gather(1, indices)
    place = torch.arange(size).expand_as(indices)
    begins = torch.cat((torch.ones(len(tied), 1, dtype=torch.bool), values[:, 1:] != values[:, :-1]), dim=1)
    start = torch.where(begins, place, 0).cummax(1).values  # where the group of equal scores begins
    ends = torch.cat((begins[:, 1:], torch.ones(len(tied), 1, dtype=torch.bool)), dim=1)
    stop = torch.where(ends, place + 1, size).flip(1).cummin(1).values.flip(1)
    hits = torch.cat((torch.zeros(len(tied), 1, dtype=torch.int64), is_hit.long().cumsum(1)), dim=1)
    hits_of_group = hits.gather(1, stop) - hits.gather(1, start)
    ordered = {
        "pessimistic": place >= stop - hits_of_group,
        "first_come": is_hit,
        "optimistic": place < start + hits_of_group,
    }
    result = []
    for rule in TIE_RULES:
        of_rule = without_ties.clone()
        of_rule[tied] = ordered[rule][:, :depth]
        result.append(of_rule)
    return result
