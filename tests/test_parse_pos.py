"""Objects of captions by part of speech."""

import time

import numpy as np
import pytest
import spacy
from threadpoolctl import threadpool_info, threadpool_limits

from benchmarks.parsing import CORPORA, REAL_DATA, Reference, corpus, differences
from data_prep import parse_pos
from data_prep.parse_pos import MAX_CHARS, PosParser, Tagger, find_pipeline, readable
from data_prep.pos_config import PosConfig

CAPTIONS = [
    "Two young guys with shaggy hair look at their hands while hanging out in the yard.",
    "a very typical bus station",
    "sierra looked stunning in this top and this skirt while performing with person at their former university",
    "MENS Leather Shoes - Brown | Size 42",
    "The Tata Motors' Chairman at the United Nations' buildings",
    "someone's mine, a coal mine, the boys' knives; nobody goin' home",
    "Kittens, Mountains & Las Vegas - Royalty Free Stock Photos",
    "a dog",
    "",
    "4 x 4 trucks, 2020 model (RX-8)",
]


@pytest.fixture(scope="module")
def parser():
    return PosParser()


@pytest.fixture(scope="module")
def reference():
    return Reference()


@pytest.mark.parametrize(
    ("caption", "objects"),
    [
        ("Two dogs and a teddy bear on the grass", ["dog", "teddy bear", "grass"]),
        ("a dog chases a dog", ["dog"]),
        ("A photo of some mice in front of a house", ["mouse", "house"]),
        ("several sports cars", ["sports car"]),
        ("running slowly", []),
        ("someone gave everyone something", []),
        ("a coal mine", ["coal mine"]),
        ("", []),
    ],
)
def test_a_caption_gives_its_nouns_once_singular_and_in_order(parser, caption, objects):
    assert parser.parse([caption]) == [objects]


@pytest.mark.parametrize(
    ("caption", "objects"),
    [
        ("BLACK DOG IN THE PARK", ["dog", "park"]),  # tagged as it stands: "black dog"
        ("Kittens in the Mountains", ["kitten", "mountain"]),  # proper nouns to the tagger
        ("James Jones in Paris, Texas", ["james jones", "paris", "texas"]),
        ("Kittens - Royalty Free Stock Photos", ["kitten", "royalty free"]),
        ("a cup &amp; a <b>plate</b> on the table<br>", ["cup", "plate", "table"]),
        ("<PERSON> with a dog", ["person", "dog"]),
        ("an ice-cream cone and ice cream", ["ice cream cone", "ice cream"]),
        ("a dog - cat fence", ["dog", "cat fence"]),
        ('"dog" and the cats\'', ["dog", "cat"]),
        ("dog_in_the_park", ["dog", "park"]),
        ("the EES-023 siren and 2x4 planks", ["siren", "plank"]),
        ("a cat\u200b and\x00a\u00a0dog 😀 \ud800", ["cat", "dog"]),
        ("  a teddy \t\n bear ", ["teddy bear"]),
    ],
)
def test_captions_from_the_web_are_read_without_their_damage(parser, caption, objects):
    assert parser.parse([caption]) == [objects]


def test_a_long_row_of_nouns_is_no_object_but_its_nouns_are(parser):
    assert parser.parse(["a home office desk lamp"]) == [["home office desk lamp"]]
    assert parser.parse(["a home office desk lamp shade"]) == [["home", "office", "desk", "lamp", "shade"]]


def test_without_compounds_adjacent_nouns_are_objects_of_their_own():
    apart = PosParser(PosConfig(compound=False))
    assert apart.parse(["a teddy bear and a fire-engine"]) == [["teddy", "bear", "fire", "engine"]]


def test_a_stop_word_is_no_object_and_ends_a_compound():
    parser = PosParser(PosConfig(stop_words=("teddy",)))
    assert parser.parse(["a photo of a teddy bear"]) == [["photo", "bear"]]


def test_numbers_single_letters_and_addresses_are_no_objects(parser):
    (objects,) = parser.parse(["picture x of 2020 from www.example.com : a dog , 3 cats"])
    assert objects == ["dog", "cat"]


def test_results_do_not_depend_on_what_was_parsed_before_or_together(parser):
    together = parser.parse(CAPTIONS * 3)
    fresh = PosParser()
    assert [fresh.parse([caption])[0] for caption in reversed(CAPTIONS)][::-1] * 3 == together


