"""Completions in turns: the model calls tools of an environment, and goes on with their answers.

A sample whose turn has ended with calls waits outside of the batch while its tools run, and other
samples decode. What tools answer is appended as token ids that are not trained on. A completion
ends with a turn without calls, with the last turn there may be, at its length limit, or where an
answer would not fit.

Letters: P prompts, G completions of a prompt, T tokens.
"""

import collections
import dataclasses
import queue
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from adpo_jax.engine.engine import Engine
from adpo_jax.engine.sampling import SamplingParams
from adpo_jax.environments import calls as calls_lib
from adpo_jax.environments.calls import Call
from adpo_jax.environments.contract import Described, EndedEnvironment, error_content
from adpo_jax.environments.environments import Environments
from adpo_jax.environments.pool import Answer, EnvironmentFailed, Lease, failure_text
from adpo_jax.records import Completion, Completions, Prompts
from adpo_jax.rewards.model import GIVEN
from adpo_jax.rollouts.completing import Answers, Message, Reading
from adpo_jax.rollouts.rows import group_seeds, reset_row, rows_of

# Where nothing decodes, answers are gathered: until none has come for so long, and at most so long,
# for a batch of few samples costs as much as one of many.
_PAUSE_S, _GATHER_S = 0.02, 0.5

_LOST_REWARD = 0.0  # of an environment whose process was killed


@dataclasses.dataclass
class _Growing:
    """A completion under way.

    Attributes:
      pieces: (tokens, log-probs, full log-probs or None, whether sampled, the turn) of each part.
      calls: those of the turn that has just ended; None where it has not.
      answers: what came of them, by their places.
    """

    lease: Lease
    described: Described
    pieces: list[tuple] = dataclasses.field(default_factory=list)
    messages: list[Message] = dataclasses.field(default_factory=list)
    texts: list[str] = dataclasses.field(default_factory=list)
    calls: list[Call] | None = None
    answers: dict[int, str] = dataclasses.field(default_factory=dict)
    finish_reason: str = "length"
    num_turns: int = 0
    reward: float | None = None
    environment: EndedEnvironment | None = None

    def completion(self, version: int) -> Completion:
        """The record of it."""
        tokens, log_probs, full, sampled, turns = zip(*self.pieces)
        sizes = [len(part) for part in tokens]
        trained = np.repeat(np.array(sampled, bool), sizes)
        return Completion(
            tokens=np.concatenate(tokens).astype(np.int32),
            log_probs=np.concatenate(log_probs).astype(np.float32),
            trained=trained,
            versions=np.full(len(trained), version, np.int32),
            turns=np.repeat(np.array(turns, np.int16), sizes),
            finish_reason=self.finish_reason,
            full_log_probs=None if full[0] is None else np.concatenate(full).astype(np.float32),
        )


@dataclasses.dataclass(frozen=True)
class InTurns:
    """Completes prompts in conversation with their environments; a `completing.Completer`."""

    engine: Engine
    tokenizer: Any
    reading: Reading
    environments: Environments

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
        rollout = _Rollout(self, prompts, sampling, key, version, on_group_done)
        try:
            rollout.reset()
            with self.engine.session(params, sampling, key, version=version) as session:
                rollout.run(session)
                return rollout.all_answers(session.stats)
        finally:
            rollout.give_back()


