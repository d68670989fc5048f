"""Composes the demo's report.html from what its steps left in the demo's folder.

    python -m setclip.demo_report demo    # writes demo/report.html again

Every figure comes from the files of the stages (manifest, objects, metrics, results, gallery); none is copied by hand.
"""

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from itertools import combinations
from pathlib import Path
from typing import Any

from markupsafe import Markup

from setclip import plots, report
from setclip.config import command
from setclip.demo_record import ARMS, SLOTS, DemoFolder, DemoRecord
from setclip.errors import InputError
from setclip.log import duration, say
from setclip.manifest import Manifest
from setclip.metric_text import interval_text, metric_words, number_text, with_interval
from setclip.objects import GROUPS, ObjectTable, num_tail_objects, read_objects
from setclip.shards import Sample, Shard

PARSER = "pos"
NUM_SAMPLES = 12
NUM_QUERIES = 6
NUM_FAILURES = 2
_LOOKED_AT = 400  # training samples among which pairs with a given overlap are sought

_LICENCE = ("CC BY 4.0", "https://creativecommons.org/licenses/by/4.0/")


class DemoData:
    """What the steps left, read when asked for."""

    def __init__(self, root: Path):
        self.folder = DemoFolder(root)
        self.record = DemoRecord.load(root)
        self.manifest = Manifest.load(self.folder.scenes)
        self.objects = read_objects(self.folder.scenes, PARSER)
        self.results = {
            evaluation: {arm: _read_json(self.folder.results(evaluation, arm)) for arm in ARMS}
            for evaluation in ("zeroshot", "retrieval")
        }
        self.gallery = {arm: _read_json(self.folder.gallery(arm)) for arm in ARMS}
        self.slots = {name: _read_json(self.folder.results(name, SLOTS)) for name in ("retrieval", "diagnostics")}
        self.looks = _read_json(self.folder.looks(SLOTS))
        self.metrics = {arm: _read_lines(self.folder.run(arm) / "metrics.jsonl") for arm in ARMS}

    def shards(self, split: str) -> list[Shard]:
        """The shards of a split."""
        return [Shard(self.folder.scenes / info.name) for info in self.manifest.of_split(split)]

    @cached_property
    def test_pictures(self) -> report.PictureBook:
        """The pictures that the galleries name."""
        return report.PictureBook(self.shards("test"))

    @cached_property
    def first_samples(self) -> list[Sample]:
        """The first training samples."""
        shard = self.shards("train")[0]
        return [shard.read(row) for row in range(min(_LOOKED_AT, len(shard)))]

    def metric(self, evaluation: str, name: str, arm: str) -> dict[str, Any] | None:
        """An entry of a results file; None where it has none of that name."""
        return self.results[evaluation][arm]["metrics"].get(name)

    def curve(self, arm: str, name: str) -> plots.Curve:
        """A metric over the steps of a run."""
        points = [(entry["step"], entry[name]) for entry in self.metrics[arm] if name in entry]
        return plots.Curve(_short(arm), [x for x, _ in points], [y for _, y in points])


def write_report(root: Path) -> Path:
    """Writes `root`/report.html; returns its path. Raises InputError where a step's files are missing."""
    data = DemoData(root)
    report.write_page(data.folder.report, compose(data))
    return data.folder.report


def compose(data: DemoData) -> report.Page:
    """The whole report."""
    return report.Page(
        title="Two kinds of labels, one small CLIP",
        kicker="Setclip demo report",
        lead=lead(data),
        opening=[report.key_figures(key_figures(data)), report.caveats("How much this shows", caveats(data))],
        sections=[
            corpus_section(data),
            labels_section(data),
            training_section(data),
            classes_section(data),
            retrieval_section(data),
            sets_section(data),
            results_section(data),
            making_section(data),
        ],
        credits=credits(data),
    )


