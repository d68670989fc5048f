"""README.md of an exported model, in Hugging Face's form, made from what the run wrote down. Used by pretrain.export.

Every figure comes from a file: the checkpoint's description, the run's config.yaml, and results of evaluations. Places on this
machine do not appear: of a path only its last part is shown.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from eval_suite.results import Metric, Results, markdown_table
from pretrain.config import RECIPES
from setclip import config as configuration
from setclip.errors import InputError
from setclip.log import say, warn
from setclip.metric_text import metric_words

_PLACES = ("out", "resume", "change", "overwrite")  # say where and how a command was typed, not what was trained


_LIMITS = (
    "For research on image–text representations: zero-shot classification and retrieval with texts like those of the training "
    "data. The model knows no language and no kind of pictures that these data do not hold, and has their biases; figures on one "
    "data set say little of another. It has not been tested for safety or fairness: do not let it decide about people, and "
    "evaluate it on your own data before any use."
)


@dataclass(frozen=True, kw_only=True)
class CardFacts:
    """What a card tells."""

    name: str
    description: Mapping[str, Any]
    """setclip_config.json of the export."""
    model_cfg: Mapping[str, Any]
    preprocess_cfg: Mapping[str, Any]
    parameters: Mapping[str, int]
    """Tower to its number of parameters."""
    image_size: int
    formats: Sequence[str]
    """open_clip, huggingface"""
    dtype: str
    has_batch_norm: bool
    license: str | None
    settings: Mapping[str, Any] | None = None
    """config.yaml of the run, where it is there."""
    results: Sequence[Results] = field(default_factory=list)


def settings_of(run: Path) -> dict[str, Any] | None:
    """Returns the resolved settings of a run folder; None where it is no run folder."""
    path = run / configuration.CONFIG_NAME
    return yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else None


def results_for(description: Mapping[str, Any], run: Path | None, files: Sequence[Path] = ()) -> list[Results]:
    """Returns the evaluations of just these weights: those in the run's results/, and `files`.

    Those of other checkpoints in results/ are left out, which is said. Raises InputError for one of `files` that is of another
    checkpoint.
    """
    found: dict[Path, Results] = {}
    others = 0
    for path in sorted((run / "results").glob("*.json")) if run is not None else []:
        if not path.name.endswith(".gallery.json") and _looks_like_results(path):
            result = Results.load(path)
            if _is_of(result, description):
                found[path.resolve()] = result
            else:
                others += 1
    if others:
        say(f"note: {others} results in {run}/results are of other checkpoints and not in the card")
    for path in files:
        result = Results.load(path)
        if not _is_of(result, description):
            raise InputError(
                f"expected results of the exported weights ({_which(description)}), found in {path} those of "
                f"{_which(result.checkpoint)}; evaluate the export: `python -m eval_suite.zeroshot NAME --checkpoint DIR`"
            )
        found[path.resolve()] = result
    return list(found.values())


def _looks_like_results(path: Path) -> bool:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        warn(f"{path} is no JSON and not in the card ({error})")
        return False
    return isinstance(content, dict) and {"evaluation", "metrics", "format_version"} <= content.keys()


def _is_of(result: Results, description: Mapping[str, Any]) -> bool:
    told = result.checkpoint
    if (told.get("data") or {}).get("digest") != (description.get("data") or {}).get("digest"):
        return False
    return all(
        told.get(key) == description.get(key) for key in ("recipe", "step", "samples_seen", "averaged", "weights")
    )


def _which(identity: Mapping[str, Any]) -> str:
    averaged, prefix = identity.get("averaged"), "the moving average at " if identity.get("weights") == "ema" else ""
    return prefix + (f"the mean of steps {averaged['steps']}" if averaged else f"step {identity.get('step')}")


def differing_settings(recipe: str, settings: Mapping[str, Any]) -> dict[str, tuple[Any, Any]] | None:
    """Returns flag → (the recipe's value, the run's) for each setting that differs; None where the recipe is not known here."""
    if recipe not in RECIPES:
        return None
    ours = _flat(configuration.to_dict(RECIPES[recipe]()))
    theirs = _flat(settings)
    return {
        name: (ours.get(name), theirs.get(name))
        for name in dict.fromkeys([*ours, *theirs])
        if name not in _PLACES and ours.get(name) != theirs.get(name)
    }


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        key = prefix + str(name).replace("_", "-")
        flat.update(_flat(value, f"{key}.") if isinstance(value, Mapping) else {key: value})
    return flat


def model_card(facts: CardFacts) -> str:
    """Returns the card: YAML front matter, then Markdown."""
    sections = (
        _front_matter(facts),
        f"# {facts.name}\n\n{_summary(facts)}",
        f"## How to load it\n\n{_loading(facts)}",
        f"## Training\n\n{_training(facts)}",
        f"## Data\n\n{_data(facts.description.get('data') or {})}",
        f"## Figures\n\n{_figures(facts)}",
        f"## Intended use and limits\n\n{_LIMITS}",
        f"## Licence\n\n{_licence(facts)}",
        f"## Where it comes from\n\n{_provenance(facts.description)}",
    )
    return "\n\n".join(section.strip() for section in sections) + "\n"


def _front_matter(facts: CardFacts) -> str:
    entries: dict[str, Any] = {
        "library_name": "open_clip" if "open_clip" in facts.formats else "transformers",
        "pipeline_tag": "zero-shot-image-classification",
        "tags": ["clip", "setclip", "image-text-retrieval"],
    }
    if facts.license is not None:
        entries["license"] = facts.license
    return f"---\n{yaml.safe_dump(entries, sort_keys=False, allow_unicode=True)}---"


def _summary(facts: CardFacts) -> str:
    description, data = facts.description, facts.description.get("data") or {}
    towers = ", ".join(f"{tower} {count / 1e6:.2f} M" for tower, count in facts.parameters.items())
    text = (
        f"A CLIP model ({description.get('model', 'of a configuration of its own')}; parameters: {towers}; pictures of "
        f"{facts.image_size} × {facts.image_size} pixels, texts of up to {facts.model_cfg['text_cfg'].get('context_length', 77)} "
        f"tokens, vectors of {facts.model_cfg['embed_dim']} numbers)"
    )
    if "pairs_present" in data:
        text += f", trained by Setclip on {data['pairs_present']:,} image–text pairs"
    if description.get("weights") == "ema":
        decay = description.get("ema", {}).get("decay")
        text += f". The weights are their exponential moving average in training (decay {decay} a step)"
    averaged = description.get("averaged")
    if averaged:
        steps = [f"{step:,}" if isinstance(step, int) else "?" for step in averaged["steps"]]
        text += (
            f". The weights are the mean of {len(steps)} checkpoints, of steps {', '.join(steps)} ({averaged['how']})"
        )
        if facts.has_batch_norm:
            text += ". **Batch norm's statistics are means too, not those of the mean weights: they are approximate**"
    return text + f". Weights are {facts.dtype}."


def _loading(facts: CardFacts) -> str:
    text = "`DIR` is the folder with this file; on the Hub, write `hf-hub:USER/NAME` for `local-dir:DIR`.\n"
    if "open_clip" in facts.formats:
        text += """
