"""Continuous batching of requests that come and go while others decode: the engine for a server.

    batch = ContinuousBatch(engine, params)
    samples = batch.submit(prompt, SamplingParams(n=2, temperature=0.7), seed=1)
    while batch.busy:
        for new in batch.step():
            new.sample, new.tokens, new.log_probs, new.finish_reason

Each sample has settings of its own. With the same seed it is the one that `Engine.generate` gives
for `jax.random.key(seed)`, whatever runs beside it.

Other than in `generation`, whose groups and settings are known from the start, every sample has a
prefix row of its own (row i belongs to slot i). Batch, ring and prefix rows grow through a few
sizes as the load asks for it, and shrink when it is gone.

Left out: text and stop strings (`text_stream`).

Letters: B slots, T tokens, A alternatives.
"""

import collections
import dataclasses
import functools
import threading
from typing import NamedTuple

import jax
import numpy as np

from adpo_jax import cache_plan, generation
from adpo_jax import schedule as schedule_lib
from adpo_jax.decode import DecodeState, Prefixes, ResultTokens, Slots
from adpo_jax.engine import Engine
from adpo_jax.sampling import Knobs, Method, SamplingParams

# Whoever asks for likeliest tokens is given the first of so many, so that one program serves all.
MAX_ALTERNATIVES = 20
# Each size is a fourth of the next: at most 3 x 3 x 3 programs.
SIZE_STEPS = (16, 4, 1)


@dataclasses.dataclass(eq=False)
class Sample:
    """One completion: waiting, in a slot, or ended.

    Attributes:
      index: its number among the samples of its prompt.
      num_tokens: sampled so far.
      cancelled: set by `ContinuousBatch.cancel`.
    """

    prompt: np.ndarray
    sampling: SamplingParams
    keys: "Keys"
    index: int
    num_alternatives: int = 0
    num_tokens: int = 0
    cancelled: bool = False
    ended: bool = False


@dataclasses.dataclass(eq=False)
class Keys:
    """The keys of a prompt's samples, computed by the thread that decodes: nobody else waits."""

    prompt: np.ndarray
    n: int
    seed: int

    @functools.cached_property
    def data(self) -> np.ndarray:
        """[n, 2] uint32 or longer."""
        key = jax.random.key(np.uint32(self.seed % 2**32))
        uids = schedule_lib.prompt_uids([self.prompt])
        # Compiled once for each power of two.
        several = schedule_lib.power_of_two(self.n)
        return np.asarray(generation.sample_keys(key, uids, several))[0]


class NewTokens(NamedTuple):
    """What one step sampled of one completion.

    tokens [T] int32 and log_probs [T] float32; alternatives, ids and log-probs [T, A], where they
    were asked for; finish_reason "stop" or "length" at the end, else None.
    """

    sample: Sample
    tokens: np.ndarray
    log_probs: np.ndarray
    alternatives: tuple[np.ndarray, np.ndarray] | None
    finish_reason: str | None


class Sizes(NamedTuple):
    """Of the decode state."""

    slots: int
    columns: int
    prefix: int

    def holds(self, other: "Sizes") -> bool:
        return all(a >= b for a, b in zip(self, other))

    def joined(self, other: "Sizes") -> "Sizes":
        return Sizes(*map(max, self, other))


