"""What is done to a model for training: locked towers, checkpointing, patch dropout, compilation, towers of others."""

import dataclasses
import json

import huggingface_hub.constants
import pytest
import torch
from material import MODEL_CFG as WITH_ALL_TOKENS
from material import write_model, write_shards
from ranks import on_ranks
from safetensors.torch import load_file
from test_pretrain import config_of, losses_of, run, train_on_rank
from transformers import BertConfig, BertTokenizerFast, RobertaConfig

from pretrain.checkpoints import SaveConfig
from pretrain.config import RECIPES
from pretrain.engine import Engine, EngineConfig
from pretrain.losses import BatchSets, LossConfig, contrastive_loss
from pretrain.model_options import (
    ModelConfig,
    build_for_training,
    locked_norms,
    patch_dropout_of,
    with_pretrained_towers,
)
from pretrain.optim import OptimConfig, parameter_groups
from pretrain.patch_dropout import PatchDropout, kept_patches
from pretrain.state import gather_weights
from setclip import distributed
from setclip.checkpoint import load_initial_weights
from setclip.errors import InputError
from setclip.hashing import _mix_number
from setclip.models.clip import build_clip, load_weights, model_config, tokenizer_for

GLOBAL_BATCH = 8
CFG = {
    **WITH_ALL_TOKENS,
    "vision_cfg": {**WITH_ALL_TOKENS["vision_cfg"], "patch_size": 8, "layers": 2},
    "text_cfg": {**WITH_ALL_TOKENS["text_cfg"], "vocab_size": 101, "layers": 2},
}
RESNET = {**CFG, "vision_cfg": {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8, "head_width": 64}}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("options")
    write_shards(folder / "shards")
    write_model(folder)
    return folder


def batch(step=0, size=32):
    random = torch.Generator().manual_seed(step)
    return (
        torch.randn(GLOBAL_BATCH, 3, size, size, generator=random),
        torch.randint(1, 100, (GLOBAL_BATCH, 12), generator=random),
        torch.randint(0, 5, (GLOBAL_BATCH, 1), generator=random),
        torch.randint(0, 2**62, (GLOBAL_BATCH,), generator=random),
    )


