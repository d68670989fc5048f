"""The vectors that stand for classes: from prompt templates, from descriptions of how classes look, or from both.

Radford et al. 2021 (arXiv 2103.00020), section 3.1.4; descriptions as AlignCLIP (Zhang, Yan, Ding, ACM MM 2024) has a
language model write them: of a class's two vectors the normalised mean, for all classes or for those of the tail. Used by
zero-shot classification. Letters: C classes, D width.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from eval_suite.encode import EncodeText, encode_texts
from eval_suite.sharing import ALONE
from setclip.distributed import World
from setclip.errors import InputError
from setclip.log import warn

Kind = Literal["templates", "descriptions", "both", "tail"]
KINDS: dict[Kind, str] = {
    "templates": "mean of the unit features of the prompts, normalised",
    "descriptions": "unit feature of “NAME. DESCRIPTION”",
    "both": "normalised mean of the prompts' and the description's vector",
    "tail": "normalised mean of both for classes of the tail, the prompts' vector for the others",
}
"""Kind of prototype to how it comes about."""

PREFIXES: dict[Kind, str] = {
    "templates": "",
    "descriptions": "descriptions_",
    "both": "both_",
    "tail": "both_for_tail_",
}
"""Kind of prototype to what stands before the names of its metrics where several kinds are evaluated."""


@dataclass(frozen=True)
class DescribedClasses:
    """What descriptions there are for the classes."""

    texts: tuple[str | None, ...]
    """C descriptions; None where there is none."""
    names: tuple[str, ...]

    @property
    def without(self) -> list[str]:
        """Names of the classes that have none."""
        return [name for name, text in zip(self.names, self.texts, strict=True) if text is None]


def described(class_names: Sequence[str], texts: Mapping[str, str]) -> DescribedClasses:
    """Returns the descriptions of classes from `texts`, name in lower case to description."""
    return DescribedClasses(tuple(texts.get(name.lower()) for name in class_names), tuple(class_names))


def class_prototypes(
    encode_text: EncodeText,
    class_names: Sequence[str],
    templates: Sequence[str],
    show_progress: bool = True,
    world: World = ALONE,
) -> Tensor:
    """Returns (C, D) float32 of unit norm: of each class the mean over prompts of their unit features, normalised."""
    bare = [template for template in templates if "{}" not in template]
    if bare or not templates:
        raise InputError(f"expected templates with {{}} for the class name, found {bare or 'none'}; add it")
    prompts = [template.replace("{}", name) for name in class_names for template in templates]
    features = encode_texts(encode_text, prompts, show_progress=show_progress, world=world)
    means = features.unflatten(0, (len(class_names), len(templates))).mean(1)
    return torch.nn.functional.normalize(means, dim=-1)


def all_prototypes(
    kinds: Sequence[Kind],
    from_templates: Tensor,
    encode_text: EncodeText,
    descriptions: DescribedClasses,
    groups: Sequence[str] | None,
    world: World = ALONE,
) -> dict[Kind, Tensor]:
    """Returns the (C, D) unit vectors of each kind, from those of the templates.

    Classes without description keep the vector of their templates in every kind: `check_descriptions` is what refuses or
    tells of them. `groups`: of each class, needed for "tail".
    """
    has_one = torch.tensor([text is not None for text in descriptions.texts])
    from_descriptions = from_templates.clone()
    if set(kinds) != {"templates"}:
        texts = [
            f"{name}. {text}"
            for name, text in zip(descriptions.names, descriptions.texts, strict=True)
            if text is not None
        ]
        from_descriptions[has_one] = encode_texts(encode_text, texts, world=world)
    both = torch.nn.functional.normalize(from_templates + from_descriptions, dim=-1)
    both = torch.where(has_one[:, None], both, from_templates)
    found: dict[Kind, Tensor] = {"templates": from_templates, "descriptions": from_descriptions, "both": both}
    if "tail" in kinds:
        assert groups is not None
        in_tail = torch.tensor([group == "tail" for group in groups])
        found["tail"] = torch.where(in_tail[:, None], both, from_templates)
    return {kind: found[kind] for kind in kinds}


def check_descriptions(
    kinds: Sequence[Kind], descriptions: DescribedClasses, groups: Sequence[str] | None, allow_missing: bool, where: str
) -> list[str]:
    """Returns the names of the classes that lack a description that one of `kinds` needs.

    Raises InputError, naming them, unless `allow_missing`; then they are warned of. "tail" needs descriptions of the
    classes of the tail only, and `groups`.
    """
    if "tail" in kinds and "tail" not in (groups or ()):
        raise InputError(
            "expected classes of the tail for prototypes of the tail, found "
            + ("none among the groups of the classes" if groups else "no objects.parquet that tells which they are")
            + "; give that of the training data with --objects"
        )
    needed: set[str] = set()
    if set(kinds) & {"descriptions", "both"}:
        needed = set(descriptions.names)
    elif "tail" in kinds:
        needed = {name for name, group in zip(descriptions.names, groups or (), strict=True) if group == "tail"}
    without = [name for name in descriptions.without if name in needed]
    if not without:
        return []
    some = ", ".join(without[:5]) + (f" and {len(without) - 5:,} more" if len(without) > 5 else "")
    if len(without) == len(needed) or not allow_missing:
        last = ", or let these keep the vector of their templates with --allow-undescribed True"
        last = "" if len(without) == len(needed) else last
        raise InputError(
            f"expected a description of each of {len(needed):,} classes in {where}, found none for {len(without):,} "
            f"({some}); describe them (`python -m data_prep.describe DIR --model MODEL --of all`){last}"
        )
    warn(
        f"{len(without):,} of {len(needed):,} classes have no description and keep the vector of their templates: {some}"
    )
    return without
