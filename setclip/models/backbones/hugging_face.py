"""Text towers of Hugging Face (BERT and other encoders): last hidden states of the pieces of words, and of the first token.

The first token, a class token, is the global feature and no local one; the token that ends a text is one. Kept whole in a
checkpoint: the configuration and the tokenizer are part of the description. Letters: B texts, L tokens, E width.
"""

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer
from torch import Tensor

from setclip.errors import InputError
from setclip.models.backbones.base import Features, TextTower, cut
from setclip.models.heads import SideWidths
from setclip.vocabulary import padded
from setclip.word_noise import DROP, KEEP, Draw, changed_to, changes, random_numbers

SHORT: dict[str, str] = {"bert": "bert-base-uncased"}
"""Stated: VSE∞, LAPS and DH-Set take it"""


class PieceTokenizer:
    """B texts to (B, L) int64: special tokens, pieces of words, padding up to the longest text of the batch.

    `pad`, `mask`: numbers of these tokens; mask None: the tokenizer has none.
    """

    def __init__(self, content: str, pad: int, mask: int | None, length: int):
        self.content, self.pad, self.mask, self.length = content, pad, mask, length
        self._own = Tokenizer.from_str(content)
        self._own.no_padding()
        self._own.enable_truncation(length)

    def __call__(self, texts: Sequence[str]) -> Tensor:
        return padded([found.ids for found in self._own.encode_batch(list(texts))], self.pad)

    def noisy(self, texts: Sequence[str], rate: float, draws: Sequence[Draw]) -> Tensor:
        """Returns the same with words changed (`setclip.word_noise`), all pieces of a word alike, each text by its own draw."""
        if self.mask is None:
            raise InputError(
                "expected a tokenizer with a mask token for --noise.words, found one without; take a text tower that was trained "
                "with masks (bert), or leave the noise out"
            )
        encoded = self._own.encode_batch(list(texts))
        length = max((len(found.ids) for found in encoded), default=0)
        others = random_numbers(draws, length, 0, len(self._others))
        rows = []
        for found, of_words, own in zip(encoded, changes(draws, length, rate), others, strict=True):
            of_pieces = [KEEP if word is None else of_words[word] for word in found.word_ids]
            rows.append(
                [
                    changed_to(number, change, self._others[other], self.mask)
                    for number, change, other in zip(found.ids, of_pieces, own, strict=False)
                    if change != DROP
                ]
            )
        return padded(rows, self.pad)

    def words_of(self, texts: Sequence[str]) -> list[list[str]]:
        """Returns the pieces of each text, the first token aside."""
        return [found.tokens[1:] for found in self._own.encode_batch(list(texts))]

    @cached_property
    def _others(self) -> list[int]:
        """Numbers that a random word may have: those of no special token."""
        special = set(self._own.get_added_tokens_decoder())
        return sorted(number for number in self._own.get_vocab().values() if number not in special)


class HuggingFaceText(TextTower):
    """`config`: of transformers, as a dict. `tokenizer`: the content of tokenizer.json. `pad`, `mask`: as of PieceTokenizer."""

    tokenizer: PieceTokenizer

    def __init__(self, config: Mapping[str, Any], tokenizer: str, pad: int, mask: int | None, length: int):
        super().__init__()
        self.config = dict(config)
        self.tokenizer = PieceTokenizer(tokenizer, pad, mask, length)
        self.encoder: Any = make_encoder(self.config)
        width = int(self.encoder.config.hidden_size)
        self.widths = SideWidths(width, width)

    @property
    def description(self) -> dict[str, Any]:
        own = self.tokenizer
        return {
            "kind": "hugging_face", "config": self.config, "tokenizer": own.content, "pad": own.pad, "mask": own.mask,
            "length": own.length,
        }  # fmt: skip

    def forward(self, tokens: Tensor) -> Features:
        mask = tokens != self.tokenizer.pad
        found = self.encoder(input_ids=tokens, attention_mask=mask.long()).last_hidden_state
        return cut(Features(found[:, 1:], mask[:, 1:], found[:, 0]))

    def words_of(self, texts: Sequence[str]) -> list[list[str]]:
        return self.tokenizer.words_of(texts)

    def noisy_tokens(self, texts: Sequence[str], rate: float, draws: Sequence[Draw]) -> Tensor:
        return self.tokenizer.noisy(texts, rate, draws)


def make_encoder(config: Mapping[str, Any]) -> Any:
    """Returns an encoder of a configuration, with random weights and no layer that pools. Raises InputError for what is none."""
    options = dict(config)
    name = str(options.pop("model_type", ""))
    try:
        own = transformers.AutoConfig.for_model(name, **options)
        # weights are float32 whatever the configuration says: half precision is autocast's
        try:
            encoder = transformers.AutoModel.from_config(own, dtype=torch.float32, add_pooling_layer=False)
        except TypeError:  # a model that never pools
            encoder = transformers.AutoModel.from_config(own, dtype=torch.float32)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"expected a text encoder that transformers knows, found model_type {name!r} ({str(error).splitlines()[0][:200]}); "
            "take bert or another encoder"
        ) from error
    if own.is_encoder_decoder or not hasattr(own, "hidden_size"):
        raise InputError(
            f"expected a text encoder with a hidden_size and no decoder, found model_type {name!r}; take bert or another encoder"
        )
    return encoder
