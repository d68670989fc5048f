"""Text domains: the shares and the choice of objects are those asked for, on any ranks and workers and after a resume."""

import dataclasses
import json
import shutil
from collections import Counter
from functools import lru_cache
from itertools import islice, pairwise

import numpy as np
import pytest
import torch
from material import MODEL_CFG, NOUNS, sample, write_model
from ranks import on_ranks
from safetensors.torch import load_file
from scipy.stats import chi2_contingency, chisquare
from test_pretrain import config_of, losses_of, run, train_on_rank

from eval_suite.datasets import TEMPLATES
from pretrain.checkpoints import SaveConfig
from pretrain.config import RECIPES
from pretrain.data_order import DataOrder
from pretrain.loader import Loader, SamplePipeline, ids_of_texts
from pretrain.losses import LossConfig
from pretrain.progress import read_metrics
from pretrain.resume import STATE_NAME
from pretrain.text_domains import Counts, Descriptions, TextConfig, TextDomains, make_text_domains, text_shares
from setclip import config as configuration
from setclip.checkpoint import CHECKSUMS_NAME
from setclip.descriptions import Description, DescriptionTable, read_descriptions, write_descriptions
from setclip.errors import InputError
from setclip.files import sha256_of, write_json
from setclip.hashing import hash_text, hash_u64
from setclip.images import Augment, AugmentConfig
from setclip.manifest import Manifest, open_split
from setclip.models.clip import tokenizer_for
from setclip.objects import OBJECTS_NAME, ObjectTable, object_id, write_objects
from setclip.shards import ShardWriter

BATCH = 16
DESCRIBED = ("dog", "cat", "car", "tree")
ALL = TextConfig(prompt=0.3, description=0.3)
DRAWS = 20_000


def text_of(name):
    return f"A {name} looks like a {name}."


def table_of(names=DESCRIBED, parser="pos", flagged=("boat",), empty=("house",)):
    rows = [Description(name, text_of(name), (), "description 1") for name in names]
    rows += [Description(name, text_of(name), ("no word of appearance",), "description 1") for name in flagged]
    rows += [Description(name, "", ("no words", "no words"), "") for name in empty]
    return DescriptionTable("test-model", parser, "tail", rows)


