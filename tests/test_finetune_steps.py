"""Steps of fine-tuning: ranks and micro-batches give what one undivided step gives; PCME; scores that need norms; trackers."""

import json
import math
from pathlib import Path

import pytest
import torch
from finetune_material import command, words, write_pretrained, write_shards
from material import MODEL_CFG
from ranks import on_ranks

from eval_suite.encode import check_unit, encode_functions
from eval_suite.results import Results
from eval_suite.retrieval import RetrievalConfig, evaluate
from finetune import training
from finetune.config import FinetuneConfig, WeightsConfig
from finetune.losses import LOSSES, Pairs, Weighted
from finetune.micro_batches import check_micro_batches, divided_backward
from finetune.recipes import RECIPES
from finetune.step import StepBatch, StepModule, loss_numbers
from finetune.training import make_accelerator
from pretrain.trackers import TENSORBOARD_FOLDER
from pretrain.watchdog import WORK, Watchdog
from setclip import distributed
from setclip.checkpoint import load_model
from setclip.errors import InputError
from setclip.models.backbones import Features, make_backbone
from setclip.models.backbones.recurrent import Recurrent
from setclip.models.heads import SideWidths, make_pair
from setclip.models.heads.pcme import Pcme
from setclip.models.set_model import HeadSettings, SetModel
from setclip.models.shared_norm import SharedBatchNorm1d
from setclip.vocabulary import SPECIAL

# --- ranks and micro-batches

SLOTS = {"num_elements": 2, "blocks": 1, "heads": 2, "head_width": 8, "dropout": 0.0}
CASES = {
    "slot": (HeadSettings(name="slot", width=16, options=SLOTS), ["triplet", "mmd", "uniformity", "contrastive"]),
    "dhset": (HeadSettings(name="dhset", width=16, options={"norm": "l2"}), ["triplet", "dhset_diversity"]),
    "dhset_fragment": (HeadSettings(name="dhset_fragment", width=16), ["triplet", "dhset_diversity"]),
    "match_prob": (HeadSettings(name="pie", width=16, similarity="match_prob_l2"), ["pcme"]),
    "asa": (HeadSettings(name="asa", width=16), ["triplet"]),
}


def gradients(case: str, accumulate: int) -> dict[str, torch.Tensor]:
    """Returns the gradients of one step on this rank's share of 8 pictures with 2 texts each, and what batch norm has seen."""
    world = distributed.start("cpu")
    settings, names = CASES[case]
    torch.manual_seed(0)
    model = SetModel(make_backbone({"kind": "open_clip", "model": MODEL_CFG}), settings)
    terms = {name: Weighted(LOSSES[name].config(), 0.5) for name in names}
    if "contrastive" in terms:
        terms["contrastive"] = Weighted(LOSSES["contrastive"].config(name="hard"))
    module = StepModule(model, terms, loss_numbers(terms))
    accelerator = make_accelerator(FinetuneConfig(device="cpu"), world)
    accelerator.ddp_handler.find_unused_parameters = True
    wrapped = accelerator.prepare_model(module)
    pixels = torch.randn(8, 3, 32, 32)
    tokens = model.backbone.tokenizer([f"{'red ' * (number % 3 + 1)}{number}" for number in range(16)])
    size = 8 // world.size
    own = slice(world.rank * size, (world.rank + 1) * size)
    texts = slice(2 * own.start, 2 * own.stop)
    batch = StepBatch(Pairs.of_captions(8, 2), epoch=0.0)
    module.train()
    if accumulate > 1:
        check_micro_batches(accumulate, size, model)
        loss, _ = divided_backward(module, wrapped, accelerator, pixels[own], tokens[texts], batch, accumulate)
    else:
        loss, _ = wrapped(pixels[own], tokens[texts], batch)
        accelerator.backward(loss)
    found = {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}
    found |= {name: value.clone() for name, value in module.named_buffers() if "running" in name}
    return {**found, "loss": loss.detach()}