def make_engine(world, options, stage=0, model_cfg=CFG, weights=None, **settings):
    torch.manual_seed(0)
    model = build_for_training(model_cfg, options)
    if weights is not None:
        load_weights(model, weights, "the test's")
    # AdamW divides by |g| + ε: with the usual ε it would make steps of gradients that are nothing but rounding.
    optim = OptimConfig(clip_grad_norm=0.5, eps=1.0)
    config = EngineConfig(zero_stage=stage, device="cpu", **settings)
    engine = Engine(model, config, optim, GLOBAL_BATCH // world.size, world)
    engine.train()
    return engine


def train(engine, world, first=0, last=3, size=32):
    """Returns each step's loss and gradient norm."""
    found = []
    for step in range(first, last):
        torch.manual_seed(step)
        mine = slice(world.rank, None, world.size)
        images, tokens, objects, draws = (value[mine] for value in batch(step, size))
        features = engine.forward(images, tokens, draws)
        output = contrastive_loss(
            features.images, features.texts, features.logit_scale, BatchSets(objects, objects), LossConfig()
        )
        norm = engine.step(output.loss, lr=0.3).grad_norm
        found.append((float(distributed.mean_over_ranks(output.loss)), norm))
    return found


def courses(cases):
    """Returns, per case of (options, engine settings), the steps and the weights after them."""
    world = distributed.start("cpu")
    found = []
    for options, settings in cases:
        engine = make_engine(world, options, **settings)
        found.append((train(engine, world), gather_weights(engine)))
        engine.close()
    return found


@pytest.mark.parametrize(("model_cfg", "is_channels_last"), [(RESNET, True), (CFG, False)])
def test_pictures_lie_channels_last_before_convolutions_alone_and_features_and_gradients_are_the_same(
    model_cfg, is_channels_last
):
    world = distributed.start("cpu")
    engine = make_engine(world, ModelConfig(), model_cfg=model_cfg)
    seen = []
    engine.model.visual.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    torch.manual_seed(0)
    plain = build_for_training(model_cfg, ModelConfig()).train()
    images, tokens, *_ = batch()
    found = engine.forward(images, tokens)
    expected = plain(images, tokens)
    assert seen[0].is_contiguous(memory_format=torch.channels_last) == is_channels_last
    torch.testing.assert_close(found.images, expected[0], rtol=0, atol=2e-6)
    engine.deepspeed.backward((found.images * images.mean((1, 2, 3))[:, None]).sum())
    (expected[0] * images.mean((1, 2, 3))[:, None]).sum().backward()
    for (name, ours), theirs in zip(engine.model.visual.named_parameters(), plain.visual.parameters(), strict=True):
        error = (ours.grad - theirs.grad).norm() / theirs.grad.norm().clamp_min(1e-2)
        assert error < 1e-4, name
    engine.close()


def check_alike(found, expected, tolerance=3e-6):
    for step, of_one in zip(found[0], expected[0], strict=True):
        assert step == pytest.approx(of_one, rel=tolerance)
    for name, weight in found[1].items():
        error = (weight - expected[1][name]).norm() / expected[1][name].norm().clamp_min(1e-2)
        assert error < tolerance, name


# Gradient checkpointing


def kept_bytes(model):
    """Returns the bytes that a forward pass keeps for the backward pass, beside parameters, and the gradients."""
    images, tokens, _, _ = batch()
    kept, owned = {}, {p.untyped_storage().data_ptr() for p in model.parameters()}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in owned:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        features = model.train()(images, tokens)
    (features[0] @ features[1].T * features[2]).logsumexp(1).sum().backward()
    return sum(kept.values()), {name: p.grad for name, p in model.named_parameters()}


def test_checkpointing_gives_the_same_gradients_and_keeps_less():
    torch.manual_seed(0)
    plain = build_for_training(CFG, ModelConfig())
    checkpointed = build_for_training(CFG, ModelConfig(grad_checkpointing=True))
    checkpointed.load_state_dict(plain.state_dict())
    whole, expected = kept_bytes(plain)
    less, found = kept_bytes(checkpointed)
    assert less < whole / 3
    for name, gradient in expected.items():
        assert torch.equal(found[name], gradient), name


def test_a_resnet_of_open_clips_cannot_be_checkpointed_and_is_told_so():
    with pytest.raises(InputError, match=r"open_clip's ResNets cannot; save memory with --engine\.accumulation"):
        build_for_training(RESNET, ModelConfig(name="RN50", grad_checkpointing=True))


# Locked towers


def test_a_locked_tower_has_nothing_to_train_and_no_weight_decay():
    model = build_for_training(CFG, ModelConfig(lock_image=True))
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained
    assert not any(name.startswith("visual.") for name in trained)
    groups = parameter_groups(model, 0.1)
    assert sum(len(group["params"]) for group in groups) == len(trained)


def test_unlocked_groups_are_those_of_open_clip():
    def trained(**options):
        model = build_for_training(CFG, ModelConfig(**options))
        return {name.split(".resblocks.")[-1] for name, p in model.named_parameters() if p.requires_grad}

    only_text = trained(lock_image=True)
    assert trained(lock_image=True, lock_image_unlocked=1) - only_text == {"visual.proj"}
    two = trained(lock_image=True, lock_image_unlocked=2) - only_text
    assert {"visual.proj", "visual.ln_post.weight"} <= two
    assert "visual.conv1.weight" not in two
    assert "text_projection" in trained(lock_text=True, lock_text_unlocked=1)
    assert "text_projection" not in trained(lock_text=True)


@pytest.mark.parametrize(
    ("model_cfg", "options", "message"),
    [
        (
            CFG,
            {"lock_image": True, "lock_text": True},
            "expected weights to train, found none in .* both towers are locked",
        ),
        (RESNET, {"lock_image": True, "lock_image_unlocked": 1}, "groups can be unlocked .* found ModifiedResNet"),
        (
            RESNET,
            {"patch_dropout": 0.5},
            r"image tower with patches for --model\.patch-dropout 0\.5, found ModifiedResNet",
        ),
    ],
)
def test_what_a_model_cannot_do_is_refused(model_cfg, options, message):
    with pytest.raises(InputError, match=message):
        build_for_training(model_cfg, ModelConfig(**options))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lock_image_unlocked": 1}, r"give --model\.lock-image True"),
        ({"lock_text": True, "lock_text_unlocked": -1}, "must not be negative"),
        ({"patch_dropout": 1.0}, r"must lie in \[0, 1\), found 1\.0"),
        ({"pretrained": "openai", "pretrained_image": True}, "not both"),
    ],
)
def test_options_that_make_no_sense_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        ModelConfig(**options)