def lead(data: DemoData) -> str:
    """What was done and what came out, in plain words that fit whichever arm is ahead."""
    dataset = data.results["zeroshot"]["hard"]["dataset"]
    top1 = {arm: _required(data, "zeroshot", "top1", arm) for arm in ARMS}
    ours, hard = (top1[arm] for arm in ARMS)
    steps = data.record.config["steps"]
    return (
        f"The same network was trained twice from the same start on the same batches, {steps:,} steps each: with "
        f"Object-IoU soft labels, and with the hard labels of CLIP. Asked for one of {dataset['classes']:,} names, it then "
        f"finds the right one for {_percent(ours['value'])} of {ours['samples']:,} held-out pictures against "
        f"{_percent(hard['value'])}; guessing gives {_percent(ours['chance'])}. {comparison(ours, hard)}"
    )


def comparison(ours: Mapping[str, Any], hard: Mapping[str, Any]) -> str:
    """Whether two metrics can be told apart by their 95 % intervals."""
    first, second = ours.get("interval_95"), hard.get("interval_95")
    if not first or not second:
        return "There are no intervals to judge the difference by."
    if first[0] <= second[1] and second[0] <= first[1]:
        return "The 95 % intervals of the two overlap, so these pictures do not tell the arms apart."
    return (
        f"The 95 % intervals do not overlap; {'Object-IoU' if ours['value'] > hard['value'] else 'hard labels'} lead."
    )


def key_figures(data: DemoData) -> list[report.KeyFigure]:
    """Headline numbers of both arms beside chance."""
    dataset = data.results["zeroshot"]["hard"]["dataset"]
    retrieval = data.results["retrieval"]["hard"]["dataset"]
    wanted = [
        ("zeroshot", "top1", f"Zero-shot accuracy, {dataset['classes']:,} names"),
        ("zeroshot", "top1_tail", "Zero-shot accuracy on tail objects, the rarest 30 %"),
        ("retrieval", "i2t_r5", f"Picture finds its caption, first 5 of {retrieval['captions']:,}"),
    ]
    figures = []
    for evaluation, name, title in wanted:
        found = {arm: data.metric(evaluation, name, arm) for arm in ARMS}
        if None in found.values():
            continue
        metrics = {arm: metric for arm, metric in found.items() if metric}
        chance = next(iter(metrics.values()))["chance"]
        most = max(chance, *(m["interval_95"][1] if m["interval_95"] else m["value"] for m in metrics.values()))
        values = [
            report.Value(
                _short(arm),
                _percent(metric["value"]),
                metric["value"] / most if most else 0,
                f"series-{number}",
                f"95 % interval {_interval(metric)}",
            )
            for number, (arm, metric) in enumerate(metrics.items(), 1)
        ]
        values.append(report.Value("chance", _percent(chance), chance / most if most else 0, "chance"))
        figures.append(report.KeyFigure(title, values))
    return figures


def caveats(data: DemoData) -> list[str | Markup]:
    """What a reader must know before believing the numbers."""
    items: list[str | Markup] = []
    if data.record.config.get("fast"):
        items.append(
            Markup(
                "<strong>Made with --fast True:</strong> little data and hardly any training. It shows that every step "
                "runs, not what the method is worth."
            )
        )
    return [
        *items,
        "The scenes are drawn from topics, so a batch holds many pictures that another caption fits as well (false "
        "negatives). Such a corpus favours soft labels; photographs from the web have fewer.",
        "The zero-shot pictures are the drawings seen in training, in new places, sizes and on new grounds. They test "
        "names, not new kinds of dogs.",
        "The intervals count the held-out pictures only. One seed is no evidence: another seed can move both arms "
        "by more than that. docs/results.md has means over three seeds, and photographs.",
    ]


