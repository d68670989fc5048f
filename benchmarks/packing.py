"""How fast images are resized, against img2dataset's resizer, and how fast tars become shards, in CPU time of one thread.

    SETCLIP_REAL_DATA=DIR python -m benchmarks.packing [--quick] [--json FILE]

1. Resizing to a short side of 256 pixels, JPEG of quality 95. The sources are photographs (DIR/photos_open/images, up to
   256 pixels) enlarged to each of --sides, as JPEG of quality 90. img2dataset's Resizer works on the same files in its own
   environment (`python -m data_prep.fetch setup` makes it), turn by turn with ours. How close each comes to an exact
   reduction of the whole picture is in decibels (PSNR): once to the mean over each pixel's area, once to Lanczos.
2. Packing tars of img2dataset's layout whose images keep their bytes, without the caption parser; and what each part of
   it takes.

Without SETCLIP_REAL_DATA the pictures are scenes of the embedded corpus, which compress better than photographs.
"""

import hashlib
import io
import json
import os
import statistics
import subprocess
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
from numpy.typing import NDArray

from data_prep.fetch_environment import python_of
from data_prep.images import Image, ImageRules, prepare_image
from data_prep.pack import PackRules, pack_unit
from data_prep.plan import Unit
from data_prep.sources.scenes import ScenesConfig, scene_maker
from data_prep.sources.tars import read_tar
from setclip.config import command, parse
from setclip.decode import decode_rgb
from setclip.errors import InputError
from setclip.files import write_json
from setclip.log import say
from setclip.shards import Sample, ShardWriter
from setclip.tar_reader import TarReader

SHORT_SIDE = 256
QUALITY = 95
SOURCE_QUALITY = 90
GOAL_SIDE = 512  # the source size that the goal is about
GOAL_TIMES_FASTER = 1.6
GOAL_SAMPLES_PER_SECOND = 4_000
_COMPARED = 24  # images whose quality is measured


@dataclass(frozen=True, kw_only=True)
class BenchmarkConfig:
    """Measures resizing and packing."""

    quick: bool = False
    """Few images, for a look."""
    sides: tuple[int, ...] = (512, 375, 480, 640, 1024)
    """Short sides of the images that are resized, in pixels."""
    repeats: int = 5
    """Measurements of each kind."""
    json: Path | None = None
    """File for the figures."""


def main() -> None:
    """The command."""
    config = parse(BenchmarkConfig, description=__doc__)
    photographs = pictures(8 if config.quick else 96)
    figures: dict[str, Any] = {"goals": {"times_faster": GOAL_TIMES_FASTER, "per_second": GOAL_SAMPLES_PER_SECOND}}
    with tempfile.TemporaryDirectory() as folder:
        figures["resizing"] = measure_resizing(photographs, config.sides, config.repeats, Path(folder))
        samples = 200 if config.quick else 3_000
        figures["packing"] = measure_packing(photographs, samples, config.repeats, Path(folder))
    if config.json is not None:
        write_json(config.json, figures)


