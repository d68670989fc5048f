"""Small region features in SCAN's layout whose captions say what the regions hold, and small towers: BERT in a folder, GloVe."""

from pathlib import Path
from typing import Any

import numpy as np
from finetune_material import COMBINATIONS, command
from transformers import BertConfig, BertTokenizerFast

from setclip.hashing import permutation

COLOURS = ("red", "green", "blue", "white")
WIDTH, PLACES, EACH = 12, 6, 5


def write_regions(folder: Path, splits: dict[str, int], repeats: int = 1, ids: bool = False) -> Path:
    """Writes splits with so many pictures, all different: each region holds one of four colours, and captions name them."""
    folder.mkdir(parents=True, exist_ok=True)
    number = 0
    for split, size in splits.items():
        pictures, captions = [], []
        for _ in range(size):
            names = COMBINATIONS[int(permutation(len(COMBINATIONS), 1)[number])]
            noise = np.random.default_rng(number).normal(0, 0.1, (PLACES, WIDTH))
            for place, name in enumerate(names):
                noise[place, 4 * (place % 3) % WIDTH + COLOURS.index(name) % 4] += 2.0
                noise[place, place] += 1.0
            pictures += [noise.astype(np.float32)] * repeats
            first = " ".join(names)
            captions += [first, f"{first} .", f"now {first}", " and ".join(names), f"a picture of {first}"]
            number += 1
        np.save(folder / f"{split}_ims.npy", np.stack(pictures))
        (folder / f"{split}_caps.txt").write_text("\n".join(captions) + "\n")
        if ids:
            lines = [f"{split}{i}" for i in range(size)]
            (folder / f"{split}_ids.txt").write_text("\n".join(lines) + "\n")
    return folder


def write_bert(folder: Path) -> Path:
    """Writes the configuration and the tokenizer of a very small BERT, without weights."""
    folder.mkdir(parents=True, exist_ok=True)
    words = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        *COLOURS,
        "and",
        "now",
        "a",
        "picture",
        "of",
        ".",
        "pict",
        "##ure",
    ]
    (folder / "vocab.txt").write_text("\n".join(words))
    BertTokenizerFast(vocab=str(folder / "vocab.txt")).save_pretrained(folder)
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    BertConfig(vocab_size=len(words), max_position_embeddings=24, **small).save_pretrained(folder)
    return folder


def finetuned(out: Path, *more: Any, head: str = "mean") -> Path:
    """Runs a short fine-tuning: 5 steps an epoch; returns its folder."""
    arguments = [
        "--head", head, "--out", out, "--width", 16, "--batch-size", 16, "--epochs", 2, "--optim.lr", 5e-3,
        "--log-every-steps", 1, "--device", "cpu", "--backbone.min-count", 1, "--backbone.word-width", 8,
        "--backbone.hidden-width", 16, "--triplet.mining", "all", *more,
    ]  # fmt: skip
    command([str(argument) for argument in arguments])
    return out
