"""The one exception for what a user can cause; commands print it as one line, everything else keeps its traceback."""


class InputError(ValueError):
    """What the user gave does not fit.

    The message has three parts: what was expected, what was found (with the values), and what to do next.
    """
