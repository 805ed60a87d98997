"""Samples that are decoded in turns: a model that calls tools, and reads what they answer.

    with engine.session(params, sampling, key) as session:
        request = session.submit(prompt)
        while session.busy:
            for turn in session.step():
                answer = ...  # of a tool, from turn.tokens; None to end the sample
                if answer is None:
                    session.end(turn.sample)
                else:
                    session.go_on(turn.sample, answer)

A turn ends where a completion of `Engine.generate` ends: at a stop token, a stop string or the
length limit, which holds for the completion as a whole, the tokens of tools included. The sample
then waits for `go_on` or `end`, and takes part in no step while it does. A sample may also begin
with tokens that it has already (`begun`).

The token at a place of a completion is drawn from the same random numbers whatever the number of
turns and dispatches, the samples beside it and the time that its tools take. So the same key gives
the same transcript, up to the rounding of matrix products.

Letters: n samples of a prompt, T tokens.
"""

import array
import collections
import dataclasses
import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import jax
import numpy as np

from adpo_jax.engine.batching import DecodeLoop
from adpo_jax.engine.decode_state import Sizes
from adpo_jax.engine.generation import (
    Growing,
    columns_for,
    fitted_to,
    shared_settings,
    tokens_to_stop_string,
)
from adpo_jax.engine.kv_cache import PageSizes
from adpo_jax.engine.requests import NewTokens, Request, Sample
from adpo_jax.engine.sampling import SamplingParams, prompt_uids, sample_keys
from adpo_jax.engine.schedule import Schedule
from adpo_jax.engine.sizes import column_buckets, largest_below, length_bucket, rows_of_a_group

if TYPE_CHECKING:
    from adpo_jax.engine.engine import Engine


class Turn(NamedTuple):
    """What a sample said from where it began or went on to where its turn ended.

    Attributes:
      sample: the sample, with its `request` and its `index` among the samples of the request.
      tokens: [T] int32, the sampled tokens alone, the stop token included.
      log_probs: [T] float32 in nats, under the distribution that each token was sampled from.
      full_log_probs: [T] float32, tempered and not truncated; None unless asked for.
      finish_reason: "stop", "length", or None in a turn that `leave` interrupted.
      experts: [T, L, k], those that each token went through; None unless asked for. Those of the
        prompt are with the sample's request.
    """

    sample: Sample
    tokens: np.ndarray
    log_probs: np.ndarray
    full_log_probs: np.ndarray | None
    finish_reason: str | None
    experts: np.ndarray | None = None


@dataclasses.dataclass
class _Conversation:
    """A sample that has not ended: its completion so far, and the turn under way."""

    tokens: array.array  # without those of the turn under way, unless they were begun
    turn: Growing
    waits: bool = False  # for `go_on` or `end`
    begun: int = 0  # tokens of the turn under way that stand last in `tokens`

    def completion(self) -> np.ndarray:
        """[T] int32, all of its tokens."""
        return np.array(self.tokens + self.turn.tokens, np.int32)


