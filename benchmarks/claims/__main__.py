"""`python -m benchmarks.claims`: the command of `benchmarks.claims.run`."""

from benchmarks.claims.run import main
from setclip.config import command

command(main)