def corpus_section(data: DemoData) -> report.Section:
    """Samples, and how often objects occur."""
    totals = data.manifest.totals()
    objects = data.objects
    num_tail, num_head = num_tail_objects(len(objects.names)), sum(objects.group_of(n) == "head" for n in objects.names)
    first, last = objects.names[0], objects.names[-1]
    counts = [int(count) for count in objects.counts]
    alt = (
        f"Counts of {len(counts)} objects by rank, both axes logarithmic: from {counts[0]:,} captions ({first}) down to "
        f"{counts[-1]:,} ({last}); the first {num_head} are the head, the last {num_tail} the tail."
    )
    tail_share = sum(counts[-num_tail:]) / max(1, sum(counts)) if num_tail else 0.0
    plot = report.figure(
        plots.rank_frequency(objects.names, counts, num_head, num_tail, alt),
        "How often objects are named",
        f"The tail, {num_tail} of {len(counts)} objects, has {100 * tail_share:.1f} % of all mentions.",
    )
    legend = [
        report.Pill("head: the most frequent 20 %", "head"),
        report.Pill("middle", "middle"),
        report.Pill("tail: the rarest 30 %", "tail"),
    ]
    facts = report.table(
        report.Table(
            "The corpus in numbers",
            ["", "value"],
            [
                *([f"samples, split “{split}”", f"{total['samples']:,}"] for split, total in totals.items()),
                ["held-out single pictures", f"{data.results['zeroshot']['hard']['dataset']['images']:,}"],
                ["distinct objects", f"{len(counts):,}"],
                ["objects a caption", f"{sum(counts) / max(1, objects.num_captions):.2f}"],
                ["pairs present of listed", f"{data.manifest.pairs_present:,} of {data.manifest.pairs_listed:,}"],
                ["size of all shards", f"{sum(total['bytes'] for total in totals.values()) / 1e6:,.1f} MB"],
            ],
        )
    )
    samples = _spread(data.first_samples, NUM_SAMPLES)
    return report.Section(
        "corpus",
        "What it learns from",
        [
            report.sample_cards([card(sample, objects) for sample in samples]),
            report.pill_legend(legend),
            report.subtitle("A long tail, as in captions from the web"),
            report.row(plot, facts),
        ],
        "Small scenes, drawn on the spot, with captions that leave objects out as real ones do. Below each caption "
        "stand the objects that the part-of-speech parser found in it; the labels are made from nothing else.",
        menu="Samples",
    )


def labels_section(data: DemoData) -> report.Section:
    """Pairs of samples and how much of one the other's caption is worth."""
    groups = [
        report.CardGroup(f"IoU {_fraction(*overlap)}", text, [card(sample, data.objects) for sample in pair])
        for overlap, text, pair in overlapping_pairs(data.first_samples)
    ]
    return report.Section(
        "labels",
        "What Object-IoU sees",
        [report.card_groups(groups)],
        "Hard labels call every other caption in the batch equally wrong. Object-IoU gives it a share of the label by "
        "the objects that both name: shared objects divided by all objects of the two.",
        menu="Labels",
    )


def training_section(data: DemoData) -> report.Section:
    """Curves of both arms."""
    ours, hard = ([data.curve(arm, name) for arm in ARMS] for name in ("kl", "zeroshot_top1"))
    chance = _required(data, "zeroshot", "top1", "hard")["chance"]
    recall = [data.curve(arm, "i2t_r5") for arm in ARMS]
    loss = report.figure(
        plots.curves(ours, "step", "KL (nats)", _curve_alt("KL divergence from the labels", ours)),
        "Training loss: KL from the labels",
        "The loss less its lowest possible value. The arms have different labels, so compare the shapes, not the heights.",
    )
    accuracy = report.figure(
        plots.curves(hard, "step", "top-1 (%)", _curve_alt("Zero-shot top-1 accuracy in percent", hard), chance),
        "Zero-shot accuracy on the way",
        "On the held-out single pictures, evaluated while training.",
    )
    recalled = report.figure(
        plots.curves(
            recall,
            "step",
            "R@5 (%)",
            _curve_alt("Recall at 5, picture to caption, in percent", recall),
            _required(data, "retrieval", "i2t_r5", "hard")["chance"],
        ),
        "Retrieval on the way",
        "Held-out pictures whose own caption is among the first five.",
    )
    has_recall = all(curve.xs for curve in recall)
    return report.Section(
        "training",
        "How it learns",
        [report.row(loss, accuracy, *([recalled] if has_recall else []))],
        "Both arms see the same samples in the same order from the same first weights.",
        menu="Training",
    )


