"""Fine-tuning for retrieval: set heads on a pretrained model. `run` is the command, `training` the loop, `losses` the losses."""

import setclip  # noqa: F401 (first: before torch and torchvision)
