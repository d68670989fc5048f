"""What a page says: gathered from finished units into one JSON file, of which alone the Markdown is made.

    content = gather("sets", experiment, units, command)
    text = markdown(content)

A row has the seeds that are there, and says how many; what is compared are the seeds that both rows have.
"""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from benchmarks.claims.choice import choose
from benchmarks.claims.experiment import Claim, Experiment, Plot, Row, Unit
from benchmarks.claims.identity import flat
from benchmarks.claims.judge import Paired, holds_chance, holm, paired, verdict
from benchmarks.claims.units import candidates_of

FORMAT_VERSION = 1


def gather(
    name: str, experiment: Experiment, units: Sequence[Unit], prepared: Mapping[str, Any], command: str
) -> dict[str, Any]:
    """Returns all that a page needs, as JSON.

    `units`: those that are finished (`benchmarks.claims.units.read_units`); `prepared`: what preparing took.
    """
    tried = {arm: _tried(experiment, units, arm) for arm in experiment.arms}
    chosen = {arm: _chosen(experiment, tried[arm]) for arm in experiment.arms}
    rows = {name: _row(experiment, units, row, chosen) for name, row in experiment.rows.items()}
    chance: dict[str, float] = {}
    for unit in units:
        chance |= unit["chance"]
    used = [unit for unit in units if unit["arm"] in experiment.arms]
    of_chosen = [unit for unit in used if chosen[unit["arm"]] == (unit["candidate"],)]
    drawn = _bars(experiment, rows) if experiment.plot is None else experiment.plot(of_chosen)
    return {
        "format_version": FORMAT_VERSION,
        "name": name,
        "title": experiment.title,
        "question": experiment.question,
        "about": dict(experiment.about),
        "limits": list(experiment.limits),
        "command": command,
        "commits": sorted({unit["provenance"]["commit"] or "unknown" for unit in used}),
        "uncommitted_runs": sum((unit["provenance"]["commit"] or "").endswith("+changes") for unit in used),
        "shards": used[0]["made_with"].get("shards", {}) if used else {},
        "history": list(experiment.history),
        "seeds_asked": experiment.seeds,
        "measures": {measure: asdict(each) for measure, each in experiment.measures.items()},
        "rows": rows,
        "chance": {measure: chance[measure] for measure in experiment.measures if measure in chance},
        "claims": _claims(experiment.claims, rows, chance),
        "chosen_by": experiment.chosen_by,
        "default": None if experiment.default is None else choose(experiment.default, rows),
        "tried": {arm: each for arm, each in tried.items() if len(experiment.arms[arm].candidates) > 1},
        "tables": [asdict(table) for table in experiment.tables(of_chosen)],
        "plot": None if drawn is None else asdict(drawn),
        "time": _time(used, prepared),
    }


def _tried(experiment: Experiment, units: Sequence[Unit], arm: str) -> list[dict[str, Any]]:
    """Returns what was tried of an arm with the first seed."""
    found = []
    for number, settings in candidates_of(experiment.arms[arm]):
        unit = _unit(units, arm, number, 0)
        held_out = None if unit is None else unit["held_out"].get(experiment.chosen_by)
        found.append({"candidate": number, "settings": settings, "held_out": held_out, "is_done": unit is not None})
    return found


def _chosen(experiment: Experiment, tried: Sequence[Mapping[str, Any]]) -> tuple[int | None] | None:
    """Returns (the candidate that held-out data chose,); None where not all were tried yet."""
    if any(not each["is_done"] for each in tried):
        return None
    if len(tried) == 1:
        return (tried[0]["candidate"],)
    best = max(each["held_out"] for each in tried)
    return (next(each["candidate"] for each in tried if each["held_out"] == best),)


def _row(
    experiment: Experiment, units: Sequence[Unit], row: Row, chosen: Mapping[str, tuple[int | None] | None]
) -> dict[str, Any]:
    arm = experiment.arms[row.arm]
    arms = [row.arm] if row.minus is None else [row.arm, row.minus]
    sides = [_seeds_of(units, name, chosen[name]) for name in arms]
    own = [unit for seed, unit in sides[0].items() if all(seed in side for side in sides)]
    alone = own if row.minus is None else []  # what is told of runs, not of differences
    measures: dict[str, Any] = {}
    for measure in experiment.measures:
        name = row.prefix + measure
        found = _measured(sides, "values", name)
        if found is not None:
            intervals = [unit["intervals"].get(name) for unit in alone if unit["seed"] in found["seeds"]]
            measures[measure] = {**found, "intervals_over_queries": intervals}
    return {
        "arm": row.arm,
        "minus": row.minus,
        "what": arm.what if row.minus is None else f"*{row.arm}* less *{row.minus}*, seed by seed",
        "is_fixed": arm.is_fixed,
        "settings": alone[0]["settings"] if alone else None,
        "seeds": [unit["seed"] for unit in own],
        "measures": measures,
        "held_out": _measured(sides, "held_out", row.prefix + experiment.chosen_by),
        "steps": alone[0]["steps"] if alone else None,
        "seconds": [unit["seconds"] for unit in alone],
        "cpu_seconds": [unit["cpu_seconds"] for unit in alone],
    }


