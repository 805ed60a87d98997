"""Puts the page of a report together."""

import difflib
import fnmatch
import json
from collections.abc import Collection, Sequence
from pathlib import Path

import jinja2
import numpy as np

from adpo_jax.log.transcripts import turns_of
from adpo_jax.losses import ALGORITHMS
from adpo_jax.report import figures
from adpo_jax.report.figures import SERIES, Picture
from adpo_jax.report.runs import Group, Run, differences, grouped

# The pictures of the page, in order, where the runs have the metric: name, title, unit.
CURVES = (
    ("eval/accuracy", "Accuracy, greedy", "share of prompts"),
    ("reward/mean", "Reward, sampled", "mean reward"),
    ("rollout/length_mean", "Length of completions", "tokens"),
    ("rollout/entropy", "Entropy of the policy", "nats a token"),
    ("compare/start_kl", "Distance from the start", "nats a completion"),
    *(
        (f"{name}/{metric.name}", f"{metric.title} ({name.upper()})", metric.unit)
        for name, algorithm in ALGORITHMS.items()
        for metric in algorithm.declared_metrics()
        if metric.title
    ),
    ("groups/zero_std_frac", "Groups without spread", "share"),
    ("rollout/unique_frac", "Different texts in a group", "share"),
    ("rollout/truncated_frac", "Cut off at the limit", "share"),
    ("rollout/turns", "Turns of a completion", "turns"),
    ("tools/calls", "Calls of tools", "calls a completion"),
    ("tools/failures", "Calls that failed", "calls"),
    ("update/grad_norm", "Norm of the gradient", "before the clip"),
    ("rollout/mismatch_kl", "Sampler against trainer", "nats a token"),
    ("rollout/tokens_per_s", "Sampling speed", "tokens a second"),
    ("memory/host_gib", "Memory of the process", "GiB"),
)
# Those that follow by their names: what the runs' own rewards and evaluations have.
_MORE = ("reward/*", "eval/*")
_NUM_MORE = 48
_STAGES = ("rollout", "reward", "anchor", "update", "eval", "checkpoint")
_NUM_SAMPLES = 6  # of a group
# In the head of every page, by which a later report knows that it may take its place.
_MARK = b'<meta name="generator" content="adpo-jax report">'


