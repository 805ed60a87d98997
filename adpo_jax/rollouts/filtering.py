"""Dynamic sampling: groups whose rewards are all equal teach nothing, so others take their place.

An iteration samples batch after batch of prompts until it has as many groups with a spread as a
batch has prompts. An iteration always trains on as many groups as a batch has: surplus groups wait
for the next iteration, and groups without a spread fill the places that are still empty after the
last attempt.

The policy of the iteration before sampled the groups that waited, which the loss does not know. The
waiting groups and the number of batches drawn are kept with every checkpoint, so that a resumed run
goes on as if it had not stopped.

Source: Yu et al. 2025, "DAPO", arXiv 2503.14476, section 3.2, which drops the surplus.
"""

import dataclasses
import json
import os
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import numpy as np

from adpo_jax.records import GradedGroups, Prompts
from adpo_jax.rollouts import recording
from adpo_jax.rollouts.sampler import logged_metrics, reward_metrics, rollout_metrics
from adpo_jax.rollouts.source import Source, SourceError, is_left_over

# Metrics of an iteration that are taken over all batches sampled in it.
OF_ALL_ATTEMPTS = (
    "rollout/tokens_per_s",
    "rollout/preempted",
    "reward/timeouts",
    "reward/crashes",
    "reward/unparsed_frac",
    "reward/grader_faults",
    "tools/calls",
    "tools/failures",
    "tools/seconds",
)

# Counts and seconds that come with each of these batches, and are summed.
_SUMMED = ("ahead/waited", "samplers/taken_back", "samplers/doubles")


@dataclasses.dataclass(frozen=True)
class _State:
    """The state that an iteration leaves to the next."""

    drawn: int = 0  # batches of prompts so far
    surplus: GradedGroups | None = None