def locked_courses(stages, precision):
    """Returns, per stage, locked weights before and after three steps, and whether others moved."""
    world = distributed.start("cpu")
    options = ModelConfig(lock_image=True, lock_image_unlocked=1)
    found = {}
    for stage in stages:
        engine = make_engine(world, options, stage, precision=precision, accumulation=2)
        locked = [name for name, p in engine.model.named_parameters() if not p.requires_grad]
        torch.manual_seed(0)
        before = build_for_training(CFG, options).state_dict()
        steps = train(engine, world)
        after = gather_weights(engine)
        found[stage] = (
            steps,
            len(locked) > 10 and all(torch.equal(after[name], before[name]) for name in locked),
            not torch.equal(after["visual.proj"], before["visual.proj"]),
        )
        engine.close()
    return found


def test_locked_weights_stay_to_the_bit():
    (found,) = [locked_courses((0,), "fp32")]
    assert found[0][1:] == (True, True)


@pytest.mark.slow
@pytest.mark.parametrize(("world_size", "precision"), [(2, "fp32"), (1, "bf16")])
def test_locked_weights_stay_to_the_bit_at_every_stage_and_in_bf16(world_size, precision):
    """In bf16 DeepSpeed rounds them; what is saved are the weights as they were."""
    stages = (1, 2, 3) if precision == "bf16" else (0, 1, 2, 3)
    for found in on_ranks(world_size, locked_courses, stages, precision):
        for stage, (steps, stayed, moved) in found.items():
            assert (stayed, moved) == (True, True), stage
            if precision == "fp32":
                assert steps[0] == pytest.approx(found[0][0][0], rel=3e-6), stage


def test_the_statistics_of_a_locked_resnet_stay():
    world = distributed.start("cpu")
    engine = make_engine(world, ModelConfig(lock_image=True), model_cfg=RESNET)
    before = {name: value.clone() for name, value in engine.model.named_buffers()}
    assert len(locked_norms(engine.model)) > 10
    train(engine, world, 0, 1)
    assert all(torch.equal(value, before[name]) for name, value in engine.model.named_buffers())


def test_a_run_with_a_locked_tower_resumes_bit_for_bit_and_not_with_another_lock(place):
    options = dataclasses.replace(config_of(place, "locked").model, lock_image=True, patch_dropout=0.5)
    last = run(config_of(place, "locked", model=options, steps=6, save=SaveConfig(every_steps=3)))
    whole = load_file(last / "model.safetensors")
    for path in last.parent.glob("step-*6"):
        path.rename(path.parent.parent / "away")
    again = config_of(place, "locked", model=options, steps=6, overwrite=False, resume=True)
    resumed = load_file(run(again) / "model.safetensors")
    assert all(torch.equal(resumed[name], value) for name, value in whole.items())
    unlocked = dataclasses.replace(again, model=dataclasses.replace(options, lock_image=False))
    with pytest.raises(InputError, match=r"towers was .*'lock_image': True"):
        run(unlocked)


# Patch dropout


def test_patches_are_drawn_by_sample_alone():
    numbers = torch.tensor([5, 2**61, -3, 5])
    kept = kept_patches(numbers, 49, 0.5)
    assert kept.shape == (4, 24)
    assert torch.equal(kept[0], kept[3])
    assert not torch.equal(kept[0], kept[1])
    assert torch.equal(kept[1:3], kept_patches(numbers[1:3], 49, 0.5)), "whatever else is in the batch"
    assert all(row.unique().numel() == 24 and row.max() < 49 for row in kept)
    assert kept_patches(numbers, 3, 0.9).shape == (4, 1), "one always stays"


