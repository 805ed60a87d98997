"""The rollout engine: token ids in, sampled token ids and their log-probs out. It knows no text.

    engine = Engine(policy, max_prompt_length=512, max_response_length=512, num_slots=64)
    out = engine.generate(params, prompts, SamplingParams(n=8, max_tokens=128), key)

A loop on the host (`generation`) fills slots from a queue (`schedule`) and dispatches several steps
of decoding at once (`decode`). It grows the cache's columns and shrinks the batch as samples age
and end, through a few sizes, so that a bounded number of programs is compiled.

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

from adpo_jax import cache_plan, cpu, kernels
from adpo_jax import schedule as schedule_lib
from adpo_jax.decode import DecodeState, Verbs
from adpo_jax.generation import Generation, GroupOutput
from adpo_jax.kv_cache import CacheLayout
from adpo_jax.policy import Policy
from adpo_jax.sampling import SamplingParams
from adpo_jax.sharding import RULES, mesh_axis_size

# A CPU's batch shrinks to these when samples run out; below 8 rows a step gets no cheaper.
SLOT_FRACTIONS = (0.75, 0.5, 0.375, 0.25, 0.1875, 0.125, 0.0625)
MIN_SLOTS = 8
DEFAULT_CPU_SLOTS = 64
# Rows that a TPU's registers hold side by side; a GPU's warps like a multiple of it too.
SLOT_TILE = 8


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

    @classmethod
    def concatenate(cls, parts: Sequence["RolloutOutput"]) -> "RolloutOutput":
        """The prompts of all parts, in their order; counts are summed."""
        if len(parts) == 1:
            return parts[0]

        def joined(name):
            arrays = [getattr(part, name) for part in parts]
            return None if arrays[0] is None else np.concatenate(arrays)

        names = [field.name for field in dataclasses.fields(cls) if field.name != "stats"]
        stats = {name: sum(part.stats[name] for part in parts) for name in parts[0].stats}
        return cls(**{name: joined(name) for name in names}, stats=stats)


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
        may be in use while sampling; lowers `num_slots` to what fits. None for no limit.
      resident_bytes: of one device, taken while sampling by what may not be there yet, such as a
        trainer's parameters and optimizer; read with `gpu_memory_utilization`.
      group_size: samples of a prompt that memory is planned for.
      free_cache_engine: give the cache's memory back after every call; else it is kept for the next
        one of these sizes, unless the batch shrank meanwhile, as it does on a CPU.
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
        resident_bytes: int = 0,
        group_size: int = 1,
        free_cache_engine: bool = True,
        steps_per_dispatch: int = 32,
        detokenize: Callable[[list[int]], str] | None = None,
    ):
        counts = {"num_slots": num_slots, "steps_per_dispatch": steps_per_dispatch}
        for name, value in counts.items():
            if value is not None and value < 1:
                raise ValueError(f"{name} is 1 or more; given {value}")
        given = policy
        if mesh is not None:
            policy = dataclasses.replace(policy, mesh=mesh)
        device = _device(policy)
        on_cpu = device.platform == "cpu"
        layout = _layout(policy, cache_dtype, attention, on_cpu)
        attention = kernels.resolve(attention, layout, device.platform)
        self.policy = policy
        self.verbs = Verbs(policy, layout, attention)
        self.max_prompt_length = max_prompt_length
        self.max_response_length = max_response_length
        self.steps_per_dispatch = steps_per_dispatch
        self.detokenize = detokenize
        self.free_cache_engine = free_cache_engine
        self._kept: DecodeState | None = None

        # A kernel reads no more columns than a slot sees, so its ring need not grow.
        self.column_stages = 4 if attention == "xla" else 1
        self.shards, splits = _splits(policy)
        budget, budget_text = None, ""
        if gpu_memory_utilization is not None:
            budget, budget_text = cache_plan.memory_budget(
                gpu_memory_utilization,
                device,
                resident=resident_bytes,
                copied=self.verbs.copied_bytes(given),
            )
        # A smaller batch makes a step faster where arithmetic is the bottleneck, and hardly where
        # reading the weights is.
        self.shrinks = on_cpu
        default = DEFAULT_CPU_SLOTS if on_cpu else cache_plan.MAX_SLOTS
        self.plan = cache_plan.plan(
            layout,
            max_prompt_length=max_prompt_length,
            max_response_length=max_response_length,
            group_size=group_size,
            most_slots=num_slots or default,
            multiple=self.shards,
            splits=splits,
            stages=self.column_stages,
            shrinks=self.shrinks,
            budget=budget,
            budget_text=budget_text,
            tile=1 if on_cpu else SLOT_TILE,
        )
        self.num_slots = self.plan.num_slots
        # A call starts with the smallest batch that holds it.
        if self.shrinks:
            sizes = schedule_lib.slot_buckets(
                self.num_slots, SLOT_FRACTIONS, self.shards, MIN_SLOTS
            )
        else:
            sizes = schedule_lib.doubling_sizes(self.num_slots, self.shards, MIN_SLOTS)
        self.slot_sizes = sizes

    @property
    def prefill_rows(self) -> int:
        """The most prompts of full length that are prefilled at once."""
        length = schedule_lib.length_bucket(self.max_prompt_length - 1, self.max_prompt_length)
        return schedule_lib.prefill_rows(length, self.shards)

    def sizes_for(self, num_prompts: int, n: int, columns: int, prefix: int) -> tuple[int, int]:
        """Slots and prefix rows that decode as many samples at once as the memory allows.

        Args:
          n: samples of a prompt.
          columns: of the ring at its longest.
          prefix: tokens of a prefix row.
        """
        enough = next((s for s in self.slot_sizes if s >= num_prompts * n), self.num_slots)
        parts = schedule_lib.rows_of_a_group(num_prompts, n, self.shards)
        sizes = []
        for slots in self.slot_sizes[: self.slot_sizes.index(enough) + 1]:
            rows = schedule_lib.power_of_two(num_prompts * parts)
            rows = min(rows, cache_plan.prefix_rows(slots, n))
            rows = cache_plan.up_to_multiple(rows, self.shards)
            most = self.plan.most_rows(slots, columns, prefix)
            if most is not None:
                rows = min(rows, most // self.shards * self.shards)
            sizes.append((slots, rows))
        each = -(-n // parts)  # samples of a row
        return max(sizes, key=lambda size: (min(size[0], size[1] * each), -size[0]))

    def trace(self, sampling: SamplingParams) -> dict[str, jax.stages.Traced]:
        """The programs "prefill" and "decode" at their largest sizes, from shapes alone."""
        n, verbs = sampling.n, self.verbs
        length = schedule_lib.length_bucket(self.max_prompt_length - 1, self.max_prompt_length)
        columns = schedule_lib.column_buckets(self.max_response_length, self.column_stages)[-1]
        slots, rows = self.sizes_for(2 * self.num_slots, n, columns, length)
        params = verbs.abstract_params()
        state = verbs.abstract_state(slots, columns, rows, length, n)
        tokens = jax.ShapeDtypeStruct((self.prefill_rows, length), jnp.int32)
        lengths = jax.ShapeDtypeStruct((self.prefill_rows,), jnp.int32)
        count = jax.ShapeDtypeStruct((), jnp.int32)
        knobs = jax.tree.map(lambda x: jax.ShapeDtypeStruct(np.shape(x), x.dtype), sampling.knobs())
        return {
            "prefill": Verbs.prefill.trace(verbs, params, tokens, lengths),
            "decode": Verbs.generate.trace(
                verbs, params, state, knobs, sampling.method, self.steps_per_dispatch, count, count
            ),
        }

    def free_cache(self):
        """Gives the memory of a kept cache back."""
        self._kept = None

    def new_state(self, *sizes: int) -> DecodeState:
        """A state without active slots, the kept one where it has these sizes."""
        kept, self._kept = self._kept, None
        if kept is not None:
            wanted = jax.eval_shape(lambda: self.verbs.init_decode_state(*sizes))
            if jax.tree.map(jnp.shape, kept) == jax.tree.map(jnp.shape, wanted):
                # Samples that a stop string ended last are still active on the device.
                idle = kept.slots._replace(active=jnp.zeros_like(kept.slots.active))
                return kept._replace(slots=idle, column=np.int32(0))
        del kept
        return self.verbs.init_decode_state(*sizes)

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
        on_tokens: Callable[[int, int, np.ndarray], None] | None = None,
    ) -> Iterator[GroupOutput]:
        """`generate` as an iterator over the groups, in the order in which they end.

        Args:
          on_tokens: called with (prompt, sample, its new tokens [T]) after every dispatch.
        """
        prompts = self.checked(prompts, sampling)
        rollout = Generation(self, params, prompts, sampling, key, on_tokens)
        try:
            while not rollout.done:
                yield from rollout.advance()
            if not self.free_cache_engine:
                self._kept = rollout.state_to_keep()
        finally:
            if stats is not None:
                stats.update(rollout.stats)

    def checked(self, prompts, sampling: SamplingParams) -> list[np.ndarray]:
        """The prompts as arrays, where this engine can sample from them; see `generate`."""
        if not len(prompts):
            raise ValueError("generate needs at least one prompt; given none")
        if sampling.max_tokens > self.max_response_length:
            raise ValueError(
                f"max_tokens is {sampling.max_tokens}, above the engine's max_response_length "
                f"{self.max_response_length}: lower the one or raise the other"
            )
        if sampling.stop and self.detokenize is None:
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


def _device(policy: Policy) -> jax.Device:
    """One of the devices of the rollout."""
    return jax.local_devices()[0] if policy.mesh is None else policy.mesh.devices.flat[0]


def _layout(policy: Policy, cache_dtype: Any, attention: str, on_cpu: bool) -> CacheLayout:
    """How this model's cache lies for the attention that will run here."""
    c = policy.config
    plain_on_cpu = on_cpu and attention in ("auto", "xla")
    return CacheLayout(
        num_layers=c.num_layers,
        num_kv_heads=c.num_kv_heads,
        head_dim=c.head_dim,
        dtype=jnp.dtype(policy.dtype if cache_dtype is None else cache_dtype),
        stacked=not (plain_on_cpu and c.num_layers <= cpu.MAX_UNROLLED_LAYERS),
        transposed_keys=plain_on_cpu,
    )


def _splits(policy: Policy) -> tuple[int, int]:
    """The devices that slots are split over, and those that a slot's cache is split over in all."""
    if policy.mesh is None:
        return 1, 1
    shards = mesh_axis_size(policy.mesh, RULES["batch"])
    heads = mesh_axis_size(policy.mesh, RULES["kv_heads"])
    return shards, shards * (heads if policy.config.num_kv_heads % heads == 0 else 1)
