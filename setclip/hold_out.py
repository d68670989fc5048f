"""Which pictures are held out of training, to choose settings on: a function of their keys alone, so the same everywhere.

Used by data_prep (`run folder --hold-out`, which makes a split of them) and finetune (`--hold-out`, which takes them of a split):
both take the same pictures.
"""

from collections.abc import Sequence

from setclip.errors import InputError
from setclip.hashing import hash_text, hash_u64

_HOLD_OUT = 21  # keeps the draw apart from others


def held_out(keys: Sequence[str], number: int) -> set[int]:
    """Returns the places in `keys` of those held out: `number`, and more where the last of them is there twice.

    A picture that is there twice goes as a whole. Raises InputError where nothing would be left.
    """
    if number >= len(keys):
        raise InputError(
            f"expected fewer pictures held out than there are, found --hold-out {number} of {len(keys):,}; lower it"
        )
    by_key: dict[str, list[int]] = {}
    for row, key in enumerate(keys):
        by_key.setdefault(key, []).append(row)
    rows: set[int] = set()
    for key in sorted(by_key, key=lambda key: int(hash_u64(_HOLD_OUT, hash_text(key)))):
        if len(rows) >= number:
            break
        rows |= set(by_key[key])
    if len(rows) == len(keys):
        raise InputError(
            f"expected pictures left to train on, found that --hold-out {number} takes all {len(keys):,}, which are "
            f"{len(by_key):,} different ones that go as a whole; lower it"
        )
    return rows