def classes_section(data: DemoData) -> report.Section:
    """Head, middle and tail against chance."""
    groups = [g for g in GROUPS if all(data.metric("zeroshot", f"top1_{g}", arm) for arm in ARMS)]
    metrics = {arm: [_required(data, "zeroshot", f"top1_{group}", arm) for group in groups] for arm in ARMS}
    series = {
        _short(arm): [plots.Bar(m["value"], tuple(m["interval_95"]) if m["interval_95"] else None) for m in of_arm]
        for arm, of_arm in metrics.items()
    }
    chance = metrics["hard"][0]["chance"] if groups else None
    alt = "Zero-shot top-1 in percent by frequency of the object. " + "; ".join(
        f"{name}: " + ", ".join(f"{group} {bar.value:.1f}" for group, bar in zip(groups, bars, strict=True))
        for name, bars in series.items()
    )
    samples = [metric["samples"] for metric in metrics["hard"]]
    labels = [f"{group}\n{number:,} pictures" for group, number in zip(groups, samples, strict=True)]
    bars = report.figure(
        plots.grouped_bars(labels, series, "top-1 (%)", alt, chance),
        "Zero-shot accuracy by frequency",
        "Lines are 95 % intervals over pictures (Wilson).",
    )
    table = report.table(
        report.Table(
            "The same as numbers, in percent",
            ["objects", *(_short(arm) for arm in ARMS), "chance"],
            [
                [
                    group,
                    *(_with_interval(metrics[arm][number]) for arm in ARMS),
                    number_text(metrics["hard"][number]["chance"], "%"),
                ]
                for number, group in enumerate(groups)
            ],
        )
    )
    return report.Section(
        "tail",
        "Head, middle and tail",
        [report.row(bars, table)],
        "Objects are put in order by how many training captions name them: the head is the most frequent 20 %, the tail "
        "the rarest 30 %.",
        menu="Head to tail",
    )


def retrieval_section(data: DemoData) -> report.Section:
    """Queries with their best answers."""
    arm = next(iter(ARMS))
    gallery = data.gallery[arm]
    return report.Section(
        "retrieval",
        "Retrieval, to look at",
        [
            report.subtitle("Captions look for pictures"),
            report.gallery(list(text_queries(data, "chosen", NUM_QUERIES))),
            report.subtitle("Pictures look for captions"),
            report.gallery(list(picture_queries(data, "chosen", NUM_QUERIES))),
            *(
                [
                    report.subtitle("Where it is most wrong"),
                    report.gallery(
                        [
                            *text_queries(data, "worst", NUM_FAILURES),
                            *picture_queries(data, "worst", NUM_FAILURES),
                        ]
                    ),
                ]
                if gallery["t2i"]["worst"] or gallery["i2t"]["worst"]
                else []
            ),
        ],
        f"Held-out scenes, ranked by the model trained with {ARMS[arm]}. The queries are spread evenly over the data, "
        "not picked; the pair's own partner is marked. Another answer may fit as well and still counts as wrong.",
        menu="Retrieval",
    )


def text_queries(data: DemoData, which: str, number: int) -> Iterator[report.Query]:
    """Captions with the pictures found for them."""
    book = data.test_pictures
    for query, note in _queries(data, "t2i", which, number):
        answers = [
            report.Answer(
                answer["is_right"],
                answer["score"],
                book.picture(answer["key"], f"answer {place}, captioned: {book.caption(answer['key'])}"),
            )
            for place, answer in enumerate(query["answers"], 1)
        ]
        yield report.Query(f"“{query['query']['caption']}”", note, answers)


def picture_queries(data: DemoData, which: str, number: int) -> Iterator[report.Query]:
    """Pictures with the captions found for them."""
    for query, note in _queries(data, "i2t", which, number):
        caption = query["query"]["captions"][0]
        picture = data.test_pictures.picture(query["query"]["key"], f"query picture, captioned: {caption}")
        answers = [report.Answer(a["is_right"], a["score"], text=a["caption"]) for a in query["answers"]]
        yield report.Query("Best captions", note, answers, picture)


