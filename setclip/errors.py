"""The one exception for what a user can cause; commands print it as one line, everything else keeps its traceback."""


class InputError(ValueError):
    """What the user gave does not fit.

    The message has three parts: what was expected, what was found (with the values), and what to do next.
    """

    exit_status = 2
    """Of a command that ends with it."""


def first_line(error: BaseException) -> str:
    """Returns the first line of what an exception says, its kind where it says nothing: for "found" in a message of ours."""
    said = str(error).strip()
    return said.splitlines()[0] if said else type(error).__name__


class Unavailable(InputError):
    """A server gave no answer in all tries: nothing is wrong with the command, and later it may go well."""

    exit_status = 69  # EX_UNAVAILABLE