def pictures(count: int) -> list[PIL.Image.Image]:
    """Returns `count` pictures of up to SHORT_SIDE pixels or a little more."""
    root = os.environ.get("SETCLIP_REAL_DATA")
    if root is None:
        say("SETCLIP_REAL_DATA is not set: scenes of the embedded corpus instead of photographs")
        return _mosaics(count)
    paths = sorted((Path(root) / "photos_open" / "images").glob("*"))
    if not paths:
        raise InputError(
            f"expected photographs in {root}/photos_open/images, found none; set SETCLIP_REAL_DATA rightly"
        )
    chosen = [paths[i * len(paths) // count] for i in range(min(count, len(paths)))]
    return [PIL.Image.open(path).convert("RGB") for path in chosen]


def enlarged(picture: PIL.Image.Image, short_side: int) -> PIL.Image.Image:
    """Returns the picture with that short side, by Lanczos."""
    scale = short_side / min(picture.size)
    width, height = (max(short_side, round(side * scale)) for side in picture.size)
    return picture.resize((width, height), PIL.Image.Resampling.LANCZOS)


def measure_resizing(
    photographs: Sequence[PIL.Image.Image], sides: Iterable[int], repeats: int, folder: Path
) -> dict[str, Any]:
    """Returns per source side what the report says; without img2dataset's environment only our own figures."""
    figures: dict[str, Any] = {}
    with ExitStack() as stack:
        try:
            peer = stack.enter_context(Peer(python_of(None)))
        except InputError as error:
            say(f"without img2dataset: {error}")
            peer = None
        say("\nresizing, images per CPU second                 ours  img2dataset  times faster")
        for side in sides:
            source, theirs = folder / f"source-{side}", folder / f"theirs-{side}"
            source.mkdir()
            theirs.mkdir()
            for number, picture in enumerate(photographs):
                enlarged(picture, side).save(source / f"{number:04d}.jpg", quality=SOURCE_QUALITY)
            figures[str(side)] = _compare(source, theirs, peer, repeats)
            _say_resizing(side, figures[str(side)])
    return figures


class Peer:
    """img2dataset's resizer in its own process, one pass at a time; a context manager."""

    def __init__(self, python: Path):
        script = Path(__file__).with_name("img2dataset_resizer.py")
        self._process = subprocess.Popen(
            [str(python), str(script), str(SHORT_SIDE), str(QUALITY)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "NO_ALBUMENTATIONS_UPDATE": "1", "OMP_NUM_THREADS": "1"},
        )

    def __enter__(self) -> "Peer":
        return self

    def __exit__(self, *_) -> None:
        self._process.communicate()

    def seconds(self, source: Path, out: Path | None = None) -> float:
        """Returns the CPU seconds that all images of `source` took; the results go to `out`."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{source}\t{out or ''}\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            raise InputError(
                f"expected CPU seconds from img2dataset's resizer, found that it ended with {self._process.wait()}; "
                "its message stands above"
            )
        return float(answer)


def _compare(source: Path, theirs: Path, peer: Peer | None, repeats: int) -> dict[str, Any]:
    paths = sorted(source.iterdir())
    images = [path.read_bytes() for path in paths]
    rules = image_rules()
    results = [_resized(image, rules) for image in images]
    if peer is not None:
        peer.seconds(source, theirs)
    seconds: dict[str, list[float]] = {"ours": [], "img2dataset": []}
    for _ in range(repeats):
        seconds["ours"].append(cpu_seconds(lambda: [prepare_image(image, rules) for image in images]))
        if peer is not None:
            seconds["img2dataset"].append(peer.seconds(source))
    seconds = {name: times for name, times in seconds.items() if times}
    compared = range(0, len(paths), -(-len(paths) // _COMPARED))
    quality = {"ours": [closeness(images[i], results[i].data, is_cut=True) for i in compared]}
    if peer is not None:
        quality["img2dataset"] = [closeness(images[i], (theirs / paths[i].name).read_bytes()) for i in compared]
    figures: dict[str, Any] = {
        "images": len(images),
        "mean_source_bytes": round(statistics.mean(map(len, images))),
        "images_per_cpu_second": {name: [len(images) / t for t in times] for name, times in seconds.items()},
        "decibels": {
            name: {"area": statistics.mean(a for a, _ in values), "lanczos": statistics.mean(b for _, b in values)}
            for name, values in quality.items()
        },
    }
    if peer is not None:
        figures["times_faster"] = [b / a for a, b in zip(seconds["ours"], seconds["img2dataset"], strict=True)]
    return figures


def _say_resizing(side: int, figures: dict[str, Any]) -> None:
    rates = {name: statistics.median(values) for name, values in figures["images_per_cpu_second"].items()}
    columns = "".join(f"{rate:13,.0f}" for rate in rates.values())
    line = f"{side:5} px, {figures['mean_source_bytes'] / 1e3:5.0f} kB -> {SHORT_SIDE} px{columns:>39}"
    if "times_faster" in figures:
        times = figures["times_faster"]
        line += f"{statistics.median(times):14.2f}  ({min(times):.2f} to {max(times):.2f})"
        if side == GOAL_SIDE:
            line += f"   goal {GOAL_TIMES_FASTER} {verdict(statistics.median(times) >= GOAL_TIMES_FASTER)}"
    say(line)
    quality = "; ".join(
        f"{name} {v['area']:.1f} area, {v['lanczos']:.1f} Lanczos" for name, v in figures["decibels"].items()
    )
    say(f"      dB to an exact reduction: {quality}")


def closeness(source: bytes, result: bytes, *, is_cut: bool = False) -> tuple[float, float]:
    """Returns PSNR in dB of a result to the mean over each pixel's area, and to Lanczos, both of the source in floats.

    `is_cut`: the result scales both sides alike and leaves out the rest of a pixel, as ours; else it is stretched.
    """
    whole = np.asarray(PIL.Image.open(io.BytesIO(source)).convert("RGB")).astype(np.float32)
    pixels = decode_rgb(result).astype(np.float32)
    height, width = pixels.shape[:2]
    scale = min(whole.shape[:2]) / min(height, width)
    box_h, box_w = (height * scale, width * scale) if is_cut else whole.shape[:2]
    area = np.einsum("ij,jkc->ikc", area_weights(height, box_h, whole.shape[0]), whole, optimize=True)
    area = np.einsum("lk,ikc->ilc", area_weights(width, box_w, whole.shape[1]), area, optimize=True)
    bands = [
        PIL.Image.fromarray(whole[..., c]).resize(
            (width, height), PIL.Image.Resampling.LANCZOS, box=(0, 0, box_w, box_h)
        )
        for c in range(3)
    ]
    return psnr(pixels, area), psnr(pixels, np.stack([np.asarray(band) for band in bands], -1).clip(0, 255))


def area_weights(pixels: int, extent: float, source_pixels: int) -> NDArray[np.float32]:
    """Returns (pixels, source_pixels): the share of each source pixel in the mean over each of `pixels` in `extent`."""
    edges = np.linspace(0, extent, pixels + 1)
    starts = np.arange(source_pixels)
    overlap = np.minimum(edges[1:, None], starts + 1) - np.maximum(edges[:-1, None], starts)
    return (overlap.clip(0) * pixels / extent).astype(np.float32)


def psnr(a: NDArray[Any], b: NDArray[Any]) -> float:
    """Returns the peak signal-to-noise ratio of two pictures of 0 to 255, in dB."""
    return float(10 * np.log10(255**2 / np.mean((a.astype(np.float64) - b) ** 2)))


def measure_packing(photographs: Sequence[PIL.Image.Image], samples: int, repeats: int, folder: Path) -> dict[str, Any]:
    """Returns samples per CPU second of the whole, and microseconds a sample of its parts."""
    images = [jpeg_of_about(33_000, enlarged(picture, SHORT_SIDE)) for picture in photographs]
    tar = write_img2dataset_tar(folder / "00000.tar", images, samples)
    rules = PackRules(
        images=image_rules(),
        pos=None,
        perceptual_hash=False,
        shard_size=10_000,
        shard_bytes=256_000_000,
        min_caption_chars=1,
        max_caption_chars=0,
    )
    unit = Unit(name=tar.name, split="train", read=partial(read_tar, str(tar)))
    pack_unit(unit, folder / "packed", rules)  # what is imported and compiled once
    packed = [cpu_seconds(lambda: pack_unit(unit, folder / "packed", rules)) for _ in range(repeats)]
    parts = _parts(tar, images, folder)
    figures: dict[str, Any] = {
        "samples": samples,
        "mean_image_bytes": round(statistics.mean(map(len, images))),
        "samples_per_cpu_second": [samples / seconds for seconds in packed],
        "microseconds": {
            name: statistics.median(cpu_seconds(work) for _ in range(repeats)) / count * 1e6
            for name, (work, count) in parts.items()
        },
    }
    rate = statistics.median(figures["samples_per_cpu_second"])
    low, high = min(figures["samples_per_cpu_second"]), max(figures["samples_per_cpu_second"])
    reached = verdict(rate >= GOAL_SAMPLES_PER_SECOND)
    say(f"\npacking images of {figures['mean_image_bytes'] / 1e3:.1f} kB that keep their bytes, without caption parser")
    say(
        f"samples per CPU second {rate:8,.0f}  ({low:,.0f} to {high:,.0f})   goal {GOAL_SAMPLES_PER_SECOND:,} {reached}"
    )
    for name, value in figures["microseconds"].items():
        say(f"  {value:8.1f} µs a sample  {name}")
    return figures


def _parts(tar: Path, images: Sequence[bytes], folder: Path) -> dict[str, tuple[Callable[[], Any], int]]:
    """Returns name to (work, samples in it) of what packing does, and of other ways to read a tar."""
    samples = sum(1 for _ in read_tar(str(tar)))

    def read_members() -> None:
        with TarReader(tar) as reader:
            for member in reader:
                reader.read(member)

    def read_with_tarfile() -> None:
        with tarfile.open(tar, "r:") as reader:
            for info in reader:
                file = reader.extractfile(info)
                assert file is not None
                file.read()

    def write_samples() -> None:
        with ShardWriter(folder / "part.tar") as writer:
            for number in range(samples):
                writer.add(
                    Sample(
                        key=f"{number:024d}",
                        image=images[number % len(images)],
                        image_ext="jpg",
                        captions=["A person rides a motorcycle on a dirt road near some hills."],
                        objects={},
                        width=256,
                        height=256,
                        sha256="0" * 64,
                    )
                )

    rules, decoding = image_rules(), image_rules(check="decode")
    parts: dict[str, tuple[Callable[[], Any], int]] = {
        "reading the tar's members": (read_members, samples),
        "  (with tarfile instead)": (read_with_tarfile, samples),
        "reading samples: members, grouped, JSON parsed": (lambda: sum(1 for _ in read_tar(str(tar))), samples),
        "checking the structure": (lambda: [prepare_image(image, rules) for image in images], len(images)),
        "  (with --check decode instead)": (lambda: [prepare_image(image, decoding) for image in images], len(images)),
        "SHA-256 of the image": (lambda: [hashlib.sha256(image).hexdigest() for image in images], len(images)),
        "writing the shard, its SHA-256 and its index": (write_samples, samples),
    }
    return parts


def jpeg_of_about(size: int, picture: PIL.Image.Image) -> bytes:
    """Returns the picture as JPEG of the quality that comes closest to `size` bytes."""
    encoded = []
    for quality in range(60, 101, 4):
        buffer = io.BytesIO()
        picture.save(buffer, "JPEG", quality=quality)
        encoded.append(buffer.getvalue())
    return min(encoded, key=lambda data: abs(len(data) - size))


def write_img2dataset_tar(path: Path, images: Sequence[bytes], samples: int) -> Path:
    """Writes `samples` samples as img2dataset does: jpg, json and txt, a pax header with the time before each."""
    caption = "A person rides a motorcycle on a dirt road near some hills."
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        for number in range(samples):
            entries = {
                "caption": caption,
                "url": f"https://example.org/photographs/{number}.jpg",
                "key": f"{number:09d}",
                "status": "success",
                "error_message": None,
                "width": 256,
                "height": 340,
                "original_width": 640,
                "original_height": 850,
                "exif": "{}",
                "sha256": "0" * 64,
            }
            # JPEG ends where its marker says, so a number after it gives every sample a key of its own.
            image = images[number % len(images)] + number.to_bytes(4, "big")
            members = {"jpg": image, "json": json.dumps(entries, indent=4).encode(), "txt": caption.encode()}
            for extension, data in members.items():
                info = tarfile.TarInfo(f"{number:09d}.{extension}")
                info.size, info.mtime, info.mode = len(data), 1_790_000_000.25, 0o444
                info.uname = info.gname = "bigdata"
                tar.addfile(info, io.BytesIO(data))
    return path


def image_rules(**changes: Any) -> ImageRules:
    """Returns the rules of a preparation with its defaults."""
    defaults = {
        "short_side": SHORT_SIDE,
        "jpeg_quality": QUALITY,
        "check": "structure",
        "min_side": 0,
        "max_aspect": 0.0,
    }
    return ImageRules(**{**defaults, **changes})


def cpu_seconds(work: Callable[[], Any]) -> float:
    """Returns the CPU time that `work` takes in this process."""
    start = time.process_time()
    work()
    return time.process_time() - start


def verdict(is_reached: bool) -> str:
    """Returns what a line says of its goal."""
    return "reached" if is_reached else "MISSED"


def _resized(image: bytes, rules: ImageRules) -> Image:
    result = prepare_image(image, rules)
    assert isinstance(result, Image)
    assert result.resized
    return result


def _mosaics(count: int) -> list[PIL.Image.Image]:
    """Returns scenes of the embedded corpus, sixteen in a picture."""
    defaults = ScenesConfig(out=Path())
    maker = scene_maker(defaults.nouns, defaults.size, defaults.seed)
    side = SHORT_SIDE // defaults.size
    result = []
    for number in range(count):
        tiles = [maker.scene("train", number * side * side + i).pixels for i in range(side * side)]
        rows = [np.concatenate(tiles[i * side : (i + 1) * side], axis=1) for i in range(side)]
        result.append(PIL.Image.fromarray(np.concatenate(rows)))
    return result


if __name__ == "__main__":
    command(main)
