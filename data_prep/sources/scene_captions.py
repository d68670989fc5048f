"""Captions of the embedded corpus: what people might write under a scene, naming all or some of its objects.

Used by `scenes`. Words around the names are verbs, adjectives, prepositions and stop words of the parser as far as
possible, so that nearly all nouns of a caption are things that can be seen: the objects and the ground.
"""

from dataclasses import dataclass

from data_prep.sources.draws import Draws
from data_prep.sources.scene_art import Ground
from data_prep.sources.scene_words import Noun

_LEADS = (
    "a photo of ",
    "a picture of ",
    "an image of ",
    "a view of ",
    "there is ",
    "here is ",
    "this is ",
    "we see ",
    "look at ",
    "i can see ",
    "this shows ",
    "someone has drawn ",
    "i really like ",
)
_PLURAL_LEADS = {"there is ": "there are ", "here is ": "here are ", "this is ": "these are "}
_TAILS = (
    " together",
    " here",
    " as seen from above",
    " , so lovely",
    " , just like that",
    " , nothing else",
    " , again",
    " that i found",
    " that you can see",
    " that we painted",
    " , nicely drawn",
)
_ADJECTIVES = ("nice", "lovely", "pretty", "funny", "cute", "beautiful", "typical", "simple", "colorful")
_PLAIN_GROUND = (" on a {} background", " in front of a {} background", " against a {} background")
_PLACE_GROUND = {
    "grass": (" on the grass", " on green grass", " in the grass", " on short grass"),
    "sand": (" on the sand", " on yellow sand", " in the sand"),
    "snow": (" in the snow", " on white snow", " in deep snow"),
    "water": (" in the water", " on blue water", " above the water"),
    "sky": (" in the sky", " under a blue sky", " against a cloudy sky"),
    "wall": (" in front of a wall", " near a red wall", " on the wall"),
    "floor": (" on the floor", " on a wooden floor", " on a brown floor"),
}
_BESIDE = (" next to ", " beside ", " near ", " with ", " and ", " and also ", " close to ")
_IRREGULAR_PLURALS = {
    "mouse": "mice",
    "goose": "geese",
    "tooth": "teeth",
    "sheep": "sheep",
    "fish": "fish",
    "deer": "deer",
    "bison": "bison",
    "moose": "moose",
    "policeman": "policemen",
    "knife": "knives",
    "wolf": "wolves",
    "scarf": "scarves",
    "leaf": "leaves",
    "maple leaf": "maple leaves",
    "ox": "oxen",
    "snowman": "snowmen",
    "dice": "dice",
}


@dataclass(frozen=True)
class Placed:
    """An object as it lies in a scene, in pixels."""

    noun: Noun
    x: float
    """Of its centre."""
    y: float
    size: float
    """Its longer side, as a share of the scene's side."""
    copies: int = 1


def write_caption(named: list[Placed], ground: Ground, size: int, draws: Draws) -> str:
    """Returns a caption that names the given objects, in their order, and sometimes the ground."""
    things = [_thing(placed, draws) for placed in named]
    text = things[0]
    if len(things) == 2:
        text += _between(named[0], named[1], size, draws) + things[1]
    elif len(things) > 2:
        style = draws.index(4)
        if style == 0:
            text = ", ".join(things)
        elif style == 1:
            text = ", ".join(things[:-1]) + ", and " + things[-1]
        elif style == 2:
            text = " and ".join(things[:2]) + draws.pick(_BESIDE) + " and ".join(things[2:])
        else:
            text = ", ".join(things[:-1]) + " and " + things[-1]
    if draws.chance(0.5):
        lead = draws.pick(_LEADS)
        text = (_PLURAL_LEADS.get(lead, lead) if named[0].copies > 1 else lead) + text
    if draws.chance(0.4):
        if ground.color is not None:
            text += draws.pick(_PLAIN_GROUND).format(_shade(ground.color, draws))
        else:
            text += draws.pick(_PLACE_GROUND[ground.place or ""])
    if draws.chance(0.15):
        text += draws.pick(_TAILS).replace(" ,", ",")
    if draws.chance(0.4):
        text = text[0].upper() + text[1:]
    return text + draws.pick((".", "", "", " .", "!" if draws.chance(0.2) else ""))


def plural(name: str) -> str:
    """Returns the plural of a noun of the corpus."""
    if name in _IRREGULAR_PLURALS:
        return _IRREGULAR_PLURALS[name]
    if name.endswith(("s", "x", "ch", "sh")) or name in ("potato", "tomato", "mango", "volcano"):
        return name + "es"
    if name.endswith("y") and name[-2] not in "aeiou":
        return name[:-1] + "ies"
    return name + "s"


def _shade(color: str, draws: Draws) -> str:
    return draws.pick((color, color, color, f"plain {color}", f"light {color}", f"pale {color}", f"soft {color}"))


def _thing(placed: Placed, draws: Draws) -> str:
    noun = placed.noun
    adjective = ""
    if draws.chance(0.25):
        if placed.size > 0.6:
            adjective = draws.pick(("big ", "large ", "huge "))
        elif placed.size < 0.38:
            adjective = draws.pick(("small ", "little ", "tiny "))
        else:
            adjective = draws.pick(_ADJECTIVES) + " "
    if noun.is_mass:
        return draws.pick(("some ", "some ", "", "the ")) + adjective + noun.name
    if placed.copies > 1:
        return "two " + adjective + plural(noun.name)
    kind = draws.uniform()
    if kind < 0.1:
        return f"the {adjective}{noun.name}"
    if kind < 0.14:
        return f"one {adjective}{noun.name}"
    words = adjective + noun.name
    return f"{_article(words)} {words}"


def _article(words: str) -> str:
    if words.startswith(("uni", "ufo")):  # sounds like "you"
        return "a"
    return "an" if words[0] in "aeiou" or words.startswith("hour") else "a"


def _between(first: Placed, second: Placed, size: int, draws: Draws) -> str:
    """Returns the words between two objects; where they lie is told only if it is clear, and truly."""
    if draws.chance(0.35) and abs(first.y - second.y) > 0.3 * size:
        return draws.pick((" above ", " over ")) if first.y < second.y else draws.pick((" below ", " under "))
    return draws.pick(_BESIDE)
