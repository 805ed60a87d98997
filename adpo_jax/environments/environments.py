"""The environments of a run: their processes, their tools, and how their words become tokens."""

import dataclasses
from collections.abc import Callable, Sequence

from adpo_jax.environments.contract import COLUMN, Described
from adpo_jax.environments.pool import EnvironmentPool
from adpo_jax.environments.rendering import TurnTemplate


@dataclasses.dataclass(frozen=True)
class Environments:
    """What rollouts in turns need to know.

    Attributes:
      pool: the processes in which the environments live.
      described: the environments by the value of the column `environment`, under "" for one alone.
      template: the chat template as far as tools are concerned.
      prompt_ids: (columns of N rows, N texts or None) -> N lists of token ids, the prompts with
        what `reset` returned appended.
      max_turns: turns of the model in a completion, at most; calls of the last are not made.
      overlap_steps: ahead of the update, decode steps beside a call before its answer is taken.
    """

    pool: EnvironmentPool
    described: dict[str, Described]
    template: TurnTemplate
    prompt_ids: Callable[[dict[str, list], Sequence[str | None]], list[list[int]]]
    max_turns: int
    overlap_steps: int

    @property
    def rewards(self) -> tuple[str, ...]:
        """The names of the rewards that environments have of their own, those of their classes."""
        found = [d.class_name for d in self.described.values() if d.has_reward]
        return tuple(dict.fromkeys(found))

    def of_row(self, row: dict) -> Described:
        """The environment of a row of the data."""
        return self.described["" if "" in self.described else str(row[COLUMN])]

    def name_of(self, row: dict) -> str | None:
        """The name of a row's environment; None where there is one alone."""
        return None if "" in self.described else str(row[COLUMN])

    def close(self) -> None:
        """Ends the processes."""
        self.pool.close()

    def __enter__(self) -> "Environments":
        return self

    def __exit__(self, *exc_info):
        self.close()