class ContinuousBatch:
    """A batch whose samples come and go.

    `submit` and `cancel` may be called from any thread, `step` from one.

    Args:
      engine: its `steps_per_dispatch` is the time, in tokens, that a new request may have to wait
        for the running ones, and the most tokens that come at once.
      params: of the policy.
    """

    def __init__(self, engine: Engine, params):
        self.engine, self.verbs = engine, engine.verbs
        self.params = self.verbs.load_params(params)
        self._waiting: collections.deque[Sample] = collections.deque()
        self._queue_lock, self._any_cancelled = threading.Lock(), False
        self._in_slot: list[Sample | None] = []
        self._retired: list[int] = []  # slots that the device still thinks are active
        self._state: DecodeState | None = None
        self._sizes = Sizes(0, 0, 0)

        def whole(limit: int, multiple: int, least: int) -> list[int]:
            parts = (max(least, limit // part) for part in SIZE_STEPS)
            return sorted({min(cache_plan.up_to_multiple(p, multiple), limit) for p in parts})

        columns = schedule_lib.column_buckets(engine.max_response_length, 1)[-1]
        prefix = schedule_lib.length_bucket(engine.max_prompt_length - 1, engine.max_prompt_length)
        self._steps = min(engine.steps_per_dispatch, columns)
        self.num_slots = engine.num_slots
        most = engine.plan.most_tokens
        if most is not None:
            # A row beside every slot, and either store copied as it is resized.
            fitting = most // cache_plan.Copies(ring=True, rows=True).tokens(columns, prefix)
            self.num_slots = min(self.num_slots, fitting // engine.shards * engine.shards)
        if not self.num_slots:
            raise ValueError(
                f"the memory holds {most} tokens of keys and values, too few for one completion "
                f"of {columns} with its prompt of {prefix} while they are copied to a larger "
                "place; raise gpu_memory_utilization or lower the lengths"
            )
        self._slot_sizes = whole(self.num_slots, engine.shards, 4)
        self._column_sizes = whole(columns, 1, max(schedule_lib.COLUMN_STEP, self._steps))
        self._prefix_sizes = whole(prefix, 1, 64)

    @property
    def busy(self) -> bool:
        """Whether anything waits or decodes."""
        return bool(self._waiting) or self.num_running > 0

    @property
    def num_running(self) -> int:
        return sum(sample is not None for sample in self._in_slot)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    def submit(
        self,
        prompt: list[int],
        sampling: SamplingParams,
        *,
        seed: int,
        num_alternatives: int = 0,
    ) -> list[Sample]:
        """Queues the completions of one prompt.

        Args:
          prompt: token ids.
          sampling: of these completions; `stop` strings are not looked for.
          num_alternatives: likeliest tokens wanted beside each sampled one, up to 20.

        Returns:
          the `sampling.n` samples, which `step` will speak of.

        Raises:
          ValueError: for a prompt or settings that the engine was not made for.
        """
        tokens = self.engine.checked([prompt], dataclasses.replace(sampling, stop=()))
        if not 0 <= num_alternatives <= MAX_ALTERNATIVES:
            raise ValueError(
                f"num_alternatives is 0 to {MAX_ALTERNATIVES}; given {num_alternatives}"
            )
        keys = Keys(tokens[0], sampling.n, seed)
        samples = [
            Sample(tokens[0], sampling, keys, i, num_alternatives) for i in range(sampling.n)
        ]
        with self._queue_lock:
            self._waiting.extend(samples)
        return samples

    def cancel(self, sample: Sample) -> None:
        """Ends a sample without a further word; its slot is free at the next step."""
        sample.cancelled = self._any_cancelled = True

    def step(self) -> list[NewTokens]:
        """Starts what waits, decodes some tokens of all that runs, and returns them."""
        self._drop_cancelled()
        starting = self._fit()
        if self._state is None:
            return []
        self._start(starting)
        return self._decode()

    # --- slots and sizes

    def _drop_cancelled(self):
        for slot, sample in enumerate(self._in_slot):
            if sample is not None and sample.cancelled:
                self._end(slot)
                self._retired.append(slot)
        if not self._any_cancelled:
            return
        self._any_cancelled = False
        with self._queue_lock:
            for sample in self._waiting:
                sample.ended = sample.cancelled
            self._waiting = collections.deque(s for s in self._waiting if not s.ended)

    def _end(self, slot: int):
        self._in_slot[slot].ended = True
        self._in_slot[slot] = None

    def _fit(self) -> list[Sample]:
        """Takes samples from the queue and makes room for them; returns them."""
        running = [sample for sample in self._in_slot if sample is not None]
        starting = []
        while self._waiting and len(running) + len(starting) < self.num_slots:
            starting.append(self._waiting.popleft())
        alive = running + starting
        if not alive:
            # Nothing to do: the memory goes back.
            self._state, self._in_slot, self._retired = None, [], []
            self._sizes = Sizes(0, 0, 0)
            return []
        oldest = max(sample.num_tokens for sample in alive)
        needed = Sizes(
            _size_for(self._slot_sizes, len(alive)),
            _size_for(self._column_sizes, min(oldest + self._steps, self._column_sizes[-1])),
            _size_for(self._prefix_sizes, max(len(sample.prompt) - 1 for sample in alive)),
        )
        if not self._sizes.holds(needed):
            self._resize(self._sizes.joined(needed), oldest)
        elif needed.slots * 4 <= self._sizes.slots:
            self._resize(needed, oldest)
        return starting

    def _resize(self, sizes: Sizes, oldest: int):
        slots, columns, prefix = sizes
        if self._state is None:
            self._state = self.verbs.init_decode_state(slots, columns, slots, prefix, 1)
            self._in_slot = [None] * slots
        else:
            live = [slot for slot, sample in enumerate(self._in_slot) if sample is not None]
            order = np.full(slots, len(self._in_slot), np.int32)
            order[: len(live)] = live
            members = np.arange(slots, dtype=np.int32)[:, None]
            # One store after the other: what was there before goes before the next is made.
            self._state = self.verbs.resize(self._state, order, members, columns, np.int32(oldest))
            rows = np.arange(slots, dtype=np.int32)
            self._state = self.verbs.regroup(self._state, order, rows, np.zeros_like(rows))
            if prefix != self._sizes.prefix:
                kv, lengths = self._state.prefix
                kv = self.verbs.with_columns(kv, prefix)
                self._state = self._state._replace(prefix=Prefixes(kv, lengths))
            moved = [self._in_slot[slot] for slot in live]
            self._in_slot = moved + [None] * (slots - len(live))
            self._retired = []
        self._sizes = sizes

    # --- samples into slots

    def _start(self, starting: list[Sample]):
        if not starting and not self._retired:
            return
        free = (slot for slot, sample in enumerate(self._in_slot) if sample is None)
        placed = dict(zip(free, starting))
        B = self._sizes.slots
        fresh, active = np.zeros(B, bool), np.zeros(B, bool)
        fresh[self._retired] = True
        ints, key_data = np.zeros((2, B), np.int32), np.zeros((B, 2), np.uint32)
        for slot, sample in placed.items():
            self._in_slot[slot] = sample
            ints[:, slot] = sample.prompt[-1], len(sample.prompt) - 1
            fresh[slot] = active[slot] = True
            key_data[slot] = sample.keys.data[sample.index]
        self._prefill(placed)
        zeros, rows = np.zeros(B, np.int32), np.arange(B, dtype=np.int32)
        slots = Slots(ints[0], ints[1], zeros, active, rows, zeros, key_data)
        self._state = self.verbs.assign(self._state, fresh, slots, rows[:, None])
        self._retired = []

    def _prefill(self, placed: dict[int, Sample]):
        """Prefills the prompts, each once, those of like length together."""
        slots_of = collections.defaultdict(list)
        for slot, sample in placed.items():
            slots_of[sample.prompt.tobytes()].append(slot)
        groups = sorted(slots_of.values(), key=lambda slots: len(placed[slots[0]].prompt))
        while groups:
            length = self._prefill_length(placed[groups[-1][0]])
            most = schedule_lib.prefill_rows(length, self.engine.shards)
            batch, groups = groups[-most:], groups[:-most]
            # Rows beyond the batch repeat its last prompt, into the same slot.
            count = schedule_lib.power_of_two(len(batch))
            count = min(cache_plan.up_to_multiple(count, self.engine.shards), most)
            filled = batch + batch[-1:] * (count - len(batch))
            tokens, lengths = np.zeros((count, length), np.int32), np.zeros(count, np.int32)
            for i, slots in enumerate(filled):
                prompt = placed[slots[0]].prompt[:-1]
                tokens[i, : len(prompt)], lengths[i] = prompt, len(prompt)
            prefixes = self.verbs.prefill(self.params, tokens, lengths)
            targets = np.array([slots[0] for slots in filled], np.int32)
            self._state = self.verbs.insert(self._state, prefixes, targets)
            for row, slots in enumerate(batch):
                if len(slots) > 1:
                    self._copy(prefixes, row, slots[1:])

    def _copy(self, prefixes: Prefixes, row: int, slots: list[int]):
        """Gives the same prompt to further slots."""
        count = schedule_lib.power_of_two(len(slots))
        count = cache_plan.up_to_multiple(count, self.engine.shards)
        targets = np.array(slots + slots[-1:] * (count - len(slots)), np.int32)
        repeated = self.verbs.rows_of(prefixes, np.full(count, row, np.int32))
        self._state = self.verbs.insert(self._state, repeated, targets)

    def _prefill_length(self, sample: Sample) -> int:
        longest = self._sizes.prefix
        return min(schedule_lib.length_bucket(len(sample.prompt) - 1, longest), longest)

    # --- decoding

    def _decode(self) -> list[NewTokens]:
        running = [sample for sample in self._in_slot if sample is not None]
        stop_at = 0
        if self._waiting:
            stop_at = len(running) - max(1, self._sizes.slots // 8)
        room = self._steps
        if self._sizes.columns < self._column_sizes[-1]:
            room = self._sizes.columns - max(sample.num_tokens for sample in running)
        knobs, method = self._knobs_and_method(running)
        self._state, results = self.verbs.generate(
            self.params,
            self._state,
            knobs,
            method,
            self._steps,
            np.int32(max(stop_at, 0)),
            np.int32(room),
        )
        results = jax.device_get(results)
        return [
            self._collect(slot, sample, results)
            for slot, sample in enumerate(self._in_slot)
            if sample is not None
        ]

    def _knobs_and_method(self, running: list[Sample]) -> tuple[Knobs, Method]:
        idle = SamplingParams()
        knobs = [(sample.sampling if sample else idle).knobs() for sample in self._in_slot]
        width = max(len(knob.stop_ids) for knob in knobs)
        knobs = [knob._replace(stop_ids=_padded(knob.stop_ids, width)) for knob in knobs]
        methods = [sample.sampling.method for sample in running]
        # All or nothing, so that few programs are compiled.
        truncates = any(method.truncates for method in methods)
        method = Method(
            mixed=True,
            top_k=truncates,
            top_p=truncates,
            min_p=truncates,
            min_tokens=any(method.min_tokens for method in methods),
            num_alternatives=MAX_ALTERNATIVES if any(s.num_alternatives for s in running) else 0,
        )
        return Knobs(*map(np.stack, zip(*knobs))), method

    def _collect(self, slot: int, sample: Sample, results: ResultTokens) -> NewTokens:
        count = int(results.valid[:, slot].sum())
        sample.num_tokens += count
        stopped = bool(results.stopped[:count, slot].any())
        finish_reason = "stop" if stopped else None
        if not stopped and sample.num_tokens >= sample.sampling.max_tokens:
            finish_reason = "length"
        alternatives = None
        if sample.num_alternatives:
            of_slot = (x[:count, slot, : sample.num_alternatives] for x in results.alternatives)
            alternatives = tuple(of_slot)
        if finish_reason:
            self._end(slot)
        tokens, log_probs = results.tokens[:count, slot], results.log_probs[:count, slot]
        return NewTokens(sample, tokens, log_probs, alternatives, finish_reason)


def _size_for(sizes: list[int], needed: int) -> int:
    return next(size for size in sizes if size >= needed)


def _padded(stop_ids: np.ndarray, width: int) -> np.ndarray:
    return np.pad(stop_ids, (0, width - len(stop_ids)), constant_values=-1)
