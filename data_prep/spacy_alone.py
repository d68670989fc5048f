"""spaCy without torch, which its array library imports where it is installed: 1.5 s and 180 MB of each process of ours.

The one place that imports spaCy and thinc. Where torch is imported already nothing is changed.
"""

import sys

_IS_BLOCKED = "torch" not in sys.modules
if _IS_BLOCKED:
    sys.modules["torch"] = None  # type: ignore[assignment]  # `import torch` now raises ImportError, which thinc expects
try:
    import spacy
    from spacy.language import Language
    from spacy.tokens import Doc, Token
    from thinc.api import Model, NumpyOps
finally:
    if _IS_BLOCKED:
        del sys.modules["torch"]

__all__ = ["Doc", "Language", "Model", "NumpyOps", "Token", "spacy"]
