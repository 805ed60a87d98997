"""Where an iteration's graded groups come from: the one thing that the loop knows of rollouts."""

from typing import Any

from adpo_jax.records import GradedGroups


class SourceError(ValueError):
    """Groups that cannot be had: something is missing, damaged or of another run."""


class Source:
    """Graded groups, iteration after iteration.

    A source that keeps nothing between iterations (samples on the spot, or a recording) has nothing
    to save. One that does is asked for it with every checkpoint, and gets it back before the first
    iteration of a resumed run.
    """

    def check(self, step: int) -> None:
        """Checks, before a run starts, that it can go on after `step` iterations.

        Args:
          step: of the newest checkpoint; below 0 it is one of the supervised stage.

        Raises:
          SourceError: naming what is missing or differs.
        """

    def restore(self, step: int) -> None:
        """Takes up what was saved after `step` iterations.

        Raises:
          SourceError: when what is needed was not kept.
        """

    def next(self, step: int, params: Any) -> GradedGroups:
        """The groups that the iteration after `step` iterations trains on.

        Args:
          params: of the policy at the start of that iteration.
        """
        raise NotImplementedError

    def save(self, step: int, *, oldest: int = 0) -> None:
        """Keeps what it needs to go on after `step` iterations.

        Args:
          oldest: step of the oldest checkpoint that is kept; what earlier ones needed may go.
        """
