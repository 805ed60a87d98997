"""The rollout engine: token ids in, sampled token ids and their log-probs out. It knows no text.

    engine = Engine(policy, max_prompt_length=512, max_response_length=512, num_slots=64)
    out = engine.generate(params, prompts, SamplingParams(n=8, max_tokens=128), key)

A loop on the host fills slots from a queue (`schedule`) and dispatches several decode steps at once
(`decode`). It grows the caches' columns and shrinks the batch as samples age and end, through a few
sizes, so that a bounded number of programs is compiled.

Not here: the text of prompts and completions, rewards, weights (an argument of every call).

Letters: P prompts, n samples of a prompt, T tokens, B slots.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from adpo_jax import cache_plan, kernels
from adpo_jax import schedule as schedule_lib
from adpo_jax.decode import DecodeState, Slots, Verbs
from adpo_jax.kv_cache import CacheLayout
from adpo_jax.policy import Policy
from adpo_jax.sampling import SamplingParams
from adpo_jax.schedule import Schedule
from adpo_jax.sharding import RULES, mesh_axis_size

# Tokens of one prefill call, padding included; bounds its activations.
PREFILL_TOKENS = 8192
# Layers run one by one up to this depth on a CPU; beyond it, compile time would grow too far.
MAX_UNROLLED_LAYERS = 12
# The batch shrinks to these when samples run out; below 8 rows a step gets no cheaper.
SLOT_FRACTIONS = (0.75, 0.5, 0.25, 0.125)
MIN_SLOTS = 8


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


@dataclasses.dataclass(frozen=True)
class RolloutOutput:
    """Completions of all prompts.

    Attributes:
      tokens: [P, n, T] int32, padded on the right with `pad_token_id`; T is max_tokens. The stop
        token is part of the completion.
      mask: [P, n, T] int32, 1 at the tokens of the completion.
      lengths: [P, n] int32.
      log_probs: [P, n, T] float32 in nats, under the distribution sampled from; 0 at padding.
      finish_reason: [P, n] str, "stop" or "length".
      full_log_probs: [P, n, T] float32, tempered and not truncated; None unless asked for.
      stats: counts of the call: what was prefilled, decoded and dispatched.
    """

    tokens: np.ndarray
    mask: np.ndarray
    lengths: np.ndarray
    log_probs: np.ndarray
    finish_reason: np.ndarray
    full_log_probs: np.ndarray | None
    stats: dict[str, int]


class Engine:
    """Samples completions of groups of prompts.

    Args:
      policy: the model; its parameters are an argument of `generate`.
      max_prompt_length: tokens of the longest prompt taken.
      max_response_length: tokens of the longest completion.
      num_slots: samples decoded at once, at most; None for 64 on a CPU and 256 elsewhere.
      mesh: devices; slots are split over (`data`, `fsdp`), heads over `tensor`. None: the policy's.
      cache_dtype: of keys and values: float32, bfloat16 or int8; None for the policy's dtype.
      attention: of decoding, one of `kernels.ATTENTION`.
      gpu_memory_utilization: fraction of the device's memory (of a CPU machine's free memory) that
        may be in use with the cache; lowers `num_slots` to what fits. None for no limit.
      group_size: samples of a prompt that memory is planned for.
      free_cache_engine: give the cache's memory back after every call.
      steps_per_dispatch: decode steps between two looks of the host.
      detokenize: token ids -> text, needed for stop strings.
    """

    def __init__(
        self,
        policy: Policy,
        *,
        max_prompt_length: int,
        max_response_length: int,
        num_slots: int | None = None,
        mesh: Mesh | None = None,
        cache_dtype: Any = None,
        attention: str = "auto",
        gpu_memory_utilization: float | None = None,
        group_size: int = 1,
        free_cache_engine: bool = True,
        steps_per_dispatch: int = 32,
        detokenize: Callable[[list[int]], str] | None = None,
    ):
        if mesh is not None:
            policy = dataclasses.replace(policy, mesh=mesh)
        c = policy.config
        on_cpu = jax.default_backend() == "cpu"
        plain = attention == "xla" or (attention == "auto" and on_cpu)
        layout = CacheLayout(
            num_layers=c.num_layers,
            num_kv_heads=c.num_kv_heads,
            head_dim=c.head_dim,
            dtype=jnp.dtype(policy.dtype if cache_dtype is None else cache_dtype),
            stacked=not (on_cpu and plain and c.num_layers <= MAX_UNROLLED_LAYERS),
            transposed_keys=on_cpu and plain,
        )
        devices = jax.devices()[:1] if policy.mesh is None else list(policy.mesh.devices.flat)
        attention = kernels.resolve(attention, layout, len(devices))
        self.policy = policy
        self.max_prompt_length = max_prompt_length
        self.max_response_length = max_response_length
        self.steps_per_dispatch = steps_per_dispatch
        self.verbs = Verbs(policy, layout, attention)
        self._detokenize = detokenize
        self._shards = splits = 1
        if policy.mesh is not None:
            self._shards = mesh_axis_size(policy.mesh, RULES["batch"])
            heads = mesh_axis_size(policy.mesh, RULES["kv_heads"])
            splits = self._shards * (heads if c.num_kv_heads % heads == 0 else 1)
        # A kernel reads no more columns than a slot sees, so its ring need not grow.
        self.column_stages = 4 if attention == "xla" else 1
        budget = (None, "")
        if gpu_memory_utilization is not None:
            budget = cache_plan.memory_budget(gpu_memory_utilization, devices)
        self.plan = cache_plan.plan(
            layout,
            max_prompt_length=max_prompt_length,
            max_response_length=max_response_length,
            group_size=group_size,
            most_slots=num_slots or (64 if on_cpu else cache_plan.MAX_SLOTS),
            multiple=self._shards,
            splits=splits,
            stages=self.column_stages,
            budget=budget[0],
            budget_text=budget[1],
        )
        self.num_slots = self.plan.num_slots
        # Rows are bounded only where memory is.
        self.most_rows = None if gpu_memory_utilization is None else self.plan.rows
        # Fewer rows make a step faster where arithmetic is the bottleneck, and not where reading
        # the weights is.
        fractions = SLOT_FRACTIONS if on_cpu else ()
        self.slot_sizes = schedule_lib.slot_buckets(
            self.num_slots, fractions, self._shards, MIN_SLOTS
        )
        self.free_cache_engine = free_cache_engine
        self._kept: DecodeState | None = None

    def free_cache(self):
        """Gives the memory of a kept cache back."""
        self._kept = None

    def new_state(self, *sizes: int) -> DecodeState:
        """A state without active slots, the kept one where it has these sizes."""
        wanted = jax.eval_shape(lambda: self.verbs.init_decode_state(*sizes))
        kept, self._kept = self._kept, None
        if kept is not None and jax.tree.map(jnp.shape, kept) == jax.tree.map(jnp.shape, wanted):
            return kept
        del kept
        return self.verbs.init_decode_state(*sizes)

    def keep_state(self, state: DecodeState):
        """Called with the state of a rollout that has ended."""
        if not self.free_cache_engine:
            self._kept = state

    def generate(
        self,
        params,
        prompts: Sequence[Sequence[int]],
        sampling: SamplingParams,
        key: jax.Array,
        *,
        on_group_done: Callable[[GroupOutput], None] | None = None,
    ) -> RolloutOutput:
        """Samples `sampling.n` completions of each prompt.

        The same key gives the same completions of a prompt whatever its place in the list, the
        prompts beside it and the number of slots (up to the rounding of matrix products).

        Args:
          params: the policy's parameters.
          prompts: token ids of each prompt, without padding.
          on_group_done: called with each group as its last sample ends, while others decode.

        Raises:
          ValueError: for prompts or settings that the engine was not made for.
        """
        stats: dict[str, int] = {}
        groups: list[GroupOutput] = [None] * len(prompts)
        for group in self.stream(params, prompts, sampling, key, stats=stats):
            groups[group.prompt_index] = group
            if on_group_done is not None:
                on_group_done(group)

        def stack(name):
            return np.stack([getattr(group, name) for group in groups])

        return RolloutOutput(
            tokens=stack("tokens"),
            mask=stack("mask"),
            lengths=stack("lengths"),
            log_probs=stack("log_probs"),
            finish_reason=stack("finish_reason"),
            full_log_probs=stack("full_log_probs") if sampling.full_log_probs else None,
            stats=stats,
        )

    def stream(
        self,
        params,
        prompts: Sequence[Sequence[int]],
        sampling: SamplingParams,
        key: jax.Array,
        *,
        stats: dict[str, int] | None = None,
    ) -> Iterator[GroupOutput]:
        """`generate` as an iterator over the groups, in the order in which they end."""
        prompts = self._checked(prompts, sampling)
        rollout = _Rollout(self, params, prompts, sampling, key)
        try:
            while not rollout.done:
                yield from rollout.advance()
            self.keep_state(rollout.state)
        finally:
            if stats is not None:
                stats.update(rollout.stats)

    def _checked(self, prompts, sampling: SamplingParams) -> list[np.ndarray]:
        if not len(prompts):
            raise ValueError("generate needs at least one prompt; given none")
        if sampling.max_tokens > self.max_response_length:
            raise ValueError(
                f"max_tokens is {sampling.max_tokens}, above the engine's max_response_length "
                f"{self.max_response_length}: lower the one or raise the other"
            )
        if sampling.stop and self._detokenize is None:
            raise ValueError("stop strings need Engine(..., detokenize=...), token ids -> text")
        V = self.policy.config.vocab_size
        checked = []
        for i, prompt in enumerate(prompts):
            tokens = np.asarray(prompt)
            if tokens.ndim != 1 or not 1 <= len(tokens) <= self.max_prompt_length:
                raise ValueError(
                    f"prompt {i} is a list of 1 to {self.max_prompt_length} token ids "
                    f"(max_prompt_length); given shape {tokens.shape}"
                )
            if not np.issubdtype(tokens.dtype, np.integer):
                raise ValueError(f"prompt {i} is made of token ids; given {tokens.dtype}")
            if tokens.min() < 0 or tokens.max() >= V:
                raise ValueError(
                    f"prompt {i} has token ids outside [0, {V}): "
                    f"{tokens.min()} to {tokens.max()} given"
                )
            checked.append(tokens.astype(np.int32))
        return checked


class _Rollout:
    """One call of `generate` under way."""

    def __init__(self, engine: Engine, params, prompts, sampling: SamplingParams, key):
        self.engine, self.verbs = engine, engine.verbs
        self.prompts, self.sampling = prompts, sampling
        self.params = self.verbs.load_params(params)
        P, n, T = len(prompts), sampling.n, sampling.max_tokens
        self.tokens = np.full((P, n, T), sampling.pad_token_id, np.int32)
        self.log_probs = np.zeros((P, n, T), np.float32)
        self.full_log_probs = np.zeros((P, n, T), np.float32) if sampling.full_log_probs else None
        self.lengths = np.zeros((P, n), np.int32)
        self.stopped = np.zeros((P, n), bool)
        self.key_data = np.asarray(_sample_keys(key, schedule_lib.prompt_uids(prompts), n))
        self.stats = dict.fromkeys(
            ("prefill_calls", "prefill_tokens", "dispatches", "steps", "slot_steps", "resizes"), 0
        )

        self.slot_sizes = engine.slot_sizes
        self.column_sizes = schedule_lib.column_buckets(T, engine.column_stages)
        slots = self._slots_for(P * n)
        rows = min(schedule_lib.power_of_two(P), cache_plan.prefix_rows(slots, n))
        rows = min(rows, engine.most_rows or rows)
        rows = cache_plan.up_to_multiple(rows, engine._shards)
        longest = max(len(p) for p in prompts) - 1
        self.prefix_length = schedule_lib.length_bucket(longest, engine.max_prompt_length)
        self.schedule = Schedule(P, n, slots, rows)
        self.columns = self._columns_for(0)
        self.state = engine.new_state(slots, self.columns, rows, self.prefix_length, n)
        self.retired: list[int] = []  # slots that the host ended: the device does not know yet

    @property
    def done(self) -> bool:
        return not self.schedule.num_waiting and not len(self.schedule.live_slots)

    def advance(self) -> list[GroupOutput]:
        """Fills the slots, runs some steps, and returns the groups that ended."""
        starts, admitted = self.schedule.start()
        if admitted:
            self._prefill(admitted)
        self._resize()
        if starts or self.retired:
            self._assign(starts)
        return self._decode()

    # --- sizes

    def _slots_for(self, needed: int) -> int:
        return next((s for s in self.slot_sizes if s >= needed), self.slot_sizes[-1])

    def _columns_for(self, oldest: int) -> int:
        """Columns that hold the oldest live sample and as many more steps as one dispatch does."""
        steps = min(self.engine.steps_per_dispatch, self.column_sizes[0])
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
            slots = min(slots, self._slots_for(len(schedule.live_slots)))
        if slots == schedule.num_slots and columns == self.columns:
            return
        if slots < schedule.num_slots:
            columns = self._columns_for(oldest)
            order = schedule.compact(slots)
            self.retired = []
        else:
            order = np.arange(slots, dtype=np.int32)
        self.state = self.verbs.resize(
            self.state, order, schedule.members.copy(), columns, np.int32(oldest)
        )
        self.columns = columns
        self.stats["resizes"] += 1

    # --- prompts into rows, samples into slots

    def _prefill(self, admitted: dict[int, int]):
        """Prefills the prompts of these groups, of like length together."""
        by_length = sorted(admitted, key=lambda group: len(self.prompts[group]))
        while by_length:
            length = self._prefill_bucket(by_length[-1])
            most = max(1, PREFILL_TOKENS // length)
            batch, by_length = by_length[-most:], by_length[:-most]
            # Rows beyond the batch repeat its last prompt, into the same prefix row.
            rows = schedule_lib.power_of_two(len(batch))
            rows = -(-rows // self.engine._shards) * self.engine._shards
            filled = batch + batch[-1:] * (rows - len(batch))
            tokens = np.zeros((rows, length), np.int32)
            lengths = np.array([len(self.prompts[g]) - 1 for g in filled], np.int32)
            for i, group in enumerate(filled):
                tokens[i, : lengths[i]] = self.prompts[group][:-1]
            prefixes = self.verbs.prefill(self.params, tokens, lengths)
            targets = np.array([admitted[g] for g in filled], np.int32)
            self.state = self.verbs.insert(self.state, prefixes, targets)
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
            ints[:, slot] = prompt[-1], len(prompt) - 1, 0, start.row, start.sample
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
        self.stats["slot_steps"] += steps * self.schedule.num_slots
        ended = (self._collect(slot, results) for slot in self.schedule.live_slots)
        return [self._group_output(group) for group in ended if group is not None]

    def _collect(self, slot: int, results) -> int | None:
        """Takes a slot's new tokens; returns its group if all its samples have ended."""
        group, sample = divmod(int(self.schedule.sample_in[slot]), self.sampling.n)
        count = int(results.valid[:, slot].sum())
        before = int(self.lengths[group, sample])
        stopped = bool(results.stopped[:count, slot].any())
        new = results.tokens[:count, slot]
        at_string = self._tokens_to_stop_string(self.tokens[group, sample, :before], new)
        if at_string is not None:
            if at_string < count or not stopped:
                self.retired.append(slot)
            count, stopped = at_string, True
        after = before + count
        self.tokens[group, sample, before:after] = new[:count]
        self.log_probs[group, sample, before:after] = results.log_probs[:count, slot]
        if self.full_log_probs is not None:
            full = results.full_log_probs[:count, slot]
            self.full_log_probs[group, sample, before:after] = full
        self.lengths[group, sample] = after
        self.stopped[group, sample] = stopped
        if not stopped and after < self.sampling.max_tokens:
            return None
        return self.schedule.finish(slot)

    def _tokens_to_stop_string(self, old: np.ndarray, new: np.ndarray) -> int | None:
        """How many of the new tokens complete the first stop string, None if there is none."""
        if not self.sampling.stop:
            return None

        def contains(count: int) -> bool:
            text = self.engine._detokenize([*old.tolist(), *new[:count].tolist()])
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


def _sample_keys(key: jax.Array, uids: np.ndarray, n: int) -> jax.Array:
    """The key of each sample, [P, n, 2] uint32."""
    if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        key = jax.random.wrap_key_data(key, impl="threefry2x32")
    return _fold_in_all(key, uids, np.arange(n, dtype=np.uint32))
