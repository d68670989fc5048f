"""Runs `data_prep.run` and kills the process with SIGKILL at one exact moment. Used by test_prep_kill.

    python tests/kill_at.py KIND NUMBER LOG [arguments of data_prep.run]

KIND is reading (bytes of an input), writing (bytes of a shard), renaming (any file or folder to its final name) or
merging (a shard of the merge); the kill comes right before the NUMBER-th such event. LOG gets one line a kind, "KIND
events", when the run ends by itself, and "killed KIND" before the kill.
"""

import atexit
import os
import signal
import sys
from collections import Counter
from pathlib import Path

from data_prep import duplicates, merge, run
from setclip import files
from setclip.config import command
from setclip.shards import ShardWriter
from setclip.tar_reader import TarReader

kind, number, log = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])
seen: Counter[str] = Counter()


def watched(name, function):
    def called(*args, **kwargs):
        seen[name] += 1
        if name == kind and seen[name] == number:
            log.write_text(f"killed {name}\n")
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)

    return called


TarReader.read = watched("reading", TarReader.read)
ShardWriter._write = watched("writing", ShardWriter._write)
files.os.replace = watched("renaming", os.replace)
merge.place_shard = watched("merging", merge.place_shard)
merge.find_duplicates = watched("merging", duplicates.find_duplicates)
merge.statistics.write_statistics = watched("merging", merge.statistics.write_statistics)
merge.output.release = watched("merging", merge.output.release)
atexit.register(lambda: log.write_text("".join(f"{name} {count}\n" for name, count in seen.items())))

sys.argv[1:] = sys.argv[4:]
command(run.main)
