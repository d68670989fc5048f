"""The benchmark of retrieval: that it runs without what it may lack, and treats a peer as it says."""

import json
import subprocess
import sys

import pytest
import torch

from benchmarks import retrieval
from setclip.errors import InputError

SIMILARITY = """
import torch
from vocab import anything


class SetwiseSimilarity:
    def __init__(self, image_elements, text_elements, denominator, temperature):
        self.elements, self.temperature = image_elements, temperature
        torch.ones(1).cuda()

    def smooth_chamfer_similarity(self, images, texts):
        grid = (self.temperature * images @ texts.T).view(-1, self.elements, len(texts) // self.elements, self.elements)
        both = grid.logsumexp(3).sum(1) + grid.logsumexp(1).sum(2)
        return both / (2 * self.temperature * self.elements)
"""
EVALUATE = """
from data import get_test_loader
from similarity import SetwiseSimilarity


def recalls(ranks):
    return [100.0 * sum(rank < k for rank in ranks) / len(ranks) for k in (1, 5, 10)]


def scores(images, sentences, similar, nreps):
    return similar(images[::nreps].flatten(0, 1), sentences.flatten(0, 1))


def i2t(images, sentences, similar, nreps, use_gpu):
    both = scores(images, sentences, similar, nreps)
    return recalls([min(int((row > row[nreps * i + c]).sum()) for c in range(nreps)) for i, row in enumerate(both)])


def t2i(images, sentences, similar, nreps, use_gpu):
    both = scores(images, sentences, similar, nreps).T
    return recalls([int((row > row[i // nreps]).sum()) for i, row in enumerate(both)])
"""


@pytest.fixture
def few_sets(monkeypatch):
    """Sets as the real ones, but few and narrow."""
    monkeypatch.setattr(retrieval, "WIDTH", 32)


@pytest.fixture
def peer(tmp_path):
    """A folder that is laid out as the peer's repository, with functions of our own."""
    folder = tmp_path / "peer"
    folder.mkdir()
    (folder / "similarity.py").write_text(SIMILARITY)
    (folder / "eval.py").write_text(EVALUATE)
    return folder


def run(monkeypatch, *flags: str) -> None:
    monkeypatch.setattr(sys, "argv", ["retrieval", "--quick", "True", *flags])
    threads = torch.get_num_threads()
    try:
        retrieval.main()
    finally:
        torch.set_num_threads(threads)


@pytest.mark.slow  # 4 s: one of its processes imports PyTorch anew
def test_the_quick_mode_runs_without_real_data_and_without_a_peer(tmp_path, monkeypatch, capsys, few_sets):
    monkeypatch.delenv("SETCLIP_REAL_DATA", raising=False)
    run(monkeypatch, "--json", str(tmp_path / "figures.json"), "--plot", str(tmp_path / "figures.svg"))
    said = capsys.readouterr().out
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["evaluation"]["peer"].startswith("not measured: give --peer DIR")
    assert "not measured: set SETCLIP_REAL_DATA or give --embeddings" in said
    assert "goal" not in said  # which are for more sets
    assert set(figures["matrix"]["ratios"]) == set(retrieval.TIMED)
    assert 0 < figures["memory"]["bytes"] < 0.2e9
    assert [entry["what"] for entry in figures["two_stage"]] == ["random", "random"]
    assert all(entry["identical"] for entry in figures["two_stage"])
    assert "<svg" in (tmp_path / "figures.svg").read_text()


def test_a_peer_gives_the_same_recalls_and_leaves_nothing_behind(peer):
    images, texts = retrieval.graded_sets(30, likeness=0.1)
    modules = set(sys.modules)
    path, moved = list(sys.path), torch.Tensor.cuda
    figures = retrieval.measure_evaluation(images, texts, 1, peer)
    assert figures["same_recalls"]
    assert figures["recalls"]["ours"][0] < 100
    assert figures["times_faster"] > 0
    assert (path, torch.Tensor.cuda) == (sys.path, moved)
    assert not {"eval", "similarity", "vocab", "data", "option"} & (set(sys.modules) - modules)


def test_other_recalls_of_a_peer_are_seen(peer):
    (peer / "eval.py").write_text(EVALUATE.replace("rank < k", "rank <= k"))
    images, texts = retrieval.graded_sets(30, likeness=0.1)
    assert not retrieval.measure_evaluation(images, texts, 1, peer)["same_recalls"]


def test_a_peer_that_lacks_a_file_or_a_package_is_said(peer):
    (peer / "eval.py").write_text("import a_package_that_nobody_has\n")
    with (
        pytest.raises(InputError, match="found no a_package_that_nobody_has; `pip install"),
        retrieval.peer_modules(peer),
    ):
        pass
    (peer / "eval.py").unlink()
    with pytest.raises(InputError, match=r"with eval.py as --peer, found none in .*kdwonn/DivE"):
        retrieval.measure_evaluation(*retrieval.graded_sets(10), 1, peer)


def test_embeddings_of_a_file_are_searched(tmp_path):
    generator = torch.Generator().manual_seed(0)
    sets = {
        "image_sets": torch.randn(12, 3, 16, generator=generator).half(),
        "text_sets": torch.randn(60, 3, 16, generator=generator),
        "what": "sets of a test",
    }
    torch.save(sets, tmp_path / "sets.pt")
    _, by_image, by_text = retrieval.searched(12, tmp_path / "sets.pt")
    assert by_image[0] == "sets of a test: images search texts"
    assert (by_image[1].shape, by_image[2].shape) == ((12, 3, 16), (60, 3, 16))
    assert (by_text[1].shape, by_text[2].shape) == ((60, 3, 16), (12, 3, 16))
    torch.testing.assert_close(by_image[1].norm(dim=2), torch.ones(12, 3))
    found = retrieval.measure_search(*by_image, "bf16", 1)
    assert found["identical"]
    assert found["first_stage"] == "bf16"
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(InputError, match='with "image_sets" and "text_sets", found list'):
        retrieval.read_embeddings(tmp_path / "list.pt")
    with pytest.raises(InputError, match="found no file"):
        retrieval.read_embeddings(tmp_path / "none.pt")


@pytest.mark.skipif(retrieval.projected_flickr8k(1) is None, reason="SETCLIP_REAL_DATA is not set")
def test_real_photographs_and_captions_become_sets():
    found = retrieval.projected_flickr8k(40)
    assert found is not None
    what, images, texts = found
    assert "random projections of Flickr8k dev" in what
    assert images.shape == (40, 4, 1_024)
    assert texts.shape == (200, 4, 1_024)
    assert bool(images.isfinite().all())
    same_caption = (texts[:, None] * texts).sum(-1)
    assert float(same_caption.diagonal().mean()) == pytest.approx(1.0, abs=1e-5)


@pytest.mark.slow  # a process that imports PyTorch anew
def test_the_peak_is_measured_above_inputs_and_output():
    """A process that holds the inner products of all pairs would be seen: 115 MB for 600 × 3,000 sets of four."""
    code = "import torch; torch.set_num_threads(1); from benchmarks import retrieval; retrieval.print_peak_memory(600)"
    result = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert 1e6 < int(result.stdout.split()[-1]) < 80e6