def _queries(data: DemoData, direction: str, which: str, number: int) -> Iterator[tuple[dict[str, Any], str]]:
    """Yields the first arm's queries with the rank of the right answer in it and, where known, in the others."""
    shown, *others = ARMS
    dataset = data.results["retrieval"][shown]["dataset"]
    total = dataset["images"] if direction == "t2i" else dataset["captions"]
    rank_of = {arm: {json.dumps(q["query"]): q["rank"] for q in data.gallery[arm][direction][which]} for arm in others}
    for query in _spread(data.gallery[shown][direction][which], number, first=which == "worst"):
        ranks = [
            f"{_short(arm)} {found:,}" for arm in others if (found := rank_of[arm].get(json.dumps(query["query"])))
        ]
        partner = "own picture" if direction == "t2i" else "own caption"
        yield query, f"{partner} at rank {query['rank']:,} of {total:,}" + (f" ({', '.join(ranks)})" if ranks else "")


def sets_section(data: DemoData) -> report.Section:
    """Slots on top of the first arm's model: recalls against its single vectors, and where slots look."""
    arm = next(iter(ARMS))
    single, sets, looked = data.results["retrieval"][arm], data.slots["retrieval"], data.slots["diagnostics"]["metrics"]
    rows = []
    for name in single["headline"]:
        if name not in sets["metrics"]:
            continue
        before, after = single["metrics"][name], sets["metrics"][name]
        chance = number_text(before["chance"], before["unit"])
        rows.append([metric_words(name, before["unit"]), _with_interval(before), _with_interval(after), chance])
    head = data.slots["diagnostics"]["details"]["head"]
    facts = [
        [
            "how far a picture's elements lie apart: log circular variance",
            _decimals(looked, "variance_image_log_of_mean"),
        ],
        ["the same of a caption's elements", _decimals(looked, "variance_text_log_of_mean")],
        ["attention that two slots of a picture share, %", _decimals(looked, "slots_image_overlap", 0)],
        ["words that two slots of a caption share, %", _decimals(looked, "slots_text_overlap", 0)],
    ]
    words = [
        [
            one["caption"],
            *(
                ", ".join(f"{word} {100 * share:.0f}\N{NO-BREAK SPACE}%" for word, share in of[:2])
                for of in one["elements"]
            ),
        ]
        for one in head["words"]
    ]
    blocks = [
        report.table(
            report.Table("Retrieval of held-out scenes, in percent", ["metric", "one vector", "a set", "chance"], rows)
        ),
        report.subtitle("Where slots look"),
        *(report.sample_cards([_look(card) for card in cards]) for cards in data.looks),
    ]
    if words:
        header = ["caption", *(f"slot {number}" for number in range(1, len(words[0])))]
        blocks += [
            report.subtitle("Which words slots take"),
            report.table(report.Table("Most taken", header, words, "wide-words")),
        ]
    blocks += [
        report.table(report.Table("Do the elements differ?", ["", "value"], facts)),
        report.paragraph(
            "A circular variance near 0, whose logarithm is very negative, means that all elements of a set are the same. "
            "python -m eval_suite.diagnostics shows more, and docs/finetuning.md tells how to train heads in earnest."
        ),
    ]
    number = len(head["elements"]["image"]["inputs_looked_at"])
    steps = sets["checkpoint"].get("step")
    return report.Section(
        "sets",
        "Sets of vectors, to look at",
        blocks,
        f"A picture of many things fits many captions, and one vector must stand for all. Here {number} slots compete for the "
        f"patches of a picture and for the words of a caption (DivE), on the frozen model trained with {ARMS[arm]}. They "
        f"learned for {steps:,} steps only: this shows how sets are made and compared, not what they are worth. "
        f"{_ahead(single, sets)}",
        menu="Sets",
    )


def _ahead(single: Mapping[str, Any], sets: Mapping[str, Any]) -> str:
    before, after = (results["metrics"]["rsum"] for results in (single, sets))
    first, second = before["interval_95"], after["interval_95"]
    if first[0] <= second[1] and second[0] <= first[1]:
        return "By RSUM the two cannot be told apart here."
    return f"By RSUM {'sets' if after['value'] > before['value'] else 'single vectors'} are ahead here."


