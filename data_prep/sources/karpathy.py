"""Reads the JSON in which Karpathy published the splits and captions of Flickr30k and COCO (`caption_datasets.zip`).

    {"dataset": "flickr30k", "images": [{"filename": "1000092795.jpg", "imgid": 0, "split": "train", "sentids": […],
     "sentences": [{"raw": "Two young guys …", "sentid": 0, "imgid": 0, "tokens": […]}, …]}, …]}

COCO's images have `filepath` ("train2014", "val2014") and `cocoid` too. Karpathy & Fei-Fei 2015,
https://arxiv.org/abs/1412.2306. Used by the sources `flickr30k` and `coco`.
"""

import json
import zipfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_prep.sources.benchmark import Entry, one_line
from setclip.errors import InputError

PROTOCOL_CAPTIONS = 5  # some images of COCO have six or seven captions; every protocol takes the first five

CREDIT = "Splits: Karpathy & Fei-Fei 2015, Deep Visual-Semantic Alignments for Generating Image Descriptions"


@dataclass(frozen=True, kw_only=True)
class Listed:
    """One image as the JSON has it."""

    name: str
    """`filename`, after `filepath/` where there is one."""
    split: str
    """As published: "train", "restval", "val" or "test"."""
    imgid: int
    """Karpathy's own number of the image."""
    coco_id: int | None
    sentids: tuple[int, ...]
    """One per caption; in COCO these are the ids of the official annotations."""
    captions: tuple[str, ...]
    """`raw`, with white space as single spaces; none is empty."""

    def entry(self, split: str, captions_per_image: int) -> Entry:
        """Returns what is packed of it: its first `captions_per_image` captions (0: all), ids beside them."""
        number = captions_per_image or len(self.captions)
        extra: dict[str, Any] = {"file_name": self.name, "image_id": self.imgid}
        if self.coco_id is not None:
            extra["coco_id"] = self.coco_id
        extra["sentids"] = list(self.sentids[:number])
        extra["karpathy_split"] = self.split
        return Entry(
            name=self.name,
            split=split,
            captions=self.captions[:number],
            extra=extra,
            beyond=max(0, len(self.captions) - number),
        )


def read_karpathy(path: Path, dataset: str, splits: Sequence[str]) -> tuple[list[Listed], list[str]]:
    """Returns the images of Karpathy's JSON in its order, and warnings (captions without text, which are left out).

    `path` is the JSON, or the zip with `dataset_NAME.json` for the given `dataset`; `splits` are those that it may
    name. Raises InputError where it is of another data set, is damaged, or gives a caption's id twice.
    """
    content = _load(path, dataset)
    images = content.get("images") if isinstance(content, dict) else None
    if not isinstance(images, list):
        raise InputError(
            f'{path}: expected {{"images": […], "dataset": "{dataset}"}}, found no list of images; give '
            f"Karpathy's dataset_{dataset}.json with --annotations"
        )
    named = str(content.get("dataset", dataset)).lower()
    if named != dataset:
        raise InputError(
            f"{path}: expected annotations of {dataset!r}, found those of {named!r}; give dataset_{dataset}.json with "
            "--annotations"
        )
    listed: list[Listed] = []
    empty = 0
    for number, image in enumerate(images):
        try:
            one, without_text = _listed(image)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise InputError(
                f"{path}, image {number}: expected filename, imgid, split and sentences with raw and sentid, found "
                f"{str(image)[:80]!r} ({error!r}); take the file as it was published"
            ) from error
        if one.split not in splits:
            raise InputError(
                f"{path}, image {number}: expected a split of {', '.join(splits)}, found {one.split!r}; take the file as "
                "it was published"
            )
        listed.append(one)
        empty += without_text
    _check_ids(path, listed)
    return listed, [f"{path.name}: {empty:,} captions without text are left out"] if empty else []


def _listed(image: Any) -> tuple[Listed, int]:
    """Returns the image, and its number of captions without text."""
    folder, file_name = image.get("filepath", ""), image["filename"]
    if not isinstance(file_name, str):
        raise TypeError(f"filename {file_name!r}")
    pairs = [(int(sentence["sentid"]), one_line(sentence["raw"])) for sentence in image["sentences"]]
    kept = [(sentid, text) for sentid, text in pairs if text]
    one = Listed(
        name=f"{folder}/{file_name}" if folder else file_name,
        split=image["split"],
        imgid=int(image["imgid"]),
        coco_id=int(image["cocoid"]) if "cocoid" in image else None,
        sentids=tuple(sentid for sentid, _ in kept),
        captions=tuple(text for _, text in kept),
    )
    return one, len(pairs) - len(kept)


def _check_ids(path: Path, listed: Sequence[Listed]) -> None:
    """Raises InputError where two captions have one id: relevance judgements join on it."""
    owners = Counter(sentid for one in listed for sentid in one.sentids)
    if repeated := [sentid for sentid, count in owners.items() if count > 1]:
        owner = next(one.name for one in listed if repeated[0] in one.sentids)
        raise InputError(
            f"{path}: expected every caption to have a sentid of its own, found {len(repeated):,} repeated, the first "
            f"{repeated[0]} at {owner}; take the file as it was published"
        )


def _load(path: Path, dataset: str) -> Any:
    if not path.is_file():
        raise InputError(
            f"expected Karpathy's dataset_{dataset}.json at {path}, found no file; give it, or the caption_datasets.zip "
            "that holds it, with --annotations"
        )
    try:
        if not zipfile.is_zipfile(path):
            with open(path, "rb") as file:
                return json.load(file, object_hook=_without_tokens)
        with zipfile.ZipFile(path) as archive, archive.open(_member(path, archive, dataset)) as member:
            return json.load(member, object_hook=_without_tokens)
    except InputError:
        raise
    except (ValueError, RecursionError, zipfile.BadZipFile) as error:
        raise InputError(f"{path}: expected JSON, found {error}; get the file again") from error


def _member(path: Path, archive: zipfile.ZipFile, dataset: str) -> str:
    names = archive.namelist()
    wanted = f"dataset_{dataset}.json"
    found = [name for name in names if name.rpartition("/")[2] == wanted and not name.startswith("__MACOSX/")]
    if len(found) != 1:
        raise InputError(
            f"{path}: expected one member {wanted}, found {len(found)} in {', '.join(names[:5])}; give another file with "
            "--annotations"
        )
    return found[0]


def _without_tokens(value: dict[str, Any]) -> dict[str, Any]:
    """Drops the token lists while the file is parsed: they are most of the memory that it takes."""
    value.pop("tokens", None)
    return value