class GroupFilter(Source):
    """Groups sampled on the spot that have a spread, as far as the attempts suffice.

    Args:
      sample: (step from 0, attempt from 0, prompts, parameters) -> graded completions.
      prompts_of: number of a batch, from 0 -> its prompts.
      folder: the folder that `save` writes in.
      num_generations: completions of a group.
      full_log_probs: whether the sampler truncates, so that completions have these.
      max_attempts: the most batches sampled in an iteration.
      min_reward_std: a group whose standard deviation (ddof=1) is below it has no spread.
    """

    def __init__(
        self,
        sample: Callable[[int, int, Prompts, Any], GradedGroups],
        prompts_of: Callable[[int], Prompts],
        folder: Path,
        *,
        num_generations: int,
        full_log_probs: bool = False,
        max_attempts: int,
        min_reward_std: float = 0.0,
    ):
        self._sample, self._prompts_of, self._folder = sample, prompts_of, folder
        self._num_generations, self._truncates = num_generations, full_log_probs
        self._max_attempts, self._min_reward_std = max_attempts, min_reward_std
        self._states: dict[int, _State] = {0: _State()}  # by iterations done

    def next(self, step: int, params) -> GradedGroups:
        """The groups of the iteration after `step` iterations, with the metrics of the filter.

        Raises:
          SourceError: when the state that iteration `step` left was not kept.
        """
        before = self._state(step)
        found = [before.surplus] if before.surplus else []
        dropped, attempts = [], []
        for attempt in range(self._max_attempts):
            prompts = self._prompts_of(before.drawn + attempt)
            groups = self._sample(step, attempt, prompts, params)
            attempts.append(groups)
            spread = has_spread(groups.rewards, self._min_reward_std)
            found.append(groups.select(np.flatnonzero(spread)))
            dropped.append(groups.select(np.flatnonzero(~spread)))
            if sum(map(len, found)) >= len(prompts):
                break
        P, num_found = len(prompts), sum(map(len, found))
        candidates = GradedGroups.concatenate([*found, *dropped])
        surplus = candidates.select(range(P, num_found)) if num_found > P else None
        if surplus:  # recordings hold no extras, and a resumed run goes on alike
            scores = dataclasses.replace(surplus.scores, extras={})
            surplus = dataclasses.replace(surplus, scores=scores, transcripts=None)
        self._states = {
            step: before,
            step + 1: _State(before.drawn + attempt + 1, surplus),
        }
        sampled = GradedGroups.concatenate(attempts)
        # Attempts follow each other, but `concatenate` takes its parts as sampled at the same time.
        seconds = np.sum([groups.seconds for groups in attempts], axis=0).tolist()
        sampled = dataclasses.replace(sampled, seconds=tuple(seconds))
        metrics = groups.metrics | {
            name: sum(each.metrics[name] for each in attempts)
            for name in _SUMMED
            if name in groups.metrics
        }
        metrics |= {
            "filter/attempts": attempt + 1.0,
            "filter/dropped_frac": sum(map(len, dropped)) / len(sampled),
            "filter/fillers": float(max(P - num_found, 0)),
            "filter/carried": float(max(num_found - P, 0)),
            "filter/sampled_reward": float(sampled.scores.total.mean()),
        }
        # These metrics cover all groups that were sampled in this time, the others the chosen ones.
        of_all = rollout_metrics(sampled) | reward_metrics(sampled.scores, sampled.rewards.shape[1])
        metrics |= {
            name: of_all[name] for name in OF_ALL_ATTEMPTS if name in of_all
        } | logged_metrics(sampled.scores)
        chosen = candidates.select(range(P))
        # How many of these went wrong is not known: a recording says nothing of it.
        chosen = dataclasses.replace(chosen, scores=dataclasses.replace(chosen.scores, counts={}))
        return dataclasses.replace(chosen, seconds=sampled.seconds, metrics=metrics)

    def save(self, step: int, *, kept: Collection[int] = ()) -> None:
        """Saves the state that iteration `step` left to the next; what is left over goes."""
        state = self._state(step)
        self._folder.mkdir(parents=True, exist_ok=True)
        if state.surplus is not None:
            recording.write(self._folder, step, state.surplus)
        content = {"drawn": state.drawn, "surplus": state.surplus is not None}
        path = self._folder / f"{step:06d}.json"
        new = path.with_name(f"{path.name}.new")
        new.write_text(json.dumps(content) + "\n")
        os.replace(new, path)  # it may be there, and a kill must not leave half of it
        for path in self._folder.iterdir():
            number = path.name.partition(".")[0]
            if number.isdecimal() and is_left_over(int(number), kept):
                path.unlink()

    def check(self, step: int) -> None:
        """Checks that the state that iteration `step` left was kept, and is of such groups.

        Args:
          step: iterations done; below 0 the run is in the supervised stage.

        Raises:
          SourceError: when it was not kept, or has groups of another size or of other data.
        """
        surplus = self._state(max(step, 0)).surplus
        if surplus is None:
            return
        first, size = self._prompts_of(0), surplus.rewards.shape[1]
        names = [sorted(prompts.columns) for prompts in (surplus.prompts, first)]
        of = f"algorithm.filter_groups: the groups that iteration {step} left over"
        if size != self._num_generations:
            raise SourceError(
                f"{of} have {size} completions each, and algorithm.num_generations is "
                f"{self._num_generations}; set it as it was, or start again in another folder"
            )
        truncated = {c.full_log_probs is not None for c in surplus.completions.flat}
        if truncated != {self._truncates}:
            did = "does not truncate" if self._truncates else "truncates"
            raise SourceError(
                f"{of} are of a sampler that {did}; set actor_rollout_ref.rollout.top_k, top_p and "
                "min_p as they were, or start again in another folder"
            )
        if names[0] != names[1]:
            raise SourceError(
                f"{of} are of data with the columns {', '.join(names[0])}, and the data has "
                f"{', '.join(names[1])}; give the data as it was, or start again in another folder"
            )

    def restore(self, step: int) -> None:
        """Takes up the state that iteration `step` left; errors as of `check`."""
        self.check(step)

    def _state(self, step: int) -> _State:
        if step not in self._states:
            path = self._folder / f"{step:06d}.json"
            try:
                content = json.loads(path.read_text())
            except (FileNotFoundError, ValueError) as error:
                reason = "missing" if isinstance(error, FileNotFoundError) else "no JSON"
                raise SourceError(
                    f"algorithm.filter_groups: {path} is {reason}, in which iteration {step} left "
                    "its surplus. A run that began without it goes on without it; set it as it "
                    "was, or start again in another folder"
                ) from error
            surplus = recording.read(self._folder, step) if content["surplus"] else None
            self._states = {step: _State(content["drawn"], surplus)}
        return self._states[step]


def has_spread(rewards_PG: np.ndarray, min_reward_std: float) -> np.ndarray:
    """[P] bool, whether the rewards of each group differ, and by so much (ddof=1)."""
    std_P = rewards_PG.std(axis=1, ddof=1)
    return (np.ptp(rewards_PG, axis=1) > 0) & (std_P >= min_reward_std)