def _look(card: Mapping[str, str]) -> report.SampleCard:
    return report.SampleCard(report.Picture(card["src"], card["alt"]), card["caption"], [], note=card["note"])


def _decimals(metrics: Mapping[str, Any], name: str, digits: int = 2) -> str:
    return f"{metrics[name]['value']:.{digits}f}" if name in metrics else "–"


def results_section(data: DemoData) -> report.Section:
    """All numbers with intervals and counts."""
    blocks = []
    for evaluation, title in (("zeroshot", "Zero-shot classification"), ("retrieval", "Retrieval")):
        by_arm = data.results[evaluation]
        dataset = by_arm["hard"]["dataset"]
        counts = ", ".join(f"{dataset[name]:,} {name}" for name in ("images", "captions", "classes") if name in dataset)
        rows = []
        for name in by_arm["hard"]["headline"]:
            metrics = [data.metric(evaluation, name, arm) for arm in ARMS]
            if None in metrics:
                continue
            found = [metric for metric in metrics if metric]
            chance, unit = number_text(found[0]["chance"], found[0]["unit"]), found[0]["unit"]
            rows.append([metric_words(name, unit), *map(_with_interval, found), chance, f"{found[0]['samples']:,}"])
        header = ["metric", *(_short(arm) for arm in ARMS), "chance", "samples"]
        blocks.append(report.table(report.Table(f"{title} ({counts})", header, rows)))
    return report.Section(
        "results",
        "Results with 95 % intervals",
        blocks,
        "From the results files of the evaluation commands, which hold each number's protocol too. Ties count against "
        "the model in retrieval.",
        menu="Results",
    )


def making_section(data: DemoData) -> report.Section:
    """Timings, commands, and what it was made with."""
    config, steps = data.record.config, data.record.steps
    size = config["size"]
    checkpoint = data.results["zeroshot"]["hard"]["checkpoint"]
    provenance = data.record.provenance
    rates = {
        arm: [entry["samples_per_second"] for entry in data.metrics[arm] if "samples_per_second" in entry]
        for arm in ARMS
    }
    speed = ", ".join(f"{_short(a)} {sorted(r)[len(r) // 2]:,.0f} samples/s" for a, r in rates.items() if r)
    settings = [
        ["scenes", f"{size['scenes']:,} for training, {size['test_scenes']:,} held out, {size['nouns']:,} nouns"],
        ["training", f"{config['steps']:,} steps of {size['global_batch_size']:,} pairs, seed {config['seed']}"],
        ["model", str(checkpoint.get("model", "–"))],
        *([f"labels, {_short(arm)}", _loss_text(data, arm)] for arm in ARMS),
        ["median training speed", speed or "–"],
        ["parser", data.manifest.parsers.get(PARSER, "–")],
        ["commit", str(provenance.get("commit") or "not in a git checkout")],
        ["versions", ", ".join(f"{k} {v}" for k, v in provenance.get("versions", {}).items())],
    ]
    total = duration(sum(step.seconds for step in steps))
    return report.Section(
        "making",
        "How this was made",
        [
            report.subtitle(f"Time: {total}"),
            report.timings([(_capital(step.title), step.seconds, duration(step.seconds)) for step in steps]),
            report.subtitle("Commands"),
            report.commands([line for step in steps for line in step.commands]),
            report.subtitle("Settings"),
            report.table(report.Table("Configuration and versions", ["", "value"], settings, "words")),
        ],
        "The demo runs the commands of the stages, nothing else, so each line can be typed by itself.",
        menu="Commands",
    )


def credits(data: DemoData) -> list[str | Markup]:
    """Whose pictures these are, and under which licence."""
    name, url = _LICENCE
    return [
        *(
            Markup("{}{}{}").format(*_around(credit, name, report.link(url, name))) if name in credit else credit
            for credit in data.manifest.credits
        ),
        "Changes: cut to their outlines, resized, and pasted onto drawn grounds.",
        "This file loads nothing from anywhere; it can be kept and sent as it is.",
    ]


