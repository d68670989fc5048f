"""Objects of captions by part of speech."""

import gzip
import os
from pathlib import Path

import pytest
import spacy

from data_prep.parse_pos import NOUN_TAGS, PosConfig, PosParser, lemma_of

REAL_DATA = os.environ.get("SETCLIP_REAL_DATA")


@pytest.fixture(scope="module")
def parser():
    return PosParser()


@pytest.mark.parametrize(
    ("caption", "objects"),
    [
        ("Two dogs and a teddy bear on the grass", ["dog", "teddy bear", "grass"]),
        ("a dog chases a dog", ["dog"]),
        ("A photo of some mice in front of a house", ["mouse", "house"]),
        ("several sports cars", ["sports car"]),
        ("running slowly", []),
        ("someone gave everyone something", []),
        ("", []),
    ],
)
def test_a_caption_gives_its_nouns_once_singular_and_in_order(parser, caption, objects):
    assert parser.parse([caption]) == [objects]


def test_without_compounds_adjacent_nouns_are_objects_of_their_own():
    apart = PosParser(PosConfig(compound=False))
    assert apart.parse(["a teddy bear and a fire engine"]) == [["teddy", "bear", "fire", "engine"]]


def test_a_stop_word_is_no_object_and_ends_a_compound():
    parser = PosParser(PosConfig(stop_words=("teddy",)))
    assert parser.parse(["a photo of a teddy bear"]) == [["photo", "bear"]]


def test_numbers_single_letters_and_addresses_are_no_objects(parser):
    (objects,) = parser.parse(["picture x of 2020 from www.example.com : a dog , 3 cats"])
    assert objects == ["dog", "cat"]


def test_results_do_not_depend_on_what_was_parsed_before_or_together(parser):
    captions = ["a cat", "Cats and dogs", "the glass of water", "a fish", "leaves in the water"]
    fresh = PosParser()
    assert [fresh.parse([caption])[0] for caption in reversed(captions)][::-1] == parser.parse(captions)


def test_the_version_changes_with_the_settings_that_change_objects(parser):
    assert parser.version == PosParser().version
    assert parser.version != PosParser(PosConfig(compound=False)).version
    assert parser.version != PosParser(PosConfig(stop_words=())).version


@pytest.mark.slow
@pytest.mark.skipif(REAL_DATA is None, reason="SETCLIP_REAL_DATA is not set")
@pytest.mark.parametrize("name", ["flickr30k", "cc3m_val_first8000", "laion_10k"])
def test_cached_lemmas_equal_those_of_spacy_run_on_every_token(parser, name):
    with gzip.open(Path(REAL_DATA or "") / "captions" / f"{name}.tsv.gz", "rt", encoding="utf-8") as file:
        captions = [line.rstrip("\n").split("\t")[-1] for line in file][:1000]
    whole = spacy.load(parser._nlp.meta["lang"] + "_" + parser._nlp.meta["name"], exclude=["parser", "ner"])
    components = [whole.get_pipe(n) for n in ("attribute_ruler", "lemmatizer")]
    differing = []
    nouns = 0
    for doc in whole.pipe(captions):
        for token in doc:
            if token.tag_ in NOUN_TAGS and token.tag_ != "NNPS":  # NNPS: made singular on purpose, see lemma_of
                nouns += 1
                expected = None if token.pos_ == "PRON" else token.lemma_.lower()
                found = lemma_of(whole.vocab, components, token.text, token.tag_)
                if found != expected:
                    differing.append((token.text, token.tag_, expected, found))
    assert nouns > 1000
    assert differing == []