def write_corpus(folder, sizes=(20, 13, 31)):
    """Writes shards with the objects of two parsers (the llm's are one of pos's, or none), counts and descriptions."""
    folder.mkdir()
    infos, counts, first = [], {"pos": Counter(), "llm": Counter()}, 0
    for shard, size in enumerate(sizes):
        with ShardWriter(folder / f"train-{shard:05d}.tar", split="train") as writer:
            for number in range(first, first + size):
                made = sample(number)
                llm = [names[:1] if number % 4 else [] for names in made.objects["pos"]]
                made = dataclasses.replace(made, objects={**made.objects, "llm": llm})
                for parser, lists in made.objects.items():
                    counts[parser].update(name for names in lists for name in names)
                writer.add(made)
        first += size
        infos.append(writer.info)
    pairs = sum(info.captions for info in infos)
    write_objects(
        folder / OBJECTS_NAME, [ObjectTable.from_counts(found, parser, pairs) for parser, found in counts.items()]
    )
    write_descriptions(folder / "descriptions.parquet", table_of())
    parsers = {"pos": "test 1", "llm": "test 1"}
    Manifest(source="folder", shards=infos, pairs_listed=pairs, pairs_present=pairs, parsers=parsers).save(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus") / "shards")


@pytest.fixture(scope="module")
def place(folder):
    write_model(folder.parent)
    return folder.parent


@lru_cache
def numbers_of(count=DRAWS, seed=0, epoch=0):
    """Returns the numbers that the loader draws for `count` keys: (caption, domain, object, template)."""
    keys = np.array([hash_text(f"key {i}") for i in range(count)], np.uint64)
    return hash_u64(np.array([1, 5, 6, 7])[None], seed, epoch, keys[:, None]).tolist()


def drawn(domains, objects, caption="the caption", **kwargs):
    return [domains.draw(caption, objects, numbers[1:]) for numbers in numbers_of(**kwargs)]


def counts_of(**captions):
    return Counts.of(ObjectTable.from_counts(captions, "pos", 1000))


def is_fair(found, expected):
    """Whether counts are as expected, by a test that is wrong once in a thousand seeds; the seed is fixed."""
    expected = np.array(expected, float)
    return chisquare(found, expected / expected.sum() * sum(found)).pvalue > 1e-3


def loader(folder, text, rank=0, world_size=1, workers=0, samples_seen=0, parser="pos"):
    _, shards = open_split(folder, "train")
    order = DataOrder(tuple(map(len, shards)), seed=3, num_lanes=8, block_size=4, window_blocks=2)
    texts = make_text_domains(text, folder, parser)
    augment = Augment(AugmentConfig(kind="resized_crop", scale=(0.5, 1), flip=True), 32)
    pipeline = SamplePipeline(shards, augment, tokenizer_for(MODEL_CFG), parser, 3, texts)
    return Loader(order, pipeline, BATCH // world_size, rank, world_size, workers, samples_seen)


def take(source, count):
    return list(islice(source, count))


def rows_of(parts):
    """Returns what each sample of a global batch has, from the ranks' parts."""
    return [
        (
            parts[j % len(parts)].keys[j // len(parts)],
            parts[j % len(parts)].domains[j // len(parts)],
            tuple(parts[j % len(parts)].tokens[j // len(parts)].tolist()),
            int(parts[j % len(parts)].text_ids[j // len(parts)]),
            *(
                frozenset(getattr(parts[j % len(parts)], side)[j // len(parts)].tolist()) - {-1}
                for side in ("image_objects", "text_objects")
            ),
        )
        for j in range(BATCH)
    ]


# ---- What is drawn ----


@pytest.mark.parametrize(("prompt", "description"), [(0.25, 0.25), (0.1, 0.6), (0.0, 0.5), (0.5, 0.5)])
def test_the_domains_have_the_shares_that_were_asked_for(prompt, description):
    config = TextConfig(prompt=prompt, description=description)
    domains = TextDomains(config, counts_of(dog=1), Descriptions.of(table_of()))
    found = Counter(text.domain for text in drawn(domains, ["dog"]))
    shares = {"caption": config.caption, "prompt": prompt, "description": description}
    assert set(found) == {name for name, share in shares.items() if share}
    assert is_fair([found[n] for n in shares if shares[n]], [share for share in shares.values() if share])


@pytest.mark.parametrize("domain", ["prompt", "description"])
@pytest.mark.parametrize(
    ("choose", "expected"),
    [("uniform", {"boat": 1, "cat": 1, "dog": 1}), ("tail", {"boat": 1 / 2, "cat": 1 / 100, "dog": 1 / 5})],
)
def test_an_object_is_chosen_as_was_asked_for(domain, choose, expected):
    """By 1/captions: with 2, 100 and 5 captions they come in the ratio 50 : 1 : 20."""
    config = TextConfig(**{domain: 1.0}, choose=choose, objects="own")
    described = Descriptions.of(table_of(("boat", "cat", "dog"), flagged=()))
    domains = TextDomains(config, counts_of(boat=2, cat=100, dog=5), described)
    found = Counter(text.objects[0] for text in drawn(domains, ["dog", "boat", "cat", "dog"]))
    assert is_fair([found[name] for name in expected], list(expected.values()))


def test_an_object_that_the_statistics_do_not_hold_counts_as_named_once():
    domains = TextDomains(TextConfig(prompt=1.0, objects="own"), counts_of(dog=3))
    found = Counter(text.objects[0] for text in drawn(domains, ["dog", "axolotl"]))
    assert is_fair([found["dog"], found["axolotl"]], [1 / 3, 1])


@pytest.mark.parametrize(("templates", "number"), [("imagenet", 80), ("simple", 7)])
def test_all_templates_come_alike_and_hold_the_object(templates, number):
    domains = TextDomains(TextConfig(prompt=1.0, choose="uniform", templates=templates))
    found = Counter(text.text for text in drawn(domains, ["polar bear"]))
    assert set(found) == {template.replace("{}", "polar bear") for template in TEMPLATES[templates]}
    assert len(found) == number
    assert is_fair(list(found.values()), [1] * number)


def test_domain_object_template_and_caption_are_drawn_independently():
    """Each pair of the four draws, in four classes each."""
    classes = np.array(numbers_of(), np.uint64) >> np.uint64(62)
    for a in range(4):
        for b in range(a):
            table = np.zeros((4, 4), int)
            np.add.at(table, (classes[:, a].astype(int), classes[:, b].astype(int)), 1)
            assert chi2_contingency(table).pvalue > 1e-3


def test_a_description_follows_the_name_of_its_object():
    domains = TextDomains(TextConfig(description=1.0), counts_of(), Descriptions.of(table_of()))
    assert drawn(domains, ["dog", "boat"], count=1)[0].text == "dog. A dog looks like a dog."


def test_only_described_objects_are_described_and_flagged_or_empty_ones_never():
    domains = TextDomains(TextConfig(description=1.0, choose="uniform"), None, Descriptions.of(table_of()))
    texts = Counter(text.text for text in drawn(domains, ["bird", "boat", "car", "cat", "house"], count=400))
    assert texts.keys() == {f"{name}. {text_of(name)}" for name in ("car", "cat")}


def test_what_has_no_text_in_its_domain_falls_back_to_the_caption_and_is_counted():
    config = TextConfig(prompt=0.25, description=0.25, objects="own")
    domains = TextDomains(config, counts_of(boat=1), Descriptions.of(table_of()))
    of_none, of_boat = drawn(domains, []), drawn(domains, ["boat"])
    asked = Counter(text.domain for text in drawn(domains, ["dog"]))
    for texts, fallbacks in ((of_none, asked["prompt"] + asked["description"]), (of_boat, asked["description"])):
        assert sum(text.domain == "fallback" for text in texts) == fallbacks
        assert {text.text for text in texts if text.domain in ("fallback", "caption")} == {"the caption"}
    assert {tuple(text.objects) for text in of_none} == {()}
    shares = text_shares([text.domain for text in of_boat])
    assert shares["text_fallback"] == asked["description"] / DRAWS
    assert shares["text_caption"] == (asked["caption"] + asked["description"]) / DRAWS
    assert shares["text_prompt"] == asked["prompt"] / DRAWS
    assert shares["text_description"] == 0


def test_shares_of_a_batch_are_those_of_its_texts():
    found = text_shares(["caption", "fallback", "prompt", "prompt"])
    assert found == {"text_caption": 0.5, "text_prompt": 0.5, "text_description": 0, "text_fallback": 0.25}


def test_draws_stay_what_they_were():
    """Runs that have begun must go on with them, whatever the versions of libraries."""
    domains = TextDomains(TextConfig(prompt=0.4, description=0.4), counts_of(dog=5), Descriptions.of(table_of()))
    assert [text.text for text in drawn(domains, ["cat", "dog"], count=8, seed=1, epoch=2)] == [
        "a dark photo of a cat.",
        "cat. A cat looks like a cat.",
        "cat. A cat looks like a cat.",
        "the caption",
        "the caption",
        "dog. A dog looks like a dog.",
        "a rendering of a cat.",
        "a photo of many cat.",
    ]


# ---- The loader ----


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # more workers than a small machine has cores
@pytest.mark.parametrize(("world_size", "workers"), [(2, 0), (1, 2), (2, 2)])
def test_ranks_and_workers_do_not_change_the_texts(folder, world_size, workers):
    text = dataclasses.replace(ALL, objects="own")
    one = take(loader(folder, text), 9)  # 144 samples: over two epochs of 64
    parts = [take(loader(folder, text, rank, world_size, workers), 9) for rank in range(world_size)]
    for step, batch in enumerate(one):
        assert rows_of([part[step] for part in parts]) == rows_of([batch])
    assert {domain for batch in one for domain in batch.domains} == {"caption", "prompt", "description", "fallback"}


def test_a_resume_in_mid_epoch_draws_the_same_texts(folder):
    whole = [rows_of([batch]) for batch in take(loader(folder, ALL), 10)]
    rest = [take(loader(folder, ALL, rank, 2, samples_seen=5 * BATCH), 5) for rank in range(2)]
    assert [rows_of(parts) for parts in zip(*rest, strict=True)] == whole[5:]


def test_each_epoch_draws_anew(folder):
    rows = [row for batch in take(loader(folder, ALL), 12) for row in rows_of([batch])]
    epochs = [{row[0]: row[1:3] for row in rows[64 * e : 64 * (e + 1)]} for e in range(3)]
    for before, after in pairwise(epochs):
        assert 16 < sum(before[key] != after[key] for key in before) < 64


def test_pictures_and_captions_are_those_of_a_run_without_text_domains(folder):
    differing = 0
    for plain, mixed in zip(take(loader(folder, TextConfig()), 8), take(loader(folder, ALL), 8), strict=True):
        assert (plain.keys, plain.lanes) == (mixed.keys, mixed.lanes)
        assert torch.equal(plain.images, mixed.images)
        assert torch.equal(plain.image_objects, mixed.image_objects)
        assert set(plain.domains) == {"caption"}
        for row, domain in enumerate(mixed.domains):
            is_equal = torch.equal(plain.tokens[row], mixed.tokens[row])
            assert is_equal == (domain in ("caption", "fallback"))
            differing += not is_equal
    assert differing > 30


def test_the_sets_of_the_caption_stay_unless_those_of_the_text_are_asked_for(folder):
    captions = take(loader(folder, ALL), 8)
    assert all(torch.equal(batch.image_objects, batch.text_objects) for batch in captions)
    ids = {object_id(name) for name in NOUNS}
    smaller = 0
    for batch, same in zip(take(loader(folder, dataclasses.replace(ALL, objects="own")), 8), captions, strict=True):
        assert torch.equal(batch.tokens, same.tokens), "the texts are no others"
        for (_, domain, _, _, of_image, of_text), row in zip(rows_of([batch]), rows_of([same]), strict=True):
            assert of_image == row[4], "the picture keeps the caption's"
            if domain in ("prompt", "description"):
                assert len(of_text) == 1
                assert of_text <= of_image <= ids
                smaller += of_text < of_image
            else:
                assert of_text == of_image
    assert smaller > 10


def test_the_object_of_the_texts_side_is_the_one_that_the_text_names(folder):
    tokenizer = tokenizer_for(MODEL_CFG)
    text = TextConfig(prompt=0.5, description=0.5, objects="own", templates="simple")
    ids = {object_id(name): name for name in NOUNS}
    for batch in take(loader(folder, text), 8):
        for row, domain in enumerate(batch.domains):
            if domain == "fallback":
                continue
            name = ids[int(batch.text_objects[row].max())]
            texts = [f"{name}. {text_of(name)}"]
            if domain == "prompt":
                texts = [template.replace("{}", name) for template in TEMPLATES["simple"]]
            assert batch.tokens[row].tolist() in tokenizer(texts).tolist()


def test_equal_texts_of_a_batch_have_equal_ids(folder):
    """Prompts meet again and again, which captions with their numbers never do."""
    text = TextConfig(prompt=1.0, templates="simple")
    repeated = 0
    for batch in take(loader(folder, text), 6):
        assert torch.equal(batch.text_ids, ids_of_texts(batch.tokens))
        texts = Counter(tuple(row) for row in batch.tokens.tolist())
        assert sorted(texts.values()) == sorted(Counter(batch.text_ids.tolist()).values())
        repeated += BATCH - len(texts)
    assert repeated > 6


def test_a_long_description_is_cut_as_captions_are(folder, tmp_path):
    long = " ".join(["a dog has four legs and"] * 20)
    table = DescriptionTable("m", "pos", "all", [Description(name, f"{long} {name}", (), "") for name in NOUNS])
    write_descriptions(tmp_path / "long.parquet", table)
    text = TextConfig(description=1.0, descriptions=tmp_path / "long.parquet")
    (batch,) = take(loader(folder, text), 1)
    assert set(batch.domains) == {"description"}
    assert batch.tokens.shape == (BATCH, MODEL_CFG["text_cfg"]["context_length"])
    assert (batch.tokens[:, -1] == 49407).all(), "the mark of the end stays"


def test_the_objects_of_the_language_model_are_drawn_where_they_are_asked_for(folder):
    text = TextConfig(prompt=1.0, objects="own")
    samples = {s.key: s for shard in open_split(folder, "train")[1] for s in shard}
    domains = Counter()
    for batch in take(loader(folder, text, parser="llm"), 4):
        for key, domain, _, _, of_image, of_text in rows_of([batch]):
            possible = [{object_id(name) for name in names} for names in samples[key].objects["llm"]]
            assert of_text in possible
            assert of_image in possible
            assert (domain == "fallback") == (not of_image)
            domains[domain] += 1
    assert domains == {"prompt": 48, "fallback": 16}, "one epoch: 16 of 64 samples have no object of the llm's"


# ---- Settings and wrong input ----


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipes_train_on_captions_alone(recipe):
    assert RECIPES[recipe]().text == TextConfig()
    assert TextConfig().is_caption_only


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"prompt": 0.7, "description": 0.4}, r"at most 1 together .*found 0\.7 \+ 0\.4 = 1\.1"),
        ({"prompt": -0.1}, r"text\.prompt must be a share from 0 to 1, found -0\.1"),
        ({"description": 1.5}, r"text\.description must be a share from 0 to 1, found 1\.5"),
        ({"prompt": float("nan")}, r"text\.prompt must be a share"),
    ],
)
def test_shares_that_are_none_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        TextConfig(**values)


def test_shares_that_sum_to_one_up_to_rounding_are_accepted():
    assert TextConfig(prompt=0.9, description=0.1).caption == 0
    assert TextConfig(prompt=0.7, description=0.2).caption == pytest.approx(0.1)


def test_flags_and_the_saved_configuration_set_the_domains(tmp_path):
    flags = ["--text.prompt", "0.25", "--text.description", "0.25", "--text.choose", "uniform"]
    _, config = configuration.parse_recipe(RECIPES, ["tiny", *flags, "--text.descriptions", "d.parquet"])
    assert (config.text.prompt, config.text.description, config.text.choose) == (0.25, 0.25, "uniform")
    configuration.save(tmp_path / "config.yaml", config)
    assert configuration.parse_recipe(RECIPES, ["tiny", "--config", str(tmp_path / "config.yaml")])[1] == config


def test_settings_that_decide_nothing_are_named():
    assert TextConfig().ignored() == {}
    config = TextConfig(choose="uniform", objects="own", templates="simple")
    assert config.ignored() == {"choose": "uniform", "objects": "own", "templates": "simple"}
    assert dataclasses.replace(config, description=0.5).ignored() == {"templates": "simple"}


def test_missing_descriptions_name_the_command_that_makes_them(folder, tmp_path):
    shutil.copy(folder / OBJECTS_NAME, tmp_path)
    with pytest.raises(InputError, match=r"no such file; make it with `python -m data_prep\.describe .*--model MODEL`"):
        make_text_domains(TextConfig(description=0.1), tmp_path, "pos")


def test_prompts_need_no_descriptions_and_a_uniform_choice_no_statistics(tmp_path):
    texts = make_text_domains(TextConfig(prompt=0.5, choose="uniform"), tmp_path, "pos")
    assert texts is not None
    assert (texts.counts, texts.descriptions) == (None, None)
    with pytest.raises(InputError, match=r"python -m data_prep\.statistics"):
        make_text_domains(TextConfig(prompt=0.5), tmp_path, "pos")


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (
            table_of(names=()),
            r"found 0 that can be used of 2 .*1 empty; flags: no word of appearance: 1.*--objects pos",
        ),
        (
            table_of(names=("axolotl",)),
            r"found 1 that can be used of 3 .*none of them of one of the 8 objects of the shards",
        ),
    ],
)
def test_descriptions_of_which_none_can_be_drawn_are_refused(folder, tmp_path, table, message):
    write_descriptions(tmp_path / "other.parquet", table)
    with pytest.raises(InputError, match=message):
        make_text_domains(TextConfig(description=0.1, descriptions=tmp_path / "other.parquet"), folder, "pos")


def test_what_is_left_out_is_said(folder):
    texts = make_text_domains(TextConfig(prompt=0.25, description=0.25, objects="own"), folder, "llm")
    head, left_out, other = texts.notes
    assert head.startswith("texts: 50% captions, 25% prompts (80 templates), 25% descriptions (of 4 objects); ")
    assert left_out.endswith("2 of 6 descriptions are not used: 1 are empty, 1 have a flag (no word of appearance: 1)")
    assert "of objects of 'pos'; 4 of them are objects of 'llm' too" in other


def test_descriptions_are_the_same_however_their_file_was_written(folder, tmp_path):
    table = read_descriptions(folder)
    turned = dataclasses.replace(table, model="other", rows=table.rows[::-1])
    other = dataclasses.replace(table, rows=[*table.rows[:-1], dataclasses.replace(table.rows[-1], text="changed")])
    one, same, changed = (Descriptions.of(t) for t in (table, turned, other))
    assert one.digest == same.digest != changed.digest
    assert one["cat"] == text_of("cat")
    with pytest.raises(KeyError):
        one["house"]


# ---- Training ----

MODES = {
    "prompts": (TextConfig(prompt=0.5), LossConfig(name="hard")),
    "descriptions": (TextConfig(description=0.5, choose="uniform"), LossConfig(name="object_iou")),
    "all": (ALL, LossConfig(name="object_iou", weights="frequency")),
    "own sets": (dataclasses.replace(ALL, objects="own"), LossConfig(name="object_iou")),
    "own sets, siglip": (dataclasses.replace(ALL, objects="own"), LossConfig(name="siglip")),
    "own sets, softclip": (dataclasses.replace(ALL, objects="own"), LossConfig(name="softclip")),
}


def run_of(place, out, text=ALL, **changes):
    config = config_of(place, out, text=text, **changes)
    return dataclasses.replace(config, data=dataclasses.replace(config.data, shards=place / "shards"))


def shares_of(out):
    names = ("text_caption", "text_prompt", "text_description", "text_fallback")
    return [[entry[name] for name in names] for entry in read_metrics(out / "metrics.jsonl") if "loss" in entry]


@pytest.mark.parametrize("mode", MODES)
def test_a_run_trains_in_each_mode_and_logs_what_it_trained_on(place, mode):
    text, loss = MODES[mode]
    run(run_of(place, mode, text, loss=loss, steps=6))
    losses, shares = losses_of(place / mode), np.array(shares_of(place / mode))
    assert len(losses) == len(shares) == 6
    assert np.isfinite(losses).all()
    assert np.allclose(shares[:, :3].sum(1), 1)
    assert (shares.sum(0)[:3] > 0).tolist() == [True, text.prompt > 0, text.description > 0]
    assert (shares[:, 3] <= shares[:, 0]).all()
    assert (shares[:, 3].sum() > 0) == (text.description > 0), "each caption has an object, not all are described"


def test_without_text_domains_no_shares_are_logged(place):
    run(run_of(place, "plain", TextConfig(), steps=2))
    assert not any(name.startswith("text_") for entry in read_metrics(place / "plain/metrics.jsonl") for name in entry)


def test_a_resume_in_mid_epoch_is_bit_identical(place):
    whole = run(run_of(place, "whole", steps=8))
    run(run_of(place, "stopped", steps=8, save=SaveConfig(every_steps=3, keep=9)))
    for later in ("step-00000008", "step-00000006"):
        shutil.rmtree(place / "stopped/checkpoints" / later)
    last = run(run_of(place, "stopped", steps=8, overwrite=False, resume=True))
    for name in ("model.safetensors", "optimizer.safetensors"):
        one, other = load_file(whole / name), load_file(last / name)
        assert all(torch.equal(one[key], other[key]) for key in one)
    assert losses_of(place / "stopped") == losses_of(place / "whole")
    assert shares_of(place / "stopped") == shares_of(place / "whole")


def test_two_ranks_with_workers_give_the_curve_of_one(place):
    text = dataclasses.replace(ALL, objects="own")
    loss = LossConfig(name="object_iou")
    run(run_of(place, "one", text, loss=loss, steps=6))
    two = run_of(place, "two", text, loss=loss, steps=6)
    on_ranks(2, train_on_rank, dataclasses.replace(two, data=dataclasses.replace(two.data, workers=1)))
    assert losses_of(place / "two") == pytest.approx(losses_of(place / "one"), abs=5e-6)
    assert np.allclose(shares_of(place / "two"), shares_of(place / "one"))


def test_a_resume_with_other_texts_is_refused(place, tmp_path):
    run(run_of(place, "begun", steps=4, save=SaveConfig(every_steps=2)))
    again = {"steps": 4, "overwrite": False, "resume": True}
    for text in (TextConfig(), dataclasses.replace(ALL, objects="own"), dataclasses.replace(ALL, prompt=0.2)):
        with pytest.raises(InputError, match=r"started with other settings: text was \{'prompt': 0\.3"):
            run(run_of(place, "begun", text, **again))
    write_descriptions(tmp_path / "changed.parquet", table_of(names=DESCRIBED[:3]))
    with pytest.raises(InputError, match=r"text was .*'descriptions': '[0-9a-f]{16}'"):
        run(run_of(place, "begun", dataclasses.replace(ALL, descriptions=tmp_path / "changed.parquet"), **again))
    shutil.copy(place / "shards/descriptions.parquet", tmp_path / "moved.parquet")
    run(run_of(place, "begun", dataclasses.replace(ALL, descriptions=tmp_path / "moved.parquet"), **again))


def test_a_run_of_captions_from_before_text_domains_goes_on(place):
    folder = run(run_of(place, "earlier", TextConfig(), steps=4, save=SaveConfig(every_steps=2, keep=2)))
    shutil.rmtree(folder)
    before = folder.with_name("step-00000002")
    state = json.loads((before / STATE_NAME).read_text())
    assert state["course"].pop("text") is None
    write_json(before / STATE_NAME, state)
    checksums = json.loads((before / CHECKSUMS_NAME).read_text())
    write_json(before / CHECKSUMS_NAME, {**checksums, STATE_NAME: sha256_of(before / STATE_NAME)})
    assert run(run_of(place, "earlier", TextConfig(), steps=4, overwrite=False, resume=True)) == folder


def test_texts_of_objects_need_parsed_shards(place):
    shutil.copytree(place / "shards", place / "bare")
    manifest = json.loads((place / "bare/manifest.json").read_text())
    write_json(place / "bare/manifest.json", {**manifest, "parsers": {}})
    config = run_of(place, "unparsed", TextConfig(prompt=0.5), loss=LossConfig(name="hard"))
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, shards=place / "bare"))
    with pytest.raises(InputError, match=r"prompts and descriptions need parsed objects: .*data_prep\.parse "):
        run(config)
