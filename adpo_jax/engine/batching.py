"""The batching loop: requests come in, and their new tokens come out dispatch by dispatch.

    loop = DecodeLoop(verbs, params, sizing, settings)
    loop.submit(Request(prompt, sampling, keys))
    while loop.busy:
        for new in loop.step():
            new.sample, new.tokens, new.log_probs, new.finish_reason

Each step fills free slots from the queue, fits the sizes of the batch to the live samples, runs
some decode steps in one dispatch, and takes their tokens. Who drives the loop decides how large the
batch is, and whether its samples share their settings: `generation` (a call whose requests are all
known), `session` (samples in turns), `continuous` (requests that come and go) with `patience`.

Samples may be decoded in turns: a sample whose turn has ended gets no slot until it goes on. Its
memory stays meanwhile in a row of its own (`past_rows`) or in pages, or in the plain version it is
made again.

The ring may be shorter than the longest completion. Then the tokens of long samples move on into
pages, and where these run short the youngest samples wait (`pages`).

The loop knows no text. The model's side of a step is in `verbs` and `sampling`.

Letters: B slots, T tokens.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Protocol

import jax
import numpy as np

from adpo_jax.engine import past as past_lib
from adpo_jax.engine.decode_state import (
    DecodeState,
    Prefixes,
    ResultTokens,
    Sizes,
    Slots,
    with_before,
)
from adpo_jax.engine.keeper import EndedTurn, Keeper
from adpo_jax.engine.kv_cache import KV, PageSizes
from adpo_jax.engine.pages import Pager
from adpo_jax.engine.past import Piece
from adpo_jax.engine.past_rows import PastKeeper
from adpo_jax.engine.prompt_rows import PromptRows
from adpo_jax.engine.reading import Reader
from adpo_jax.engine.requests import NewTokens, Request, Sample
from adpo_jax.engine.sampling import Knobs, Method
from adpo_jax.engine.schedule import Schedule, Start
from adpo_jax.engine.verbs import Verbs


class Sizing(Protocol):
    """Decides how large the batch is, from the samples that wait and those that are alive.

    Attributes:
      steps: the most decode steps of a dispatch.
      most_columns: columns of the ring at its longest. They hold the longest completion, or with
        pages twice `steps` and more.
      pages: the pool of pages of all its sizes; None where the ring holds the longest completion.
    """

    steps: int
    most_columns: int
    pages: PageSizes | None

    def room(self, now: Sizes | None, schedule: Schedule, most_in_ring: int) -> Sizes | None:
        """The sizes in which waiting samples start; None if no memory is needed any more.

        Args:
          now: the present sizes, None where there is no state yet.
          most_in_ring: tokens in the ring of the live sample with most of them there.
        """

    def fitted(self, now: Sizes, schedule: Schedule, most_in_ring: int) -> Sizes:
        """The sizes for the next dispatch, after all samples that can start have started."""

    def smaller(self, live: int) -> int:
        """The largest batch smaller than `live` that is worth a resize; 0 for none."""


class TurnSizing(Sizing, Protocol):
    """How large the batch is whose samples go on after their turns, in past rows."""

    def with_past(self, sizes: Sizes, longest: int) -> Sizes:
        """The sizes with as many past rows as slots or more, for completions of so many tokens."""


# A function from the sample in each slot (None where it is free) to the settings of the slots: the
# numbers, one for all rows or one a row, and the method that is compiled.
Settings = Callable[[Sequence[Sample | None]], tuple[Knobs, Method]]


class DecodeLoop:
    """Decodes requests in the slots of one batch.

    `cancel` may be called from any thread, all else from one.

    Args:
      params: the policy's parameters.
      num_shards: devices that slots and prefix rows are split over.
      make_state: makes an empty state of given sizes; None for `Verbs.init_decode_state`.
      keeps_memory: whether to remember the ring that the first state began with, for
        `state_to_keep`.
      most_prefilled: (length, count) -> how many of that many prompts go into one prefill; None for
        all that fit one.
      prefill_chunk_size: tokens of a piece in which longer prompts are read (`reading`), a power of
        two; 0 prefills each prompt at once.
      keeps_turns: whether what samples attend to stays when their turns have ended, in pages where
        there are any and else in past rows; else a sample that goes on, or begins with tokens, is
        prefilled again.

    Attributes:
      stats: counts of prefills, decode steps and dispatches; where there are pages, also of
        samples that lost theirs in mid-call ("preempted").
      sizes: the sizes of the present state; None where there is none.
      version: the number of the parameters, 0 for the first ones.
    """

    def __init__(
        self,
        verbs: Verbs,
        params,
        sizing: Sizing | TurnSizing,
        settings: Settings,
        *,
        num_shards: int = 1,
        make_state: Callable[[Sizes], DecodeState] | None = None,
        keeps_memory: bool = False,
        most_prefilled: Callable[[int, int], int] | None = None,
        prefill_chunk_size: int = 0,
        keeps_turns: bool = False,
    ):
        self.params, self.version = verbs.load_params(params), 0
        self.schedule = Schedule(num_shards=num_shards)
        self.stats = dict.fromkeys(
            ("prefill_calls", "prefill_tokens", "dispatches", "steps", "slot_steps", "resizes"), 0
        )
        self.sizes: Sizes | None = None
        self._verbs, self._sizing, self._settings = verbs, sizing, settings
        self._num_shards = num_shards
        self._make_state = make_state or verbs.init_decode_state
        self._state: DecodeState | None = None
        self._any_cancelled = self._in_step = False
        self._retired: list[int] = []  # freed slots that the device still thinks are active
        self._written = 0  # steps since the ring began at its first column
        self._keeps_memory, self._has_moved = keeps_memory, False
        # The ring that the first state began with, remembered while a longer one is in use.
        self._first_ring: KV | None = None
        if sizing.pages is not None:
            self.stats["preempted"] = 0
        self._num_evicted = 0  # before the memory was freed
        self._reader = Reader(verbs, prefill_chunk_size, num_shards)
        self._prompts = PromptRows(verbs, self._reader, num_shards, most_prefilled, self.stats)
        self._keeps_turns = keeps_turns
        self._keeper = self._new_keeper()
        # Samples whose turns ended with the last dispatch; nothing has overwritten them yet.
        self._ended_turns: dict[Sample, EndedTurn] = {}

    @property
    def busy(self) -> bool:
        """Whether anything waits or decodes."""
        return self.schedule.num_waiting > 0 or self.schedule.num_live > 0

    @property
    def num_ready(self) -> int:
        """Waiting samples whose prompts need no more reading."""
        return self.schedule.num_waiting - self.schedule.count(
            lambda request: not self._reader.is_ready(request)
        )

    def may_read(self, request: Request) -> bool:
        """Whether the prompt of a request would be prefilled at once, or is the next to be read."""
        others = (self._reader.in_pieces(queued) for queued in self.schedule.queued)
        return not self._reader.in_pieces(request) or not any(others)

    def submit(self, request: Request, per_row: int | None = None):
        """Queues the samples of a request.

        Args:
          per_row: the most samples that share a prefix row; None for as many as rows are wide.
        """
        fresh = []
        for sample in request.samples:
            if sample.num_tokens and not self._keeps_turns:
                self._begin_again(sample)
            else:
                self._keeper.expect(sample.num_tokens)
                fresh.append(sample)
        if fresh:
            self.schedule.add(request, fresh, per_row)

    def cancel(self, sample: Sample):
        """Ends a sample, which gets no further tokens; its slot is free at the next step."""
        sample.cancelled = self._any_cancelled = True

    def go_on(self, sample: Sample, completion: np.ndarray):
        """Queues a sample whose turn has ended.

        Its random numbers are those of its places in the completion, as if it had never paused.

        Args:
          completion: [T] int32, all of its tokens, those of tools included; at least one.
        """
        sample.completion, sample.num_tokens = completion, len(completion)
        sample.ended = False
        if self._keeps_turns:
            self._keeper.expect(sample.num_tokens)
            self.schedule.resume(sample, sample.request)
        else:
            self._begin_again(sample)

    def _begin_again(self, sample: Sample):
        """Queues a sample as a request whose prompt is all that the sample has so far."""
        request = sample.request
        one = dataclasses.replace(request.sampling, n=1)
        whole = np.concatenate([request.prompt, sample.completion])
        self.schedule.add(Request(whole, one, lambda: request.key_data), [sample])

    def stop(self, sample: Sample, num_tokens: int):
        """Ends a turn after so many tokens of the completion, and drops those that follow."""
        slot = next((slot for slot, live in self.schedule.live() if live is sample), None)
        drops, sample.num_tokens = num_tokens < sample.num_tokens, num_tokens
        if slot is not None:
            self._pause_or_finish(slot, sample)
            self._retired.append(slot)
        elif sample in self._ended_turns:
            ended = self._ended_turns[sample]
            self._ended_turns[sample] = ended._replace(count=sample.age)
        # A state of linear attention holds all tokens that were fed, and cannot go back: the turn
        # is prefilled again, after what the past row holds.
        if drops and self._verbs.layout.linear:
            self._ended_turns.pop(sample, None)

    @property
    def num_evicted(self) -> int:
        """Samples that lost their memory while they waited, and are prefilled again."""
        return self._num_evicted + self._keeper.num_evicted

    def _new_keeper(self) -> Keeper:
        sizing = self._sizing
        if sizing.pages is not None:
            return Pager(self._verbs, self.schedule, sizing.pages, sizing.most_columns)
        return PastKeeper(self._verbs, self.schedule) if self._keeps_turns else Keeper()

    def end(self, sample: Sample):
        """Frees what is kept for a sample whose turn has ended and that does not go on."""
        self._ended_turns.pop(sample, None)
        self.schedule.forget(sample)
        self._keeper.release(sample)

    def _pause_or_finish(self, slot: int, sample: Sample):
        """Takes a sample whose turn has ended out of its slot, for good unless turns are kept."""
        if not self._keeps_turns:
            self._finish(slot, sample)
            return
        sample.ended = True
        self._ended_turns[sample] = EndedTurn(sample, slot, sample.first, sample.age)
        self.schedule.pause(slot)
        self._keeper.pause(sample)

    def _finish(self, slot: int, sample: Sample):
        """Takes a sample out of its slot for good, and frees what is kept for it."""
        sample.ended = True
        self._keeper.release(sample)
        self.schedule.finish(slot)

    def exchange(self, params, version: int):
        """Goes on with other parameters of the same policy, from the next step on.

        The samples that are alive keep the keys and values that the old parameters made. Their
        requests tell the version that began them, and their new tokens the version that sampled
        these. The old parameters are let go before the new ones are copied.
        """
        self.params = None
        self.params, self.version = self._verbs.load_params(params), version

    def _drop_cancelled(self):
        self._any_cancelled = False
        for slot, sample in self.schedule.live():
            if sample.cancelled:
                self._finish(slot, sample)
                self._retired.append(slot)
        for sample in self.schedule.drop(lambda sample: sample.cancelled):
            sample.ended = True
            self._keeper.release(sample)
        self._reader.let_go(self.schedule.queued)

    def step(self) -> list[NewTokens]:
        """Starts waiting samples, decodes some tokens of all live ones, and returns the tokens.

        Raises:
          RuntimeError: after a step that raised anything, until the memory is freed.
        """
        if self._in_step:
            raise RuntimeError(
                "an earlier step failed and may have left samples half begun, so no further one "
                "can run: make a new batch or session, and submit the prompts again"
            )
        self._in_step = True
        found = self._step()
        self._in_step = False
        return found

    def _step(self) -> list[NewTokens]:
        if self._any_cancelled:
            self._drop_cancelled()
        if self._ended_turns:
            self._store_turns()
        if self._state is not None:
            self._leave_ring()
        self._prompts.read(self.params, self.schedule, self.version)
        # Where nothing decodes and all that waits is being read, there is no more to do yet.
        if self.schedule.num_waiting and not (self.schedule.num_live or self.num_ready):
            return []
        most_in_ring = self._most_in_ring()
        self._resize(self._sizing.room(self.sizes, self.schedule, most_in_ring), most_in_ring)
        if self._state is None:
            return []
        self._resize(self._with_past(self.sizes), most_in_ring)
        starts, admitted = self.schedule.start(
            lambda request: (
                len(request.prompt) - 1 <= self.sizes.prefix and self._reader.is_ready(request)
            ),
            self._keeper.try_begin,
        )
        if admitted:
            self._state = self._prompts.fill(self.params, self._state, admitted, self.version)
        self._reader.let_go(self.schedule.queued)
        # This comes before the batch shrinks, since `starts` name the present slots and rows.
        if starts or self._retired:
            self._assign(starts)
        fitted = self._sizing.fitted(self.sizes, self.schedule, most_in_ring)
        self._resize(self._with_past(fitted), most_in_ring)
        return self._decode(most_in_ring)

    def state_to_keep(self) -> DecodeState | None:
        """The memory that the loop began with; None if the batch has moved out of it."""
        if self._has_moved or self._state is None:
            return None
        ring = self._state.ring if self._first_ring is None else self._first_ring
        return self._state._replace(ring=ring)

    def free(self):
        """Forgets all samples and frees the memory."""
        self._num_evicted = self.num_evicted
        self.schedule = Schedule(num_shards=self._num_shards)
        self.sizes = self._state = self._first_ring = None
        self._retired, self._ended_turns, self._in_step = [], {}, False
        self._keeper = self._new_keeper()
        self._reader.let_go(())

    def _most_in_ring(self) -> int:
        """Tokens in the ring of the live sample with most of them there."""
        return max((sample.age for _, sample in self.schedule.live()), default=0)

    # --- sizes

    def _resize(self, sizes: Sizes | None, most_in_ring: int):
        now, schedule = self.sizes, self.schedule
        if sizes == now:
            return
        self.sizes = sizes
        if sizes is None:
            self._state, self._retired = None, []
            schedule.lay_out(0, 0, 1)
        elif now is None:
            schedule.lay_out(sizes.slots, sizes.rows, sizes.width)
            self._state = self._make_state(sizes)
            self._written = 0
        else:
            self.stats["resizes"] += 1
            self._change(now, sizes, most_in_ring)

    def _change(self, now: Sizes, sizes: Sizes, most_in_ring: int):
        """Moves the state into other sizes, one store after the other.

        The old form of a store is freed before the next store is copied.
        """
        slots, columns, rows, width, prefix, *_ = sizes
        schedule, verbs, kept = self.schedule, self._verbs, np.int32(most_in_ring)
        moves = sizes.moves(now)
        if moves:
            self._has_moved, self._first_ring = True, None
        elif self._keeps_memory and not self._has_moved and self._first_ring is None:
            self._first_ring = self._state.ring
        if moves:
            old_slots, old_rows = schedule.lay_out(slots, rows, width)
            members = schedule.members.copy()
            self._state = verbs.resize(self._state, old_slots, members, columns, kept)
            row, rank = schedule.row_of.copy(), schedule.rank_of.copy()
            self._state = verbs.regroup(self._state, old_rows, row, rank)
            self._written, self._retired = most_in_ring, []
        elif columns != now.columns and self._written <= now.columns < columns:
            self._state = verbs.grow(self._state, columns, self._written)
        elif columns != now.columns:
            old_slots, members = np.arange(slots, dtype=np.int32), schedule.members.copy()
            self._state = verbs.resize(self._state, old_slots, members, columns, kept)
            self._written = most_in_ring
        if prefix != now.prefix:
            kv = verbs.with_columns(self._state.prefix.kv, prefix)
            lengths = self._state.prefix.lengths
            self._state = self._state._replace(prefix=Prefixes(kv, lengths))
        self._state = self._keeper.resized(self._state, now, sizes)

    # --- samples that go on

    def _with_past(self, sizes: Sizes) -> Sizes:
        longest = self._keeper.longest
        return self._sizing.with_past(sizes, longest) if longest else sizes

    def _store_turns(self):
        """Copies the turns that have ended, and may go on, from the ring to where they stay."""
        ended = list(self._ended_turns.values())
        self._keeper.expect(max(turn.sample.before + turn.count for turn in ended))
        self._resize(self._with_past(self.sizes), self._most_in_ring())
        self._state, self._ended_turns = self._keeper.keep(self._state, ended), {}

    def _prefill_chunks(self, store: KV, chunks: list[Piece], longest: int) -> KV:
        """The store, past rows or pages, with chunks that are prefilled piece by piece."""
        for pieces in past_lib.in_rounds(chunks, longest):
            store = past_lib.prefill_all(
                self._verbs, self.params, self._state.prefix, store, pieces, self._num_shards
            )
            self.stats["prefill_calls"] += 1
            self.stats["prefill_tokens"] += sum(len(piece.tokens) for piece in pieces)
        return store

    # --- samples that outgrow the ring

    def _leave_ring(self):
        """Moves tokens of long samples into pages, once the ring is nearly full."""
        most, most_in_ring = self._sizing.most_columns, self._most_in_ring()
        if self.sizes.columns < most or most_in_ring + self._sizing.steps <= most:
            return
        self._state, waiting = self._keeper.leave_ring(self._state, self._written)
        self._retired += waiting
        if waiting:
            self.stats["preempted"] += len(waiting)

    # --- samples into slots

    def _assign(self, starts: list[Start]):
        self._state = self._keeper.refilled(self._state, starts, self._prefill_chunks)
        B = self.sizes.slots
        fresh, active = np.zeros(B, bool), np.zeros(B, bool)
        fresh[self._retired] = True
        ints, key_data = np.zeros((5, B), np.int32), np.zeros((B, 2), np.uint32)
        for request, sample, slot, row, rank in starts:
            token, position = request.prompt[-1], len(request.prompt) - 1
            sample.before = sample.num_tokens
            if sample.version is None:
                sample.version = request.version
            # A prompt that is read for a further turn ends with the completion.
            if sample.before and request is sample.request:
                token, position = sample.completion[-1], position + sample.before
            sample.completion = None
            ints[:, slot] = token, position, sample.before, row, rank
            fresh[slot] = active[slot] = True
            key_data[slot] = request.key_data[sample.index]
        token, position, generated, row, rank = ints
        before = None
        if generated.any():
            self._state = self._state._replace(slots=with_before(self._state.slots))
        if self._state.slots.before is not None:
            before = generated.copy()
        slots = Slots(token, position, generated, active, row, rank, key_data, before)
        self._state = self._keeper.started(self._state, starts)
        self._state = self._verbs.assign(self._state, fresh, slots, self.schedule.members.copy())
        self._retired = []

    # --- decoding

    def _decode(self, most_in_ring: int) -> list[NewTokens]:
        live, sizes, steps = self.schedule.live(), self.sizes, self._sizing.steps
        if self.schedule.num_waiting:
            stop_at = len(live) - max(1, sizes.slots // 8)
        else:
            stop_at = self._sizing.smaller(len(live))
        room = steps
        # The slot of a turn that has ended is written on until the dispatch ends, and must not lose
        # the turn's first columns, which are copied then.
        # With pages no slot must lose a column that has not moved on.
        if sizes.columns < self._sizing.most_columns or self._keeper.copies_ring:
            room = sizes.columns - most_in_ring
        in_slot = [held and held.sample for held in self.schedule.in_slot]
        knobs, method = self._settings(in_slot)
        self._state, results = self._verbs.generate(
            self.params,
            self._state,
            knobs,
            method,
            steps,
            np.int32(max(stop_at, 0)),
            np.int32(room),
        )
        for _, sample in live:
            sample.first = (self._written - sample.age) % sizes.columns
        results = jax.device_get(results)
        self._prompts.take_experts()
        done = int(np.sum(results.valid.any(axis=1)))
        self.stats["dispatches"] += 1
        self.stats["steps"] += done
        self.stats["slot_steps"] += done * sizes.slots
        self._written += done
        counts = results.valid.sum(axis=0).tolist()
        stopped = results.stopped.any(axis=0).tolist()
        return [self._new(slot, s, counts[slot], stopped[slot], results) for slot, s in live]

    def _new(
        self, slot: int, sample: Sample, count: int, stopped: bool, results: ResultTokens
    ) -> NewTokens:
        """The new tokens of one sample; a sample that is done is ended."""
        sample.num_tokens += count
        request, finish_reason = sample.request, None
        if stopped or sample.num_tokens >= request.sampling.max_tokens:
            finish_reason = "stop" if stopped else "length"
            self._pause_or_finish(slot, sample)
        else:
            self._keeper.remember(sample, results.tokens[:count, slot])
        alternatives = full = None
        if request.num_alternatives:
            of_slot = (x[:count, slot, : request.num_alternatives] for x in results.alternatives)
            alternatives = tuple(of_slot)
        if results.full_log_probs is not None:
            full = results.full_log_probs[:count, slot]
        experts = None if results.experts is None else results.experts[:count, slot]
        tokens, log_probs = results.tokens[:count, slot], results.log_probs[:count, slot]
        return NewTokens(
            sample, tokens, log_probs, alternatives, finish_reason, full, self.version, experts
        )