def card(sample: Sample, objects: ObjectTable) -> report.SampleCard:
    """A sample with its first caption's objects."""
    names = sample.objects.get(PARSER, [[]])[0]
    picture = report.picture(sample.image, sample.image_ext, f"scene captioned: {sample.captions[0]}")
    return report.SampleCard(picture, sample.captions[0], [report.Pill(n, objects.group_of(n)) for n in names])


def overlapping_pairs(samples: Sequence[Sample]) -> list[tuple[tuple[int, int], str, tuple[Sample, Sample]]]:
    """Returns ((shared, all), a sentence, the pair) for the first pairs whose objects overlap wholly, half and by a third."""
    wanted = {
        (2, 2): "The same objects in other words: the largest share.",
        (1, 2): "One caption names one object more.",
        (1, 3): "One object of three is shared.",
    }
    found: dict[tuple[int, int], tuple[Sample, Sample]] = {}
    for first, second in combinations(samples, 2):
        a, b = (set(sample.objects.get(PARSER, [[]])[0]) for sample in (first, second))
        overlap = (len(a & b), len(a | b))
        if {first.key, second.key} & {sample.key for pair in found.values() for sample in pair}:
            continue
        if overlap in wanted and overlap not in found and first.captions[0] != second.captions[0]:
            found[overlap] = (first, second)
            if len(found) == len(wanted):
                break
    return [(overlap, text, found[overlap]) for overlap, text in wanted.items() if overlap in found]


def _spread(items: Sequence[Any], number: int, first: bool = False) -> list[Any]:
    """Returns `number` items spread evenly over all, or the first ones."""
    if first or len(items) <= number:
        return list(items[:number])
    return [items[row * len(items) // number] for row in range(number)]


def _required(data: DemoData, evaluation: str, name: str, arm: str) -> dict[str, Any]:
    metric = data.metric(evaluation, name, arm)
    if metric is None:
        raise InputError(
            f"{data.folder.results(evaluation, arm)}: expected the metric {name}, found "
            f"{', '.join(data.results[evaluation][arm]['metrics'])}; evaluate again"
        )
    return metric


def _loss_text(data: DemoData, arm: str) -> str:
    loss = data.results["zeroshot"][arm]["checkpoint"].get("loss") or {"name": arm}
    if loss["name"] != "object_iou":
        return str(loss["name"])
    return f"object_iou, target {loss.get('target')}, β {loss.get('beta')}"


def _curve_alt(what: str, lines: Sequence[plots.Curve]) -> str:
    ends = [f"{c.name} from {c.ys[0]:.2f} to {c.ys[-1]:.2f} at step {c.xs[-1]:,}" for c in lines if c.xs]
    return f"{what} over training steps: {'; '.join(ends)}"


def _short(arm: str) -> str:
    return {"object_iou": "Object-IoU", "hard": "hard labels"}.get(arm, arm)


def _fraction(shared: int, total: int) -> str:
    return "1" if shared == total else f"{shared}/{total}"


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _percent(value: float) -> str:
    return f"{number_text(value, '%')}\N{NO-BREAK SPACE}%"


def _interval(metric: Mapping[str, Any]) -> str:
    low, high = metric["interval_95"] or (metric["value"],) * 2
    return interval_text((low, high), metric["unit"], " to ")


def _with_interval(metric: Mapping[str, Any]) -> str:
    return with_interval(metric["value"], metric["unit"], metric["interval_95"])


def _around(text: str, part: str, replacement: Markup) -> tuple[str, Markup, str]:
    before, _, after = text.partition(part)
    return before, replacement, after


def _read_json(path: Path) -> Any:
    if not path.exists():
        raise InputError(f"expected {path}, found none; the demo has not come so far, start it again")
    return json.loads(path.read_text(encoding="utf-8"))


def _read_lines(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        raise InputError(f"expected {path}, found none; the demo has not come so far, start it again")
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def main() -> None:
    """The command."""
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        say((__doc__ or "").strip())
        raise SystemExit(0 if sys.argv[1:] in (["-h"], ["--help"]) else 2)
    say(f"report: {write_report(Path(sys.argv[1]))}")


if __name__ == "__main__":
    command(main)
