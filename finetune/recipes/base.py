"""What a recipe of a paper's row is: hyper-parameters, each with where it comes from, and the configuration that they make.

    SETTINGS = {"head": stated("slot"), "optim.lr": stated(1e-3), "options.num_elements": stated(4)}
    config_of(SETTINGS)                # a FinetuneConfig

Names are those of the flags (`optim.lr`: --optim.lr); `options.NAME`, `image_options.NAME`, `text_options.NAME` and
`similarity_options.NAME` are one option each.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, is_dataclass, replace
from typing import Any, Literal

from finetune.config import FinetuneConfig
from setclip.errors import InputError

Recipe = Callable[[str | None], FinetuneConfig]
"""Of the head that is asked for; None: the recipe's own"""

Source = Literal["stated", "derived", "remembered", "reconstructed"]
SOURCES: dict[str, str] = {
    "stated": "by the paper, its slides or supplement, or its authors' code",
    "derived": "not said, but it follows from figures or equations that are",
    "remembered": "from the published paper, but not confirmed in a copy that could be read",
    "reconstructed": "no source that could be read gives it of this row: ours",
}

_OPTIONS = ("options", "image_options", "text_options", "similarity_options")


@dataclass(frozen=True)
class Value:
    """A hyper-parameter."""

    value: Any
    source: Source
    note: str = ""


Settings = Mapping[str, Value]


def stated(value: Any, note: str = "") -> Value:
    """Returns a value that a source gives."""
    return Value(value, "stated", note)


def derived(value: Any, note: str = "") -> Value:
    """Returns a value that follows from what a source gives."""
    return Value(value, "derived", note)


def remembered(value: Any, note: str = "") -> Value:
    """Returns a value that no source at hand confirms."""
    return Value(value, "remembered", note)


def ours(value: Any, note: str = "") -> Value:
    """Returns a value of our reconstruction."""
    return Value(value, "reconstructed", note)


def as_of(settings: Settings, note: str, source: Source = "reconstructed", but: tuple[str, ...] = ()) -> Settings:
    """Returns settings that are stated of another row than the one they are used for, tagged so.

    `note`: of which, as "as on COCO". `but`: names, or their beginnings (as "triplet"), that are stated of this row too. What
    is not stated of the other row either stays as it is tagged.
    """
    return {
        name: value
        if value.source != "stated" or any(name == each or name.startswith(f"{each}.") for each in but)
        else Value(value.value, source, f"{note}; {value.note}" if value.note else note)
        for name, value in settings.items()
    }


@dataclass(frozen=True, kw_only=True)
class PaperRecipe:
    """The settings of one row."""

    title: str
    settings: Settings
    notes: tuple[str, ...] = ()
    """In what it is not the source's, beyond single values"""

    def config(self) -> FinetuneConfig:
        """Returns the configuration. The data are those under $SETCLIP_DATA."""
        return config_of(self.settings)

    def __call__(self, head: str | None = None) -> FinetuneConfig:
        """Returns the same, for the command. Raises InputError where another head is asked for."""
        config = self.config()
        if head is not None and head != config.head:
            raise InputError(
                f"expected head {config.head}, which this recipe of a paper's row is made of, found --head {head}; leave it out, "
                "or take the recipe plain"
            )
        return config


def config_of(settings: Settings) -> FinetuneConfig:
    """Returns the configuration that settings make of the defaults."""
    config = FinetuneConfig()
    entries: dict[str, list[str]] = {}
    for name, value in settings.items():
        first, dot, rest = name.partition(".")
        if dot and first in _OPTIONS:
            text = value.value if isinstance(value.value, str) else json.dumps(value.value)
            entries.setdefault(first, []).append(f"{rest}={text}")
        else:
            config = with_value(config, name, value.value)
    return replace(config, **{name: tuple(words) for name, words in entries.items()})


def with_value(config: Any, name: str, value: Any) -> Any:
    """Returns a configuration with another value of a dotted name. Raises InputError on an unknown one."""
    first, dot, rest = name.partition(".")
    if not hasattr(config, first) or (dot and not is_dataclass(getattr(config, first))):
        raise InputError(
            f"expected a setting of fine-tuning, found {name!r}; see `python -m finetune.run plain --help`"
        )
    return replace(config, **{first: with_value(getattr(config, first), rest, value) if dot else value})