def test_each_patch_is_kept_as_often_as_any_other():
    """2,000 draws of 8 of 16: each is kept 1,000 times, give or take four standard deviations of 22."""
    counts = kept_patches(torch.arange(2000), 16, 0.5).flatten().bincount(minlength=16)
    assert counts.sum() == 16_000
    assert (counts - 1000).abs().max() < 90


def test_the_draws_are_the_hash_that_they_say():
    word = _mix_number(7 ^ _mix_number(2))
    scores = [_mix_number(7 ^ _mix_number(patch)) for patch in range(1, 10)]
    assert scores[1] == word
    signed = [score - 2**64 if score >= 2**63 else score for score in scores]
    expected = sorted(sorted(range(9), key=lambda i: signed[i])[-4:])
    assert kept_patches(torch.tensor([7]), 9, 0.5).tolist() == [expected]


def test_dropped_patches_have_no_part_and_evaluation_keeps_all():
    module = PatchDropout(0.5, 1)
    module.patches = 4
    tokens = torch.arange(5.0).view(1, 5, 1)
    module.draw(torch.tensor([3]))
    out = module(tokens)[0, :, 0]
    assert out[0] == 0
    assert out.numel() == 3
    assert torch.equal(out[1:].long() - 1, module.kept[0])
    assert torch.equal(module.eval()(tokens), tokens)


def test_patch_dropout_of_a_configuration_is_drawn_by_sample_too():
    model = build_for_training({**CFG, "vision_cfg": {**CFG["vision_cfg"], "patch_dropout": 0.25}}, ModelConfig())
    assert patch_dropout_of(model).share == 0.25
    assert patch_dropout_of(build_for_training(CFG, ModelConfig())) is None


def test_patch_dropout_learns_alike_whatever_the_micro_batches_and_checkpointing():
    dropped = ModelConfig(patch_dropout=0.5)
    both = dataclasses.replace(dropped, grad_checkpointing=True)
    plain, cut, checked, without = courses(
        [(dropped, {}), (dropped, {"accumulation": 4}), (both, {"accumulation": 2}), (ModelConfig(), {})]
    )
    check_alike(cut, plain)
    check_alike(checked, plain)
    assert without[0][0][0] != pytest.approx(plain[0][0][0], rel=1e-4)


@pytest.mark.slow
def test_two_ranks_drop_the_patches_of_one(place):
    options = dataclasses.replace(config_of(place, "x").model, patch_dropout=0.5)
    run(config_of(place, "dropped", model=options, steps=3))
    on_ranks(2, train_on_rank, config_of(place, "dropped2", model=options, steps=3))
    run(config_of(place, "whole", steps=3))
    assert losses_of(place / "dropped2") == pytest.approx(losses_of(place / "dropped"), abs=2e-5)
    assert losses_of(place / "whole")[0] != pytest.approx(losses_of(place / "dropped")[0], abs=1e-3)


@pytest.mark.slow
def test_stages_learn_alike_with_all_options_on_two_ranks():
    options = ModelConfig(patch_dropout=0.5, grad_checkpointing=True, lock_text=True, lock_text_unlocked=2)
    expected = courses([(options, {})])[0]
    cases = [(options, {"stage": stage, "accumulation": 2}) for stage in (0, 1, 2, 3)]
    for found in on_ranks(2, courses, cases):
        for case in found:
            check_alike(case, expected)


