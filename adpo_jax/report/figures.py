"""The report's pictures, drawn with matplotlib and coloured by the page.

Text stays text and colours become CSS variables, so that one SVG serves a light and a dark page.
"""

import contextlib
import io
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from adpo_jax.report.runs import Group

try:
    import matplotlib

    matplotlib.use("agg")
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator
except ImportError as error:
    raise ValueError(
        f"a report draws with matplotlib, which cannot be imported ({error}): "
        "pip install 'adpo-jax[report]'"
    ) from error

# Okabe and Ito's palette, told apart by most colour-blind readers; black is left to the text.
SERIES = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c6bb1", "#7f7f7f")
_INK, _FAINT = "#010101", "#c8c8c9"
_STYLES = ("-", "--", "-.", ":")
_LONGEST = 48  # characters of a title or a label
_SOFTWARE = "adpo_jax"
# Near the start of every PNG file, by which a later report knows that it may take its place.
PNG_MARK = b"tEXtSoftware\0" + _SOFTWARE.encode()

_STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "report",  # the same picture gives the same bytes
    "font.family": "sans-serif",
    "font.size": 9,
    "text.parse_math": False,  # a folder's or a metric's name may hold a $
    "axes.formatter.useoffset": False,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.linewidth": 0.6,
    "grid.color": _FAINT,
    "lines.linewidth": 1.6,
    "legend.frameon": False,
    "text.color": _INK,
    "axes.labelcolor": _INK,
    "axes.edgecolor": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
}


class Picture:
    """One drawing, as SVG for the page and as PNG for elsewhere.

    Args:
      name: a file's name without its end.
      title: what it shows.
      draw: called with matplotlib axes.
      size: inches.
    """

    def __init__(self, name: str, title: str, draw: Callable, size=(4.6, 2.7)):
        self.name, self.title = name, plain(title)
        with _drawing():
            self._figure = Figure(figsize=size, layout="constrained")
            axes = self._figure.subplots()
            axes.set_title(self.title)
            draw(axes)

    @property
    def svg(self) -> str:
        """The picture as an element of an HTML page."""
        text = io.StringIO()
        with _drawing():
            self._figure.savefig(text, format="svg", transparent=True, metadata={"Date": None})
        svg = text.getvalue()
        svg = svg[svg.index("<svg") :]
        # Names within a page are shared by all its pictures.
        svg = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{self.name}-", svg)
        svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
        for number, colour in enumerate(SERIES):
            svg = svg.replace(colour, f"var(--series-{number})")
        svg = svg.replace(_INK, "var(--ink)").replace(_FAINT, "var(--faint)")
        return svg.replace("<svg ", f'<svg role="img" aria-label="{_attribute(self.title)}" ', 1)

    def save_png(self, folder: Path) -> None:
        """Writes `<name>.png`, on white, with the legend that the page has once for all."""
        labels = self._figure.axes[0].get_legend_handles_labels()[1]
        with _drawing():
            legend = None
            if len(labels) > 1 and not self._figure.legends:
                legend = self._figure.legend(loc="outside lower center", ncols=3, fontsize=8)
            self._figure.savefig(
                folder / f"{self.name}.png",
                dpi=160,
                facecolor="white",
                metadata={"Software": _SOFTWARE},
            )
            if legend is not None:
                legend.remove()


def curve(groups: Sequence[Group], name: str, title: str, *, unit: str = "") -> Picture | None:
    """A metric by step: a line a group, over its seeds a band from the smallest to the largest.

    None where no run has the metric.
    """
    values = {v for group in groups for run in group.runs for v in run.series(name).values()}
    if not values:
        return None

    def draw(axes):
        for number, group in enumerate(groups):
            steps, mean, low, high = group.band(name)
            if not len(steps):
                continue
            colour, style = series_style(number)
            marker = "o" if len(steps) < 3 else None
            label = plain(group.label)
            axes.plot(steps, mean, style, color=colour, marker=marker, ms=4, label=label)
            if len(group.runs) > 1:
                axes.fill_between(steps, low, high, color=colour, alpha=0.15, lw=0)
            else:
                run = group.runs[0]
                low, high = (run.series(f"{name}_{end}") for end in ("low", "high"))
                both = [step for step in steps if step in low and step in high]
                ends = [[end[step] for step in both] for end in (low, high)]
                axes.fill_between(both, *ends, color=colour, alpha=0.15, lw=0)
        _label_iterations(axes)
        axes.set_ylabel(unit)
        if all(value.is_integer() for value in values):
            axes.yaxis.set_major_locator(_whole_numbers())

    return Picture(file_name(name), title, draw)