def _measured(sides: Sequence[Mapping[int, Unit]], kind: str, name: str) -> dict[str, Any] | None:
    """Returns a value of an arm, or of two arms the first's less the second's, by the seeds that have it; None: none has."""
    found = [{seed: u[kind][name] for seed, u in side.items() if u[kind].get(name) is not None} for side in sides]
    seeds = [seed for seed in found[0] if all(seed in each for each in found)]
    if not seeds:
        return None
    parts = [[each[seed] for seed in seeds] for each in found]
    values = parts[0] if len(parts) == 1 else [first - second for first, second in zip(*parts, strict=True)]
    deviation = statistics.stdev(values) if len(values) > 1 else None
    return {
        "values": values,
        "mean": statistics.fmean(values),
        "deviation": deviation,
        "seeds": seeds,
        "parts": parts if len(parts) > 1 else [],
    }


def _seeds_of(units: Sequence[Unit], arm: str, chosen: tuple[int | None] | None) -> dict[int, Unit]:
    """Returns seed to unit of an arm with what was chosen of it, in order."""
    own = [] if chosen is None else [u for u in units if u["arm"] == arm and u["candidate"] == chosen[0]]
    return {unit["seed"]: unit for unit in sorted(own, key=lambda unit: unit["seed"])}


def _bars(experiment: Experiment, rows: Mapping[str, Any]) -> Plot | None:
    """Returns the measure that chooses, of each row that has it."""
    name = experiment.chosen_by
    if name not in experiment.measures:
        return None
    heading = experiment.measures[name].heading
    found = {row: each["measures"][name] for row, each in rows.items() if name in each["measures"]}
    if not found:
        return None
    return Plot(
        title=f"{heading}, mean ± standard deviation over seeds",
        x_label="",
        y_label=heading,
        series={
            _with_seeds(row, rows[row], len(each["seeds"]), experiment.seeds): [
                [0.0, each["mean"], each["deviation"] or 0.0]
            ]
            for row, each in found.items()
        },
        is_bars=True,
    )


def _with_seeds(name: str, row: Mapping[str, Any], seeds: int, asked: int) -> str:
    """Returns a row's name, with its seeds where it has fewer than the others will have: a point that may lie far off."""
    return name if row["is_fixed"] or seeds >= asked else f"{name} ({seeds} seed{'s' if seeds > 1 else ''})"


def _unit(units: Sequence[Unit], arm: str, candidate: int | None, seed: int) -> Unit | None:
    return next((u for u in units if (u["arm"], u["candidate"], u["seed"]) == (arm, candidate, seed)), None)


# --- claims


@dataclass(frozen=True, kw_only=True)
class _Compared:
    """The seeds of a claim."""

    seeds: int
    missing: int
    """Seeds that were run of which a row has no value"""
    paired: Paired | None
    is_chance: bool


def _claims(claims: Sequence[Claim], rows: Mapping[str, Any], chance: Mapping[str, float]) -> list[dict[str, Any]]:
    compared = [_compared(claim, rows, chance.get(claim.measure)) for claim in claims]
    p_values = [_p_value(claim, each) for claim, each in zip(claims, compared, strict=True)]
    adjusted = holm([None if claim.post_hoc else p for claim, p in zip(claims, p_values, strict=True)])
    found = []
    for claim, each, p_value, p_holm in zip(claims, compared, p_values, adjusted, strict=True):
        result = each.paired
        is_one_arm = all(rows[claim.better][side] == rows[claim.worse][side] for side in ("arm", "minus"))
        judged: dict[str, Any] = {"verdict": "inconclusive", "difference": None, "deviation": None, "interval_95": None}
        if result is not None:
            judged = {
                "verdict": verdict(
                    result, claim.kind, claim.margin, p_holm, is_chance=each.is_chance, is_one_arm=is_one_arm
                ),
                "difference": result.mean,
                "deviation": result.deviation,
                "interval_95": result.interval_95,
            }
        judged |= {"p_value": p_value, "p_value_holm": p_holm, "why": _why(claim, each, is_one_arm)}
        found.append({**asdict(claim), "seeds": each.seeds, **judged})
    return found


