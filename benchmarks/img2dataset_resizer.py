"""img2dataset's own resizer at work, for benchmarks.packing; runs in img2dataset's environment and imports none of ours.

    .venv-img2dataset/bin/python -m benchmarks.img2dataset_resizer SHORT_SIDE QUALITY

Each line of standard input is a folder of images and, after a tab, a folder for the results or nothing. The answer to
it is one line: the CPU seconds that resizing all images took, reading and writing files not counted.
"""

import io
import sys
import time
from pathlib import Path

import cv2
from img2dataset.resizer import Resizer


def main() -> None:
    cv2.setNumThreads(1)
    short_side, quality = map(int, sys.argv[1:])
    resizer = Resizer(short_side, "keep_ratio", True, encode_quality=quality, encode_format="jpg")
    for line in sys.stdin:
        folder, _, out = line.rstrip("\n").partition("\t")
        paths = sorted(Path(folder).iterdir())
        images = [path.read_bytes() for path in paths]
        start = time.process_time()
        results = [resizer(io.BytesIO(image)) for image in images]
        seconds = time.process_time() - start
        for path, (encoded, *_, error) in zip(paths, results, strict=True):
            if error is not None:
                raise ValueError(f"{path}: {error}")
            if out:
                Path(out, path.name).write_bytes(encoded)
        print(seconds, flush=True)


if __name__ == "__main__":
    main()