def distribution(group: Group, field: str, title: str, *, unit: str) -> Picture | None:
    """Percentiles of what the kept samples of a group have under `field`, by step."""
    values: dict[int, list[float]] = {}
    for run in group.runs:
        for step, samples in run.samples("train").items():
            values.setdefault(step, []).extend(s[field] for s in samples if field in s)
    steps = sorted(step for step, v in values.items() if v)
    if not steps:
        return None

    def draw(axes):
        table = np.array([np.percentile(values[s], (5, 25, 50, 75, 95)) for s in steps]).T
        axes.fill_between(steps, table[0], table[4], color=SERIES[0], alpha=0.15, lw=0)
        axes.fill_between(steps, table[1], table[3], color=SERIES[0], alpha=0.3, lw=0)
        axes.plot(steps, table[2], color=SERIES[0], marker="o", ms=3)
        axes.plot(steps, [np.mean(values[s]) for s in steps], "--", color=SERIES[1])
        _label_iterations(axes)
        axes.set_ylabel(unit)

    return Picture(file_name(f"{field}_{group.label}"), title, draw)


def stages(groups: Sequence[Group], seconds: Sequence[dict[str, float]]) -> Picture:
    """Seconds of an iteration by stage, a bar a group."""

    def draw(axes):
        names = list(dict.fromkeys(name for row in seconds for name in row))
        left = np.zeros(len(groups))
        for number, name in enumerate(names):
            widths = np.array([row.get(name, 0.0) for row in seconds])
            axes.barh(range(len(groups)), widths, 0.6, left, color=SERIES[number], label=name)
            left += widths
        axes.set_yticks(range(len(groups)), [plain(group.label) for group in groups])
        axes.invert_yaxis()
        axes.grid(axis="y", visible=False)
        axes.set_xlabel("seconds an iteration")
        axes.figure.legend(loc="outside lower center", ncols=len(names), fontsize=8)

    return Picture("stages", "Where the time goes", draw, size=(6.4, 1.2 + 0.32 * len(groups)))


def series_style(number: int) -> tuple[str, str]:
    """Colour and dashes of a series; dashes change when the colours start again."""
    return SERIES[number % len(SERIES)], _STYLES[number // len(SERIES) % len(_STYLES)]


def file_name(text: str) -> str:
    """The text as a file's name and as part of an identifier."""
    return re.sub(r"[^A-Za-z0-9]+", "_", text).strip("_")[:100]


def name_apart(pictures: Sequence[Picture]) -> None:
    """Numbers the names that several pictures share."""
    taken: set[str] = set()
    for picture in pictures:
        name, number = picture.name, 2
        while picture.name in taken:
            picture.name, number = f"{name}_{number}", number + 1
        taken.add(picture.name)


def plain(text: str) -> str:
    """The text as a picture can show it: printable, one line, not too long."""
    text = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)
    text = text if len(text) <= _LONGEST else f"{text[: _LONGEST // 2]}...{text[-_LONGEST // 2 :]}"
    # matplotlib leaves names with an underscore at the front out of legends.
    return f"\N{ZERO WIDTH SPACE}{text}" if text.startswith("_") else text


def _label_iterations(axes) -> None:
    axes.set_xlabel("iteration")
    axes.xaxis.set_major_locator(_whole_numbers())


def _whole_numbers() -> MaxNLocator:
    """Ticks at whole numbers alone, were there but one."""
    return MaxNLocator("auto", integer=True, min_n_ticks=1, steps=[1, 2, 5, 10])


@contextlib.contextmanager
def _drawing() -> Iterator[None]:
    """Sets the style; a character that the font lacks is drawn as a box, without a warning."""
    with matplotlib.rc_context(_STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        yield


def _attribute(text: str) -> str:
    return text.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")