def _p_value(claim: Claim, compared: _Compared) -> float | None:
    """Returns the p value of a difference; None of a claim that there is none, which the test cannot show."""
    return None if claim.kind == "equal" or compared.paired is None else compared.paired.p_value


def _compared(claim: Claim, rows: Mapping[str, Any], chance: float | None) -> _Compared:
    sides = [rows[claim.better], rows[claim.worse]]
    drawn = [set(row["seeds"]) for row in sides if not row["is_fixed"]] or [set(row["seeds"]) for row in sides]
    run = sorted(set.intersection(*drawn)) if all(row["seeds"] for row in sides) else []
    values = [_by_seed(row, claim.measure, run) for row in sides]
    seeds = [seed for seed in run if all(seed in each for each in values)]
    if not seeds:
        return _Compared(seeds=0, missing=len(run), paired=None, is_chance=False)
    first, second = ([each[seed][0] for seed in seeds] for each in values)
    # of a difference, chance is asked of what it is made of
    asked = [[each[seed][part] for seed in seeds] for each in values for part in _asked(each[seeds[0]])]
    return _Compared(
        seeds=len(seeds),
        missing=len(run) - len(seeds),
        paired=paired(first, second),
        is_chance=any(holds_chance(each, chance) for each in asked),
    )


def _by_seed(row: Mapping[str, Any], measure: str, run: Sequence[int]) -> dict[int, list[float]]:
    """Returns seed to [value, *values of its parts]; a fixed row has the same with every seed."""
    measured = row["measures"].get(measure)
    if measured is None:
        return {}
    lines = [list(line) for line in zip(measured["values"], *measured["parts"], strict=True)]
    return dict.fromkeys(run, lines[0]) if row["is_fixed"] else dict(zip(measured["seeds"], lines, strict=True))


def _asked(line: Sequence[float]) -> range:
    return range(1, len(line)) if len(line) > 1 else range(1)


def _why(claim: Claim, compared: _Compared, is_one_arm: bool) -> str:
    found = compared.paired
    said = []
    if found is None and not compared.missing:
        said.append("not run yet")
    elif compared.is_chance:
        said.append("an arm's interval holds chance")
    elif found is not None and found.interval_95 is None:
        said.append("one seed")
    elif found is not None and found.deviation == 0 and not is_one_arm:
        said.append("the same difference with every seed")
    if compared.missing:
        said.append(f"no value on {compared.missing} seed{'s' if compared.missing > 1 else ''}")
    if claim.post_hoc:
        said.append("post hoc, not adjusted")
    return "; ".join(said)


# --- what it took


def _time(used: Sequence[Unit], prepared: Mapping[str, Any]) -> dict[str, Any]:
    cpu = [unit["cpu_seconds"] for unit in used]
    return {
        "runs": len(used),
        "prepare_cpu_seconds": prepared.get("cpu_seconds"),
        "cpu_seconds": sum(cpu),
        "cpu_seconds_a_run": [min(cpu), statistics.median(cpu), max(cpu)] if cpu else None,
        "seconds_a_run": [function([unit["seconds"] for unit in used]) for function in (min, statistics.median, max)]
        if used
        else None,
    }


# --- Markdown


def markdown(content: Mapping[str, Any], figure: str | None = None) -> str:
    """Returns the page. `figure`: name of the SVG beside it."""
    parts = [f"# {content['title']}", content["question"]]
    commits = ", ".join(f"`{c[:7]}{c[40:]}`" if len(c) >= 40 else c for c in content["commits"]) or "unknown"
    made = f"Made by `{content['command']}` at commit {commits}"
    made += f"; the figures are in [{content['name']}.json]({content['name']}.json)."
    if content.get("runs_file") is not None:
        made += (
            f" Every run by itself is in [{content['runs_file']}]({content['runs_file']}), from which the command goes on "
            "with `--take-runs`."
        )
    if content["uncommitted_runs"]:
        made += (
            f" {content['uncommitted_runs']} of {content['time']['runs']} runs were made with changes that were not "
            "committed (`+changes`), so the commit alone may not make them again."
        )
    parts.append(made)
    about = {**content["about"], **({"Shards": _shards_text(content["shards"])} if content["shards"] else {})}
    parts.append("\n".join(f"- **{heading}**: {text}" for heading, text in about.items()))
    parts.append("## The claims\n\n" + _claims_text(content))
    parts.append("## The figures\n\n" + _figures_text(content))
    if figure is not None:
        parts.append(f"![{content['plot']['title']}]({figure})\n\n{content['plot']['title']}.")
    parts += [f"## {t['title']}\n\n{t['text']}\n\n{_table(t['header'], t['rows'])}" for t in content["tables"]]
    if content["default"] is not None:
        parts.append("## The default\n\n" + _default_text(content))
    if content["tried"]:
        parts.append("## What was tried\n\n" + _tried_text(content))
    parts.append("## What this does not say\n\n" + "\n".join(f"- {limit}" for limit in content["limits"]))
    history = "".join(f"\n\n{each}" for each in content["history"])
    parts.append("## What it took\n\n" + _time_text(content["time"]) + history)
    return "\n\n".join(parts) + "\n"


