"""Groups in conversation with environments that are decoded ahead of the update.

An environment lives on while its sample waits for the next iteration, and what tools answer
meanwhile is there when that begins. A resumed run makes the calls of samples in flight again, in
environments of the same seed.

What an iteration trains on does not depend on a clock. So an answer is not taken when it comes, but
when so many decode steps have been done beside it; then it is waited for. Where nothing decodes,
all answers are waited for.
"""

import time
from collections.abc import Iterable, Mapping, Sequence

from adpo_jax.engine.requests import Sample
from adpo_jax.engine.sampling import SamplingParams
from adpo_jax.engine.session import Session
from adpo_jax.records import Prompts
from adpo_jax.rollouts.completing import Answers
from adpo_jax.rollouts.conversations import COUNTS, Conversations, Place
from adpo_jax.rollouts.flight import FlyingGroup, is_whole
from adpo_jax.rollouts.in_turns import InTurns
from adpo_jax.rollouts.numbering import Numbering
from adpo_jax.rollouts.rows import group_seeds, rows_of


class TurnsAhead:
    """State kept between iterations, mainly the environments of samples in flight.

    Attributes:
      overlap: decode steps beside a call before its answer is taken.
    """

    def __init__(self, in_turns: InTurns, numbering: Numbering, sampling: SamplingParams):
        self.conversations: Conversations = in_turns.conversations()
        self.numbering, self.sampling = numbering, sampling
        self.overlap = in_turns.environments.overlap_steps

    def start(self, session: Session) -> "TurnsDecoding":
        """Starts the decoding of an iteration."""
        self.conversations.counts.clear()
        return TurnsDecoding(session, self)


