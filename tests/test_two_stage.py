"""Exact search in two stages: the same answers as scoring everything, also where ties and roundings are at their worst."""

import pytest
import torch

from eval_suite import two_stage
from eval_suite.set_scores import set_scores
from eval_suite.two_stage import SetSearch, exact_top_k, possible_stages
from setclip.errors import InputError
from setclip.similarity import SIMILARITIES, GridSimilarity, make_similarity, similarity_matrix
from setclip.similarity import bounds as bounds_module
from setclip.similarity.bounds import Plain, Rounded, upwards

STAGES = ["none", "float32", "bf16"]


def unit(*shape: int, seed: int) -> torch.Tensor:
    return torch.nn.functional.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def best_of_all(scores: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the first k by a plain sort; of equal scores the lower index first."""
    values, indices = scores.sort(dim=1, descending=True, stable=True)
    return values[:, :k], indices[:, :k]


def in_full(name: str, queries: torch.Tensor, gallery: torch.Tensor) -> torch.Tensor:
    """Returns what "in full" means: float32 tiles for grids, float64 for vectors."""
    similarity = make_similarity(name)
    if name in ("cosine", "avg", "diagonal"):
        return set_scores(similarity, queries, gallery)(slice(0, len(queries)), slice(0, len(gallery)))
    with torch.no_grad():
        return similarity_matrix(similarity, queries, gallery)


def gallery_with_ties(size: int, elements: int, width: int, seed: int) -> torch.Tensor:
    """Returns sets of which some occur several times and some differ by one rounding."""
    gallery = unit(size, elements, width, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    pairs = torch.randint(size, (2, size // 3), generator=generator)
    gallery[pairs[0]] = gallery[pairs[1]]
    nearly = torch.randint(size, (2, size // 8), generator=generator)
    gallery[nearly[0]] = gallery[nearly[1]] * (1 + 2.0**-23)
    return gallery


SEARCHED = ["smooth_chamfer", "mil", "chamfer", "match_prob", "maxpair", "cosine", "avg", "diagonal"]


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(
    ("name", "stage"), [(name, stage) for name in SEARCHED for stage in possible_stages(make_similarity(name))]
)
def test_scores_indices_and_order_are_those_of_scoring_everything(name, stage, seed):
    elements = 1 if name == "cosine" else (1, 2, 3, 4, 4, 2)[seed]
    queries = unit(13, elements, 24 + seed, seed=100 + seed)
    gallery = gallery_with_ties(150, elements, 24 + seed, seed)
    queries[:4] = gallery[40:44]  # perfect answers, which occur more than once
    k = (1, 5, 10, 150, 3, 149)[seed]
    expected, where = best_of_all(in_full(name, queries, gallery), k)
    scores, indices = exact_top_k(make_similarity(name), queries, gallery, k, first_stage=stage)
    assert torch.equal(indices, where)
    assert torch.equal(scores, expected)


@pytest.mark.parametrize("name", ["smooth_chamfer", "cosine"])
@pytest.mark.parametrize("stage", ["bf16", "auto"])
def test_a_larger_gallery_is_pruned_and_still_exact(name, stage):
    elements = 1 if name == "cosine" else 4
    centres = unit(60, 1, 64, seed=1)
    gallery = torch.nn.functional.normalize(
        centres.repeat_interleave(50, 0) + 0.5 * unit(3_000, elements, 64, seed=2), dim=-1
    )
    queries = torch.nn.functional.normalize(centres + 0.3 * unit(60, elements, 64, seed=3), dim=-1)
    gallery[2_999] = gallery[0]
    found = SetSearch(make_similarity(name), gallery, first_stage=stage).search(queries, 10)
    expected, where = best_of_all(in_full(name, queries, gallery), 10)
    assert torch.equal(found.indices, where)
    assert torch.equal(found.scores, expected)
    if stage == "bf16":
        assert found.first_stage == "bf16"
        assert found.rescored < 0.2


def test_an_answer_that_only_its_rounding_hides_is_found():
    """Elements at the midpoints of bf16 lose all that tells them apart: cheap scores tie or are the wrong way round."""
    width, size = 64, 40
    base = torch.full((width,), 1.0)
    step = 2.0**-7  # of bf16 at 1
    gallery = base.repeat(size, 1)
    for number in range(size):  # each a little above or below the midpoint: the larger rounds down, the smaller up
        above = (number % 2) * 2.0**-12
        gallery[number] += step / 2 + (2.0**-14 * (number % 5) - above)
    gallery = torch.nn.functional.normalize(gallery * (1 + 1e-4 * torch.arange(size)[:, None] % 3), dim=1)[:, None]
    queries = torch.nn.functional.normalize(base + 0.01 * unit(5, width, seed=1), dim=1)[:, None]
    for has_units in (False, True):
        form = Rounded(width, has_units)
        cheap = form.product(form.of(queries).elements[:, 0], form.of(gallery).elements[:, 0].T, 1.0)
        expected, where = best_of_all(in_full("cosine", queries, gallery), 5)
        assert not torch.equal(best_of_all(cheap, 5)[1], where)  # the rounded scores alone are wrong
        scores, indices = exact_top_k(make_similarity("cosine"), queries, gallery, 5, first_stage="bf16")
        assert torch.equal(indices, where)
        assert torch.equal(scores, expected)


def test_a_bound_that_is_too_small_would_be_caught(monkeypatch):
    """The tests above look where errors are: with no error allowed they fail."""
    monkeypatch.setattr(two_stage._FullVectors, "together", 1)  # or queries find theirs among others' candidates
    queries, gallery = unit(400, 1, 64, seed=1), unit(2_000, 1, 64, seed=2)
    _, where = best_of_all(in_full("cosine", queries, gallery), 10)
    _, indices = exact_top_k(make_similarity("cosine"), queries, gallery, 10, first_stage="bf16")
    assert torch.equal(indices, where)

    def without_error(self, sets):
        self.relative = 0.0  # of processors with bf16 units, whose products are rounded, too
        rounded = sets.bfloat16()
        return bounds_module.CheapSets(rounded if self.has_units else rounded.float(), torch.zeros(len(sets)))

    monkeypatch.setattr(Rounded, "of", without_error)
    _, indices = exact_top_k(make_similarity("cosine"), queries, gallery, 10, first_stage="bf16")
    assert not torch.equal(indices, where)


@pytest.mark.parametrize("has_units", [False, True])
@pytest.mark.parametrize("kind", ["random", "midpoints", "tiny", "one large"])
def test_the_bound_of_rounded_products_holds(kind, has_units):
    """Against float64, where each element stands at its worst; the forms that a machine lacks are tried as well."""
    width = 256
    x, y = unit(30, 2, width, seed=1), unit(40, 2, width, seed=2)
    if kind == "midpoints":  # halfway between two numbers of bf16, all rounding the same way
        x, y = ((s.bfloat16().float() * (1 + 2.0**-8)) for s in (x.abs(), y.abs()))
    elif kind == "tiny":
        x, y = x * 1e-30, y * 1e-3
    elif kind == "one large":
        x[:, :, 0], y[:, :, 0] = 30.0 + 2.0**-4, 50.0 + 2.0**-3
    form = Rounded(width, has_units)
    cheap_x, cheap_y = form.of(x), form.of(y)
    product = form.product(cheap_x.elements.flatten(0, 1), cheap_y.elements.flatten(0, 1).T, 1.0)
    true = x.flatten(0, 1).double() @ y.flatten(0, 1).double().T
    norm_x, norm_y = x.norm(dim=2).max().item(), y.norm(dim=2).max().item()
    error = cheap_x.error.repeat_interleave(2)[:, None] * norm_y + norm_x * cheap_y.error.repeat_interleave(2)
    bound = error.double() + form.slack * norm_x * norm_y + form.relative * product.abs()
    assert bool(((product - true).abs() <= bound).all())
    if kind == "midpoints":  # and says something: the errors all have one sign there
        assert float(((product - true).abs() / bound).max()) > 0.3


def test_every_similarity_with_a_bound_is_tested_as_one():
    grids = {name for name, kind in SIMILARITIES.items() if issubclass(kind, GridSimilarity)}
    assert {name for name in grids if "bf16" in possible_stages(make_similarity(name))} == set(HAS_BOUND)


def test_the_bound_of_plain_products_holds():
    x, y = unit(50, 1, 1_000, seed=1).abs(), unit(60, 1, 1_000, seed=2).abs()
    product = Plain(1_000).product(x[:, 0], y[:, 0].T, 1.0)
    true = x[:, 0].double() @ y[:, 0].double().T
    assert float((product - true).abs().max()) <= Plain(1_000).slack * float(x.norm(dim=2).max() * y.norm(dim=2).max())


def test_upwards_never_rounds_down():
    values = torch.rand(10_000, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 1e-3
    assert bool((upwards(values).double() >= values).all())
    assert float(upwards(torch.zeros(1, dtype=torch.float64))) >= 0.0


HAS_BOUND = ["smooth_chamfer", "mil", "chamfer", "match_prob", "match_prob_cos", "maxpair"]


@pytest.mark.parametrize("name", HAS_BOUND)
def test_scores_change_by_no_more_than_their_steepness_times_the_change_of_cosines(name):
    similarity = make_similarity(name)
    generator = torch.Generator().manual_seed(0)
    grid = torch.rand(40, 4, 3, 50, generator=generator, dtype=torch.float64) * 2 - 1
    for amount in (1e-3, 0.3):
        change = (torch.rand(grid.shape, generator=generator, dtype=torch.float64) * 2 - 1) * amount
        change[:20] = amount
        with torch.no_grad():
            moved = (similarity.reduce(grid + change) - similarity.reduce(grid)).abs().max().item()
        assert moved <= similarity.steepness() * amount * (1 + 1e-9)


@pytest.mark.parametrize("options", [{}, {"alpha": 1.0}, {"alpha": 200.0}, {"alpha": 0.05}])
def test_what_is_said_of_rounding_in_smooth_chamfer_holds(options):
    similarity = make_similarity("smooth_chamfer", **options)
    grid = torch.rand(100, 6, 6, 100, generator=torch.Generator().manual_seed(0)) * 2 - 1
    scaled = grid * similarity.grid_scale
    found = similarity.reduce_in_place(scaled.clone(), 1.0)
    true = similarity.reduce(scaled.double() / similarity.grid_scale)
    assert float((found - true).abs().max()) <= similarity.rounding(6)


@pytest.mark.parametrize("stage", ["none", "bf16"])
@pytest.mark.parametrize("name", ["smooth_chamfer", "chamfer", "avg", "diagonal", "maxpair"])
def test_masked_sets_are_searched_exactly(name, stage):
    queries, gallery = unit(9, 4, 16, seed=1), unit(120, 4, 16, seed=2)
    query_mask = torch.arange(4) < (torch.arange(9) % 4 + 1)[:, None]
    gallery_mask = torch.arange(4) < (torch.arange(120) % 4 + 1)[:, None]
    gallery[50:60], gallery_mask[50:60] = gallery[:10].clone(), gallery_mask[:10].clone()
    queries[~query_mask], gallery[~gallery_mask] = 77.0, torch.nan  # never looked at
    similarity = make_similarity(name)
    if name in ("avg", "diagonal"):
        everything = set_scores(similarity, queries, gallery, query_mask, gallery_mask)(slice(0, 9), slice(0, 120))
    else:
        everything = similarity_matrix(similarity, queries, gallery, query_mask, gallery_mask)
    scores, indices = exact_top_k(similarity, queries, gallery, 7, query_mask, gallery_mask, first_stage=stage)
    expected, where = best_of_all(everything, 7)
    assert torch.equal(indices, where)
    assert torch.equal(scores, expected)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("name", ["dhset_set", "dhset_hybrid"])
def test_texts_search_images_and_images_texts(name, stage):
    images, texts = unit(40, 1, 16, seed=1), 3 * unit(50, 3, 16, seed=2)
    images[30] = images[3]
    similarity = make_similarity(name)
    everything = set_scores(similarity, images, texts)(slice(0, 40), slice(0, 50))
    for queries, gallery, kind, expected in (
        (images, texts, "images", everything),
        (texts, images, "texts", everything.T.contiguous()),
    ):
        scores, indices = exact_top_k(similarity, queries, gallery, 6, queries=kind, first_stage=stage)
        values, where = best_of_all(expected, 6)
        assert torch.equal(indices, where)
        assert torch.equal(scores, values)


def test_where_small_products_add_up_otherwise_whole_tiles_are_scored(monkeypatch):
    monkeypatch.setattr(two_stage, "_adds_up_alike", lambda *shapes: False)
    gallery = gallery_with_ties(400, 4, 32, seed=3)
    queries = torch.nn.functional.normalize(gallery[:20] + 0.2 * unit(20, 4, 32, seed=4), dim=-1)
    scores, indices = exact_top_k(make_similarity("smooth_chamfer"), queries, gallery, 5, first_stage="bf16")
    expected, where = best_of_all(in_full("smooth_chamfer", queries, gallery), 5)
    assert torch.equal(indices, where)
    assert torch.equal(scores, expected)


def test_first_stages_are_chosen_by_the_processor_and_said(monkeypatch):
    gallery = unit(20, 2, 8, seed=1)
    for has_units, of_sets, of_vectors in ((False, "none", "float32"), (True, "bf16", "bf16")):
        monkeypatch.setattr(two_stage, "has_bf16_units", lambda device, answer=has_units: answer)
        assert SetSearch(make_similarity("mil"), gallery).first_stage == of_sets
        assert SetSearch(make_similarity("avg"), gallery).first_stage == of_vectors
        assert SetSearch(make_similarity("match_prob_l2"), gallery).first_stage == "none"
        found = SetSearch(make_similarity("mil"), gallery).search(gallery, 3)
        assert torch.equal(
            found.indices, best_of_all(similarity_matrix(make_similarity("mil"), gallery, gallery), 3)[1]
        )


def test_a_first_stage_that_leaves_too_much_is_given_up_only_if_it_was_chosen_here(monkeypatch):
    monkeypatch.setattr(two_stage, "has_bf16_units", lambda device: True)
    same = unit(1, 2, 8, seed=1).expand(300, 2, 8).contiguous()
    found = SetSearch(make_similarity("mil"), same).search(same, 3)
    assert (found.first_stage, found.indices.tolist()[7]) == ("none", [0, 1, 2])
    found = SetSearch(make_similarity("mil"), same, first_stage="bf16").search(same, 3)
    assert (found.first_stage, found.indices.tolist()[7]) == ("bf16", [0, 1, 2])
    assert found.rescored >= 1.0


def test_half_precision_sets_and_no_queries_are_taken():
    gallery = unit(30, 3, 8, seed=1).bfloat16()
    scores, indices = exact_top_k(make_similarity("smooth_chamfer"), gallery[:4], gallery, 2, first_stage="bf16")
    expected, where = best_of_all(similarity_matrix(make_similarity("smooth_chamfer"), gallery[:4], gallery), 2)
    assert torch.equal(indices, where)
    assert torch.equal(scores, expected)
    for name in ("smooth_chamfer", "avg"):
        scores, indices = exact_top_k(make_similarity(name), gallery[:0], gallery, 2)
        assert scores.shape == indices.shape == (0, 2)


def test_what_does_not_fit_is_refused():
    gallery = unit(5, 2, 8, seed=1)
    search = SetSearch(make_similarity("mil"), gallery)
    with pytest.raises(InputError, match="k from 1 to the 5 sets of the gallery, found 6"):
        search.search(gallery, 6)
    with pytest.raises(InputError, match="one width, found 4 and 8"):
        search.search(unit(2, 2, 4, seed=1), 1)
    with pytest.raises(InputError, match="first stage of MultipleInstance among auto, none, bf16, found 'float32'"):
        SetSearch(make_similarity("mil"), gallery, first_stage="float32")
    with pytest.raises(InputError, match="among auto, none, found 'bf16'"):
        SetSearch(make_similarity("match_prob_l2"), gallery, first_stage="bf16")
    for stage in ("none", "bf16"):
        broken = gallery.clone()
        broken[3, 0, 0] = torch.nan
        with pytest.raises(InputError, match="expected finite"):
            exact_top_k(make_similarity("mil"), gallery, broken, 2, first_stage=stage)