def test_the_recipes_at_scale_have_the_settings_of_the_published_runs():
    """SLIP, LaCLIP and DeCLIP: AdamW (0.9, 0.98), 1e-8; batch 4096; one epoch of warm-up; scale from 1/0.07 to at most 100."""
    for name in ("cc3m", "cc12m", "yfcc15m", "yfcc15m-clip", "yfcc15m-declip"):
        for recipe, patch in ((name, 32), (f"{name}-b16", 16)):
            config = RECIPES[recipe]()
            optim = config.optim
            assert (config.global_batch_size, config.epochs, optim.lr, optim.weight_decay) == (4096, 32, 1e-3, 0.1)
            assert (optim.betas, optim.eps, optim.final_lr_share, optim.max_logit_scale) == ((0.9, 0.98), 1e-8, 0, 100)
            assert optim.warmup_samples == 0
            assert optim.warmup_share * config.epochs == 1
            assert (config.engine.precision, config.engine.zero_stage) == ("bf16", 1)
            cfg = model_config(config.model.name)
            vision, text = cfg["vision_cfg"], cfg["text_cfg"]
            assert cfg["embed_dim"] == 512
            assert (vision["image_size"], vision["layers"], vision["width"], vision["patch_size"]) == (
                224,
                12,
                768,
                patch,
            )
            shape = ("vocab_size", "context_length", "width", "heads", "layers")
            assert [text[key] for key in shape] == [49408, 77, 512, 8, 12]
            assert cfg.get("init_logit_scale") is None, "open_clip's own: ln(1/0.07)"


# torch.compile


def test_compilation_at_stage_3_is_refused():
    with pytest.raises(ValueError, match=r"compile needs --engine\.zero-stage 0, 1 or 2; found 3"):
        EngineConfig(compile=True, zero_stage=3)


