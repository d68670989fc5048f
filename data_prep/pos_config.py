"""How captions become objects by part of speech: the settings, without spaCy.

Apart from `data_prep.parse_pos`, because loading spaCy takes seconds and a mistyped path should not wait for it.
"""

from dataclasses import dataclass

NAME = "pos"  # of this parser in samples, objects.parquet and the manifest

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


@dataclass(frozen=True, kw_only=True)
class PosConfig:
    """How captions become objects."""

    compound: bool = True
    """Whether adjacent nouns are one object ("teddy bear") or several."""
    stop_words: tuple[str, ...] = STOP_WORDS
    """Nouns that are no objects, singular and in lower case. They also end a compound."""
