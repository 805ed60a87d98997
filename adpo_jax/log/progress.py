"""The output on the terminal: a progress line, and samples with their rewards."""

import sys
import time
from collections.abc import Mapping, Sequence

import rich.console
import rich.progress
import rich.table
import rich.text

from adpo_jax.log.printable import guarded, printable, unguarded


class Progress:
    """A progress bar with an ETA on a terminal, plain lines elsewhere.

    Args:
      title: the name of the steps.
      total: steps in all.
      done: steps done before, in a resumed run.
      console: the console to write to; None for standard output.
    """

    def __init__(
        self, title: str, total: int, done: int = 0, console: rich.console.Console | None = None
    ):
        # A bar is drawn with escape sequences; all words in it are made printable here.
        self._console = console or rich.console.Console(
            highlight=False, soft_wrap=True, file=unguarded(sys.stdout)
        )
        self._title, self._total, self._first = printable(title), total, done
        self._started = time.monotonic()
        self._bar = None
        if self._console.is_terminal:
            self._bar = rich.progress.Progress(
                rich.progress.TextColumn("{task.description}", markup=False),
                rich.progress.BarColumn(bar_width=20),
                rich.progress.MofNCompleteColumn(),
                rich.progress.TimeRemainingColumn(elapsed_when_finished=True),
                rich.progress.TextColumn("{task.fields[note]}", markup=False),
                console=self._console,
            )
            self._task = self._bar.add_task(self._title, total=total, completed=done, note="")

    def __enter__(self):
        if self._bar:
            self._bar.start()
            # Meanwhile rich puts what others print above the bar, by streams of its own, which it
            # takes away again.
            sys.stdout, sys.stderr = guarded(sys.stdout), guarded(sys.stderr)
        return self

    def __exit__(self, *_):
        if self._bar:
            self._bar.stop()

    def update(self, step: int, note: str) -> None:
        """Shows that `step` steps are done, with a few words on the last one."""
        if self._bar:
            self._bar.update(self._task, completed=step, note=printable(note))
            return
        elapsed = time.monotonic() - self._started
        left = elapsed / max(step - self._first, 1) * (self._total - step)
        self.print(f"{self._title} {step}/{self._total}  {note}  eta {_minutes(left)}")

    def print(self, text: str) -> None:
        """Prints text above the bar, markup and control characters as they are."""
        self._console.print(printable(text), markup=False)

    def print_samples(self, samples: Sequence[Mapping]) -> None:
        """Shows completions with their rewards: a table in a terminal, lines elsewhere.

        Args:
          samples: records with "prompt", "completion", "reward" and "components", the scores of
            each reward function.
        """
        if self._bar is None:
            for sample in samples:
                self.print(
                    f"  [{sample['reward']:+.2f}{_scores(sample['components'])}] "
                    f"{sample['prompt']}\n    {sample['completion']!r}"
                )
            return
        names = dict.fromkeys(name for sample in samples for name in sample["components"])
        table = rich.table.Table(show_lines=True, expand=True)
        for name in ("prompt", "completion"):
            table.add_column(name, ratio=2)
        for name in ("reward", *names):
            table.add_column(rich.text.Text(printable(name)), justify="right")
        for sample in samples:
            scores = [sample["reward"], *(sample["components"].get(name) for name in names)]
            table.add_row(
                *(rich.text.Text(printable(str(sample[k]))) for k in ("prompt", "completion")),
                *("" if score is None else f"{score:.2f}" for score in scores),
            )
        self._console.print(table)


def _scores(components: Mapping[str, float | None]) -> str:
    """The scores of several functions; empty for one alone, whose score is the reward."""
    if len(components) < 2:
        return ""
    return " " + " ".join(
        f"{name} {score:.2f}" for name, score in components.items() if score is not None
    )


def _minutes(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"
