"""What the stages of Setclip share: formats, models, checkpoints, configuration. It imports none of the stages."""

from setclip import quick_start, torchvision_cpu

__version__ = "0.1.0"

quick_start.begin_if_command()
torchvision_cpu.install()
