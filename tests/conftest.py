"""What every test needs."""

import os

import setclip  # noqa: F401 (before torchvision, which some test modules import through open_clip)

# A run under test must not look for the tests' own launcher, nor use all cores of a shared machine.
for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "SLURM_NTASKS", "SLURM_STEP_ID", "SLURM_PROCID"):
    os.environ.pop(name, None)