def write(
    folders: Sequence[Path],
    out: Path,
    *,
    png: Path | None = None,
    metrics: Collection[str] = (),
) -> list[str]:
    """Writes one self-contained page about some runs.

    Args:
      folders: of runs; those that differ in their seed alone are joined, and one that is named
        twice counts once.
      out: the page; one that is there is replaced.
      png: a folder for the pictures as PNG files too; those of an older report are replaced.
      metrics: patterns of further metrics to draw, such as "update/*".

    Returns:
      What could not be read, a sentence each.

    Raises:
      ValueError: when a folder holds no run, no run has such a metric, or the page or a picture
        cannot be written or would take the place of another file.
    """
    _refuse_other_file(out, _MARK, "is no report; give the page another name by --out")
    once: dict[Path, Path] = {}
    for folder in map(Path, folders):
        once.setdefault(folder.resolve(), folder)
    groups = grouped([Run.read(folder) for folder in once.values()])
    further, num_left_out = _further(groups, metrics)
    pictures = [p for name, title, unit in CURVES if (p := _curve(groups, name, title, unit))]
    more = [p for name in further if (p := _curve(groups, name, name, ""))]
    spreads = [p for group in groups for p in _spreads(group)]
    seconds = [stage_seconds(group) for group in groups]
    bars = [figures.stages(groups, seconds)] if any(seconds) else []
    drawn = [*pictures, *more, *spreads, *bars]
    figures.name_apart(drawn)
    for picture in drawn if png is not None else ():
        no_picture = "is no picture of a report; give another folder by --png"
        _refuse_other_file(png / f"{picture.name}.png", figures.PNG_MARK, no_picture)
    samples = [samples_of(group) for group in groups]
    problems = list(
        dict.fromkeys(p for group in groups for run in group.runs for p in run.problems)
    )
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("adpo_jax.report", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["number"] = _number
    environment.filters["blank"] = blank
    environment.filters["turns"] = turns_of
    page = environment.get_template("template.html").render(
        groups=groups,
        overview=[overview(group) for group in groups],
        curves=[_inline(p) for p in pictures],
        more=[_inline(p) for p in more],
        num_left_out=num_left_out,
        metrics=metrics_table(groups),
        problems=problems,
        spreads=[_inline(p) for p in spreads],
        stages=[_inline(p) for p in bars],
        seconds=seconds,
        stage_names=[stage for stage in _STAGES if any(stage in row for row in seconds)],
        samples=samples,
        differences=differences(groups),
        configs=[_pretty(group.runs[0].config) for group in groups],
        environments=_environments(groups),
        colours=SERIES,
    )
    # What a model wrote may hold lone surrogates, which UTF-8 has no bytes for, and controls that
    # HTML does not allow.
    page = "".join(
        c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in page
    )
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(page, encoding="utf-8", errors="replace")
        if png is not None:
            png.mkdir(parents=True, exist_ok=True)
            for picture in drawn:
                picture.save_png(png)
    except OSError as error:
        raise ValueError(f"{error.filename or out} cannot be written: {error.strerror}") from error
    return problems


def _refuse_other_file(out: Path, mark: bytes, otherwise: str) -> None:
    """Refuses to write over a file that no report wrote.

    Args:
      mark: what the first bytes of a report's file hold.
      otherwise: the end of the sentence about a file that lacks it.

    Raises:
      ValueError: there is such a file, or it cannot be read.
    """
    if not out.is_file():  # what is there otherwise is no file to lose
        return
    try:
        with out.open("rb") as file:
            ours = mark in (file.read(1024) or mark)
    except OSError as error:
        raise ValueError(f"{out} cannot be read: {error.strerror}") from error
    if not ours:
        raise ValueError(f"{out} exists and {otherwise}")


def _further(groups: Sequence[Group], patterns: Collection[str]) -> tuple[list[str], int]:
    """The metrics to draw after `CURVES`, and how many of those that follow have no room.

    Raises:
      ValueError: for a pattern that no metric has.
    """
    names = sorted(set().union(*(group.names for group in groups)))
    ends = {f"{name}_{end}" for name in names for end in ("low", "high")}  # they are bands
    wanted = dict.fromkeys(n for p in patterns for n in names if fnmatch.fnmatchcase(n, p))
    for pattern in patterns:
        if not any(fnmatch.fnmatchcase(name, pattern) for name in names):
            near = difflib.get_close_matches(pattern, names, n=1, cutoff=0.0)
            raise ValueError(f"no run has a metric {pattern}; did you mean {near[0]}?")
    found = [n for n in names if n not in ends and any(fnmatch.fnmatchcase(n, p) for p in _MORE)]
    drawn = {name for name, _, _ in CURVES}
    found = [name for name in found if name not in drawn | wanted.keys()]
    return [*(n for n in wanted if n not in drawn), *found[:_NUM_MORE]], len(found[_NUM_MORE:])


def metrics_table(groups: Sequence[Group]) -> dict[str, list[str]]:
    """Every metric that a run has: its first and its last mean in each group."""
    table = {}
    for name in sorted(set().union(*(group.names for group in groups))):
        means = [group.band(name)[1] for group in groups]
        table[name] = [f"{_number(m[0])} to {_number(m[-1])}" if len(m) else "" for m in means]
    return table


def blank(text: str) -> str:
    """Words for a text that shows nothing; empty for one that shows something."""
    if any(c.isprintable() and not c.isspace() for c in text):
        return ""
    return f"blank: {len(text)} characters, none of them visible" if text else "blank: no text"


def overview(group: Group) -> dict[str, object]:
    """A row of the table at the top."""
    last = [_last(run, "eval/accuracy") for run in group.runs]
    first = [run.series("eval/accuracy").get(0) for run in group.runs]
    rewards = [list(run.series("reward/mean").values())[-10:] for run in group.runs]
    steps = [run.rows[-1]["step"] for run in group.runs]
    tokens = [sum(run.series("update/tokens").values()) for run in group.runs]
    hours = [run.seconds / 3600 for run in group.runs]
    return {
        "label": group.label,
        "seeds": ", ".join(str(run.seed) for run in group.runs),
        "iterations": _span(steps),
        "accuracy before": _mean(first),
        "accuracy after": _mean(last),
        "95% interval": _interval(group, last),
        "reward, last 10": _mean([np.mean(r) for r in rewards if r]),
        "completion tokens": _number(float(np.mean(tokens))),
        "hours": _mean(hours),
    }


def stage_seconds(group: Group) -> dict[str, float]:
    """Mean seconds of an iteration by stage, what is not done each time spread over all."""
    means: dict[str, float] = {}
    for stage in _STAGES:
        totals = [sum(run.series(f"time/{stage}").values()) for run in group.runs]
        iterations = [max(run.rows[-1]["step"], 1) for run in group.runs]
        if any(totals):
            means[stage] = sum(totals) / sum(iterations)
    return means


def samples_of(group: Group) -> dict[str, object]:
    """The same prompts answered before and after training, changed verdicts first."""
    for run in group.runs:
        evaluations = run.samples("eval")
        if len(evaluations) >= 2:
            first, last = min(evaluations), max(evaluations)
            pairs = _same_prompts(evaluations[first], evaluations[last])
            order = sorted(
                range(len(pairs)),
                key=lambda i: (pairs[i][0]["correct"] == pairs[i][1]["correct"], i),
            )
            shown = [pairs[i] for i in _varied(order, pairs)]
            if shown:
                return {"seed": run.seed, "first": first, "last": last, "pairs": shown}
    return {}


def _varied(order: list[int], pairs: list) -> list[int]:
    """A few of each kind of change, in the given order."""
    kinds: dict[tuple, list[int]] = {}
    for i in order:
        kinds.setdefault((pairs[i][0]["correct"], pairs[i][1]["correct"]), []).append(i)
    rounds = [i for k in range(_NUM_SAMPLES) for rows in kinds.values() for i in rows[k : k + 1]]
    return rounds[:_NUM_SAMPLES]


def _same_prompts(before: list[dict], after: list[dict]) -> list[tuple[dict, dict]]:
    """The greedy completions of prompts that both evaluations have, in the order of the first."""
    later: dict[str, list[dict]] = {}
    for record in _greedy(after):
        later.setdefault(_question(record), []).append(record)
    found = [(record, later.get(_question(record))) for record in _greedy(before)]
    return [(record, same.pop(0)) for record, same in found if same]


def _question(record: dict) -> str:
    return json.dumps([record.get("prompt"), record.get("solution")])


def _greedy(records: list[dict]) -> list[dict]:
    return [r for r in records if r.get("sampling", "greedy") == "greedy"]


def _curve(groups, name: str, title: str, unit: str) -> Picture | None:
    return figures.curve(groups, name, title, unit=unit)


def _spreads(group: Group) -> list[Picture]:
    found = (
        figures.distribution(group, "reward", f"Rewards: {group.label}", unit="reward"),
        figures.distribution(group, "num_tokens", f"Lengths: {group.label}", unit="tokens"),
    )
    return [picture for picture in found if picture]


def _inline(picture: Picture) -> str:
    return jinja2.utils.markupsafe.Markup(picture.svg)


def _environments(groups: Sequence[Group]) -> dict[str, list[str]]:
    """What the groups' first runs ran on: name -> a value a group."""
    found = [group.runs[0].environment for group in groups]
    names = dict.fromkeys(name for environment in found for name in environment)
    return {name: [str(environment.get(name, "")) for environment in found] for name in names}


def _pretty(config: dict[str, object]) -> str:
    return "\n".join(f"{key} = {json.dumps(value, default=str)}" for key, value in config.items())


def _last(run: Run, name: str) -> float | None:
    return next(reversed(run.series(name).values()), None)


def _mean(values: Sequence[float | None]) -> str:
    present = [value for value in values if value is not None]
    return f"{np.mean(present):.3f}" if present else ""


def _span(values: Sequence[int]) -> str:
    return str(values[0]) if len(set(values)) == 1 else f"{min(values)} to {max(values)}"


def _interval(group: Group, last: list[float | None]) -> str:
    """Over seeds by Student's t where there are several, else over prompts by bootstrap."""
    of_seed: dict[int, list[float]] = {}
    for run, value in zip(group.runs, last):
        if value is not None:
            of_seed.setdefault(run.seed, []).append(value)
    present = np.array([np.mean(values) for values in of_seed.values()])
    if len(present) > 1:
        half = t_quantile(len(present) - 1) * present.std(ddof=1) / np.sqrt(len(present))
        return f"{max(present.mean() - half, 0):.3f} to {min(present.mean() + half, 1):.3f}, seeds"
    ends = [_last(group.runs[0], f"eval/accuracy_{end}") for end in ("low", "high")]
    return "" if None in ends else f"{ends[0]:.3f} to {ends[1]:.3f}, prompts"


def t_quantile(degrees: int) -> float:
    """The 97.5% quantile of Student's t distribution."""
    table = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
    return table[degrees - 1] if degrees <= len(table) else 1.96 + 2.4 / degrees


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
