"""Looks a name up in a plain dict; the error lists the known names and the nearest one. Used by every registry."""

import difflib
from collections.abc import Mapping
from typing import TypeVar

from setclip.errors import InputError

T = TypeVar("T")


def look_up(table: Mapping[str, T], name: str, what: str) -> T:
    """Returns `table[name]`. Raises InputError "unknown recipe 'x', perhaps 'y'; known: …" (`what` is "recipe")."""
    if name in table:
        return table[name]
    nearest = difflib.get_close_matches(name, table, n=1, cutoff=0.5)
    perhaps = f", perhaps {nearest[0]!r}" if nearest else ""
    raise InputError(f"unknown {what} {name!r}{perhaps}; known: {', '.join(sorted(table))}")
