"""The self-test passes as things are, and notices when a metric is broken."""

import importlib
import sys

import pytest

from eval_suite import metrics, protocols, ranks, relevance
from eval_suite import selftest as module
from eval_suite.relevance import Relevance
from eval_suite.selftest import CHECKS, Check, SelftestConfig, is_good, markdown, run_checks

FEW = SelftestConfig(cases=4)


def failed(rows):
    return {f"{row.name} / {row.against.split()[0]}" for row in rows if row.status == "FAIL"}


def test_every_check_passes_and_says_with_whom_it_compares(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["selftest", "--cases", "4"])
    module.main()
    printed = capsys.readouterr().out
    assert len(printed.strip().splitlines()) == 2 + len(CHECKS)
    assert "FAIL" not in printed
    for peer in ("eccv-caption 0.1.0", "clip-benchmark 1.", "scikit-learn 1.", "scipy 1."):
        assert peer in printed


def without_the_peer_of_coco(monkeypatch):
    """The longest check; what is broken here is seen by others too."""
    monkeypatch.setattr(module, "CHECKS", tuple(check for check in CHECKS if check.against != "eccv-caption"))


BROKEN_RANKS = {
    # as a peer did it: of 0-based ranks those up to k
    "recall": (metrics, "recall_at_k", lambda found, k: 100.0 * (found <= k).double().mean().item()),
    "median": (metrics, "median_rank", lambda found: int(found.median())),
    "accuracy": (metrics, "mean_per_class_accuracy", lambda right, labels: 100.0 * right.double().mean().item()),
    "chance": (metrics, "chance_recall_at_k", lambda k, n, m=1: 100.0 * min(1.0, k * m / n)),
    "interval": (metrics, "wilson_interval", lambda right, n: (100.0 * right / n, 100.0 * right / n)),
}


@pytest.mark.parametrize(
    ("broken", "noticed"),
    [
        ("recall", "R@K of retrieval / clip-benchmark"),
        ("recall", "top-1, top-5 / scikit-learn"),
        ("median", "ranks, R@K, Med r, RSUM / worked"),
        ("accuracy", "mean per class / scikit-learn"),
        ("chance", "chance of R@K / scipy"),
        ("interval", "Wilson's interval / scipy"),
    ],
)
def test_a_broken_metric_is_noticed(monkeypatch, broken, noticed):
    without_the_peer_of_coco(monkeypatch)
    monkeypatch.setattr(*BROKEN_RANKS[broken])
    rows = run_checks(FEW)
    assert noticed in failed(rows)
    assert not is_good(rows, require_all=False)


def test_ties_that_count_for_us_are_noticed(monkeypatch):
    without_the_peer_of_coco(monkeypatch)
    monkeypatch.setattr(ranks.Ranks, "by", lambda self, rule: self.better)
    assert {
        "all scores equal / worked",
        "ranks under each tie rule / plain",
    } <= failed(run_checks(FEW))


def test_broken_lists_and_folds_are_noticed(monkeypatch):
    right = relevance.relevance

    def without_rank(*args, **options):
        found = right(*args, **options)
        return Relevance(found.rank, found.r_precision, found.r_precision)  # mAP@R without its precisions

    monkeypatch.setattr(relevance, "relevance", without_rank)
    monkeypatch.setattr(protocols, "relevance", without_rank)
    monkeypatch.setattr(protocols.Queries, "mean", lambda self, values: 99.0)
    assert {
        "R-Precision, mAP@R / worked",
        "R-Precision, mAP@R under each tie rule / plain",
        "average precision / scikit-learn",
        "mean over folds / worked",
        "COCO 5K, 1K, CxC, ECCV Caption / eccv-caption",
    } <= failed(run_checks(SelftestConfig(cases=1)))


def test_a_metric_that_raises_is_a_failure_of_its_checks_alone(monkeypatch):
    without_the_peer_of_coco(monkeypatch)

    def raising(*_):
        raise ZeroDivisionError("no images")

    monkeypatch.setattr(metrics, "wilson_interval", raising)
    rows = run_checks(FEW)
    assert failed(rows) == {"Wilson's interval / scipy"}
    assert "FAIL: Wilson's interval: ZeroDivisionError: no images" in markdown(rows)


def test_a_peer_that_is_not_installed_is_not_run_and_fails_only_where_all_is_required(monkeypatch):
    without_the_peer_of_coco(monkeypatch)
    right = importlib.import_module

    def import_module(name, *args):
        if name.startswith("clip_benchmark"):
            raise ImportError(name)
        return right(name, *args)

    monkeypatch.setattr(importlib, "import_module", import_module)
    rows = run_checks(FEW)
    assert [row.status for row in rows].count("not run") == 2
    assert "not run: R@K of retrieval: not installed: pip install clip-benchmark" in markdown(rows)
    assert is_good(rows, require_all=False)
    assert not is_good(rows, require_all=True)


def test_a_difference_that_is_no_number_or_no_case_at_all_is_a_failure(monkeypatch):
    checks = (
        Check(name="nan", against="nobody", differences=lambda generator, cases: iter([float("nan")])),
        Check(name="none", against="nobody", differences=lambda generator, cases: iter(())),
        Check(name="late", against="nobody", differences=lambda generator, cases: iter([0.0, float("nan")])),
        Check(name="good", against="nobody", differences=lambda generator, cases: iter([0.0, 1e-12])),
    )
    monkeypatch.setattr(module, "CHECKS", checks)
    assert [row.status for row in run_checks(FEW)] == ["FAIL", "FAIL", "FAIL", "pass"]


def test_the_command_exits_with_one_where_a_check_fails(monkeypatch, capsys):
    without_the_peer_of_coco(monkeypatch)
    monkeypatch.setattr(*BROKEN_RANKS["interval"])
    monkeypatch.setattr(sys, "argv", ["selftest", "--cases", "1"])
    with pytest.raises(SystemExit) as stopped:
        module.main()
    assert stopped.value.code == 1
    assert "| Wilson's interval |" in capsys.readouterr().out
