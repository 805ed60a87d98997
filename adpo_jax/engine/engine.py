"""The rollout engine: token ids in, sampled token ids and their log-probs out.

    engine = Engine(policy, max_prompt_length=512, max_response_length=512, num_slots=64)
    out = engine.generate(params, prompts, SamplingParams(n=8, max_tokens=128), key)

The engine plans the memory, knows the sizes that there are programs for, and runs the batching loop
(`batching`) with the sizing of a call (`generation`). The loop dispatches several steps of decoding
at once (`verbs`). The sizes are few, so that a bounded number of programs is compiled.

The engine sees text in one place: it looks for stop strings in the text that `detokenize` makes of
the tokens. It knows neither prompts as text nor rewards, and the weights are an argument of every
call.

Letters: P prompts, n samples of a prompt, T tokens.
"""

import dataclasses
import functools
import numbers
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from adpo_jax.devices.sharding import RULES, mesh_axis_size
from adpo_jax.engine import cache_plan, kernels, reading
from adpo_jax.engine.batching import DecodeLoop
from adpo_jax.engine.decode_state import DecodeState, Sizes
from adpo_jax.engine.generation import CallSizing, FinishedGroup, Generation, shared_settings
from adpo_jax.engine.kv_cache import CacheLayout
from adpo_jax.engine.requests import Request
from adpo_jax.engine.sampling import SamplingParams, prompt_uids, sample_keys
from adpo_jax.engine.session import Session
from adpo_jax.engine.sizes import (
    column_buckets,
    is_power_of_two,
    is_whole,
    length_bucket,
    power_of_two,
    prefill_rows,
    rows_of_a_group,
    up_to_multiple,
)
from adpo_jax.engine.state_store import StateLayout
from adpo_jax.engine.tuning import EngineTuning, column_stages, engine_tuning
from adpo_jax.engine.verbs import Verbs
from adpo_jax.model import parameters
from adpo_jax.policy.policy import Policy
from adpo_jax.records import Completion, Completions

# The last one has a scale for each token and head.
CACHE_DTYPES = ("float32", "bfloat16", "float16", "int8")


