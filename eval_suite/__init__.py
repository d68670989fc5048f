"""Evaluation as pure functions over encode and score functions, and their commands. It knows nothing of trainers.

`eval_suite` imports only `setclip`; pretraining and fine-tuning import it, because they evaluate on their way.
"""

import setclip  # noqa: F401 (first: it makes torchvision importable on CPU-only machines, and open_clip imports that)
