"""Samples in conversation with their environments: what is asked, and what comes of the answers.

`Conversations` knows no schedule. Those who decode (`in_turns` all at once, `turns_ahead` from one
iteration to the next) decide when an answer is taken, and when a sample goes on with it.

Letters: P prompts, G completions of a prompt.
"""

import collections
import dataclasses
import queue
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from absl import logging

from adpo_jax.engine.session import Turn
from adpo_jax.environments import calls as calls_lib
from adpo_jax.environments.calls import Call
from adpo_jax.environments.contract import Described, EndedEnvironment, error_content
from adpo_jax.environments.environments import Environments
from adpo_jax.environments.pool import Answer, EnvironmentFailed, Lease, failure_text
from adpo_jax.records import Completions, Prompts
from adpo_jax.rewards.model import GIVEN
from adpo_jax.rollouts.completing import Answers, Message, Reading
from adpo_jax.rollouts.flight import FlyingSample, Told
from adpo_jax.rollouts.rows import reset_row
from adpo_jax.rollouts.source import SourceError

# The place of a sample: its group, whatever names that, and its number in the group.
Place = tuple[Hashable, int]

LOST_REWARD = 0.0  # of an environment whose process was killed
_LOSSES = ("timeout", "crash", "lost")
_OTHER_CALLS = (
    "the samples in flight were answered other calls than they made: they are of another model or "
    "environment"
)
# What is counted of tools.
COUNTS = ("tool_calls", "tool_failures", "tool_microseconds")


@dataclasses.dataclass(eq=False)
class Conversation:
    """A sample and its environment.

    Attributes:
      described: its environment.
      sample: its tokens, and what it was told.
      lease: the environment; None where none is needed any more.
      begun_thought: the mark with which the prompt begins a thought that the first turn goes on
        with; "" for none, None for what the template begins every turn with.
      messages: what was said after the prompt.
      texts: what the model wrote, turn by turn.
      calls: those of the turn that has just ended; None where it has not, or ended without.
      answers: what came of them, by their places.
      num_failed: those of them that failed.
      finish_reason: why the last turn ended.
      is_over: whether no further turn comes; the environment may still be asked for its reward.
      attributes: of the environment after its last answer.
    """

    described: Described
    sample: FlyingSample
    lease: Lease | None = None
    begun_thought: str | None = None
    messages: list[Message] = dataclasses.field(default_factory=list)
    texts: list[str] = dataclasses.field(default_factory=list)
    calls: list[Call] | None = None
    answers: dict[int, str] = dataclasses.field(default_factory=dict)
    num_failed: int = 0
    finish_reason: str = "length"
    is_over: bool = False
    attributes: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def is_answered(self) -> bool:
        """Whether all calls of the turn that has just ended are answered."""
        return self.calls is not None and len(self.answers) == len(self.calls)

    @property
    def environment(self) -> EndedEnvironment:
        """The environment after the end."""
        told = self.sample.told
        return EndedEnvironment(self.described.class_name, told.attributes, told.is_lost)

    def note_state(self, answer: Answer) -> None:
        """Notes the state of the environment after an answer: its attributes, or its loss."""
        self.attributes = answer.content.get("attributes", self.attributes)
        if answer.kind in _LOSSES:
            self.tell(is_lost=True, attributes=self.attributes)

    def tell(self, **changes: Any) -> None:
        """Notes what the environment told."""
        told = dataclasses.replace(self.sample.told, **changes)
        self.sample = dataclasses.replace(self.sample, told=told)