class Engine:
    """Samples completions of groups of prompts.

    Args:
      policy: the model; its parameters are an argument of `generate`.
      max_prompt_length: tokens of the longest prompt taken.
      max_response_length: tokens of the longest completion.
      num_slots: the most samples decoded at once; None for 64 on a CPU and 256 elsewhere.
      mesh: the devices; slots are split over (`data`, `fsdp`), heads over `tensor`. None for the
        policy's mesh.
      cache_dtype: dtype of keys and values, one of `CACHE_DTYPES`; None for the policy's dtype.
      attention: attention of decoding, one of `attention_choice.NAMES`; prefill follows it.
      gpu_memory_utilization: fraction, at most 1, of the device's memory (of a CPU machine's free
        memory) that may be in use while sampling; lowers `num_slots` to the number that fits. None
        for no limit.
      resident_bytes: bytes of one device that others need while the engine samples, such as a
        trainer's parameters and optimizer; has an effect with `gpu_memory_utilization` alone.
      group_size: samples of a prompt that memory is planned for.
      expected_response_length: tokens of a completion that memory is planned for, where the longest
        ones are much longer. Keys and values then lie in pages (`pages`), as many as completions
        need; where a batch needs more pages than there are, its youngest samples wait. None for
        memory for the longest completion in every slot. Calls whose `max_tokens` are few, a
        `ContinuousBatch`, and a `session` of a model with linear attention keep everything in the
        ring all the same.
      page_size: tokens of a page, a power of two; the ring has room for four pages.
      prefill_chunk_size: tokens of a piece, a power of two, in which longer prompts are read while
        others decode (`reading`); 0 prefills every prompt at once.
      free_cache_engine: whether to give the cache's memory back after every call; else it is kept
        for the next call of the same sizes, unless the batch shrank meanwhile, as on a CPU.
      steps_per_dispatch: decode steps between two looks of the host.
      detokenize: token ids -> text, needed for stop strings.

    Raises:
      ValueError: for a size, dtype or attention that cannot be, or where not a single slot fits.
      TypeError: for a `policy` that is none.
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
        expected_response_length: int | None = None,
        page_size: int = cache_plan.PAGE,
        prefill_chunk_size: int = 0,
        free_cache_engine: bool = True,
        steps_per_dispatch: int = 32,
        detokenize: Callable[[list[int]], str] | None = None,
    ):
        _check_policy(policy)
        _check_counts(
            steps_per_dispatch=steps_per_dispatch,
            group_size=group_size,
            max_prompt_length=max_prompt_length,
            max_response_length=max_response_length,
            num_slots=1 if num_slots is None else num_slots,
            expected_response_length=(
                1 if expected_response_length is None else expected_response_length
            ),
        )
        _check_memory(gpu_memory_utilization, resident_bytes)
        if not is_power_of_two(page_size, least=8):
            raise ValueError(f"page_size is a power of two, 8 or more; given {page_size!r}")
        reading.check_size(prefill_chunk_size)
        _check_cache_dtype(cache_dtype)
        trainers = policy
        if mesh is not None:
            policy = dataclasses.replace(policy, mesh=mesh)
        device = _device(policy)
        tuning = engine_tuning(device.platform, attention, policy.config.num_layers)
        layout = _layout(policy, cache_dtype, tuning)
        attention = kernels.choose(attention, layout, device)
        self.policy = policy
        self.verbs = Verbs(policy, layout, attention)
        self.max_prompt_length = max_prompt_length
        self.max_response_length = max_response_length
        self.prefill_chunk_size = prefill_chunk_size
        self.steps_per_dispatch = steps_per_dispatch
        self.detokenize = detokenize
        self.free_cache_engine = free_cache_engine
        self._kept: DecodeState | None = None

        self.column_stages = column_stages(attention)
        self.shards, self._splits = _splits(policy)
        budget, budget_text = self._budget(gpu_memory_utilization, resident_bytes, trainers)
        paging = None
        if expected_response_length is not None:
            longest = max_response_length
            paging = cache_plan.Paging(expected_response_length, longest, page_size, self.shards)
            paging = paging.for_longest(longest)
        self.plan = cache_plan.plan(
            layout,
            max_prompt_length=max_prompt_length,
            max_response_length=max_response_length,
            group_size=group_size,
            most_slots=num_slots or tuning.default_slots,
            multiple=self.shards,
            splits=self._splits,
            stages=self.column_stages,
            shrinks=tuning.shrinks,
            budget=budget,
            budget_text=budget_text,
            tile=tuning.slot_tile,
            paging=paging,
        )
        self.num_slots = self.plan.num_slots
        self.slot_sizes = tuning.slot_sizes(self.num_slots, self.shards)
        # A batch that shrinks goes through these sizes; another one stays as it is.
        self.smaller_sizes = self.slot_sizes if tuning.shrinks else []

    def _budget(
        self, utilization: float | None, resident_bytes: int, trainers: Policy
    ) -> tuple[int | None, str]:
        """Bytes of one device that the cache may take, and the arithmetic; None for no limit.

        Args:
          trainers: the policy where the trainer has it, from which the parameters are copied.
        """
        if utilization is None:
            return None, ""
        return cache_plan.memory_budget(
            utilization,
            _device(self.policy),
            resident=resident_bytes + self.reading_bytes,
            copied=self.verbs.copied_bytes(trainers),
        )

    @property
    def prefill_pieces(self) -> int:
        """The pieces in which the longest prompt is read; 1 for all at once."""
        size, length = self.prefill_chunk_size, self.max_prompt_length - 1
        return -(-length // size) if 0 < size < length else 1

    @property
    def prefill_rows(self) -> int:
        """The most prompts of full length that are prefilled at once."""
        if self.prefill_pieces > 1:
            return self.shards
        length = length_bucket(self.max_prompt_length - 1, self.max_prompt_length)
        return prefill_rows(length, self.shards, self.verbs.layout.most_new_rows)

    @property
    def reading_bytes(self) -> int:
        """Bytes on a device of the longest prompt while it is read, and copied into its rows."""
        if self.prefill_pieces == 1:
            return 0
        layout = self.verbs.layout
        columns = power_of_two(self.max_prompt_length - 1) + layout.row_tokens()
        # The store, the part of it that is copied, and the copies of that for the rows.
        return 3 * layout.token_bytes() * columns * self.shards // self._splits

    def sizes_for(
        self,
        num_prompts: int,
        n: int,
        columns: int,
        prefix: int,
        beside: Callable[[int], int] = lambda slots: 0,
    ) -> tuple[int, int]:
        """Slots and prefix rows that decode as many samples at once as the memory allows.

        Args:
          n: samples of a prompt.
          columns: of the ring at its longest.
          prefix: tokens of a prefix row.
          beside: tokens of further stores that so many slots need.
        """
        enough = next((s for s in self.slot_sizes if s >= num_prompts * n), self.num_slots)
        parts = rows_of_a_group(num_prompts, n, self.shards)
        sizes = []
        for slots in self.slot_sizes[: self.slot_sizes.index(enough) + 1]:
            rows = power_of_two(num_prompts * parts)
            rows = min(rows, cache_plan.prefix_rows(slots, n))
            rows = up_to_multiple(rows, self.shards)
            most = self.plan.most_rows(slots, columns, prefix, beside(slots))
            if most is not None:
                rows = min(rows, most // self.shards * self.shards)
            sizes.append((slots, rows))
        each = -(-n // parts)  # samples of a row
        return max(sizes, key=lambda size: (min(size[0], size[1] * each), -size[0]))

    def trace(self, sampling: SamplingParams) -> dict[str, jax.stages.Traced]:
        """The programs "prefill" and "decode" at their largest sizes, from shapes alone.

        Where prompts are read in pieces, "prefill" is that of a piece.
        """
        n, verbs = sampling.n, self.verbs
        length = length_bucket(self.max_prompt_length - 1, self.max_prompt_length)
        sizes, _ = self._sizes(2 * self.num_slots, n, self.max_response_length, length)
        params = verbs.abstract_params()
        state = verbs.abstract_state(sizes)
        if self.prefill_pieces > 1:
            prefill = reading.trace(verbs, params, self.prefill_chunk_size, length, self.shards)
        else:
            tokens = jax.ShapeDtypeStruct((self.prefill_rows, length), jnp.int32)
            lengths = jax.ShapeDtypeStruct((self.prefill_rows,), jnp.int32)
            prefill = Verbs.prefill.trace(verbs, params, tokens, lengths)
        count = jax.ShapeDtypeStruct((), jnp.int32)
        knobs = jax.tree.map(lambda x: jax.ShapeDtypeStruct(np.shape(x), x.dtype), sampling.knobs())
        return {
            "prefill": prefill,
            "decode": Verbs.generate.trace(
                verbs, params, state, knobs, sampling.method, self.steps_per_dispatch, count, count
            ),
        }

    def free_cache(self):
        """Gives the memory of a kept cache back."""
        self._kept = None

    def new_state(self, sizes: Sizes) -> DecodeState:
        """A state without active slots: the kept state if it has these sizes, else a new one."""
        kept, self._kept = self._kept, None
        if kept is not None:
            wanted = jax.eval_shape(lambda: self.verbs.init_decode_state(sizes))
            if jax.tree.map(jnp.shape, kept) == jax.tree.map(jnp.shape, wanted):
                # Samples that a stop string ended last are still active on the device.
                idle = kept.slots._replace(active=jnp.zeros_like(kept.slots.active))
                return kept._replace(slots=idle, column=np.int32(0))
        del kept
        return self.verbs.init_decode_state(sizes)

    def generate(
        self,
        params,
        prompts: Sequence[Sequence[int]],
        sampling: SamplingParams,
        key: jax.Array,
        *,
        version: int = 0,
        keys: np.ndarray | None = None,
        on_group_done: Callable[[FinishedGroup], None] | None = None,
    ) -> Completions:
        """Samples `sampling.n` completions of each prompt.

        The same key gives the same completions of a prompt whatever its place in the list, the
        prompts beside it and the number of slots (up to the rounding of matrix products).

        Args:
          params: the policy's parameters.
          prompts: token ids of each prompt, without padding.
          version: iterations done by these parameters; it is written beside every token.
          keys: [P, n or more, 2] uint32, the keys of the samples; None to make them of `key`.
          on_group_done: called with each group when its last sample ends, while others decode.

        Raises:
          ValueError: for prompts or settings that the engine was not made for.
          TypeError: for a key that is none of `jax.random.key`.
        """
        stats: dict[str, int] = {}
        groups: list[list[Completion]] = [[] for _ in prompts]
        streamed = self.stream(
            params, prompts, sampling, key, version=version, keys=keys, stats=stats
        )
        for group in streamed:
            groups[group.prompt_index] = group.completions
            if on_group_done is not None:
                on_group_done(group)
        return Completions(groups, stats)

    def stream(
        self,
        params,
        prompts: Sequence[Sequence[int]],
        sampling: SamplingParams,
        key: jax.Array,
        *,
        version: int = 0,
        keys: np.ndarray | None = None,
        stats: dict[str, int] | None = None,
        on_tokens: Callable[[int, int, np.ndarray], None] | None = None,
        on_completion: Callable[[int, int, Completion], None] | None = None,
    ) -> Iterator[FinishedGroup]:
        """`generate` as an iterator over the groups, in the order in which they end.

        Args:
          stats: a dict that is filled with the counts of the call at its end.
          on_tokens: called with (prompt, sample, its new tokens [T]) after every dispatch.
          on_completion: called with (prompt, sample, its completion) when a sample has ended.
        """
        prompts = self.checked(prompts, sampling)
        _check_given(params, key)
        if keys is None:
            keys = np.asarray(sample_keys(key, prompt_uids(prompts), sampling.n))
        requests = [
            Request(prompt, sampling, functools.partial(keys.__getitem__, index))
            for index, prompt in enumerate(prompts)
        ]
        loop = DecodeLoop(
            self.verbs,
            params,
            self._sizing(prompts, sampling),
            shared_settings(sampling),
            num_shards=self.shards,
            make_state=self.new_state,
            keeps_memory=not self.free_cache_engine,
            prefill_chunk_size=self.prefill_chunk_size,
        )
        for request in requests:
            loop.submit(request)
        generation = Generation(
            loop,
            requests,
            version=version,
            detokenize=self.detokenize,
            on_tokens=on_tokens,
            on_completion=on_completion,
        )
        try:
            while not generation.done:
                yield from generation.advance()
            if not self.free_cache_engine:
                self._kept = loop.state_to_keep()
        finally:
            if stats is not None:
                stats.update(loop.stats)

    def session(
        self,
        params,
        sampling: SamplingParams,
        key: jax.Array,
        *,
        version: int = 0,
        keeps_turns: bool = True,
    ) -> Session:
        """Samples in turns: samples that go on after tokens that were not sampled (`session`).

        Args:
          params: the policy's parameters.
          key: the samples of a prompt are those of `generate` with this key.
          version: iterations done by these parameters.
          keeps_turns: whether the memory of earlier turns stays, so that a turn costs its new
            tokens alone; else every turn prefills the whole transcript.

        Raises:
          ValueError: for settings that the engine was not made for.
          TypeError: for a key that is none of `jax.random.key`.
        """
        _check_given(params, key)
        return Session(self, params, sampling, key, version=version, keeps_turns=keeps_turns)

    def paging_for(self, max_tokens: int) -> cache_plan.Paging | None:
        """How completions of at most so many tokens are kept in pages.

        None where the ring holds them.
        """
        paging = self.plan.paging
        return paging and paging.for_longest(max_tokens)

    def _sizing(self, prompts: list[np.ndarray], sampling: SamplingParams) -> CallSizing:
        """The sizes that a call goes through."""
        longest = max(len(prompt) for prompt in prompts) - 1
        prefix = length_bucket(longest, self.max_prompt_length)
        first, column_sizes = self._sizes(len(prompts), sampling.n, sampling.max_tokens, prefix)
        # With pages the ring has room for two dispatches or more.
        most_steps = first.columns // 2 if first.pages else self.steps_per_dispatch
        return CallSizing(
            first=first,
            slot_sizes=[*(s for s in self.smaller_sizes if s < first.slots), first.slots],
            column_sizes=column_sizes,
            steps=min(self.steps_per_dispatch, most_steps),
        )

    def _sizes(
        self, num_prompts: int, n: int, max_tokens: int, prefix: int
    ) -> tuple[Sizes, list[int]]:
        """The largest sizes of a call, and the lengths that its ring grows through."""
        paging = self.paging_for(max_tokens)
        if paging is None:
            column_sizes = column_buckets(max_tokens, self.column_stages)
            columns, pages = column_sizes[-1], None
            slots, rows = self.sizes_for(num_prompts, n, columns, prefix)
        else:
            column_sizes = paging.columns(self.column_stages)
            columns = column_sizes[-1]
            slots, rows = self.sizes_for(num_prompts, n, columns, prefix, paging.tokens)
            pages = paging.sizes(slots)
        width = -(-n // rows_of_a_group(num_prompts, n, self.shards))
        return Sizes(slots, columns, rows, width, prefix, pages=pages), column_sizes

    def checked(self, prompts, sampling: SamplingParams) -> list[np.ndarray]:
        """The prompts as int32 arrays.

        Raises:
          ValueError: where this engine cannot sample from them so.
        """
        if not len(prompts):
            raise ValueError("sampling needs at least one prompt; given none")
        if sampling.max_tokens > self.max_response_length:
            raise ValueError(
                f"max_tokens is {sampling.max_tokens}, above the engine's max_response_length "
                f"{self.max_response_length}: lower the one or raise the other"
            )
        if sampling.stop and self.detokenize is None:
            raise ValueError("stop strings need Engine(..., detokenize=...), token ids -> text")
        for name in ("routed_experts", "prompt_experts"):
            if getattr(sampling, name) and not self.policy.config.num_mixtures:
                raise ValueError(f"{name} needs a mixture of experts, and this model has none")
        checked = []
        for i, prompt in enumerate(prompts):
            tokens = np.asarray(prompt)
            if tokens.ndim != 1 or not 1 <= len(tokens) <= self.max_prompt_length:
                raise ValueError(
                    f"prompt {i} is a list of 1 to {self.max_prompt_length} token ids "
                    f"(max_prompt_length); given shape {tokens.shape}"
                )
            checked.append(self.checked_tokens(tokens, f"prompt {i}"))
        return checked

    def checked_tokens(self, tokens: np.ndarray, name: str) -> np.ndarray:
        """Token ids as int32.

        Raises:
          ValueError: for others than the vocabulary's, calling them by this name.
        """
        V = self.policy.config.vocab_size
        if tokens.ndim != 1 or not np.issubdtype(tokens.dtype, np.integer):
            raise ValueError(
                f"{name} is made of token ids; given {tokens.dtype} of shape {tokens.shape}"
            )
        if len(tokens) and (tokens.min() < 0 or tokens.max() >= V):
            raise ValueError(
                f"{name} has token ids outside [0, {V}): {tokens.min()} to {tokens.max()} given"
            )
        return tokens.astype(np.int32)


def _check_policy(policy) -> None:
    if not isinstance(policy, Policy):
        raise TypeError(
            "policy is a Policy, the first of what Policy.from_pretrained returns; given "
            f"{type(policy).__name__}. The parameters go to `generate`"
        )


def _check_counts(**counts: int) -> None:
    for name, value in counts.items():
        if not (is_whole(value) and value >= 1):
            raise ValueError(f"{name} is a whole number, 1 or more; given {value!r}")


def _check_memory(utilization: float | None, resident_bytes: int) -> None:
    is_fraction = isinstance(utilization, numbers.Real) and 0 < utilization <= 1
    if not (utilization is None or is_fraction):
        raise ValueError(
            "gpu_memory_utilization is a fraction above 0 and at most 1, or None for no limit; "
            f"given {utilization!r}"
        )
    if not (isinstance(resident_bytes, numbers.Real) and 0 <= resident_bytes < float("inf")):
        raise ValueError(
            f"resident_bytes is a number of bytes, 0 or more; given {resident_bytes!r}"
        )


def _check_cache_dtype(given: Any) -> None:
    if given is None:
        return
    try:
        name = jnp.dtype(given).name
    except (TypeError, ValueError):
        name = None
    if name not in CACHE_DTYPES:
        raise ValueError(f"cache_dtype is one of {', '.join(CACHE_DTYPES)}; given {given!r}")


def _check_given(params, key) -> None:
    parameters.check_params(params)
    if not isinstance(key, jax.Array):
        raise TypeError(f"key is a jax.random.key(seed); given {type(key).__name__}")


def _device(policy: Policy) -> jax.Device:
    """One of the devices of the rollout."""
    return jax.local_devices()[0] if policy.mesh is None else policy.mesh.devices.flat[0]


def _layout(policy: Policy, cache_dtype: Any, tuning: EngineTuning) -> CacheLayout:
    """How the key/value cache of this model lies in memory."""
    c, linear = policy.config, policy.config.linear_attention
    states = None
    if linear:
        states = StateLayout(
            num_layers=sum(linear.layers),
            num_key_heads=linear.num_key_heads,
            key_dim=linear.key_dim,
            num_value_heads=linear.num_value_heads,
            value_dim=linear.value_dim,
            before=linear.taps - 1,
            dtype=policy.dtype,
            stacked=tuning.stacked,
        )
    return CacheLayout(
        num_layers=c.num_layers,
        num_kv_heads=c.num_kv_heads,
        head_dim=c.head_dim,
        dtype=jnp.dtype(policy.dtype if cache_dtype is None else cache_dtype),
        stacked=tuning.stacked,
        transposed_keys=tuning.transposed_keys,
        kinds=c.kinds if c.has_two_kinds else (),
        linear=states,
    )


def _splits(policy: Policy) -> tuple[int, int]:
    """The number of devices that slots are split over, and that the whole cache is split over."""
    if policy.mesh is None:
        return 1, 1
    shards = mesh_axis_size(policy.mesh, RULES["batch"])
    heads = mesh_axis_size(policy.mesh, RULES["kv_heads"])
    all_split = all(kv_heads % heads == 0 for _, kv_heads, _ in policy.config.kinds)
    return shards, shards * (heads if all_split else 1)
