"""When an update is not sound: its iteration is skipped, or the run stops.

The update itself keeps the old parameters where its loss or gradient is not finite or the anchor is
too far away (`update`), so that there is always a good state to go on from or to stop at.
"""

import dataclasses

from adpo_jax.update import SKIPPED


class TrainingStopped(Exception):
    """An update was not sound, and the run stops by its settings."""


@dataclasses.dataclass
class Guard:
    """Watches the updates of a run.

    Attributes:
      action: "stop" at the first one that is not sound, or "skip" it.
      limit: skipped iterations in a row that stop the run all the same.
      watched: the names of the metrics that are told of one that is not sound.
      in_a_row: skipped iterations since the last sound one.
    """

    action: str = "stop"
    limit: int = 3
    watched: tuple[str, ...] = ()
    in_a_row: int = 0

    def resume(self, rows: list[dict]) -> None:
        """Counts the skipped iterations that the metrics so far end with."""
        flags = [row[SKIPPED] for row in rows if SKIPPED in row]
        sound = [place for place, flag in enumerate(flags) if not flag]
        self.in_a_row = len(flags) - 1 - sound[-1] if sound else len(flags)

    def check(self, step: int, metrics: dict[str, float], evidence: str) -> None:
        """Counts a skipped iteration.

        Args:
          step: the iteration, from 1.
          evidence: where its batch was saved.

        Raises:
          TrainingStopped: by the settings.
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