class Conversations:
    """Conversations under way, by their places.

    Attributes:
      under_way: the conversations.
      counts: of calls of tools, by the names in `COUNTS`.
    """

    def __init__(self, tokenizer: Any, reading: Reading, environments: Environments):
        self._tokenizer, self._reading, self._environments = tokenizer, reading, environments
        self._pool, self._template = environments.pool, environments.template
        # Marks of calls may be special tokens, which rewards do not always read.
        self._with_marks = dataclasses.replace(reading, skip_special_tokens=False)
        self._answers: queue.SimpleQueue[Answer] = queue.SimpleQueue()
        self.under_way: dict[Place, Conversation] = {}
        self.counts: collections.Counter[str] = collections.Counter()

    # --- beginnings and ends

    def begin(
        self, rows: Mapping[Hashable, dict], seeds: Mapping[Hashable, int], places: Sequence[Place]
    ) -> dict[Hashable, str | None]:
        """Begins conversations of these places, in environments that are reset for them.

        Args:
          rows, seeds: the row of the data and the seed of each group.

        Returns:
          What the environments of each group said at their reset; None for nothing.

        Raises:
          EnvironmentFailed: a reset failed, or the environments of a group said different things.
        """
        resets: queue.SimpleQueue[Answer] = queue.SimpleQueue()
        for place in places:
            self._open(place, rows[place[0]], FlyingSample.empty(Told()))
            self._reset(place, rows[place[0]], seeds[place[0]], resets, place)
        said: dict[Hashable, set[str | None]] = collections.defaultdict(set)
        for _ in places:
            answer = resets.get()
            self._refuse_failure("reset", answer)
            said[answer.tag[0]].add(answer.content["said"])
            self.under_way[answer.tag].note_state(answer)
            self.under_way[answer.tag].tell(observation=answer.content["said"])
        return {group: _the_same(found) for group, found in said.items()}

    def resume(
        self,
        rows: Mapping[Hashable, dict],
        seeds: Mapping[Hashable, int],
        samples: Mapping[Place, FlyingSample],
    ) -> None:
        """Takes up conversations of samples in flight whose environments are not there.

        What a sample did in its environment is done again in another one, so an environment that
        answers alike is then as it was. The sample keeps what it was told, and calls that were not
        answered yet are asked.

        Raises:
          EnvironmentFailed: a reset failed.
          SourceError: for samples of other environments.
        """
        again: queue.SimpleQueue[Answer] = queue.SimpleQueue()
        num_requests = 0
        unanswered: dict[Place, list[Call]] = {}
        for place, sample in samples.items():
            row = rows[place[0]]
            self._open(place, row, sample, leases=_needs_environment(sample))
            conversation = self.under_way[place]
            answered, last = self._read_again(conversation)
            if conversation.lease is not None:
                tag = place, "reset", sample.told.observation
                self._reset(place, row, seeds[place[0]], again, tag)
                for call, text in answered:
                    self._pool.ask(*self._call(conversation, call), again, (place, "call", text))
                num_requests += 1 + len(answered)
            if sample.finish_reason:
                conversation.is_over, conversation.finish_reason = True, sample.finish_reason
            elif last:
                unanswered[place] = last
        for _ in range(num_requests):
            self._hear_again(again.get())
        for place, calls in unanswered.items():
            self._ask(place, calls)

    def _read_again(self, conversation: Conversation) -> tuple[list[tuple[Call, str]], list[Call]]:
        """Reads the turns of a sample in flight that have ended, and notes how they were answered.

        Returns:
          The calls of answered turns, without malformed ones, with the answer to each; and all
          calls of the last turn, if that is not answered.

        Raises:
          SourceError: for answers to other calls than there are.
        """
        told, answered = conversation.sample.told, []
        has_ended = bool(conversation.sample.finish_reason)
        for number, texts in enumerate(told.answers):
            calls = self._read(conversation, number)
            if not calls or len(calls) != len(texts):
                raise SourceError(_OTHER_CALLS)
            self._note(conversation, calls, texts)
            answered += [(call, text) for call, text in zip(calls, texts) if not call.error]
        last = []
        if has_ended or told.asked:
            last = self._read(conversation, len(told.answers))
            if not (last or has_ended):
                raise SourceError(_OTHER_CALLS)
        return answered, last

    def _hear_again(self, answer: Answer) -> None:
        """Takes an answer to what was asked before; the sample keeps what it was told then."""
        place, verb, text = answer.tag
        if verb == "reset":
            self._refuse_failure(verb, answer)
        self.under_way[place].note_state(answer)
        said = self._words(answer)
        # A checkpoint may hold an answer in full, where it is cut now.
        if text != said and (verb == "reset" or text != self._template.cut(said)):
            logging.log_first_n(
                logging.WARNING,
                "an environment answers otherwise when its calls are made again, as a resumed "
                "run makes them; its samples go on with what they were told before",
                1,
            )

    def _open(self, place: Place, row: dict, sample: FlyingSample, *, leases: bool = True) -> None:
        environments = self._environments
        lease = self._pool.lease(environments.name_of(row)) if leases else None
        self.under_way[place] = Conversation(
            environments.of_row(row),
            sample,
            lease,
            begun_thought=self.begun_thought(row),
            attributes=sample.told.attributes,
        )

    def begun_thought(self, row: Mapping[str, Any]) -> str | None:
        """As of `Conversation`, where the prompt of a row ends with words of the assistant."""
        prompt = row.get(self._reading.prompt_key)
        last = prompt[-1] if isinstance(prompt, list) and prompt else None
        if not isinstance(last, Mapping) or last.get("role") != "assistant":
            return None
        said = last.get("content") or ""
        if not isinstance(said, str):
            said = "".join(str(part.get("text") or "") for part in said)
        return calls_lib.begun_thought(self._template.form, said, continued=said)

    def _reset(
        self, place: Place, row: dict, seed: int, answers: queue.SimpleQueue, tag: Any
    ) -> None:
        lease = self.under_way[place].lease
        row = reset_row(row, self._reading.prompt_key, lease.name)
        self._pool.ask(lease, "reset", {"row": row, "seed": seed}, answers, tag)

    def prompts_with(self, prompts: Prompts, said: Sequence[str | None]) -> Prompts:
        """The prompts with what the environments of each said at their reset."""
        if all(text is None for text in said):
            return prompts
        observed = self._environments.prompt_ids(prompts.columns, said)
        ids = [
            of_data if text is None else of_observed
            for of_data, of_observed, text in zip(prompts.token_ids, observed, said, strict=True)
        ]
        return Prompts(ids, prompts.columns)

    def give_back(self, place: Place) -> None:
        """Forgets a conversation; its environment is free for another one."""
        lease = self.under_way.pop(place).lease
        if lease is not None:
            self._pool.give_back(lease)

    # --- turns

    def take(self, place: Place, turn: Turn, version: int) -> None:
        """Takes a turn that has ended, and asks tools or, where no turn follows, the environment.

        Args:
          version: of the weights that sampled it.
        """
        conversation = self.under_way[place]
        number = len(conversation.texts)
        conversation.sample = conversation.sample.sampled(turn, version, number)
        conversation.finish_reason = turn.finish_reason
        calls = self._read(conversation, number)
        goes_on = turn.finish_reason == "stop" and number + 1 < self._environments.max_turns
        if calls and goes_on:
            self._ask(place, calls)
        else:
            self.end(place)

    def _read(self, conversation: Conversation, number: int) -> list[Call]:
        """Reads a turn as a message; returns its calls, malformed ones among them."""
        tokens = conversation.sample.turn_tokens(number)
        (shown,) = self._reading.decoded(self._tokenizer, [tokens])
        (text,) = self._with_marks.decoded(self._tokenizer, [tokens])
        tools = conversation.described.parameters
        thought = self._template.thought if number else conversation.begun_thought
        thought = self._template.thought if thought is None else thought
        calls = calls_lib.calls_in(self._template.form, thought + text, tools)
        conversation.texts.append(shown)
        conversation.messages.append({"role": "assistant", "content": shown} | _as_message(calls))
        return calls

    def _ask(self, place: Place, calls: list[Call]) -> None:
        """Has the calls of a turn carried out; malformed ones are answered at once."""
        conversation = self.under_way[place]
        conversation.calls, conversation.answers, conversation.num_failed = calls, {}, 0
        conversation.tell(asked=True)
        for number, call in enumerate(calls):
            if call.error:
                conversation.num_failed += 1
                conversation.answers[number] = error_content(call.error)
            elif conversation.sample.told.is_lost:
                tag = conversation, place, number
                self._answers.put(Answer(tag, {}, "", "lost", 0.0))
            else:
                request = self._call(conversation, call)
                self._pool.ask(*request, self._answers, (conversation, place, number))

    def _call(self, conversation: Conversation, call: Call) -> tuple[Lease, str, dict]:
        """What the pool is asked for a call."""
        return conversation.lease, "call", {"tool": call.name, "arguments": call.arguments}

    def end(self, place: Place, finish_reason: str | None = None) -> None:
        """Lets no further turn come, and asks the environment for its reward."""
        conversation = self.under_way[place]
        conversation.finish_reason = finish_reason or conversation.finish_reason
        conversation.calls, conversation.is_over = None, True
        conversation.tell(asked=False)
        tag = conversation, place
        if conversation.sample.told.is_lost:
            self._answers.put(Answer(tag, {}, "", "lost", 0.0))
        else:
            self._pool.ask(conversation.lease, "end", {}, self._answers, tag)

    def interrupt(self, place: Place, turn: Turn, version: int) -> None:
        """Takes the tokens of a turn that has not ended; arguments as of `take`."""
        conversation = self.under_way[place]
        if len(turn.tokens):
            number = len(conversation.texts)
            conversation.sample = conversation.sample.sampled(turn, version, number)

    # --- answers

    def hear(self, timeout: float | None = None) -> Place:
        """Takes an answer.

        Args:
          timeout: seconds to wait for one; None for as long as it takes, 0 for no waiting.

        Returns:
          The place of the conversation. It can go on where it `is_answered`; it has ended where its
          sample has a `finish_reason`.

        Raises:
          queue.Empty: when there is none.
          EnvironmentFailed: the environment failed at its end.
        """
        while True:
            answer = self._answers.get(block=timeout != 0, timeout=timeout or None)
            conversation, place, *number = answer.tag
            if self.under_way.get(place) is conversation:
                break
        conversation.note_state(answer)
        if number:
            self.counts["tool_microseconds"] += int(answer.seconds * 1e6)
            conversation.num_failed += bool(answer.kind)
            conversation.answers[number[0]] = self._words(answer)
        else:
            self._ended(conversation, answer)
        return place

    def _words(self, answer: Answer) -> str:
        """What the model reads of an answer."""
        if not answer.kind:
            return answer.content["said"]
        too_long = f"the tool took longer than {self._pool.timeout_s:g} s and was stopped"
        return error_content(
            {
                "timeout": too_long,
                "cancelled": too_long,
                "crash": "the tool ended in a crash",
                "lost": "the tool is no longer there, since an earlier call was stopped",
            }.get(answer.kind, answer.error)
        )

    def _ended(self, conversation: Conversation, answer: Answer) -> None:
        if answer.kind not in (*_LOSSES, "cancelled"):
            self._refuse_failure("end", answer)
        reward = LOST_REWARD if answer.kind else answer.content["reward"]
        if reward is not None and not np.isfinite(reward):
            raise EnvironmentFailed(
                f"get_reward of {conversation.described.class_name} gave {reward}, no finite number"
            )
        conversation.tell(reward=reward, attributes=conversation.attributes)
        conversation.sample = conversation.sample.ended(conversation.finish_reason)

    def go_on(
        self, places: Sequence[Place], room: Callable[[Place], int], version: int
    ) -> Iterator[tuple[Place, list[int] | None]]:
        """Has conversations go on whose calls are all answered.

        Args:
          room: tokens that the completion at a place may still have.
          version: of the weights that go on.

        Yields:
          Each place with the token ids of the answers; with None where they do not fit, so that the
          completion has ended.
        """
        found = [self.under_way[place] for place in places]
        told = [[self._template.cut(c.answers[i]) for i in range(len(c.calls))] for c in found]
        named = [
            [(call.name, text) for call, text in zip(c.calls, texts)]
            for c, texts in zip(found, told)
        ]
        all_ids = self._template.answer_ids(named)
        for place, conversation, texts, ids in zip(places, found, told, all_ids, strict=True):
            conversation.answers = {}  # in full they may be long
            # They count here, which is no matter of when answers come.
            self.counts["tool_calls"] += len(texts)
            self.counts["tool_failures"] += conversation.num_failed
            if len(ids) >= room(place):
                self.end(place, "length")
                yield place, None
                continue
            self._note(conversation, conversation.calls, texts)
            number = len(conversation.texts) - 1
            conversation.sample = conversation.sample.answered(ids, version, number)
            answers = (*conversation.sample.told.answers, tuple(texts))
            conversation.tell(answers=answers, asked=False)
            conversation.calls = None
            yield place, ids

    def _note(self, conversation: Conversation, calls: Sequence[Call], told: Sequence[str]) -> None:
        """Notes answers as messages."""
        conversation.messages += [
            {"role": "tool", "name": call.name, "content": text}
            for call, text in zip(calls, told, strict=True)
        ]

    # --- what comes of them

    def group_answers(self, prompts: Prompts, places: Sequence[Place]) -> Answers:
        """What the samples of a prompt, which have ended, answer to it.

        Args:
          prompts: the prompt alone.
        """
        group = [self.under_way[place] for place in places]
        transcripts = [conversation.messages for conversation in group]
        columns: dict[str, list] = {
            "environments": [conversation.environment for conversation in group],
            "transcripts": transcripts,
        }
        for name in self._environments.rewards:
            columns[GIVEN + name] = [
                c.sample.told.reward if c.described.class_name == name else None for c in group
            ]
        completions = Completions([[c.sample.completion() for c in group]])
        texts = ["\n".join(conversation.texts) for conversation in group]
        return Answers(prompts, completions, texts, transcripts, columns)

    def _refuse_failure(self, verb: str, answer: Answer) -> None:
        if answer.kind:
            raise EnvironmentFailed(failure_text(verb, answer, self._pool.timeout_s))


def _needs_environment(sample: FlyingSample) -> bool:
    return not sample.finish_reason and not sample.told.is_lost


def _as_message(found: list[Call]) -> dict:
    """The calls of a turn as a message has them; {} for none."""
    made = [
        {"type": "function", "function": {"name": call.name, "arguments": call.arguments}}
        for call in found
        if not call.error
    ]
    return {"tool_calls": made} if made else {}


def _the_same(said: set[str | None]) -> str | None:
    """What all environments of a group said at their reset.

    Raises:
      EnvironmentFailed: they said different things, and a group has one prompt.
    """
    if len(said) > 1:
        two = sorted(map(str, said))[:2]
        raise EnvironmentFailed(
            "reset returned different texts for the samples of one prompt, which are compared with "
            f"each other and share it: {two[0][:200]!r} and {two[1][:200]!r}. Let it depend on the "
            "row, or on Python's or NumPy's global random numbers, which are the same for them"
        )
    (text,) = said
    return text