class TurnsDecoding:
    """A `group_decoding.Decoding` of groups in conversation."""

    def __init__(self, session: Session, ahead: TurnsAhead):
        self._session, self._version = session, session.version
        self._conversations, self._under_way = ahead.conversations, ahead.conversations.under_way
        self._numbering, self._sampling = ahead.numbering, ahead.sampling
        self._overlap = ahead.overlap
        self._prompts: dict[int, Prompts] = {}
        self._places: dict[Sample, Place] = {}
        self._samples: dict[Place, Sample] = {}
        # What has been asked of tools and environments, with the step at which it was.
        self._asked: list[tuple[int, Place]] = []
        self.waited = 0.0

    @property
    def stats(self) -> dict[str, int]:
        counts = dict.fromkeys(COUNTS, 0) | self._conversations.counts
        return self._session.stats | counts

    def begin(self, groups: Mapping[int, FlyingGroup]) -> None:
        """See `Decoding`.

        Raises:
          EnvironmentFailed: an environment failed in `reset`.
          SourceError: for samples in flight of other environments.
        """
        if not groups:
            return
        prompts = self._numbering.prompts(groups)
        rows = dict(zip(groups, rows_of(prompts)))
        seeds = {
            number: group_seeds(self._numbering.key(number), prompts.select([i]))[0]
            for i, number in enumerate(groups)
        }
        samples = {(n, i): sample for n, group in groups.items() for i, sample in enumerate(group)}
        said = {n: group[0].told.observation for n, group in groups.items() if group[0].told}
        new = [place for place in samples if place[0] not in said]
        for place, sample in samples.items():
            if place in self._under_way and self._under_way[place].sample is not sample:
                self._conversations.give_back(place)
        absent = {
            place: sample
            for place, sample in samples.items()
            if place[0] in said and place not in self._under_way
        }
        began = time.perf_counter()
        said |= self._conversations.begin(rows, seeds, new)
        self._conversations.resume(rows, seeds, absent)
        self.waited += time.perf_counter() - began
        prompts = self._conversations.prompts_with(prompts, [said[number] for number in groups])
        self._prompts |= {n: prompts.select([i]) for i, n in enumerate(groups)}
        self._go_on([place for place in samples if self._under_way[place].calls is not None])
        for number, group in groups.items():
            self._submit(number, len(group))

    def _submit(self, number: int, n: int) -> None:
        going_on = [(number, i) for i in range(n) if not self._under_way[number, i].is_over]
        if not going_on:
            return
        flying = [self._under_way[place].sample for place in going_on]
        turns = [len(self._under_way[place].texts) for place in going_on]
        request = self._session.submit(
            self._prompts[number].token_ids[0],
            [sample.tokens for sample in flying],
            keys=self._numbering.keys(number)[[i for _, i in going_on]],
            of_turn=[len(sample.turn_tokens(turn)) for sample, turn in zip(flying, turns)],
        )
        for place, sample in zip(going_on, request.samples, strict=True):
            self._places[sample], self._samples[place] = place, sample

    def decode(self, steps: int) -> None:
        session = self._session
        until = session.stats["steps"] + steps
        while (session.num_decoding or self._asked) and session.stats["steps"] < until:
            for turn in session.step():
                place = self._places[turn.sample]
                self._conversations.take(place, turn, self._version)
                if self._under_way[place].is_over:
                    session.end(turn.sample)
                self._asked.append((session.stats["steps"], place))
            now, nothing_decodes = session.stats["steps"], not session.num_decoding
            due = [p for at, p in self._asked if nothing_decodes or at + self._overlap <= now]
            gone = set(due)
            self._asked = [(at, place) for at, place in self._asked if place not in gone]
            self._go_on(due)

    def _go_on(self, places: list[Place]) -> None:
        """Waits for what these conversations have asked, and has those go on that do."""
        self._wait(places)
        answered = [place for place in places if self._under_way[place].is_answered]
        steps = self._session.stats["steps"]
        for place, ids in self._conversations.go_on(answered, self._room, self._version):
            sample = self._samples.get(place)  # none before the group is submitted
            if ids is None:
                self._asked.append((steps, place))
                if sample is not None:
                    self._session.end(sample)
            elif sample is not None:
                self._session.go_on(sample, ids)

    def _room(self, place: Place) -> int:
        return self._sampling.max_tokens - len(self._under_way[place].sample.tokens)

    def _wait(self, places: Iterable[Place]) -> None:
        """Waits until these conversations are answered, or their environments have ended."""
        began = time.perf_counter()
        for place in places:
            conversation = self._under_way[place]
            while not (conversation.is_answered or conversation.sample.finish_reason):
                self._conversations.hear()
        self.waited += time.perf_counter() - began

    def whole(self) -> list[int]:
        """The numbers of the groups whose samples and environments have all ended.

        An environment counts when its answer is due: it may have been heard before.
        """
        waited_for = {number for _, (number, _) in self._asked}
        others = [number for number in self._prompts if number not in waited_for]
        return [number for number in others if is_whole(self._group(number))]

    def _group(self, number: int) -> FlyingGroup:
        """A group as it is now."""
        n = self._sampling.n
        return tuple(self._under_way[number, i].sample for i in range(n))

    def left(self) -> dict[int, FlyingGroup]:
        self._wait([place for _, place in self._asked if self._under_way[place].is_over])
        for turn in self._session.leave():
            place = self._places[turn.sample]
            if self._under_way[place].calls is None:
                self._conversations.interrupt(place, turn, self._version)
        return {number: self._group(number) for number in self._prompts}

    def answers(self, numbers: Sequence[int], stats: dict[str, int]) -> Answers:
        n = self._sampling.n
        found = [
            self._conversations.group_answers(
                self._prompts[number], [(number, i) for i in range(n)]
            )
            for number in numbers
        ]
        return Answers.concatenate(found, stats)

    def forget(self, numbers: Iterable[int]) -> None:
        """See `Decoding`; their environments are free for others."""
        for number in numbers:
            if self._prompts.pop(number, None) is not None:
                for i in range(self._sampling.n):
                    self._conversations.give_back((number, i))
