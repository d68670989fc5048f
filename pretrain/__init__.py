"""Pretraining: losses, exact data order, the DeepSpeed engine and the loop."""

import os

# OpenMP's threads wait for each other by spinning, which on shared cores (a loader process is enough) can cost ten times
# the work. Takes effect where torch is not loaded yet; a setting of the user's stays.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import setclip  # noqa: F401 (before torchvision, wherever a module of this package is imported first)