def _shards_text(shards: Mapping[str, Any]) -> str:
    """Says what was there when the runs were made."""
    return "; ".join(
        f"{name}: " + ", ".join(f"{count:,} of {split}" for split, count in each["samples"].items())
        for name, each in shards.items()
    )


def _claims_text(content: Mapping[str, Any]) -> str:
    rows = []
    for claim in content["claims"]:
        digits = content["measures"][claim["measure"]]["digits"]
        difference, interval = "–", "–"
        if claim["difference"] is not None:
            difference = f"{claim['difference']:+.{digits}f}"
        if claim["interval_95"] is not None:
            interval = " to ".join(f"{bound:+.{digits}f}" for bound in claim["interval_95"])
        judged = f"**{claim['verdict']}**" + (f" ({claim['why']})" if claim["why"] else "")
        p = " / ".join("–" if claim[n] is None else f"{claim[n]:.2g}" for n in ("p_value", "p_value_holm"))
        heading = content["measures"][claim["measure"]]["heading"]
        rows.append(
            [claim["text"], claim["source"], f"{heading}: {difference}", interval, p, str(claim["seeds"]), judged]
        )
    table = _table(["claim", "source", "difference", "95 % interval", "p / adjusted", "seeds", "here"], rows)
    margins = {content["measures"][claim["measure"]]["heading"]: claim["margin"] for claim in content["claims"]}
    margin_text = ", ".join(f"{margin:g} ({heading})" for heading, margin in margins.items())
    margin_text += ", set before the runs"
    post_hoc = ""
    if any(claim["post_hoc"] for claim in content["claims"]):
        margin_text += " of all claims but those marked post hoc"
        post_hoc = (
            " *Post hoc*: asked after figures had been seen, so a hint, and not one of those that p is adjusted for."
        )
    return (
        f"{table}\n\nDifferences are taken seed by seed; interval and p are of a paired t test over seeds, and the "
        "adjusted p is for the number of claims that have one (Holm). *Holds here*: the interval lies on the claim's side of "
        "0, and the adjusted p is below 0.05; where it is not, *holds, but not after adjusting*. *Contradicted*: the same on the "
        "other side. *Less than would matter*: the interval leaves out 0, and lies within what would matter, "
        f"{margin_text}. *No difference seen*: it holds 0 and lies within that. A claim that two are equal *holds here* "
        f"where the interval lies within what would matter, and has no p value: the test is of a difference.{post_hoc} "
        "*Inconclusive*: anything else, and where chance explains an arm. With few seeds intervals are wide."
    )


def _figures_text(content: Mapping[str, Any]) -> str:
    measures = content["measures"]
    there = [name for name in measures if any(name in row["measures"] for row in content["rows"].values())]
    rows = []
    for name, row in content["rows"].items():
        count = len(row["seeds"])
        cells = [_mean_text(row["measures"].get(measure), measures[measure]["digits"], count) for measure in there]
        seeds = "fixed" if row["is_fixed"] else str(count)
        rows.append([name, seeds, *cells, _mean_text(row["held_out"], 1, count)])
    if content["chance"]:
        levels = [f"{content['chance'][measure]:.2g}" if measure in content["chance"] else "" for measure in there]
        rows.append(["chance", "", *levels, ""])
    header = ["arm", "seeds", *(measures[name]["heading"] for name in there), f"held-out {_chosen_by(content)}"]
    table = _table(header, rows)
    whats = "\n".join(
        f"- {name}: " + "; ".join(filter(None, [row["what"], _settings_text(row["settings"] or {}), _steps_text(row)]))
        for name, row in content["rows"].items()
    )
    asked = content["seeds_asked"]
    short = [n for n, row in content["rows"].items() if not row["is_fixed"] and len(row["seeds"]) < asked]
    note = f"\n\nNot all of the {asked} seeds are there yet for: {', '.join(short)}." if short else ""
    if any(len(row["seeds"]) > asked for row in content["rows"].values()):
        note += (
            f"\n\n{asked} seeds were set before the runs, and there are more: if they were added because of what the first had "
            "shown, p values are too small."
        )
    return f"Mean ± sample standard deviation over seeds.{_queries_text(content)}\n\n{table}{note}\n\n{whats}"


