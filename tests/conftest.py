"""What every test needs."""

import os
from collections import Counter

import setclip  # noqa: F401 (before torchvision, which some test modules import through open_clip)

# A run under test must not look for the tests' own launcher, nor use all cores of a shared machine.
for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "SLURM_NTASKS", "SLURM_STEP_ID", "SLURM_PROCID"):
    os.environ.pop(name, None)


def pytest_collection_modifyitems(config, items):
    """Several workers, a file each, begin with the files of most slow tests: one of those left to the end runs alone."""
    if hasattr(config, "workerinput"):
        slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
        items.sort(key=lambda item: -slow[item.path])
