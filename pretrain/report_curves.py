"""The figures of a run report: curves over steps, of one run or of several on top of each other. Used by
pretrain.report.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from pretrain.report_runs import Run
from setclip import plots, report
from setclip.plots import Timeline

MOST_POINTS = 240
"""Of a line; more are averaged, and their span is shaded."""


@dataclass(frozen=True)
class Measure:
    """A figure of metrics.jsonl as a line."""

    key: str
    words: str
    tone: str = ""
    """Of `plots.Timeline`; by default in turn."""


@dataclass(frozen=True)
class Chart:
    """Measures that belong together; of several runs each has a figure of its own."""

    title: str
    measures: Sequence[Measure]
    y_label: str
    text: str
    factor: float = 1.0
    log_y: bool = False
    from_zero: bool = False
    marks: bool = False
    """Whether restarts and skipped steps are shown."""
    cap: str = ""
    """Setting whose value is drawn as a level."""


TRAINING = (
    Chart(
        "Loss",
        (Measure("loss", "loss"),),
        "nats",
        "Mean over the steps between two lines. Soft labels have a loss that cannot become 0; compare runs by KL.",
        marks=True,
    ),
    Chart(
        "KL from the labels",
        (Measure("kl", "KL"),),
        "nats",
        "The loss less the lowest that its labels allow. It falls fast at first, and then slowly to the end.",
    ),
    Chart(
        "Logit scale",
        (Measure("logit_scale", "logit scale"),),
        "scale",
        "1 / temperature. It rises as the features become better, and may reach its cap late.",
        cap="optim.max_logit_scale",
    ),
    Chart("Logit bias", (Measure("logit_bias", "logit bias"),), "bias", "Of siglip: the bias of all logits."),
    Chart(
        "Learning rate",
        (Measure("lr", "learning rate"),),
        "learning rate",
        "By samples seen: warm-up, then the schedule to its end.",
        from_zero=True,
    ),
    Chart(
        "Gradient norm",
        (Measure("grad_norm", "gradient norm"),),
        "L2 norm",
        "Before clipping, logarithmic. A peak is a batch out of the ordinary; a steady rise comes before a run that "
        "diverges.",
        log_y=True,
    ),
    Chart(
        "False negatives",
        (Measure("similar_pairs", "IoU ≥ 1/2"), Measure("equal_pairs", "equal objects")),
        "% of other pairs",
        "Pairs of different samples whose objects agree: a hard loss takes them for wrong. A matter of the data, so "
        "flat.",
        factor=100,
        from_zero=True,
    ),
    Chart(
        "What the labels leave on the true pair",
        (Measure("true_pair_mass", "true pair"),),
        "% of the label",
        "100 % is the hard label of CLIP; the rest goes to pairs that share objects.",
        factor=100,
    ),
    Chart(
        "Where the texts are from",
        (
            Measure("text_caption", "captions"),
            Measure("text_prompt", "prompts"),
            Measure("text_description", "descriptions"),
            Measure("text_fallback", "fallen back"),
        ),
        "% of texts",
        "Shares of the texts trained on; “fallen back” are captions where no prompt or description could be made.",
        factor=100,
        from_zero=True,
    ),
)

SPEED = (
    Chart(
        "Samples a second",
        (Measure("samples_per_second", "samples/s"),),
        "samples/s",
        "Over all ranks, without the time of evaluations and checkpoints.",
        from_zero=True,
        marks=True,
    ),
    Chart(
        "Waiting for data",
        (Measure("data_wait_share", "data wait"),),
        "% of the time",
        "Of the rank that waits most. Above a few percent the processors are idle for want of pictures.",
        factor=100,
        from_zero=True,
    ),
    Chart(
        "MFU",
        (Measure("mfu", "MFU"),),
        "% of the peak",
        "FLOPs that the model needs by its definition, of what the device could compute at its peak.",
        factor=100,
        from_zero=True,
    ),
    Chart(
        "Memory",
        (
            Measure("gpu_memory_bytes", "GPU, at most"),
            Measure("cpu_memory_bytes", "process"),
            Measure("loader_memory_bytes", "its loaders"),
        ),
        "GB",
        "Of the rank that has most. Of main memory, without the pages of shards, which the system takes back.",
        factor=1e-9,
        from_zero=True,
    ),
)

EVALUATION = (
    Chart(
        "Zero-shot accuracy",
        (
            Measure("zeroshot_top1", "all", "series-1"),
            Measure("zeroshot_top1_head", "head", "head"),
            Measure("zeroshot_top1_middle", "middle", "soft"),
            Measure("zeroshot_top1_tail", "tail", "tail"),
            Measure("zeroshot_top1_unseen", "unseen", "series-2"),
        ),
        "top-1 (%)",
        "By how many training captions name the class: the most frequent 20 %, the middle, the rarest 30 %.",
        from_zero=True,
    ),
    *(
        Chart(
            f"Recall at {k}",
            (Measure(f"i2t_r{k}", "picture → caption"), Measure(f"t2i_r{k}", "caption → picture")),
            f"R@{k} (%)",
            f"Share of the queries whose right answer is {'the first' if k == 1 else f'among the first {k}'}.",
            from_zero=True,
        )
        for k in (1, 5)
    ),
)


def figures(charts: Sequence[Chart], runs: Sequence[Run]) -> list[Markup]:
    """Returns the figures of all charts that some run has values for."""
    return [figure for chart in charts for figure in _figures(chart, runs)]


def _figures(chart: Chart, runs: Sequence[Run]) -> list[Markup]:
    there = [m for m in chart.measures if any(run.values(m.key) for run in runs)]
    if not there:
        return []
    if len(runs) == 1:
        lines = [_line(chart, m, runs[0], m.words, m.tone or f"series-{n}") for n, m in enumerate(there, 1)]
        return [_figure(chart, chart.title, lines, runs)]
    found = []
    for measure in there:
        numbered = [(number, run) for number, run in enumerate(runs, 1) if run.values(measure.key)]
        lines = [_line(chart, measure, run, run.name, f"series-{number}") for number, run in numbered]
        title = chart.title if len(chart.measures) == 1 else f"{chart.title}: {measure.words}"
        found.append(_figure(chart, title, lines, runs))
    return found


def _figure(chart: Chart, title: str, lines: Sequence[Timeline], runs: Sequence[Run]) -> Markup:
    caps = {run.settings.get(chart.cap) for run in runs} if chart.cap else set()
    cap = caps.pop() if len(caps) == 1 else None
    highest = max(max(line.ys) for line in lines)
    level = ("cap", float(cap)) if isinstance(cap, int | float) and highest > cap / 2 else None
    drawn = plots.timelines(
        lines,
        chart.y_label,
        _alt(title, chart.y_label, lines),
        chart.log_y and all(min(line.ys if line.lows is None else line.lows) > 0 for line in lines),
        chart.from_zero,
        level,
        _marks(runs[0]) if chart.marks and len(runs) == 1 else None,
    )
    return report.figure(drawn, title, chart.text)


def _line(chart: Chart, measure: Measure, run: Run, name: str, tone: str) -> Timeline:
    points = [(step, value * chart.factor) for step, value in run.values(measure.key)]
    if len(points) <= MOST_POINTS:
        return Timeline(name, [x for x, _ in points], [y for _, y in points], tone=tone)
    ends = [len(points) * part // MOST_POINTS for part in range(MOST_POINTS + 1)]
    parts = [points[start:end] for start, end in itertools.pairwise(ends)]
    ys = [[y for _, y in part] for part in parts]
    return Timeline(
        name,
        [part[-1][0] for part in parts],
        [sum(of_part) / len(of_part) for of_part in ys],
        [min(of_part) for of_part in ys],
        [max(of_part) for of_part in ys],
        tone,
    )


def _marks(run: Run) -> dict[str, list[float]]:
    """Returns where the run was started again and where it skipped steps; a mark a step, of the first hundred."""
    found = {
        "started again": sorted({float(session.step) for session in run.sessions if session.step})[:100],
        "skipped step": sorted({float(entry["step"]) for entry in run.bad_steps})[:100],
    }
    return {name: steps for name, steps in found.items() if steps}


def _alt(title: str, unit: str, lines: Sequence[Timeline]) -> str:
    told = [f"{line.name} from {line.ys[0]:.4g} to {line.ys[-1]:.4g} at step {line.xs[-1]:,}" for line in lines]
    return f"{title} ({unit}) over steps: {'; '.join(told)}"
