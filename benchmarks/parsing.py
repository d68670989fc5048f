"""How fast captions are parsed to objects, against spaCy's whole pipeline, and that the objects are those of spaCy.

    SETCLIP_REAL_DATA=DIR python -m benchmarks.parsing [--quick] [--everything] [--json FILE]

DIR/captions holds the corpora of CORPORA, one caption in the last column of each line. CPU time of one process with one
BLAS thread; each repeat takes captions that no repeat before it had, and runs the three ways one after the other:

    pipeline   nlp.pipe with all components of the pipeline's default
    reference  the tagger's tags, spaCy's attribute ruler and lemmatizer on every token in its context, our rules
    ours       data_prep.parse_pos

Then the wall time of the same work in one process and in each of two at a time (on a quiet machine).
"""

import gzip
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import spacy
from threadpoolctl import threadpool_limits

from data_prep.parse_pos import (
    NOUN_TAGS,
    Noun,
    NounRules,
    PosParser,
    find_pipeline,
    is_joined,
    objects_of,
    readable,
)
from data_prep.pos_config import PosConfig
from setclip.config import command, parse
from setclip.errors import InputError
from setclip.files import write_json
from setclip.log import Meter, say

REAL_DATA = os.environ.get("SETCLIP_REAL_DATA")
CORPORA = ("flickr30k", "cc3m_val_first8000", "laion_10k")
GOAL_RATIO = 3.0  # ours to the pipeline, captions per second of one core
GOAL_SCALING = 1.8  # captions per second of two processes to those of one
_EXAMPLES = 10


@dataclass(frozen=True, kw_only=True)
class BenchmarkConfig:
    """Measures parsing of captions and compares the objects with spaCy's."""

    quick: bool = False
    """Fewer captions, for a look: under a minute."""
    everything: bool = False
    """Compare all captions of the corpora with the reference, not only those that are timed: ten minutes."""
    repeats: int = 5
    """Measurements of each kind."""
    json: Path | None = None
    """File for the figures."""


class Reference:
    """Objects by spaCy's own path: every token is tagged, ruled and lemmatised in its context."""

    def __init__(self, config: PosConfig | None = None):
        self.config = config or PosConfig()
        self._nlp = spacy.load(find_pipeline(), exclude=["parser", "ner", "senter"])
        self._rest: list[Any] = [self._nlp.get_pipe(name) for name in ("attribute_ruler", "lemmatizer")]
        self._nlp.select_pipes(enable=["tok2vec", "tagger"])
        self._rules = NounRules(spacy.load(find_pipeline()), self.config.stop_words)  # it changes its lemmatizer

    def parse(self, captions: Sequence[str]) -> list[list[str]]:
        """Returns what `PosParser.parse` must return."""
        objects = []
        for doc in self._nlp.pipe(map(readable, captions)):
            nouns = [(place, token.text) for place, token in enumerate(doc) if token.tag_ in NOUN_TAGS]
            for place, text in nouns:
                doc[place].tag_ = self._rules.lemma_tag(text, doc[place].tag_)
            for component in self._rest:
                doc = component(doc)
            lemmas = ["" if doc[place].pos_ == "PRON" else doc[place].lemma_ for place, _ in nouns]
            found = [
                Noun(place, *self._rules.noun(text, lemma), is_joined(doc, place))
                for (place, text), lemma in zip(nouns, lemmas, strict=True)
            ]
            objects.append(objects_of(found, self.config.compound))
        return objects


def differences(captions: Sequence[str], ours: Sequence[list[str]], reference: Sequence[list[str]]) -> list[str]:
    """Returns a line for each caption whose two sets of objects differ."""
    return [
        f"{caption!r}: ours {mine}, reference {theirs}"
        for caption, mine, theirs in zip(captions, ours, reference, strict=True)
        if set(mine) != set(theirs)
    ]


def corpus(name: str) -> list[str]:
    """Returns the captions of a corpus; raises InputError if it is not there."""
    path = Path(REAL_DATA or "") / "captions" / f"{name}.tsv.gz"
    if not REAL_DATA or not path.exists():
        raise InputError(
            f"expected captions/{name}.tsv.gz under $SETCLIP_REAL_DATA, found {REAL_DATA or 'the variable unset'}; "
            "set it to the folder that holds captions/"
        )
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return [line.rstrip("\n").split("\t")[-1] for line in file]


