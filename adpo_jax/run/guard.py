"""Skips an iteration whose update is not sound, or stops the run.

An update itself keeps the old parameters where its loss or gradient is not finite, or where the
anchor is too far away (`update.step`). So there is always a good state to go on from or to stop at.
"""

import dataclasses

from adpo_jax.update import SKIPPED


class TrainingStopped(Exception):
    """An update was not sound, and the run stops by its settings."""


@dataclasses.dataclass
class Guard:
    """Watches the updates of a run.

    Attributes:
      action: "stop" stops at the first update that is not sound, "skip" goes on.
      limit: how many skipped iterations in a row stop the run all the same.
      watched: the names of the metrics that a message about such an update shows.
      in_a_row: skipped iterations since the last sound one.
    """

    action: str = "stop"
    limit: int = 3
    watched: tuple[str, ...] = ()
    in_a_row: int = 0

    def resume(self, rows: list[dict]) -> None:
        """Counts the skipped iterations at the end of the metrics so far."""
        flags = [row[SKIPPED] for row in rows if SKIPPED in row]
        sound = [place for place, flag in enumerate(flags) if not flag]
        self.in_a_row = len(flags) - 1 - sound[-1] if sound else len(flags)

    def check(self, step: int, metrics: dict[str, float], evidence: str) -> None:
        """Counts a skipped iteration.

        Args:
          step: the number of the iteration, from 1.
          evidence: the file that its batch was saved in.

        Raises:
          TrainingStopped: where the settings say so.
        """
        if not metrics[SKIPPED]:
            self.in_a_row = 0
            return
        self.in_a_row += 1
        told = [name for name in self.watched if name in metrics]
        found = ", ".join(f"{name} {metrics[name]:.4g}" for name in told)
        text = f"the update of iteration {step} is not sound ({found}); its batch is in {evidence}"
        if self.action == "stop":
            raise TrainingStopped(
                f"{text}. The last checkpoint is from before. trainer.on_bad_update=skip goes on "
                "without such updates"
            )
        if self.in_a_row >= self.limit:
            raise TrainingStopped(
                f"{text}: {self.in_a_row} iterations in a row, trainer.max_bad_updates is "
                f"{self.limit}. The last checkpoint is from before"
            )
        print(f"WARNING: {text}; skipped", flush=True)