def assert_alike(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    largest = max(float(value.abs().max()) for value in expected.values())
    for name, value in expected.items():
        torch.testing.assert_close(
            found[name], value, rtol=2e-3, atol=2e-5 * largest, msg=lambda text, n=name: f"{n}: {text}"
        )


@pytest.mark.parametrize("case", ["slot", "dhset", "dhset_fragment", "match_prob"])
def test_micro_batches_give_the_gradients_of_the_undivided_step(case):
    whole = gradients(case, 1)
    assert any(bool(value.any()) for name, value in whole.items() if "backbone" in name)
    assert_alike(gradients(case, 4), whole)


@pytest.mark.parametrize(
    ("case", "accumulate"),
    [("slot", 2), pytest.param("dhset", 2, marks=pytest.mark.slow), ("asa", 1)],
)
def test_two_ranks_divided_or_with_batch_norm_give_the_gradients_of_one(case, accumulate):
    """asa's batch norm sees the rows of both ranks, its running statistics too."""
    whole = gradients(case, 1)
    for found in on_ranks(2, gradients, case, accumulate):
        assert_alike(found, whole)


def test_batch_norm_of_one_process_is_torch_s():
    own, other = SharedBatchNorm1d(3), torch.nn.BatchNorm1d(3)
    values = torch.randn(5, 3)
    assert torch.equal(own(values), other(values))
    assert own.state_dict().keys() == other.state_dict().keys()


def test_steps_that_cannot_be_divided_are_refused():
    model = SetModel(make_backbone({"kind": "open_clip", "model": MODEL_CFG}), HeadSettings(name="asa", width=16))
    with pytest.raises(InputError, match="expected a head without batch norm for --accumulate 2, found asa"):
        check_micro_batches(2, 8, model)
    towers = {"image": {"kind": "regions", "width": 6}, "text": {"kind": "recurrent", "words": " ".join(SPECIAL)}}
    projected = SetModel(
        make_backbone({"kind": "towers", **towers}), HeadSettings(name="gpo", width=16, projection="vseinf")
    )
    with pytest.raises(InputError, match="expected a projection without batch norm for --accumulate 2, found vseinf"):
        check_micro_batches(2, 8, projected)
    with pytest.raises(InputError, match="expected --accumulate to divide the 8 pictures of a rank's step, found 3"):
        check_micro_batches(3, 8, model)


# --- PCME


def test_pcme_is_its_plain_formula_and_the_same_each_time_in_evaluation():
    torch.manual_seed(0)
    head = Pcme(6, 4, 5, num_samples=3, start=-1.0).double().eval()
    local, pooled = torch.randn(2, 7, 6).double(), torch.randn(2, 5).double()
    mask = torch.arange(7) < torch.tensor([[7], [4]])
    found = head(local, mask, pooled)
    assert found.sets.shape == (2, 3, 4)
    for number, size in enumerate((7, 4)):
        inputs = local[number, :size]
        shares = torch.softmax(torch.tanh(inputs @ head.to_hidden.weight.T) @ head.to_map.weight.T, 0)
        log_sigma = head.of_inputs(shares.T @ inputs)[0] + head.of_global(pooled[number])
        torch.testing.assert_close(found.auxiliary["log_sigma"][number], log_sigma)
        mean = found.auxiliary["mean"][number]
        torch.testing.assert_close(mean, head.mean(inputs[None], None, pooled[number : number + 1]).sets[0, 0])
        assert float(mean.detach().norm()) == pytest.approx(1)
        torch.testing.assert_close(found.sets[number], mean + head.noise * log_sigma.exp())
    assert torch.equal(head(local, mask, pooled).sets, found.sets)
    head.train()
    assert not torch.equal(head(local, mask, pooled).sets, head(local, mask, pooled).sets)
    spread = torch.stack([head(local, mask, pooled).sets for _ in range(400)])
    deviation = (spread - found.auxiliary["mean"][None, :, None]).std((0, 2))
    torch.testing.assert_close(deviation, found.auxiliary["log_sigma"].exp(), rtol=0.15, atol=0)


def test_noise_of_pictures_and_texts_differs():
    settings = HeadSettings(name="pcme", width=8)
    pair = SetModel(make_backbone({"kind": "open_clip", "model": MODEL_CFG}), settings).pair
    assert not torch.equal(pair.image.noise, pair.text.noise)


# --- regions and words


@pytest.mark.parametrize("kind", ["vseinf", "dive"])
def test_a_projection_in_front_of_a_head_is_its_plain_formula(kind):
    torch.manual_seed(0)
    head = make_pair("pie", SideWidths(6, 3), SideWidths(6, 6), width=4, projection=kind).image.double()
    local = torch.randn(3, 5, 6).double()
    mask = torch.arange(5) < torch.tensor([[5], [2], [4]])
    found = head(local, mask, torch.randn(3, 3).double())
    rows = local[mask]
    z = rows @ head.layer.weight.T + head.layer.bias
    hidden = (rows if kind == "vseinf" else z) @ head.into.weight.T + head.into.bias
    hidden = ((hidden - hidden.mean(0)) / (hidden.var(0, unbiased=False) + 1e-5).sqrt()).relu()
    values = z + hidden @ head.out.weight.T + head.out.bias
    if kind == "dive":
        head.dropout.p = 0.0
        found = head(local, mask, None)
    for number, own in enumerate(values.split(mask.sum(1).tolist())):
        expected = head.head(own[None], None, own.amax(0)[None]).sets[0]
        torch.testing.assert_close(found.sets[number], expected)


def test_words_of_a_recurrent_tower_may_be_its_embeddings():
    words = " ".join((*SPECIAL, "red", "blue"))
    tower = Recurrent(words, "bigru_concat", word_width=4, hidden_width=6, local="embeddings")
    assert tower.widths == SideWidths(4, 6)
    tokens = tower.tokenizer(["red blue", "blue"])
    features = tower(tokens)
    assert torch.equal(features.local[0], tower.embedding(tokens)[0])
    assert features.pooled.shape == (2, 6)
    assert tower.description["local"] == "embeddings"


# --- runs


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("steps")
    write_shards(folder / "data", {"train": 64, "val": 12, "test": 12})
    write_pretrained(folder / "pretrained")
    return folder


LAPS = [
    "--similarity", "laps", "--options", "normalise=false", "--similarity-options", "width=32", "num_patches=4", "keep=0.5",
]  # fmt: skip


@pytest.mark.parametrize(
    ("head", "more", "similarity"),
    [
        ("dhset", ["--options", "norm=none"], "dhset_hybrid"),
        pytest.param(
            "dhset", ["--options", "norm=none", "--inference", "set"], "dhset_set", marks=pytest.mark.slow, id="none"
        ),
        ("dhset", ["--options", "norm=l2", "--inference", "set"], "dhset_rows"),
        pytest.param("dhset_fragment", ["--inference", "set"], "dhset_fragment", marks=pytest.mark.slow, id="fragment"),
        ("laps", LAPS, "laps"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_comparisons_that_need_norms_or_layers_evaluate_from_a_checkpoint_as_in_the_run(
    place, tmp_path, head, more, similarity
):
    command(words(place, tmp_path / "run", head, "--epochs", 1, "--optim.lr", 1e-2, *more))
    told = Results.load(tmp_path / "run" / "results.json")
    asked = RetrievalConfig(
        data=place / "data", split="test", checkpoint=str(tmp_path / "run"), gallery_queries=0, device="cpu", workers=0
    )
    found = evaluate(asked).results
    assert found.details["similarity"] == told.details["similarity"] == similarity
    assert {n: m.value for n, m in found.metrics.items()} == {n: m.value for n, m in told.metrics.items()}
    loaded = load_model(tmp_path / "run")
    if "norm=none" in more and "--inference" not in more:
        model = loaded.model
        tokens = loaded.tokenizer(["red blue", "green"])
        with torch.no_grad():
            images = model.encode_image(torch.randn(3, 3, 32, 32))
            sets = model.texts(model.backbone.text(tokens)).sets
            scores = model.pair.similarity(images[:, None], sets)
            torch.testing.assert_close(images @ model.encode_text(tokens).T / sets.shape[1], scores)
    if similarity != "dhset_rows":
        with pytest.raises(InputError, match="expected a model whose features are unit vectors"):
            check_unit(encode_functions(loaded)[0])


def test_a_run_in_micro_batches_has_the_losses_of_one_without(place, tmp_path):
    slots = ["--options", "num_elements=2", "blocks=1", "heads=2", "head_width=8", "dropout=0.0"]
    for number in (1, 4):
        more = ["--epochs", 1, "--accumulate", number, "--backbone.freeze", "none", *slots]
        command([*words(place, tmp_path / str(number), "mean", *more), "--head", "slot"])
    losses = [[e["loss"] for e in entries(tmp_path / n) if "loss" in e] for n in ("1", "4")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


@pytest.mark.slow
def test_a_plateau_goes_on_in_a_resume_trackers_get_all_and_the_watchdog_hears_of_each_work(
    place, tmp_path, monkeypatch
):
    heard: list[str] = []

    class Heard(Watchdog):
        def at(self, step, work):
            heard.append(work)
            super().at(step, work)

        def close(self):
            heard.append("closed")
            super().close()

    monkeypatch.setattr(training, "Watchdog", Heard)
    plateau = ["--optim.schedule", "plateau", "--optim.patience", 0, "--optim.decay", 0.5, "--epochs", 6, "--keep", 9]
    command(words(place, tmp_path / "whole", "mean", *plateau, "--log.tensorboard", True))
    told = entries(tmp_path / "whole")
    rates = [entry["lr"] for entry in told if "lr" in entry]
    assert min(rates) < max(rates) == 3e-3
    assert set(heard) == {*WORK, "closed"} - {"encoding"}
    assert heard[-1] == "closed"
    assert list((tmp_path / "whole" / TENSORBOARD_FOLDER).glob("events.*"))
    # going on after the fourth epoch, as after a kill
    out = tmp_path / "whole"
    for step in (10, 12):
        for file in (out / "checkpoints" / f"step-{step:08d}").iterdir():
            file.unlink()
        (out / "checkpoints" / f"step-{step:08d}").rmdir()
    (out / "results.json").unlink()
    command(words(place, out, "mean", *plateau, "--resume", True))
    assert [entry["lr"] for entry in entries(out) if "lr" in entry] == rates


def entries(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_the_heads_own_losses_of_pcme_are_those_of_its_recipe():
    config = RECIPES["plain"]("pcme")
    assert set(config.terms()) == {"pcme", "gaussian_kl"}
    assert config.weights == WeightsConfig(triplet=0.0, pcme=1.0, gaussian_kl=1e-5)
    assert math.isclose(config.terms()["gaussian_kl"].weight, 1e-5)
    assert config.head_settings().similarity_options == {"a": 15, "b": 15}


def test_parts_of_features_keep_rows_together():
    from finetune.micro_batches import parts_of

    features = Features(
        torch.arange(12.0).view(4, 3, 1), torch.ones(4, 3, dtype=torch.bool), torch.arange(4.0)[:, None]
    )
    parts = parts_of(features, 2)
    assert [part.local.shape[0] for part in parts] == [2, 2]
    assert torch.equal(torch.cat([part.pooled for part in parts]), features.pooled)