@pytest.mark.filterwarnings(
    "ignore:.torch.jit.script_method. is deprecated:DeprecationWarning"
)  # torch's own use of it
@pytest.mark.slow
def test_a_compiled_model_gives_the_losses_and_names_of_the_plain_one(tmp_path, monkeypatch):
    """With the feature cache, patch dropout and checkpointing at once: compiling takes most of the time."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("TORCHINDUCTOR_COMPILE_THREADS", "1")
    options = ModelConfig(patch_dropout=0.5, grad_checkpointing=True)
    of_one_layer = {name: {**CFG[name], "layers": 1} for name in ("vision_cfg", "text_cfg")}
    settings = {"stage": 1, "accumulation": 2, "model_cfg": {**CFG, **of_one_layer}}
    plain, compiled = courses([(options, settings), (options, {**settings, "compile": True})])
    assert list(tmp_path.rglob("*.so")), "something was compiled"
    check_alike(compiled, plain, 2e-5)
    assert compiled[1].keys() == plain[1].keys()


# Towers of timm and Hugging Face


@pytest.fixture(scope="module")
def text_tower(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bert")
    words = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        "a",
        "and",
        "number",
        ",",
        *map(str, range(10)),
        "dog",
        "cat",
    ]
    (folder / "vocab.txt").write_text("\n".join(words))
    BertTokenizerFast(vocab=str(folder / "vocab.txt")).save_pretrained(folder)
    small = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    BertConfig(vocab_size=101, max_position_embeddings=16, **small).save_pretrained(folder)
    RobertaConfig(vocab_size=101, max_position_embeddings=16, **small).save_pretrained(folder / "roberta")
    return folder


def foreign(text_tower, image="test_vit", kind="", **vision):
    folder = str(text_tower / kind)
    return {
        "embed_dim": 16,
        "vision_cfg": {"timm_model_name": image, "image_size": 160, "timm_pool": "avg", **vision},
        "text_cfg": {
            "hf_model_name": folder,
            "hf_tokenizer_name": str(text_tower),
            "context_length": 12,
            "hf_pooler_type": "mean_pooler",
        },
    }


def test_towers_of_timm_and_hugging_face_train_and_are_read_again(text_tower, place, tmp_path):
    path = tmp_path / "foreign.json"
    path.write_text(json.dumps(foreign(text_tower)))
    options = ModelConfig(name=str(path), patch_dropout=0.5, grad_checkpointing=True)
    last = run(config_of(place, tmp_path / "run", model=options, steps=2))
    losses = losses_of(tmp_path / "run")
    assert len(losses) == 2
    assert all(map(torch.isfinite, torch.tensor(losses)))
    weights = load_initial_weights(str(last), "")
    load_weights(build_clip(foreign(text_tower), scalar_logit_scale=True), weights, str(last))


def test_locks_of_foreign_towers_are_those_of_open_clip(text_tower):
    def trained(cfg, **options):
        model = build_for_training(cfg, ModelConfig(**options))
        return {name for name, p in model.named_parameters() if p.requires_grad}

    cfg = foreign(text_tower, kind="roberta")
    image = {name for name in trained(cfg, lock_image=True) if name.startswith("visual.")}
    assert image == {"visual.head.proj.weight"}
    unlocked = trained(cfg, lock_text=True, lock_text_unlocked=1)
    assert any(".layer.1." in name for name in unlocked)
    assert not any(".layer.0." in name for name in unlocked)
    with pytest.raises(InputError, match=r"BertModel of Hugging Face .* layers open_clip does not know"):
        trained(foreign(text_tower), lock_text=True, lock_text_unlocked=1)


def test_a_convolutional_tower_of_timm_trains_but_has_no_patches(text_tower):
    cfg = foreign(text_tower, image="test_resnet")
    model = build_for_training(cfg, ModelConfig(grad_checkpointing=True, lock_image=True))
    assert len(locked_norms(model)) > 10
    with pytest.raises(InputError, match=r"patch_drop_rate.*timm's 'test_resnet'"):
        build_for_training(cfg, ModelConfig(patch_dropout=0.5))


def test_a_tower_that_is_not_known_or_of_another_size_is_named(text_tower):
    with pytest.raises(InputError, match=r"Unknown model \(vit_nonsense\)"):
        build_clip(foreign(text_tower, image="vit_nonsense"))
    with pytest.raises(
        InputError, match=r"pictures of 224 pixels for timm's 'vit_tiny_patch16_224', found image_size 64"
    ):
        build_clip(foreign(text_tower, image="vit_tiny_patch16_224", image_size=64))


def test_without_a_network_what_is_missing_is_named(text_tower, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    cfg = foreign(text_tower)
    cfg["text_cfg"]["hf_model_name"] = cfg["text_cfg"]["hf_tokenizer_name"] = "nobody/nothing"
    with pytest.raises(InputError, match=r"text tower 'nobody/nothing' .* \(HF_HOME\), or give the folder of a model"):
        build_clip(cfg)
    with pytest.raises(
        InputError, match=r"tokenizer 'nobody/nothing' .* \(HF_HOME\), or give a folder as hf_tokenizer_name"
    ):
        tokenizer_for(cfg)
    with pytest.raises(
        InputError, match=r"weights laion400m_e31 in the cache or on the Hub, found neither .* \(HF_HOME\)"
    ):
        load_initial_weights("laion400m_e31", "ViT-B-32-quickgelu")
    with pytest.raises(InputError, match=r"weights hf-hub:nobody/nothing in the cache or on the Hub"):
        load_initial_weights("hf-hub:nobody/nothing", "ViT-B-32")


def test_weights_of_the_other_activation_are_refused():
    """open_clip warns and lets them be loaded; zero-shot is then some points worse, and nobody knows why."""
    with pytest.raises(InputError, match=r"QuickGELU for the weights 'openai', found ViT-B-32; .* ViT-B-32-quickgelu"):
        load_initial_weights("openai", "ViT-B-32")


def test_pretrained_towers_need_towers_that_have_weights(text_tower):
    with pytest.raises(InputError, match=r"image tower of timm for --model\.pretrained-image"):
        with_pretrained_towers(CFG, ModelConfig(pretrained_image=True))
    with pytest.raises(InputError, match=r"text tower of Hugging Face for --model\.pretrained-text"):
        with_pretrained_towers(CFG, ModelConfig(pretrained_text=True))


def test_a_text_tower_begins_with_its_own_weights(text_tower, tmp_path):
    from transformers import BertModel

    torch.manual_seed(1)
    tower = BertModel(BertConfig.from_pretrained(text_tower), add_pooling_layer=False)
    tower.save_pretrained(tmp_path)
    cfg = foreign(text_tower)
    cfg["text_cfg"]["hf_model_name"] = str(tmp_path)
    weights = with_pretrained_towers(cfg, ModelConfig(pretrained_text=True))
    for name, value in tower.state_dict().items():
        assert torch.equal(weights[f"text.transformer.{name}"], value), name
