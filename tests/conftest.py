"""What every test needs."""

import os
from collections import Counter

# setclip comes before torchvision, which some test modules import through open_clip.
from setclip import quick_start

# A run under test must not look for the tests' own launcher, nor use all cores of a shared machine.
for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "SLURM_NTASKS", "SLURM_STEP_ID", "SLURM_PROCID"):
    os.environ.pop(name, None)

# Modules and thousands of tests stay: they are made with few collections, then frozen, and no later one looks at them.
quick_start.begin()


def pytest_collection_finish():
    """The tests themselves run with Python's own settings."""
    quick_start.end()


def pytest_collection_modifyitems(config, items):
    """Several workers, a file each, begin with the files of most slow tests: one of those left to the end runs alone."""
    if hasattr(config, "workerinput"):
        slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
        items.sort(key=lambda item: -slow[item.path])
