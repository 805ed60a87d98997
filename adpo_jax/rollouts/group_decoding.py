"""Decoding groups in flight: the protocol, and the decoding of groups with one turn."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Protocol

import numpy as np

from adpo_jax.engine.requests import Sample
from adpo_jax.engine.session import Session, Turn
from adpo_jax.records import Completions, Prompts
from adpo_jax.rollouts.completing import Answers
from adpo_jax.rollouts.flight import FlyingGroup, FlyingSample, is_whole
from adpo_jax.rollouts.numbering import Numbering


class Decoding(Protocol):
    """Groups that are decoded in an iteration ahead of the update, on this process.

    Attributes:
      waited: seconds in which nothing was decoded, since answers of tools were waited for.
      stats: counts of the session, and of calls of tools where there are any.
    """

    waited: float

    @property
    def stats(self) -> dict[str, int]: ...

    def begin(self, groups: Mapping[int, FlyingGroup]) -> None:
        """Has groups decoded, by their numbers."""

    def decode(self, steps: int) -> None:
        """Decodes so many steps, or until nothing is left to decode."""

    def whole(self) -> list[int]:
        """The numbers of the groups whose samples have all ended."""

    def answers(self, numbers: Sequence[int], stats: dict[str, int]) -> Answers:
        """The completions of whole groups, with these counts."""

    def forget(self, numbers: Iterable[int]) -> None:
        """Forgets whole groups."""

    def left(self) -> dict[int, FlyingGroup]:
        """Ends the session; the groups with the tokens that they have."""


class GroupDecoding:
    """Groups with one turn that are decoded in a session."""

    def __init__(self, session: Session):
        self._session = session
        self._samples: dict[int, list[FlyingSample]] = {}
        # Of the session's samples: the group's number, and the sample's number in it.
        self._places: dict[Sample, tuple[int, int]] = {}

    def submit(self, number: int, prompt: list[int], keys: np.ndarray, group: FlyingGroup) -> None:
        """Has the samples of a group decoded that have not ended."""
        assert number not in self._samples
        self._samples[number] = list(group)
        going_on = [i for i, sample in enumerate(group) if not sample.finish_reason]
        if going_on:
            begun = [group[i].tokens for i in going_on]
            request = self._session.submit(prompt, begun, keys=keys[going_on])
            places = ((number, i) for i in going_on)
            self._places |= dict(zip(request.samples, places, strict=True))

    def whole(self) -> list[int]:
        """The numbers of the groups whose samples have all ended."""
        return [number for number, group in self._samples.items() if is_whole(group)]

    def group(self, number: int) -> FlyingGroup:
        """A group as it is now."""
        return tuple(self._samples[number])

    def take(self, number: int) -> FlyingGroup:
        """A whole group, which is forgotten."""
        return tuple(self._samples.pop(number))

    def decode(self, steps: int) -> None:
        """Decodes so many steps, or until nothing is left to decode."""
        session = self._session
        until = session.stats["steps"] + steps
        while session.num_decoding and session.stats["steps"] < until:
            for turn in session.step():
                self._add(turn)
                session.end(turn.sample)

    def _add(self, turn: Turn) -> None:
        number, i = self._places[turn.sample]
        if number in self._samples:
            sample = self._samples[number][i].sampled(turn, self._session.version)
            self._samples[number][i] = sample.ended(turn.finish_reason or "")

    def left(self) -> dict[int, FlyingGroup]:
        """Ends the session; the groups with the tokens that they have."""
        for turn in self._session.leave():
            self._add(turn)
        return {number: tuple(group) for number, group in self._samples.items()}


class OneTurnDecoding(GroupDecoding):
    """A `Decoding` of groups with one turn.

    Args:
      answers_of: prompts and their completions -> the answers.
    """

    waited = 0.0

    def __init__(
        self,
        session: Session,
        numbering: Numbering,
        answers_of: Callable[[Prompts, Completions], Answers],
    ):
        super().__init__(session)
        self._numbering, self._answers_of = numbering, answers_of

    @property
    def stats(self) -> dict[str, int]:
        return dict(self._session.stats)

    def begin(self, groups: Mapping[int, FlyingGroup]) -> None:
        prompts = self._numbering.prompts(groups).token_ids if groups else []
        for (number, group), prompt in zip(groups.items(), prompts, strict=True):
            self.submit(number, prompt, self._numbering.keys(number), group)

    def answers(self, numbers: Sequence[int], stats: dict[str, int]) -> Answers:
        completions = [[sample.completion() for sample in self.group(n)] for n in numbers]
        return self._answers_of(self._numbering.prompts(numbers), Completions(completions, stats))

    def forget(self, numbers: Iterable[int]) -> None:
        for number in numbers:
            self._samples.pop(number, None)
