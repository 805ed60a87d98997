"""The output on the terminal: a progress line, and samples with their rewards.

Whoever waits is told at least every `QUIET_S` seconds what goes on: a step may take minutes, and a
first one compiles.
"""

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence

import rich.console
import rich.progress
import rich.table
import rich.text

from adpo_jax.log.printable import drawable, guarded, printable
from adpo_jax.log.transcripts import turns_of

QUIET_S = 10.0


class Progress:
    """A progress bar with an ETA on a terminal that can draw one, plain lines elsewhere.

    While nothing else is printed, a line every `QUIET_S` seconds says what is being done.

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
            highlight=False, soft_wrap=True, file=drawable(sys.stdout)
        )
        self._title, self._total, self._first = printable(title), total, done
        self._done, self._doing = done, ("", 0.0)
        self._started = self._updated = time.monotonic()
        self._ticker = _Ticker(self._tell)
        self._bar = None
        if self._console.is_terminal and not self._console.is_dumb_terminal:
            whole = rich.table.Column(no_wrap=True)  # a long note gives way, then the bar
            self._bar = rich.progress.Progress(
                rich.progress.TextColumn("{task.description}", markup=False),
                rich.progress.BarColumn(bar_width=20),
                rich.progress.MofNCompleteColumn(table_column=whole),
                rich.progress.TimeRemainingColumn(elapsed_when_finished=True, table_column=whole),
                rich.progress.TextColumn(
                    "{task.fields[note]}",
                    markup=False,
                    table_column=rich.table.Column(no_wrap=True, ratio=1),
                ),
                console=self._console,
                expand=True,
            )
            self._task = self._bar.add_task(self._title, total=total, completed=done, note="")

    def __enter__(self):
        if self._bar:
            self._bar.start()
            # Meanwhile rich puts what others print above the bar, by streams of its own, which it
            # takes away again.
            sys.stdout, sys.stderr = guarded(sys.stdout), guarded(sys.stderr)
        self._ticker.start()
        return self

    def __exit__(self, *_):
        self._ticker.stop()
        if self._bar:
            self._bar.stop()

    @contextlib.contextmanager
    def doing(self, what: str) -> Iterator[None]:
        """Says `what` is being done, should it take long."""
        before, self._doing = self._doing, (what, time.monotonic())
        try:
            yield
        finally:
            self._doing = before

    def advance(self, step: int) -> None:
        """Notes that `step` steps are done, without a line."""
        self._done = step
        if self._bar:
            self._bar.update(self._task, completed=step)

    @property
    def is_due(self) -> bool:
        """Whether the last `update` is so long ago that those who wait want another."""
        return time.monotonic() - self._updated >= 0.8 * QUIET_S  # before `_tell` says less

    def update(self, step: int, note: str) -> None:
        """Shows that `step` steps are done, with a few words on the last one."""
        self._done, self._updated = step, time.monotonic()
        self._ticker.said()
        if self._bar:
            self._bar.update(self._task, completed=step, note=printable(note))
            return
        elapsed = time.monotonic() - self._started
        left = elapsed / max(step - self._first, 1) * (self._total - step)
        self.print(f"{self._title} {step}/{self._total}  {note}  eta {_minutes(left)}")

    def print(self, text: str) -> None:
        """Prints text above the bar, markup and control characters as they are."""
        self._ticker.said()
        self._console.print(printable(text), markup=False)

    def print_samples(self, samples: Sequence[Mapping]) -> None:
        """Shows completions with their rewards: a table in a terminal, lines elsewhere.

        Args:
          samples: records with "prompt", "completion", "reward" and "components", the scores of
            each reward function; "turns", their messages, where they have several turns.
        """
        if self._bar is None:
            for sample in samples:
                self.print(
                    f"  [{sample['reward']:+.2f}{_scores(sample['components'])}] "
                    f"{sample['prompt']}\n    "
                    + "\n    ".join(_turns(sample) or [repr(sample["completion"])])
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
                rich.text.Text(printable(str(sample["prompt"]))),
                rich.text.Text(printable("\n".join(_turns(sample)) or str(sample["completion"]))),
                *("" if score is None else f"{score:.2f}" for score in scores),
            )
        self._console.print(table)

    def _tell(self) -> None:
        """Says what is being done."""
        what, since = self._doing
        if self._bar:
            self._bar.update(self._task, note=f"{what} {_minutes(time.monotonic() - since)}")
            return
        where = f"{self._title} {min(self._done + 1, self._total)}/{self._total}"
        since = since or self._started
        took = _minutes(time.monotonic() - since)
        self._console.print(f"{where}: {what or 'working'}, {took} so far", markup=False)


@contextlib.contextmanager
def telling(what: str) -> Iterator[None]:
    """Says on standard error every `QUIET_S` seconds that `what` is being done, and how long."""
    started = time.monotonic()

    def tell():
        took = _minutes(time.monotonic() - started)
        print(f"{what}: {took} so far", file=sys.stderr, flush=True)

    ticker = _Ticker(tell)
    ticker.start()
    try:
        yield
    finally:
        ticker.stop()


class _Ticker:
    """Calls `tell` in a thread of its own whenever nothing was said for `QUIET_S` seconds."""

    def __init__(self, tell: Callable[[], None]):
        self._tell = tell
        self._said = time.monotonic()
        self._ended = threading.Event()
        # A daemon: it holds up no exit.
        self._thread = threading.Thread(target=self._run, name="progress", daemon=True)

    def start(self) -> None:
        self.said()
        self._thread.start()

    def stop(self) -> None:
        self._ended.set()
        self._thread.join(timeout=1.0)  # it may wait for someone to read the output

    def said(self) -> None:
        """Something has been said just now."""
        self._said = time.monotonic()

    def _run(self) -> None:
        while not self._ended.wait(max(self._said + QUIET_S - time.monotonic(), 0.0)):
            if time.monotonic() < self._said + QUIET_S:  # something was said meanwhile
                continue
            self.said()
            with contextlib.suppress(OSError, ValueError):  # nobody reads the output any more
                self._tell()


def _turns(sample: Mapping) -> list[str]:
    """A line for each message of a sample in several turns; none for a single turn."""
    return [f"{who}: {what!r}" for who, what in turns_of(sample)]


def _scores(components: Mapping[str, float | None]) -> str:
    """The scores of several functions; empty for one alone, whose score is the reward."""
    if len(components) < 2:
        return ""
    return " " + " ".join(
        f"{name} {score:.2f}" for name, score in components.items() if score is not None
    )


def _minutes(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"
