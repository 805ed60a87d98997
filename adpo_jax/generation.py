"""One call of `Engine.generate` under way: the loop between the queue and the decode steps.

Each turn fills free slots from the queue, fits the sizes of batch and ring to what is alive, runs
some decode steps in one dispatch, and takes their tokens.

Letters: P prompts, n samples of a prompt, T tokens, B slots.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from adpo_jax import cache_plan
from adpo_jax import schedule as schedule_lib
from adpo_jax.decode import DecodeState, Slots
from adpo_jax.kv_cache import KV
from adpo_jax.sampling import SamplingParams
from adpo_jax.schedule import Schedule

# A ring with room for so many steps is not grown yet: a step reads all of its columns.
LEAST_STEPS = 8


@dataclasses.dataclass(frozen=True)
class GroupOutput:
    """The completions of one prompt; fields as in `RolloutOutput`, without the axis of prompts."""

    prompt_index: int
    tokens: np.ndarray
    mask: np.ndarray
    lengths: np.ndarray
    log_probs: np.ndarray
    finish_reason: np.ndarray
    full_log_probs: np.ndarray | None


class Generation:
    """One call of `generate` under way."""

    def __init__(
        self,
        engine,
        params,
        prompts: list[np.ndarray],
        sampling: SamplingParams,
        key,
        on_tokens: Callable[[int, int, np.ndarray], None] | None = None,
    ):
        self.on_tokens = on_tokens
        self.engine, self.verbs = engine, engine.verbs
        self.prompts, self.sampling = prompts, sampling
        self.params = self.verbs.load_params(params)
        P, n, T = len(prompts), sampling.n, sampling.max_tokens
        self.tokens = np.full((P, n, T), sampling.pad_token_id, np.int32)
        self.log_probs = np.zeros((P, n, T), np.float32)
        self.full_log_probs = np.zeros((P, n, T), np.float32) if sampling.full_log_probs else None
        self.lengths = np.zeros((P, n), np.int32)
        self.stopped = np.zeros((P, n), bool)
        self.key_data = np.asarray(sample_keys(key, schedule_lib.prompt_uids(prompts), n))
        self.stats = dict.fromkeys(
            ("prefill_calls", "prefill_tokens", "dispatches", "steps", "slot_steps", "resizes"), 0
        )

        self.column_sizes = schedule_lib.column_buckets(T, engine.column_stages)
        longest = max(len(p) for p in prompts) - 1
        self.prefix_length = schedule_lib.length_bucket(longest, engine.max_prompt_length)
        slots, rows = engine.sizes_for(P, n, self.column_sizes[-1], self.prefix_length)
        # Those that a shrinking batch goes through; elsewhere it stays as it is.
        smaller = engine.slot_sizes if engine.shrinks else ()
        self.slot_sizes = [*(s for s in smaller if s < slots), slots]
        self.schedule = Schedule(P, n, slots, rows, engine.shards)
        self.columns = self._columns_for(0)
        self.written = 0  # steps since the ring began at its first column
        members = self.schedule.members.shape[1]
        self.state = engine.new_state(slots, self.columns, rows, self.prefix_length, members)
        self.retired: list[int] = []  # slots that the host ended: the device does not know yet
        # The ring that the call began with, to be kept, while a longer one is in use.
        self.first_ring: KV | None = None
        self.has_shrunk = False

    @property
    def done(self) -> bool:
        return not self.schedule.num_waiting and not len(self.schedule.live_slots)

    def state_to_keep(self) -> DecodeState | None:
        """The memory that the call began with; None where the batch has shrunk and it is gone."""
        if self.has_shrunk:
            return None
        own = self.state.own if self.first_ring is None else self.first_ring
        return self.state._replace(own=own)

    def advance(self) -> list[GroupOutput]:
        """Fills the slots, runs some steps, and returns the groups that ended."""
        starts, admitted = self.schedule.start()
        if admitted:
            self._prefill(admitted)
        # Before the batch shrinks: `starts` speak of the slots and rows as they are now.
        if starts or self.retired:
            self._assign(starts)
        self._resize()
        return self._decode()

    # --- sizes

    def _slots_for(self, needed: int) -> int:
        return next((s for s in self.slot_sizes if s >= needed), self.slot_sizes[-1])

    def _columns_for(self, oldest: int) -> int:
        """Columns that hold the oldest live sample and the steps that are worth a dispatch."""
        steps = min(LEAST_STEPS, self.engine.steps_per_dispatch, self.column_sizes[0])
        needed = min(oldest + steps, self.column_sizes[-1])
        return next(c for c in self.column_sizes if c >= needed)

    def _ages(self) -> np.ndarray:
        """Tokens sampled so far in each live slot."""
        flat = self.schedule.sample_in[self.schedule.live_slots]
        return self.lengths.reshape(-1)[flat]

    def _resize(self):
        """Shrinks the batch when few samples are left; grows the ring when they get long."""
        schedule, oldest = self.schedule, int(self._ages().max(initial=0))
        slots, columns = schedule.num_slots, max(self.columns, self._columns_for(oldest))
        if not schedule.num_waiting:
            slots = min(slots, self._slots_for(schedule.needed_slots))
        if slots == schedule.num_slots and columns == self.columns:
            return
        self.stats["resizes"] += 1
        if slots < schedule.num_slots:
            self.has_shrunk, self.first_ring = True, None
        elif not (self.engine.free_cache_engine or self.has_shrunk or self.first_ring):
            self.first_ring = self.state.own
        if slots == schedule.num_slots and self.written <= self.columns:
            self.state = self.verbs.grow(self.state, columns, self.written)
            self.columns = columns
            return
        rows = None
        if slots < schedule.num_slots:
            columns = self._columns_for(oldest)
            order, rows = schedule.compact(slots)
        else:
            order = np.arange(slots, dtype=np.int32)
        members = schedule.members.copy()
        self.state = self.verbs.resize(self.state, order, members, columns, np.int32(oldest))
        if rows is not None:
            row, rank = schedule.row_of.copy(), schedule.rank_of.copy()
            self.state = self.verbs.regroup(self.state, rows, row, rank)
        self.columns, self.written = columns, oldest

    # --- prompts into rows, samples into slots

    def _prefill(self, admitted: dict[int, int]):
        """Prefills the prompts of groups into their prefix rows, those of like length together."""
        by_length = sorted(admitted, key=lambda row: len(self.prompts[admitted[row]]))
        while by_length:
            length = self._prefill_bucket(admitted[by_length[-1]])
            most = schedule_lib.prefill_rows(length, self.engine.shards)
            batch, by_length = by_length[-most:], by_length[:-most]
            # Rows beyond the batch repeat its last prompt, into the same prefix row.
            rows = schedule_lib.power_of_two(len(batch))
            rows = min(cache_plan.up_to_multiple(rows, self.engine.shards), most)
            filled = batch + batch[-1:] * (rows - len(batch))
            tokens = np.zeros((rows, length), np.int32)
            prompts = [self.prompts[admitted[row]][:-1] for row in filled]
            lengths = np.array(list(map(len, prompts)), np.int32)
            for i, prompt in enumerate(prompts):
                tokens[i, : lengths[i]] = prompt
            prefixes = self.verbs.prefill(self.params, tokens, lengths)
            self.state = self.verbs.insert(self.state, prefixes, np.array(filled, np.int32))
            self.stats["prefill_calls"] += 1
            self.stats["prefill_tokens"] += int(lengths[: len(batch)].sum())

    def _prefill_bucket(self, group: int) -> int:
        length = len(self.prompts[group]) - 1
        return min(
            schedule_lib.length_bucket(length, self.engine.max_prompt_length), self.prefix_length
        )

    def _assign(self, starts):
        B = self.schedule.num_slots
        fresh = np.zeros(B, bool)
        fresh[self.retired] = True
        ints = np.zeros((5, B), np.int32)
        active, key_data = np.zeros(B, bool), np.zeros((B, 2), np.uint32)
        for start in starts:
            prompt, slot = self.prompts[start.group], start.slot
            ints[:, slot] = prompt[-1], len(prompt) - 1, 0, start.row, start.rank
            fresh[slot] = active[slot] = True
            key_data[slot] = self.key_data[start.group, start.sample]
        token, position, generated, row, rank = ints
        slots = Slots(token, position, generated, active, row, rank, key_data)
        self.state = self.verbs.assign(self.state, fresh, slots, self.schedule.members.copy())
        self.retired = []

    # --- decoding

    def _decode(self) -> list[GroupOutput]:
        live = len(self.schedule.live_slots)
        if self.schedule.num_waiting:
            stop_at = live - max(1, self.schedule.num_slots // 8)
        else:
            stop_at = max((s for s in self.slot_sizes if s < live), default=0)
        room = self.columns - int(self._ages().max(initial=0))
        if self.columns == self.column_sizes[-1]:
            room = self.engine.steps_per_dispatch
        self.state, results = self.verbs.generate(
            self.params,
            self.state,
            self.sampling.knobs(),
            self.sampling.method,
            self.engine.steps_per_dispatch,
            np.int32(max(stop_at, 0)),
            np.int32(room),
        )
        results = jax.device_get(results)
        steps = int(np.sum(results.valid.any(axis=1)))
        self.stats["dispatches"] += 1
        self.stats["steps"] += steps
        self.written += steps
        self.stats["slot_steps"] += steps * self.schedule.num_slots
        return [self._group_output(group) for group in self._collect(results)]

    def _collect(self, results) -> list[int]:
        """Takes all new tokens; returns the groups whose last sample has ended."""
        live, T = self.schedule.live_slots, self.sampling.max_tokens
        samples = self.schedule.sample_in[live]
        lengths, all_stopped = self.lengths.reshape(-1), self.stopped.reshape(-1)
        before = lengths[samples]
        counts, stopped = results.valid[:, live].sum(axis=0), results.stopped[:, live].any(axis=0)
        if self.sampling.stop:
            self._end_at_stop_strings(results, live, counts, stopped)

        step, i = np.nonzero(np.arange(len(results.valid))[:, None] < counts)

        def take(kept, new):
            kept.reshape(-1, T)[samples[i], before[i] + step] = new[step, live[i]]

        take(self.tokens, results.tokens)
        take(self.log_probs, results.log_probs)
        if self.full_log_probs is not None:
            take(self.full_log_probs, results.full_log_probs)
        lengths[samples], all_stopped[samples] = before + counts, stopped
        if self.on_tokens is not None:
            for slot, sample, count in zip(live, samples.tolist(), counts):
                self.on_tokens(*divmod(sample, self.sampling.n), results.tokens[:count, slot])
        ended = live[stopped | (before + counts >= T)]
        groups = [self.schedule.finish(slot) for slot in ended.tolist()]
        return [group for group in groups if group is not None]

    def _end_at_stop_strings(self, results, live, counts: np.ndarray, stopped: np.ndarray):
        """Shortens `counts` to the tokens that complete a stop string, and marks their samples."""
        for i, slot in enumerate(live):
            group, sample = divmod(int(self.schedule.sample_in[slot]), self.sampling.n)
            old = self.tokens[group, sample, : self.lengths[group, sample]]
            at_string = self._tokens_to_stop_string(old, results.tokens[: counts[i], slot])
            if at_string is not None:
                if at_string < counts[i] or not stopped[i]:
                    self.retired.append(slot)
                counts[i], stopped[i] = at_string, True

    def _tokens_to_stop_string(self, old: np.ndarray, new: np.ndarray) -> int | None:
        """How many of the new tokens complete the first stop string, None if there is none."""
        if not self.sampling.stop:
            return None

        def contains(count: int) -> bool:
            text = self.engine.detokenize([*old.tolist(), *new[:count].tolist()])
            return any(stop in text for stop in self.sampling.stop)

        first = max(1, self.sampling.min_tokens - len(old))
        if first > len(new) or not contains(len(new)):
            return None
        return next(count for count in range(first, len(new) + 1) if contains(count))

    def _group_output(self, group: int) -> GroupOutput:
        lengths = self.lengths[group]
        mask = np.arange(self.sampling.max_tokens) < lengths[:, None]
        full = None if self.full_log_probs is None else self.full_log_probs[group]
        return GroupOutput(
            prompt_index=group,
            tokens=self.tokens[group],
            mask=mask.astype(np.int32),
            lengths=lengths,
            log_probs=self.log_probs[group],
            finish_reason=np.where(self.stopped[group], "stop", "length"),
            full_log_probs=full,
        )


@jax.jit
def _fold_in_all(key, uids, samples):
    def of_sample(uid, sample):
        return jax.random.key_data(jax.random.fold_in(jax.random.fold_in(key, uid), sample))

    return jax.vmap(jax.vmap(of_sample, (None, 0)), (0, None))(uids, samples)


def sample_keys(key: jax.Array, uids: np.ndarray, n: int) -> jax.Array:
    """The key of each sample, [P, n, 2] uint32."""
    return _fold_in_all(threefry(key), uids, np.arange(n, dtype=np.uint32))


def threefry(key: jax.Array) -> jax.Array:
    """The key itself, or one made of the bits of another implementation's, such as rbg's four."""
    data = jax.random.key_data(key) if jnp.issubdtype(key.dtype, jax.dtypes.prng_key) else key
    derived = jax.random.wrap_key_data(data[:2], impl="threefry2x32")
    for word in data[2:]:
        derived = jax.random.fold_in(derived, word)
    return derived