def measure(captions: Sequence[str], each: int, repeats: int, whole: Any, ways: Mapping[str, Any]) -> dict[str, Any]:
    """Returns captions per CPU second of each way and repeat, the ratios, and what differs."""
    rates: dict[str, list[float]] = {name: [] for name in ("pipeline", *ways)}
    differing: list[str] = []
    stride = len(captions) // (each * (repeats + 1))  # spread over the corpus; the first part warms up
    parts = [captions[number :: stride * (repeats + 1)][:each] for number in range(repeats + 1)]
    for number, part in enumerate(parts):
        found: dict[str, Any] = {}
        for name, work in {"pipeline": lambda some: list(whole.pipe(some)), **ways}.items():
            start = time.process_time()
            found[name] = work(part)
            if number:
                rates[name].append(len(part) / (time.process_time() - start))
        differing += differences(part, found["ours"], found["reference"])
    return {
        "captions_per_cpu_second": rates,
        "ratio": [ours / pipeline for ours, pipeline in zip(rates["ours"], rates["pipeline"], strict=True)],
        "compared": sum(map(len, parts)),
        "differing": differing,
    }


def compare_all(captions: Sequence[str], ways: Mapping[str, Callable[[Sequence[str]], Any]], name: str) -> list[str]:
    """Returns a line for each caption of a whole corpus whose two sets of objects differ."""
    differing = []
    meter = Meter(len(captions), f"comparing {name}", "captions")
    for start in range(0, len(captions), 2048):
        part = captions[start : start + 2048]
        differing += differences(part, ways["ours"](part), ways["reference"](part))
        meter.update(len(part))
    meter.close()
    return differing


_parser: PosParser


def _load() -> None:
    global _parser
    _parser = PosParser()


def _parse(captions: list[str]) -> int:
    return len(_parser.parse(captions))


def scaling(captions: list[str], repeats: int) -> list[float]:
    """Returns, a repeat, captions per second of two processes to those of one, by wall time."""
    result = []
    with multiprocessing.get_context("spawn").Pool(2, initializer=_load) as pool:
        pool.map(_parse, [captions] * 4, chunksize=1)
        for _ in range(repeats):
            seconds = []
            for tasks in (1, 2):
                start = time.perf_counter()
                pool.map(_parse, [captions] * tasks, chunksize=1)
                seconds.append(time.perf_counter() - start)
            result.append(2 * seconds[0] / seconds[1])
    return result


def main() -> None:
    """The command."""
    config = parse(BenchmarkConfig, description=__doc__)
    each, repeats = (150, min(3, config.repeats)) if config.quick else (1_000, config.repeats)
    corpora = {name: corpus(name) for name in CORPORA}
    start = time.process_time()
    parser = PosParser()
    load_seconds = time.process_time() - start
    ways = {"reference": Reference().parse, "ours": parser.parse}
    whole = spacy.load(find_pipeline())
    figures: dict[str, Any] = {}
    with threadpool_limits(limits=1):
        for name, captions in corpora.items():
            figures[name] = found = measure(captions, each, repeats, whole, ways)
            if config.everything:
                found |= {"compared": len(captions), "differing": compare_all(captions, ways, name)}
            for way, values in found["captions_per_cpu_second"].items():
                say(f"{name:20} {way:10} {_spread(values, 0)} captions per second of a core")
            say(f"{name:20} ratio      {_spread(found['ratio'], 2)}   goal {GOAL_RATIO:g}")
            say(f"{name:20} differing  {len(found['differing']):,} of {found['compared']:,} captions   goal 0")
            for line in found["differing"][:_EXAMPLES]:
                say(f"    {line}")
    figures["scaling"] = scaling(corpora[CORPORA[0]][: 3 * each], 3)
    say(f"two processes to one       {_spread(figures['scaling'], 2)}   goal {GOAL_SCALING:g}")
    say(f"loading the parser: {load_seconds:.1f} CPU seconds a process, without the imports")
    if config.json is not None:
        goals = {"ratio": GOAL_RATIO, "differing": 0, "scaling": GOAL_SCALING}
        write_json(config.json, {"goals": goals, "load_seconds": load_seconds, "parser": parser.version, **figures})


def _spread(values: list[float], digits: int) -> str:
    low, middle, high = min(values), statistics.median(values), max(values)
    return f"{middle:8,.{digits}f}  ({low:,.{digits}f} to {high:,.{digits}f})"


if __name__ == "__main__":
    command(main)
