"""Completions in turns: the model calls tools of an environment, and goes on with their answers.

A sample whose turn has ended with calls waits outside of the batch while its tools run, and other
samples decode. What tools answer is appended as token ids that are not trained on. A completion
ends with a turn without calls, with the last turn there may be, at its length limit, or where an
answer would not fit.

Letters: P prompts, G completions of a prompt.
"""

import dataclasses
import queue
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from adpo_jax.engine.engine import Engine
from adpo_jax.engine.sampling import SamplingParams, sample_keys
from adpo_jax.environments.environments import Environments
from adpo_jax.records import Prompts
from adpo_jax.rollouts.completing import Answers, Reading
from adpo_jax.rollouts.conversations import COUNTS, Conversations, Place
from adpo_jax.rollouts.rows import group_seeds, rows_of

# Where nothing decodes, answers are gathered: until none has come for so long, and at most so long,
# for a batch of few samples costs as much as one of many.
_PAUSE_S, _GATHER_S = 0.02, 0.5


@dataclasses.dataclass(frozen=True)
class InTurns:
    """Completes prompts in conversation with their environments; a `completing.Completer`."""

    engine: Engine
    tokenizer: Any
    reading: Reading
    environments: Environments

    def conversations(self) -> Conversations:
        """Room for conversations with the environments."""
        return Conversations(self.tokenizer, self.reading, self.environments)

    def __call__(
        self,
        params,
        prompts: Prompts,
        sampling: SamplingParams,
        key: jax.Array,
        *,
        version: int = 0,
        on_group_done: Callable[[int, Answers], None] | None = None,
    ) -> Answers:
        """See `Completer`.

        Raises:
          EnvironmentFailed: an environment failed in `reset` or `get_reward`.
        """
        seeds = group_seeds(key, prompts)
        # What an environment adds to a prompt decides nothing of how its completions are drawn.
        uids = np.array(seeds, np.uint64).astype(np.uint32)
        keys = np.asarray(sample_keys(key, uids, sampling.n))
        rollout = _Rollout(self.conversations(), sampling.n, len(seeds), version, on_group_done)
        try:
            rollout.reset(prompts, seeds)
            with self.engine.session(params, sampling, key, version=version) as session:
                rollout.run(session, keys)
                return rollout.all_answers(session.stats)
        finally:
            rollout.give_back()


class _Rollout:
    """The completions of one call under way."""

    def __init__(
        self,
        conversations: Conversations,
        n: int,
        num_prompts: int,
        version: int,
        on_group_done: Callable[[int, Answers], None] | None,
    ):
        self._conversations, self._under_way = conversations, conversations.under_way
        self._version, self._on_group_done = version, on_group_done
        self._groups = [[(group, i) for i in range(n)] for group in range(num_prompts)]
        self._left = [n] * num_prompts
        self._done: list[Answers | None] = [None] * num_prompts

    def reset(self, prompts: Prompts, seeds: list[int]) -> None:
        """Resets the environments, and puts what they say into the prompts."""
        rows = dict(enumerate(rows_of(prompts)))
        places = [place for group in self._groups for place in group]
        said = self._conversations.begin(rows, dict(enumerate(seeds)), places)
        self._prompts = self._conversations.prompts_with(prompts, [said[i] for i in rows])

    def give_back(self) -> None:
        """Gives the environments back."""
        for place in list(self._under_way):
            self._conversations.give_back(place)

    def run(self, session, keys: np.ndarray) -> None:
        """Decodes until all completions and their environments have ended.

        Args:
          keys: [P, n, 2] uint32, the keys of the samples.
        """
        place_of = {}
        for ids, places, of_group in zip(self._prompts.token_ids, self._groups, keys, strict=True):
            samples = session.submit(ids, keys=of_group).samples
            place_of |= dict(zip(samples, places, strict=True))
        sample_of = {place: sample for sample, place in place_of.items()}

        def room(place: Place) -> int:
            return session.room(sample_of[place])

        while any(self._left):
            answered = []
            for turn in session.step():
                place = place_of[turn.sample]
                self._conversations.take(place, turn, self._version)
                if self._under_way[place].is_over:
                    session.end(turn.sample)
                elif self._under_way[place].is_answered:  # all of its calls are malformed
                    answered.append(place)
            answered += self._heard(waits=not session.num_decoding and not answered)
            for place, ids in self._conversations.go_on(answered, room, self._version):
                if ids is None:
                    session.end(sample_of[place])
                else:
                    session.go_on(sample_of[place], ids)

    def _heard(self, *, waits: bool) -> list[Place]:
        """Takes the answers that there are; returns the places that are answered with them.

        Args:
          waits: whether to wait for a first one, and a moment for others to decode beside it, since
            nothing else can be done.
        """
        answered, until = [], None
        while any(self._left):
            try:
                if waits and until is None:
                    place = self._conversations.hear()
                else:
                    left = 0.0 if until is None else min(until - time.monotonic(), _PAUSE_S)
                    place = self._conversations.hear(timeout=max(left, 0.0))
            except queue.Empty:
                break
            if waits and until is None:
                until = time.monotonic() + _GATHER_S
            if self._under_way[place].sample.finish_reason:
                self._take_end(place[0])
                if not answered:
                    until = None  # an end lets nothing go on
            elif self._under_way[place].is_answered:
                answered.append(place)
        return answered

    def _take_end(self, group: int) -> None:
        self._left[group] -= 1
        if not self._left[group]:
            prompt = self._prompts.select([group])
            self._done[group] = self._conversations.group_answers(prompt, self._groups[group])
            if self._on_group_done is not None:
                self._on_group_done(group, self._done[group])

    def all_answers(self, stats: dict[str, int]) -> Answers:
        """The completions of all prompts."""
        counts = dict.fromkeys(COUNTS, 0) | self._conversations.counts
        return Answers.concatenate(self._done, stats | counts)
