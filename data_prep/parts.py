"""Which part of the work is this job's: from its flags, or else from Slurm's job array. Used by commands that share work."""

import os

from setclip.errors import InputError
from setclip.log import say


def part_of(part: int | None, parts: int | None) -> tuple[int, int]:
    """Returns (number of this job, number of jobs), from the flags or else from Slurm's array variables.

    Raises InputError where they do not fit together.
    """
    if part is not None or parts is not None:
        if part is None or parts is None or not 0 <= part < parts:
            raise InputError(
                f"expected --part I and --parts N together, with I from 0 to N - 1, found part {part} and parts {parts}"
            )
        return part, parts
    if "SLURM_ARRAY_TASK_COUNT" not in os.environ:
        return 0, 1
    number, first, step, count = (
        int(os.environ.get(f"SLURM_ARRAY_TASK_{name}", default))
        for name, default in (("ID", ""), ("MIN", "0"), ("STEP", "1"), ("COUNT", ""))
    )
    part = (number - first) // step
    if not 0 <= part < count:
        raise InputError(
            f"expected the elements of the job array to be evenly spaced, found element {number} of {count} from {first} in "
            f"steps of {step}; submit a plain range such as --array=0-{count - 1}, or give --part and --parts"
        )
    say(f"part {part} of {count}, from Slurm's job array")
    return part, count