class _Rollout:
    """The completions of one call under way."""

    def __init__(self, parts: InTurns, prompts: Prompts, sampling, key, version, on_group_done):
        self._parts, self._environments = parts, parts.environments
        self._pool, self._template = parts.environments.pool, parts.environments.template
        self._sampling, self._version, self._on_group_done = sampling, version, on_group_done
        self._answers: queue.SimpleQueue[Answer] = queue.SimpleQueue()
        self._counts: collections.Counter[str] = collections.Counter()
        ids = [list(row) for row in prompts.token_ids]
        self._rows = rows_of(prompts)
        self._seeds = group_seeds(key, ids)
        self._prompts = Prompts(ids, prompts.columns)
        self._groups: list[list[_Growing]] = []
        self._left: list[int] = []
        self._done: list[Answers | None] = [None] * len(prompts)

    # --- resets

    def reset(self) -> None:
        """Leases and resets the environments, and puts what they say into the prompts."""
        environments, G = self._environments, self._sampling.n
        for row in self._rows:
            name, described = environments.name_of(row), environments.of_row(row)
            self._groups.append([_Growing(self._pool.lease(name), described) for _ in range(G)])
            self._left.append(G)
        for place, group in enumerate(self._groups):
            row = reset_row(self._rows[place], self._parts.reading.prompt_key, group[0].lease.name)
            for index, growing in enumerate(group):
                arguments = {"row": row, "seed": self._seeds[place]}
                self._pool.ask(growing.lease, "reset", arguments, self._answers, (place, index))
        said: list[dict[int, str | None]] = [{} for _ in self._groups]
        for _ in range(len(self._groups) * G):
            answer = self._answers.get()
            self._refuse_failure("reset", answer)
            place, index = answer.tag
            said[place][index] = answer.content["said"]
        observations = [_the_same(found, self._rows[place]) for place, found in enumerate(said)]
        if any(text is not None for text in observations):
            ids = environments.prompt_ids(self._prompts.columns, observations)
            ids = [
                of_observed if text is not None else of_data
                for of_data, of_observed, text in zip(self._prompts.token_ids, ids, observations)
            ]
            self._prompts = Prompts(ids, self._prompts.columns)

    def give_back(self) -> None:
        """Gives the environments back."""
        for group in self._groups:
            for growing in group:
                self._pool.give_back(growing.lease)

    def _refuse_failure(self, verb: str, answer: Answer) -> None:
        if answer.kind:
            raise EnvironmentFailed(failure_text(verb, answer, self._pool.timeout_s))

    # --- turns

    def run(self, session) -> None:
        """Decodes until all completions and their environments have ended."""
        place_of, sample_of = {}, {}
        for place, ids in enumerate(self._prompts.token_ids):
            for index, sample in enumerate(session.submit(ids).samples):
                place_of[sample] = place, index
                sample_of[place, index] = sample
        while any(self._left):
            told = []
            for turn in session.step():
                place, index = place_of[turn.sample]
                growing = self._groups[place][index]
                self._take(growing, turn)
                if growing.calls is None:
                    session.end(turn.sample)
                    self._end(place, index)
                else:
                    self._call(place, index)
                    if len(growing.answers) == len(growing.calls):  # all of them malformed
                        told.append((place, index))
            told += self._arrived(waits=not session.num_decoding and not told)
            if told:
                self._go_on(session, told, sample_of)

    def _take(self, growing: _Growing, turn) -> None:
        """Takes a turn; its `calls` are None where the completion ends with it."""
        growing.pieces.append(
            (turn.tokens, turn.log_probs, turn.full_log_probs, True, growing.num_turns)
        )
        growing.num_turns += 1
        growing.finish_reason = turn.finish_reason
        parts = self._parts
        (shown,) = parts.reading.decoded(parts.tokenizer, [turn.tokens])
        # Marks of calls may be special tokens, which rewards do not always read.
        (text,) = dataclasses.replace(parts.reading, skip_special_tokens=False).decoded(
            parts.tokenizer, [turn.tokens]
        )
        found = calls_lib.calls_in(self._template.form, text, growing.described.tool_names)
        growing.texts.append(shown)
        growing.messages.append({"role": "assistant", "content": shown} | _as_message(found))
        goes_on = turn.finish_reason == "stop" and growing.num_turns < self._environments.max_turns
        growing.calls, growing.answers = (found if found and goes_on else None), {}

    def _call(self, place: int, index: int) -> None:
        """Has the calls of a turn carried out; malformed ones are answered at once."""
        growing = self._groups[place][index]
        for number, call in enumerate(growing.calls):
            self._counts["tool_calls"] += 1
            if call.error:
                self._counts["tool_failures"] += 1
                growing.answers[number] = error_content(call.error)
                continue
            arguments = {"tool": call.name, "arguments": call.arguments}
            self._pool.ask(growing.lease, "call", arguments, self._answers, (place, index, number))

    def _arrived(self, *, waits: bool) -> list[tuple[int, int]]:
        """Takes the answers that there are; returns the completions whose calls are all answered.

        Args:
          waits: whether to wait for a first one, and a moment for others to decode beside it, since
            nothing else can be done.
        """
        told, until = [], None
        while any(self._left):
            try:
                if waits and until is None:
                    answer = self._answers.get()
                else:
                    left = 0.0 if until is None else min(until - time.monotonic(), _PAUSE_S)
                    answer = (
                        self._answers.get(timeout=left)
                        if left > 0
                        else (self._answers.get_nowait())
                    )
            except queue.Empty:
                break
            if waits and until is None:
                until = time.monotonic() + _GATHER_S
            place, index, *number = answer.tag
            growing = self._groups[place][index]
            if not number:
                self._ended(place, index, answer)
                if not told:
                    until = None  # an end lets nothing go on
                continue
            self._counts["tool_microseconds"] += int(answer.seconds * 1e6)
            growing.answers[number[0]] = self._words(answer)
            if len(growing.answers) == len(growing.calls):
                told.append((place, index))
        return told

    def _words(self, answer: Answer) -> str:
        """What the model reads of an answer."""
        if not answer.kind:
            return answer.content["said"]
        self._counts["tool_failures"] += 1
        seconds = self._pool.timeout_s
        return error_content(
            {
                "timeout": f"the tool took longer than {seconds:g} s and was stopped",
                "crash": "the tool ended in a crash",
                "lost": "the tool is no longer there, since an earlier call was stopped",
            }.get(answer.kind, answer.error)
        )

    def _go_on(self, session, told: list[tuple[int, int]], sample_of: dict) -> None:
        """Appends what tools answered, and has the completions go on that it fits into."""
        named = []
        for place, index in told:
            growing = self._groups[place][index]
            named.append([(call.name, growing.answers[i]) for i, call in enumerate(growing.calls)])
        for (place, index), answers, ids in zip(told, named, self._template.answer_ids(named)):
            growing, sample = self._groups[place][index], sample_of[place, index]
            growing.calls = None
            if len(ids) >= session.room(sample):
                growing.finish_reason = "length"
                session.end(sample)
                self._end(place, index)
                continue
            zeros = np.zeros(len(ids), np.float32)
            full = None if growing.pieces[0][2] is None else zeros
            growing.pieces.append((np.array(ids), zeros, full, False, growing.num_turns - 1))
            growing.messages += [
                {"role": "tool", "name": name, "content": self._template.cut(text)}
                for name, text in answers
            ]
            session.go_on(sample, ids)

    # --- ends

    def _end(self, place: int, index: int) -> None:
        """Asks the environment of an ended completion for its reward."""
        lease = self._groups[place][index].lease
        self._pool.ask(lease, "end", {}, self._answers, (place, index))

    def _ended(self, place: int, index: int, answer: Answer) -> None:
        growing = self._groups[place][index]
        name, is_lost = growing.described.class_name, answer.kind in ("lost", "timeout", "crash")
        if not is_lost:
            self._refuse_failure("end", answer)
        growing.environment = EndedEnvironment(name, answer.content.get("attributes", {}), is_lost)
        growing.reward = _LOST_REWARD if is_lost else answer.content["reward"]
        if growing.reward is not None and not np.isfinite(growing.reward):
            raise EnvironmentFailed(f"get_reward of {name} gave {growing.reward}, no finite number")
        self._left[place] -= 1
        if not self._left[place]:
            self._done[place] = self._group_answers(place)
            if self._on_group_done is not None:
                self._on_group_done(place, self._done[place])

    def _group_answers(self, place: int) -> Answers:
        group = self._groups[place]
        columns: dict[str, list] = {
            "environments": [growing.environment for growing in group],
            "transcripts": [growing.messages for growing in group],
        }
        for name in self._environments.rewards:
            columns[GIVEN + name] = [
                growing.reward if growing.described.class_name == name else None
                for growing in group
            ]
        completions = Completions([[growing.completion(self._version) for growing in group]])
        texts = ["\n".join(growing.texts) for growing in group]
        return Answers(
            self._prompts.select([place]), completions, texts, columns["transcripts"], columns
        )

    def all_answers(self, stats: dict[str, int]) -> Answers:
        """The completions of all prompts."""
        counts = dict.fromkeys(("tool_calls", "tool_failures", "tool_microseconds"), 0)
        groups = [answers.completions[0] for answers in self._done]
        names = self._done[0].columns if self._done else ()
        return Answers(
            self._prompts,
            Completions(groups, stats | counts | self._counts),
            [text for answers in self._done for text in answers.texts],
            [messages for answers in self._done for messages in answers.transcripts],
            {n: [x for answers in self._done for x in answers.columns[n]] for n in names},
        )


def _as_message(found: list[Call]) -> dict:
    """The calls of a turn as a message has them; {} for none."""
    made = [
        {"type": "function", "function": {"name": call.name, "arguments": call.arguments}}
        for call in found
        if not call.error
    ]
    return {"tool_calls": made} if made else {}


def _the_same(said: dict[int, str | None], row: dict) -> str | None:
    """What all environments of a group said at their reset.

    Raises:
      EnvironmentFailed: they said different things, and a group has one prompt.
    """
    different = set(said.values())
    if len(different) > 1:
        two = sorted(map(str, different))[:2]
        raise EnvironmentFailed(
            "reset returned different texts for the samples of one prompt, which are compared with "
            f"each other and share it: {two[0][:200]!r} and {two[1][:200]!r}. Let it depend on the "
            "row, or on Python's or NumPy's global random numbers, which are the same for them"
        )
    return different.pop()