def _queries_text(content: Mapping[str, Any]) -> str:
    """Says how far another draw of queries moves a figure, which seeds do not tell."""
    said = []
    for measure in dict.fromkeys(claim["measure"] for claim in content["claims"]):
        found = [row["measures"].get(measure, {}).get("intervals_over_queries", []) for row in content["rows"].values()]
        halves = [(each[1] - each[0]) / 2 for intervals in found for each in intervals if each is not None]
        if halves:
            heading, digits = content["measures"][measure]["heading"], content["measures"][measure]["digits"]
            said.append(f"{heading} by ± {statistics.median(halves):.{digits}f}")
    if not said:
        return ""
    return f" Another draw of as many queries would move one run's {', '.join(said)} (95 %; the median over runs)."


def _mean_text(measured: Mapping[str, Any] | None, digits: int, seeds: int) -> str:
    """Says how many of the seeds have a value where not all have."""
    if measured is None:
        return ""
    spread = "" if measured["deviation"] is None else f" ± {measured['deviation']:.{digits}f}"
    there = len(measured["values"])
    return f"{measured['mean']:.{digits}f}{spread}" + (f" ({there} of {seeds})" if there < seeds else "")


def _default_text(content: Mapping[str, Any]) -> str:
    default = content["default"]
    told = (
        f"Held-out figures choose {default['what']}: *{default['row']}* is the default, and stays it unless the held-out "
        f"{_chosen_by(content)} of another is above it with an adjusted p below 0.05 (a paired t test over seeds, adjusted "
        "for as many comparisons as there are, without a margin)."
    )
    rows = []
    for each in default["compared"]:
        interval = "–" if each["interval_95"] is None else " to ".join(f"{bound:+.1f}" for bound in each["interval_95"])
        p = " / ".join("–" if each[n] is None else f"{each[n]:.2g}" for n in ("p_value", "p_value_holm"))
        rows.append([each["row"], f"{each['mean']:+.1f}", interval, p, str(each["count"])])
    if not rows:
        return f"{told} Not run yet."
    table = _table(["instead", "held-out difference", "95 % interval", "p / adjusted", "seeds"], rows)
    chosen = f"**{default['chosen']}**"
    return f"{told}\n\n{table}\n\n" + (
        f"{chosen} stays." if default["chosen"] == default["row"] else f"{chosen} is chosen instead."
    )


def _chosen_by(content: Mapping[str, Any]) -> str:
    """Returns the held-out measure that chooses, in words."""
    name: str = content["chosen_by"]
    return str(content["measures"][name]["heading"]) if name in content["measures"] else name


def _tried_text(content: Mapping[str, Any]) -> str:
    rows = []
    for arm, tried in content["tried"].items():
        for each in tried:
            score = "–" if each["held_out"] is None else f"{each['held_out']:.1f}"
            rows.append([arm, _settings_text(each["settings"]), score])
    return "With the first seed; the better on held-out data was taken.\n\n" + _table(
        ["arm", "settings", f"held-out {content['chosen_by']}"], rows
    )


def _steps_text(row: Mapping[str, Any]) -> str:
    return f"{row['steps']:,} steps" if row["steps"] else ""


def _settings_text(settings: Mapping[str, Any]) -> str:
    """Says settings as the flags of a command have them: `loss.beta 0.2`."""
    return ", ".join(f"`{name} {value}`" for name, value in flat(settings).items() if value is not None)


def _time_text(time: Mapping[str, Any]) -> str:
    if not time["runs"]:
        return "Nothing has been run yet."
    low, middle, high = time["cpu_seconds_a_run"]
    prepared = time["prepare_cpu_seconds"]
    preparation = "preparation not known" if prepared is None else f"{prepared / 60:.1f} CPU minutes of preparation"
    hours = (time["cpu_seconds"] + (prepared or 0.0)) / 3600
    return (
        f"{time['runs']} runs of {low:.0f} to {high:.0f} CPU seconds each (median {middle:.0f}; by the clock, on "
        f"shared cores, {time['seconds_a_run'][0]:.0f} to {time['seconds_a_run'][2]:.0f} s), {preparation}: "
        f"{hours:.2f} core hours in all, so {hours / 2:.2f} hours on two cores. Of a run that was stopped and went on, the last "
        "sitting counts. Hours on a GPU were not measured."
    )


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])