def test_tags_equal_those_of_spacy_however_captions_are_batched(parser):
    nlp = spacy.load(find_pipeline(), enable=["tok2vec", "tagger"])
    tagger = Tagger(nlp)
    docs = [nlp.make_doc(caption) for caption in CAPTIONS]
    expected = [[token.tag_ for token in doc] for doc in nlp.pipe(CAPTIONS)]
    assert [[tagger.labels[tag] for tag in tags] for tags in tagger(docs)] == expected
    assert [[tagger.labels[tag] for tag in tagger([doc])[0]] for doc in docs] == expected


def test_a_close_decision_is_left_to_the_arithmetic_of_spacy(monkeypatch):
    nlp = spacy.load(find_pipeline(), enable=["tok2vec", "tagger"])
    tagger = Tagger(nlp)
    docs = [nlp.make_doc(caption) for caption in CAPTIONS]
    expected = tagger(docs)
    softmax = tagger._fast[-1]
    softmax.set_param("W", np.zeros_like(softmax.get_param("W")))
    wrong = tagger(docs)
    assert any((found != tags).any() for found, tags in zip(wrong, expected, strict=True))
    monkeypatch.setattr(tagger, "CLOSE", np.inf)
    assert all((found == tags).all() for found, tags in zip(tagger(docs), expected, strict=True))


def test_tagging_takes_one_blas_thread_and_gives_the_others_back(parser, monkeypatch):
    def threads():
        return [pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas"]

    during = []
    scores = Tagger._scores
    monkeypatch.setattr(Tagger, "_scores", lambda *args: (during.append(threads()), scores(*args))[1])
    with threadpool_limits(limits=2):
        parser.parse(["a dog"])
        assert set(threads()) == {2}
    assert [set(numbers) for numbers in during] == [{1}]


def test_memory_stays_bounded_over_captions_of_words_never_met_before(parser, monkeypatch):
    words = ["".join("abcdefghij"[int(digit)] for digit in f"{number:04}") for number in range(400)]
    captions = [f"a dog and the red {word}s" for word in words]
    expected = parser.parse(captions)
    few = PosParser()
    most = len(few._nlp.vocab.strings) + 400
    monkeypatch.setattr(parse_pos, "_MOST_STRINGS", most)
    monkeypatch.setattr(parse_pos, "_CAPTIONS_AT_ONCE", 100)
    sizes = []
    for start in range(0, len(captions), 100):
        assert few.parse(captions[start : start + 100]) == expected[start : start + 100]
        sizes.append(len(few._nlp.vocab.strings))
    assert max(sizes) < most + 100 * 5  # what one batch adds: a word a caption, with its parts
    assert sizes != sorted(sizes)
    assert few._noun.cache_info().maxsize is not None


@pytest.mark.parametrize(
    "text", ["(", "'s", "😀", "a", "dog ", "((((((((( ", "😀 ", "<a ", "&", "\x00", "كلب ", "_", "1,"]
)
def test_endless_captions_are_cut_and_take_bounded_time(parser, text):
    caption = text * (100_000 // len(text))
    assert len(readable(caption)) <= MAX_CHARS
    start = time.process_time()
    assert parser.parse([caption, "a dog"])[1] == ["dog"]
    assert time.process_time() - start < 2


def test_the_version_changes_with_the_settings_that_change_objects(parser):
    assert parser.version != PosParser(PosConfig(compound=False)).version
    assert parser.version != PosParser(PosConfig(stop_words=())).version


def test_objects_equal_those_of_spacy_run_on_every_token(parser, reference):
    assert differences(CAPTIONS, parser.parse(CAPTIONS), reference.parse(CAPTIONS)) == []


@pytest.mark.slow
@pytest.mark.skipif(REAL_DATA is None, reason="SETCLIP_REAL_DATA is not set")
@pytest.mark.parametrize("name", CORPORA)
def test_objects_of_real_captions_equal_those_of_spacy_run_on_every_token(parser, reference, name):
    captions = corpus(name)[-1500:]
    found = parser.parse(captions)
    assert sum(map(len, found)) > 1500
    assert differences(captions, found, reference.parse(captions)) == []
