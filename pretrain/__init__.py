"""Pretraining: losses, exact data order, the DeepSpeed engine and the loop."""

import setclip  # noqa: F401 (before torchvision, wherever a module of this package is imported first)
