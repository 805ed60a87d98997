"""The source of an iteration's graded groups, the one thing that the loop knows of rollouts."""

from collections.abc import Collection
from typing import Any

from adpo_jax.records import GradedGroups


class SourceError(ValueError):
    """A source cannot give its groups: something is missing, damaged or of another run."""


class Source:
    """Graded groups, iteration after iteration.

    A source that keeps nothing between iterations (samples on the spot, or a recording) has nothing
    to save. A source with a state saves it with every checkpoint, and restores it before the first
    iteration of a resumed run.

    Attributes:
      saves_on_every_process: whether each process of a run saves a state of its own; else one
        saves the state that all have alike.
    """

    saves_on_every_process: bool = False

    def check(self, step: int) -> None:
        """Checks, before a run starts, that it can go on after `step` iterations.

        Args:
          step: iterations done in the newest checkpoint; below 0 in the supervised stage.

        Raises:
          SourceError: naming what is missing or differs.
        """

    def restore(self, step: int) -> None:
        """Takes up the state that was saved after `step` iterations.

        Raises:
          SourceError: when a state is needed and was not kept.
        """

    def next(self, step: int, params: Any) -> GradedGroups:
        """The groups that the iteration after `step` iterations trains on.

        Args:
          params: the policy's parameters at the start of that iteration.
        """
        raise NotImplementedError

    def save(self, step: int, *, kept: Collection[int] = ()) -> None:
        """Saves the state that the source needs to go on after `step` iterations.

        Args:
          kept: the steps of the checkpoints that there are; see `is_left_over`.
        """

    def end(self) -> None:
        """Takes note that the run is over: no further iteration will come, now or later."""

    def close(self) -> None:
        """Ends what the source has started; this process asks nothing of it any more."""


def is_left_over(step: int, kept: Collection[int]) -> bool:
    """Whether no run goes on from the state of a step any more, so that its files may go.

    Args:
      kept: the steps of the checkpoints that there are. Another one may be on its way to the disk,
        and is newer than all of them.
    """
    return step not in kept and step < max(kept, default=0)
