"""Recurrent text towers over words of a vocabulary: GRU and BiGRU, as VSE++, SCAN, PVSE and DivE have them.

    bigru         words: mean of both directions; global: mean of both last states        stated (SCAN's and DivE's code)
    bigru_concat  half as wide a direction, both side by side, in words and global        stated (PVSE, PCME)
    gru           one direction; global: the last state                                   stated (VSE++)

Every word of a text is a local feature, <start> and <end> among them. Letters: B texts, L words, H hidden width.
"""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from setclip.errors import InputError
from setclip.lookup import look_up
from setclip.models.backbones.base import Features, TextTower
from setclip.models.heads import SideWidths
from setclip.models.pieces import check_choice, first_places
from setclip.vocabulary import PAD, Vocabulary, WordTokenizer
from setclip.word_noise import Draw

_DIRECTIONS = {"bigru": 2, "bigru_concat": 2, "gru": 1}


class Recurrent(TextTower):
    """`words`: all of the vocabulary in their order, a space between. `cell`: bigru, bigru_concat or gru.

    `dropout`: of embeddings and of the words that come out, in training. `length`: most tokens of a text. `local` "embeddings":
    local features are the words' embeddings, before the GRU (stated: PVSE's, PCME's and DivE's code); else its states.
    """

    tokenizer: WordTokenizer

    def __init__(
        self,
        words: str,
        cell: str = "bigru",
        word_width: int = 300,
        hidden_width: int = 1024,
        dropout: float = 0.0,
        length: int = 128,
        local: Literal["states", "embeddings"] = "states",
    ):
        super().__init__()
        check_choice("local", local, ("states", "embeddings"))
        directions = look_up(_DIRECTIONS, cell, "recurrent text tower")
        if cell == "bigru_concat" and hidden_width % 2:
            raise InputError(
                f"expected an even width for two directions side by side, found --backbone.hidden-width {hidden_width}; take "
                f"{hidden_width + 1}"
            )
        self.cell, self.options = cell, {"word_width": word_width, "hidden_width": hidden_width, "dropout": dropout}
        self.tokenizer = WordTokenizer(Vocabulary(tuple(words.split(" "))), length)
        self.embedding = nn.Embedding(len(self.tokenizer.vocabulary), word_width)
        nn.init.uniform_(self.embedding.weight, -0.1, 0.1)  # stated: VSE++'s and SCAN's code
        own = hidden_width // 2 if cell == "bigru_concat" else hidden_width
        self.gru = nn.GRU(word_width, own, batch_first=True, bidirectional=directions == 2)
        self.dropout = nn.Dropout(dropout)
        self.local = local
        self.widths = SideWidths(word_width if local == "embeddings" else hidden_width, hidden_width)

    @property
    def description(self) -> dict[str, Any]:
        words = " ".join(self.tokenizer.vocabulary.words)
        return {
            "kind": "recurrent", "words": words, "cell": self.cell, **self.options, "length": self.tokenizer.length,
            **({"local": self.local} if self.local != "states" else {}),
        }  # fmt: skip

    def forward(self, tokens: Tensor) -> Features:
        lengths = (tokens != PAD).sum(1)
        embedded = self.dropout(self.embedding(tokens))
        packed = pack_padded_sequence(embedded, lengths.cpu(), batch_first=True, enforce_sorted=False)
        states, last = self.gru(packed)
        words, _ = pad_packed_sequence(states, batch_first=True)
        if self.cell == "bigru":
            words, pooled = words.unflatten(2, (2, -1)).mean(2), last.mean(0)
        else:
            pooled = torch.cat(tuple(last), 1)
        words = embedded[:, : words.shape[1]] if self.local == "embeddings" else self.dropout(words)
        return Features(words, first_places(lengths, words.shape[1]), pooled)

    def words_of(self, texts: Sequence[str]) -> list[list[str]]:
        return self.tokenizer.words_of(texts)

    def noisy_tokens(self, texts: Sequence[str], rate: float, draws: Sequence[Draw]) -> Tensor:
        return self.tokenizer.noisy(texts, rate, draws)