```python
import open_clip

model, preprocess = open_clip.create_model_from_pretrained("local-dir:DIR")
tokenizer = open_clip.get_tokenizer("local-dir:DIR")
image_features = model.eval().encode_image(preprocess(image)[None], normalize=True)
text_features = model.encode_text(tokenizer(["a photo of a dog"]), normalize=True)
```
"""
    if "huggingface" in facts.formats:
        text += """
```python
from transformers import CLIPModel, CLIPProcessor

model, processor = CLIPModel.from_pretrained("DIR"), CLIPProcessor.from_pretrained("DIR")
inputs = processor(text=["a photo of a dog"], images=image, padding=True, truncation=True, return_tensors="pt")
scores = model(**inputs).logits_per_image
```
"""
    if "open_clip" in facts.formats:
        text += """
```bash
python -m eval_suite.zeroshot NAME --checkpoint DIR              # Setclip
python -m pretrain.run RECIPE --model.name MODEL --model.pretrained DIR
clip_benchmark eval --model local-dir:DIR --pretrained none --dataset DATASET --output results.json
```
"""
    return text + "\n" + _pictures(facts.image_size, facts.preprocess_cfg)


def _pictures(size: int, preprocess: Mapping[str, Any]) -> str:
    resized = {
        "shortest": f"the short side is resized to {size} pixels, the centre cropped",
        "longest": f"the long side is resized to {size} pixels, the rest filled",
        "squash": f"resized to {size} × {size} pixels, whatever their shape",
    }
    how = resized.get(preprocess["resize_mode"], preprocess["resize_mode"])
    mean, std = (", ".join(f"{value:g}" for value in preprocess[name]) for name in ("mean", "std"))
    return f"Pictures: {how} ({preprocess['interpolation']}), RGB in 0–1 normalised by mean {mean} and standard deviation {std}."


def _training(facts: CardFacts) -> str:
    description, settings = facts.description, facts.settings
    loss = description.get("loss") or {}
    rows = {
        "recipe": description.get("recipe"),
        "model": description.get("model"),
        "loss": "/".join(str(part) for part in (loss.get("name"), loss.get("target")) if part),
        "steps": description.get("step"),
        "samples seen": description.get("samples_seen"),
        "passes over the data": description.get("epoch"),
        "pairs a step": None if settings is None else settings.get("global_batch_size"),
        "precision while training": None if settings is None else settings.get("engine", {}).get("precision"),
        "seed": None if settings is None else settings.get("seed"),
    }
    table = "| | |\n| --- | --- |\n"
    table += "".join(f"| {name} | {_cell(value)} |\n" for name, value in rows.items() if value not in (None, ""))
    return f"{table}\n{_differences(description.get('recipe'), settings)}"


def _differences(recipe: str | None, settings: Mapping[str, Any] | None) -> str:
    if settings is None or recipe is None:
        return f"The run's settings ({configuration.CONFIG_NAME}) were not beside the checkpoint, so they are not told here."
    differing = differing_settings(recipe, settings)
    if differing is None:
        return f"The recipe `{recipe}` is not among this version's, so what differs from it is not told here."
    if not differing:
        return f"All settings are those of the recipe `{recipe}`."
    rows = "".join(f"| `--{name}` | {_cell(ours)} | {_cell(theirs)} |\n" for name, (ours, theirs) in differing.items())
    return f"Settings that differ from the recipe `{recipe}`:\n\n| setting | recipe | this run |\n| --- | --- | --- |\n{rows}"


def _cell(value: Any) -> str:
    """Returns a value for a table; of a place on this machine only the last part."""
    if isinstance(value, bool) or value is None:
        return str(value)
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, list | tuple):
        return ", ".join(map(_cell, value)) or "none"
    text = str(value)
    if "/" in text and (Path(text).is_absolute() or text.startswith(".") or Path(text).exists()):
        text = Path(text).name
    return text.replace("|", "\\|").replace("\n", " ")


def _data(data: Mapping[str, Any]) -> str:
    if "pairs_present" not in data:
        return "The checkpoint does not tell what it was trained on."
    present, listed = data["pairs_present"], data.get("pairs_listed")
    share = f" of {listed:,} listed ({100 * present / listed:.1f} %)" if listed else ""
    lines = [f"- source: {data.get('source', 'not told')}", f"- image–text pairs: {present:,} present{share}"]
    for split, total in (data.get("totals") or {}).items():
        counts = ", ".join(f"{total[name]:,} {name}" for name in ("samples", "captions", "shards") if name in total)
        lines.append(f"- split {split}: {counts}")
    if data.get("parsers"):
        lines.append("- objects in captions by " + ", ".join(f"{k} ({v})" for k, v in data["parsers"].items()))
    if data.get("digest"):
        lines.append(f"- digest over the shards: `{data['digest']}`")
    return "\n".join(lines)


def _figures(facts: CardFacts) -> str:
    if not facts.results:
        return "No evaluation of these weights was found."
    parts = [
        f"In brackets stand 95 % intervals. Each figure has its protocol below.{_rounding(facts)}\n",
        markdown_table(facts.results),
        *(_protocols(result) for result in facts.results),
    ]
    return "\n".join(parts)


def _rounding(facts: CardFacts) -> str:
    evaluated = {(result.checkpoint.get("export") or {}).get("dtype", "fp32") for result in facts.results}
    if evaluated <= {facts.dtype}:
        return ""
    return f" The weights that were evaluated were {' and '.join(sorted(evaluated))}, those here are {facts.dtype}."


def _protocols(result: Results) -> str:
    named = {name: result.metrics[name] for name in result.headline if name in result.metrics}
    place = " ".join(str(result.dataset[key]) for key in ("name", "split") if result.dataset.get(key))
    head = f"\n{result.evaluation}, {place}" + (
        " (partial: samples of the protocol were missing)" if result.is_partial else ""
    )
    head += f"; Setclip {result.provenance.get('setclip')}, commit {_commit(result.provenance)}:\n\n"
    return head + "\n".join(
        f"- {metric_words(name, metric.unit)}: {_protocol(metric)}" for name, metric in named.items()
    )


def _protocol(metric: Metric) -> str:
    interval = f"; interval: {metric.interval_method}" if metric.interval_method else ""
    return f"{metric.protocol} (Samples: {metric.samples:,}{interval}.)"


def _licence(facts: CardFacts) -> str:
    chosen = (
        f"These weights are published under: `{facts.license}`."
        if facts.license is not None
        else "No licence is stated here: that of the weights is for whoever publishes them to choose (`--license`, and the field "
        "`license` at the head of this file)."
    )
    credits = (facts.description.get("data") or {}).get("credits") or []
    if not credits:
        return (
            f"{chosen} The manifest of the training data names no licences or credits; what their terms say still goes."
        )
    named = "\n".join(f"- {credit}" for credit in credits)
    return f"{chosen} The training data come with these licences and credits, whose terms go on holding for them:\n\n{named}"


def _provenance(description: Mapping[str, Any]) -> str:
    lines = []
    for what, provenance in (("trained", description.get("provenance")), ("exported", description.get("export"))):
        if provenance:
            versions = ", ".join(f"{name} {version}" for name, version in provenance.get("versions", {}).items())
            lines.append(f"- {what} with Setclip {provenance['setclip']}, commit {_commit(provenance)} ({versions})")
    return "\n".join(lines)


def _commit(provenance: Mapping[str, Any]) -> str:
    return f"`{provenance['commit']}`" if provenance.get("commit") else "unknown"
