"""The questions to a language model, word by word, and the ids of requests. Used by `data_prep.parse_llm` and `.describe`.

The first question of each kind is AlignCLIP's (Zhang, Yan, Ding, ACM MM 2024, supplement). The second, with two examples,
is ours; it is put where the first answer was of no use. The fixed instruction stands first, so that an engine with a
prefix cache reads it once.
"""

from dataclasses import dataclass

from setclip.errors import InputError
from setclip.hashing import hash_text

OBJECTS = "The following is a caption for an image. Please directly indicate the objects contained in it, separated by commas."
DESCRIPTION = "Please briefly introduce the appearance of CLASS in ordinary language"
CLASS = "CLASS"

Message = dict[str, str]

_SHORTLY = "Answer with nothing but their names."
_TEMPLATE_TOKENS = 192  # what a chat template puts around the messages; some begin with a system message of their own


@dataclass(frozen=True, kw_only=True)
class Question:
    """One way to ask about a text: a caption, or the name of a class."""

    kind: str
    """Goes into the ids of requests, and so does the version: raise that when the words change."""
    version: int
    instruction: str
    """With CLASS in it that is replaced by the text; otherwise the text follows on a line of its own."""
    examples: tuple[tuple[str, str], ...] = ()
    """Texts and their answers, shown as turns of the conversation before."""

    @property
    def name(self) -> str:
        """For the version of a parser and the columns of tables."""
        return f"{self.kind} {self.version}"

    def messages(self, text: str) -> tuple[Message, ...]:
        """Returns the conversation whose last turn asks about `text`."""
        turns: list[Message] = []
        for example, answer in self.examples:
            turns += [{"role": "user", "content": self._asked(example)}, {"role": "assistant", "content": answer}]
        return (*turns, {"role": "user", "content": self._asked(text)})

    def room(self, max_model_len: int, max_tokens: int) -> int:
        """Returns the bytes that a text may have so that conversation, template and answer fit into `max_model_len` tokens.

        A token has at least one byte, whatever the tokenizer. Raises InputError where next to nothing is left.
        """
        fixed = sum(len(turn["content"].encode()) for turn in self.messages(""))
        room = max_model_len - max_tokens - _TEMPLATE_TOKENS - fixed
        if room < 64:
            raise InputError(
                f"expected room for a text of 64 bytes beside the question ({fixed} bytes), a chat template "
                f"({_TEMPLATE_TOKENS} tokens) and an answer ({max_tokens} tokens), found --max-model-len {max_model_len}; give "
                f"at least {max_model_len - room + 64}"
            )
        return room

    def _asked(self, text: str) -> str:
        if CLASS in self.instruction:
            return self.instruction.replace(CLASS, text)
        return f"{self.instruction}\n{text}"


OBJECTS_FIRST = Question(kind="objects", version=1, instruction=OBJECTS)
OBJECTS_SECOND = Question(
    kind="objects with examples",
    version=1,
    instruction=f"{OBJECTS} {_SHORTLY}",
    examples=(
        ("A cat sleeping on a sofa next to an open laptop computer.", "cat, sofa, laptop computer"),
        ("Two young men with umbrellas are waiting for the bus in heavy rain", "man, umbrella, bus, rain"),
    ),
)
DESCRIPTION_FIRST = Question(kind="description", version=1, instruction=DESCRIPTION)
DESCRIPTION_SECOND = Question(
    kind="description with examples",
    version=1,
    instruction=f"{DESCRIPTION}, in one or two sentences.",
    examples=(
        (
            "teapot",
            "A teapot is a round pot of china or metal with a curved spout on one side, a handle on the other and a small "
            "lid on top.",
        ),
        (
            "heron",
            "A heron is a tall grey bird with long thin legs, a long bent neck and a sharp yellow beak.",
        ),
    ),
)


def request_id(question: Question, text: str) -> str:
    """Returns 16 hex digits that are equal for equal questions about equal texts: these are asked once."""
    return f"{hash_text(f'{question.name}{chr(0)}{text}'):016x}"


def cut(text: str, room: int) -> str:
    """Returns the text in one line and in at most `room` bytes of UTF-8, cut at a space where there is one."""
    text = " ".join(
        text.encode("utf-8", "replace").decode().split()
    )  # a lone surrogate, which JSON can spell, has no bytes
    data = text.encode()
    if len(data) <= room:
        return text
    short = data[:room].decode(errors="ignore")
    return short.rpartition(" ")[0] or short