class SessionSizing:
    """The sizes of a session's batch; see `batching.Sizing`.

    The batch begins with the sizes that suit the requests there are, and grows when more come. It
    shrinks, where it does, when no sample is left that could need the slots.

    Args:
      keeps_turns: whether samples keep what they attend to, in pages where the engine plans for
        them and else in past rows; else each has a prefix row of its own, for its whole transcript.

    Attributes:
      num_samples: samples that have not ended.
      num_paused: those of them that wait for `go_on` or `end`.
    """

    def __init__(self, engine: "Engine", sampling: SamplingParams, keeps_turns: bool):
        self._engine, self._max_tokens = engine, sampling.max_tokens
        self._n = sampling.n if keeps_turns else 1
        # The states of samples that wait have rows of the past, and no pages.
        pages = keeps_turns and not engine.policy.config.linear_attention
        self._paging = engine.paging_for(sampling.max_tokens) if pages else None
        self.steps = engine.steps_per_dispatch
        if self._paging is None:
            self._columns = column_buckets(sampling.max_tokens, engine.column_stages)
        else:
            self._columns = self._paging.columns(engine.column_stages)
            self.steps = min(self.steps, self._columns[0] // 2)
        self._row = engine.plan.row_tokens  # of each store
        in_rows = keeps_turns and self._paging is None
        self._past = self.most_columns + self._row if in_rows else 0
        self._longest = engine.max_prompt_length + (0 if keeps_turns else sampling.max_tokens)
        self.num_samples = self.num_paused = 0

    @property
    def most_columns(self) -> int:
        return self._columns[-1]

    def room(self, now: Sizes | None, schedule: Schedule, most_in_ring: int) -> Sizes | None:
        if not schedule.num_waiting:
            return now
        longest = max(len(group.prompt) for group, *_ in schedule.waiting(1)) - 1
        prefix = length_bucket(longest, self._longest)
        if now is not None:
            prefix = max(prefix, now.prefix)
        groups = -(-(schedule.num_live + schedule.num_waiting) // self._n)
        # Where memory is short the rows are planned for the longest prompts, which may come later.
        limited = self._engine.plan.most_tokens is not None
        planned = length_bucket(self._longest - 1, self._longest)
        slots, rows = self._engine.sizes_for(
            groups,
            self._n,
            self.most_columns,
            planned if limited else prefix,
            lambda slots: self._pool_tokens + slots * self._past,
        )
        if rows < 1:
            each = f"each takes twice {self.most_columns + self._row} tokens beside its prompt"
            if self._paging is not None:
                each = f"each takes {self.most_columns} tokens and its pages beside its prompt"
            elif self._engine.paging_for(self._max_tokens) is not None:
                each += (
                    ", since expected_response_length plans for pages, which samples in turns of a "
                    "model with linear attention, or that keep no turns, do not have"
                )
            raise ValueError(
                f"the memory holds {self._engine.plan.most_tokens} tokens of keys and values, too "
                f"few for samples in turns: {each}, which has {planned}. Raise "
                "gpu_memory_utilization, or lower the lengths"
            )
        if now is None:
            width = -(-self._n // rows_of_a_group(groups, self._n, self._shards))
            columns = columns_for(self._columns, 0, self.steps)
            return Sizes(slots, columns, rows, width, prefix, pages=self.pages)
        return now._replace(slots=max(slots, now.slots), rows=max(rows, now.rows), prefix=prefix)

    def fitted(self, now: Sizes, schedule: Schedule, most_in_ring: int) -> Sizes:
        columns, slots = columns_for(self._columns, most_in_ring, self.steps), now.slots
        if not schedule.num_waiting:
            wanted = schedule.needed_slots + self.num_paused
            slots = min((s for s in self._engine.smaller_sizes if s >= wanted), default=slots)
        return fitted_to(now, slots, columns, schedule, now.width)

    def with_past(self, sizes: Sizes, longest: int) -> Sizes:
        plan, columns = self._engine.plan, next(c for c in self._columns if c >= longest)
        rows = sizes.slots
        if self.num_samples > sizes.slots:
            ring = sizes.slots * (self.most_columns + self._row)
            prefixes = sizes.rows * (sizes.prefix + self._row)
            needed = plan.copied.tokens(ring, prefixes) + 2 * rows * self._past
            rows *= 1 if plan.most_tokens is not None and needed > plan.most_tokens else 2
        rows = max(rows, sizes.past_rows)
        return sizes._replace(past_rows=rows, past=max(columns, sizes.past))

    @property
    def _shards(self) -> int:
        return self._engine.shards

    @property
    def _pool_tokens(self) -> int:
        """Tokens that the pages hold; there are as many for a small batch as for a large one."""
        return self._paging.tokens(self._engine.num_slots) if self._paging else 0

    @property
    def pages(self) -> PageSizes | None:
        paging = self._paging
        return paging and paging.sizes(self._engine.num_slots)

    def smaller(self, live: int) -> int:
        return largest_below(self._engine.smaller_sizes, live)


class Session:
    """Samples of one set of weights that are decoded in turns; `Engine.session` makes it.

    Attributes:
      version: iterations done by the weights, for the records made of the turns.
    """

    def __init__(
        self,
        engine: "Engine",
        params,
        sampling: SamplingParams,
        key: jax.Array,
        *,
        version: int = 0,
        keeps_turns: bool = True,
    ):
        engine.checked([np.zeros(1, np.int32)], sampling)
        self.version, self._engine, self._sampling, self._key = version, engine, sampling, key
        self._sizing = SessionSizing(engine, sampling, keeps_turns)
        self._loop = DecodeLoop(
            engine.verbs,
            params,
            self._sizing,
            shared_settings(sampling),
            num_shards=engine.shards,
            make_state=engine.new_state,
            keeps_turns=keeps_turns,
            prefill_chunk_size=engine.prefill_chunk_size,
        )
        self._conversations: dict[Sample, _Conversation] = {}
        self._seen: collections.Counter[bytes] = collections.Counter()

    def __enter__(self) -> "Session":
        return self

    def __exit__(self, *_):
        self.close()

    @property
    def stats(self) -> dict[str, int]:
        """Counts of prefills, decode steps and dispatches, and of samples that lost their memory.

        A sample that was evicted while it waited is prefilled again when it goes on.
        """
        return self._loop.stats | {"evicted": self._loop.num_evicted}

    @property
    def busy(self) -> bool:
        """Whether any sample has not ended: it decodes, or waits for `go_on` or `end`."""
        return bool(self._conversations)

    @property
    def num_decoding(self) -> int:
        """The samples that `step` decodes, now or when a slot is free; 0 where it does nothing."""
        return len(self._conversations) - self.num_waiting

    @property
    def num_waiting(self) -> int:
        """The samples whose turn has ended, and that wait for `go_on` or `end`."""
        return self._sizing.num_paused

    def room(self, sample: Sample) -> int:
        """Tokens left of `max_tokens`, which limits the completion as a whole."""
        return self._sampling.max_tokens - len(self._of(sample).completion())

    def submit(
        self,
        prompt: Sequence[int],
        begun: Sequence[Sequence[int]] | None = None,
        *,
        keys: np.ndarray | None = None,
        of_turn: Sequence[int] | None = None,
    ) -> Request:
        """Queues `sampling.n` samples of a prompt.

        Args:
          prompt: token ids.
          begun: tokens that each sample has already, one list a sample; empty for a sample that
            begins. There may be fewer samples than n, but not more.
          keys: [n or more, 2] uint32, the keys of the samples, as `request.key_data` of an earlier
            session gives them; None to make them of the session's key and the prompt.
          of_turn: how many of each sample's `begun` tokens belong to the turn that goes on, for
            stop strings that began in them; None for all.

        Returns:
          The request; its `samples` are what turns refer to.

        Raises:
          ValueError: for a prompt or tokens that the engine was not made for.
        """
        (prompt,) = self._engine.checked([prompt], self._sampling)
        sampling = self._sampling
        if begun is not None:
            if not 1 <= len(begun) <= sampling.n:
                raise ValueError(
                    f"begun has the tokens of 1 to {sampling.n} samples (n); given {len(begun)}"
                )
            begun = [self._tokens(tokens, sampling.max_tokens) for tokens in begun]
            sampling = dataclasses.replace(sampling, n=len(begun))
        request = Request(prompt, sampling, self._keys(prompt, keys))
        for sample in request.samples:
            self._conversations[sample] = _Conversation(array.array("i"), Growing())
        of_turn = of_turn or [len(tokens) for tokens in begun or ()]
        for sample, tokens, count in zip(request.samples, begun or (), of_turn):
            conversation = self._conversations[sample]
            conversation.tokens.extend(tokens.tolist())
            conversation.begun = count
            sample.num_tokens, sample.completion = len(tokens), tokens
        self._loop.submit(request)
        return request

    def step(self) -> list[Turn]:
        """Runs one dispatch, and returns the turns that ended with it.

        It returns at once where no sample decodes.
        """
        if not self.num_decoding:
            return []
        self._sizing.num_samples = len(self._conversations)
        turns = [self._take(new) for new in self._loop.step()]
        return [turn for turn in turns if turn is not None]

    def go_on(self, sample: Sample, tokens: Sequence[int] = ()):
        """Appends tokens that were not sampled, such as a tool's answer, and decodes a next turn.

        Args:
          sample: a sample whose turn has ended.
          tokens: fewer than `room(sample)` token ids.

        Raises:
          ValueError: for a sample whose turn has not ended, and for tokens that do not fit.
        """
        conversation = self._waiting(sample)
        tokens = self._tokens(tokens, self.room(sample))
        conversation.tokens.extend(conversation.turn.tokens)
        conversation.tokens.extend(tokens.tolist())
        conversation.turn, conversation.waits, conversation.begun = Growing(), False, 0
        self._sizing.num_paused -= 1
        self._loop.go_on(sample, conversation.completion())

    def end(self, sample: Sample):
        """Ends a sample whose turn has ended; its memory is free."""
        self._waiting(sample)
        self._sizing.num_paused -= 1
        self._loop.end(sample)
        del self._conversations[sample]

    def leave(self) -> list[Turn]:
        """Ends the session.

        Returns:
          For every sample that has not ended, in the order in which they were submitted, the turn
          under way with the tokens it has so far. A sample that waited for `go_on` has no tokens in
          it, since its last turn was returned before.
        """
        left = [
            _turn(sample, Growing() if c.waits else c.turn, None, self._sampling)
            for sample, c in self._conversations.items()
        ]
        self.close()
        return left

    def close(self):
        """Drops all samples and frees the memory."""
        self._conversations.clear()
        self._sizing.num_paused = 0
        self._loop.free()

    def _take(self, new: NewTokens) -> Turn | None:
        """Takes the new tokens of a sample; returns its turn if that has ended with them."""
        sample, count, finish_reason = new.sample, len(new.tokens), new.finish_reason
        conversation, sampling = self._of(sample), self._sampling
        old, turn = conversation.tokens, conversation.turn
        if sampling.stop:
            num_before = len(old) + len(turn.tokens)
            of_turn = old[len(old) - conversation.begun :] + turn.tokens
            at_string = tokens_to_stop_string(
                self._engine.detokenize, sampling, of_turn, new.tokens, num_before
            )
            if at_string is not None:
                count, finish_reason = at_string, "stop"
                self._loop.stop(sample, num_before + count)
        turn.take(new, count)
        if finish_reason is None:
            return None
        conversation.waits = True
        self._sizing.num_paused += 1
        return _turn(sample, turn, finish_reason, sampling)

    def _of(self, sample: Sample) -> _Conversation:
        conversation = self._conversations.get(sample)
        if conversation is None:
            raise ValueError("the sample has ended, or belongs to another session")
        return conversation

    def _waiting(self, sample: Sample) -> _Conversation:
        conversation = self._of(sample)
        if not conversation.waits:
            raise ValueError("the turn of the sample has not ended: `step` returns it when it has")
        return conversation

    def _tokens(self, tokens: Sequence[int], room: int) -> np.ndarray:
        """Tokens that are appended to a completion, [T] int32."""
        found = np.asarray(tokens, np.int32) if not len(tokens) else np.asarray(tokens)
        if len(found) >= room:
            raise ValueError(
                f"a completion has room for {room} tokens of max_tokens "
                f"{self._sampling.max_tokens}, and needs one for what is sampled next; given "
                f"{len(found)} tokens to append. Cut them, or end the sample"
            )
        return self._engine.checked_tokens(found, "the list of tokens to append")

    def _keys(self, prompt: np.ndarray, keys: np.ndarray | None):
        if keys is not None:
            keys = np.asarray(keys, np.uint32)
            return lambda: keys
        seen = self._seen[prompt.tobytes()]
        self._seen[prompt.tobytes()] += 1
        return functools.partial(_keys, self._key, prompt, self._sampling.n, seen)


def _keys(key: jax.Array, prompt: np.ndarray, n: int, seen: int) -> np.ndarray:
    """[n, 2] uint32, the keys of `Engine.generate` for the prompt where it stands `seen` before."""
    return np.asarray(sample_keys(key, prompt_uids([prompt], [seen]), n))[0]


def _turn(
    sample: Sample, turn: Growing, finish_reason: str | None, sampling: SamplingParams
) -> Turn:
    full = np.array(turn.full_log_probs, np.float32) if sampling.full_log_probs else None
    log_probs = np.array(turn.log_probs, np.float32)
    tokens, experts = np.array(turn.tokens, np.int32), None
    if sampling.routed_experts and turn.experts:
        experts = np.concatenate(turn.experts)
    return Turn(sample, tokens, log_probs, full, finish_reason, experts)
