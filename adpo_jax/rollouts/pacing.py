"""The schedule of rollouts ahead of the update: which groups are in flight, and which are trained.

Groups are numbered in the order of the data. An iteration may end as soon as it has as many whole
groups as a batch holds, whichever they are; the others stay in flight. A group that was admitted
after v iterations is trained at iteration v + `max_staleness` at the latest, and none is thrown
away. So that this is possible, no more than `ahead` groups beyond a batch are in flight, and an
iteration waits for old groups while leaving them would make a later one late.

Several processes share one schedule. Each decodes its own groups, and after every `WINDOW` decode
steps all tell each other which groups are whole. So they choose alike, and what they choose depends
on no clock.

The schedule knows no model: `scripts/simulate_rollouts.py` runs it with lengths alone.
"""

import collections
import dataclasses
from collections.abc import Collection, Iterable, Mapping

# Decode steps between two exchanges of processes: enough to hide one, few beside a completion.
WINDOW = 256


@dataclasses.dataclass(frozen=True)
class Pacing:
    """The rules of a run.

    Attributes:
      batch_size: groups that an iteration trains on.
      max_staleness: iterations between the one that a group is admitted for and the one that
        trains on it, at most.
      ahead: groups in flight beyond a batch, at most `max_staleness * batch_size`.
      num_steps: iterations of the whole run.
    """

    batch_size: int
    max_staleness: int
    ahead: int
    num_steps: int

    def __post_init__(self):
        most = self.max_staleness * self.batch_size
        if not 0 <= self.ahead <= most:
            raise ValueError(
                f"ahead is 0 to max_staleness times the groups of an iteration, {most}; given "
                f"{self.ahead}"
            )

    def admitted(self, step: int, next_number: int, num_in_flight: int) -> range:
        """The numbers of the groups that start now: as many as the rest of the run can train on.

        Args:
          step: iterations done.
          next_number: the number of the first group that has not started.
          num_in_flight: groups that have started and wait or decode.
        """
        room = self.batch_size + self.ahead - num_in_flight
        wanted = (self.num_steps - step) * self.batch_size - num_in_flight
        return range(next_number, next_number + max(min(room, wanted), 0))

    def chosen(
        self, step: int, admitted_at: Mapping[int, int], whole: Collection[int]
    ) -> list[int] | None:
        """The groups that iteration `step` trains on; None while it has to wait.

        They are the oldest whole ones: those of the smallest numbers. If these are the oldest in
        flight, there is nothing to wait for, whatever is late: more groups may be than a run that
        goes on with a smaller `max_staleness` allows.

        Args:
          admitted_at: the iterations done when each group in flight was admitted, by its number.
          whole: numbers of the groups in flight that are whole.
        """
        chosen = sorted(whole)[: self.batch_size]
        if len(chosen) < self.batch_size:
            return None
        if chosen == sorted(admitted_at)[: self.batch_size]:
            return chosen
        left = set(admitted_at) - set(chosen)
        for last in range(step, step + self.max_staleness):
            due = sum(admitted_at[number] + self.max_staleness <= last for number in left)
            if due > (last - step) * self.batch_size:
                return None
        return chosen


def shared_out(new: Iterable[int], busy: Iterable[int], num_processes: int) -> dict[int, int]:
    """The process that decodes each new group: one that has the fewest groups to decode.

    Args:
      new: the numbers of the groups.
      busy: the process of each group that is being decoded already.
    """
    groups = collections.Counter(dict.fromkeys(range(num_processes), 0))
    groups.update(busy)
    owners = {}
    for number in new:
        owners[number] = min(groups, key=lambda process: (groups[process], process))
        groups[owners[number]] += 1
    return owners
