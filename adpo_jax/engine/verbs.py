"""JetStream's verbs over prompts that a group shares: prefill, insert, generate, pure and jitted.

    prefixes = prefill(params, tokens, lengths)          once a prompt, not once a sample
    state    = insert(state, prefixes, rows)             prompts into prefix rows
    state    = assign(state, fresh, slots, members)      samples into slots
    state, results = generate(params, state, knobs, ...) several steps of every slot
    state    = grow(state, ...), resize(state, ...)      more columns, other slots

A prefix holds all tokens of its prompt but the last, which is the first token that each sample
feeds. So the first token of a completion is sampled like every other, and prefill needs no head.

Letters: B slots, P prefix rows, M samples of a prefix row, C columns of the ring, T tokens.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from adpo_jax.devices import moving, sharding
from adpo_jax.devices.sharding import constrain
from adpo_jax.engine import kernels, kv_cache, sampling, state_store
from adpo_jax.engine.decode_state import (
    DecodeState,
    Pages,
    Prefixes,
    ResultTokens,
    Sizes,
    Slots,
    age,
)
from adpo_jax.engine.group_attention import PageView, View, group_attention
from adpo_jax.engine.kv_cache import KV, CacheLayout
from adpo_jax.engine.sampling import Alternatives, Knobs, Method
from adpo_jax.model import linear_attention, parameters, unstacked
from adpo_jax.model.attention import Attend, Turning
from adpo_jax.model.linear_attention import Hybrid, Recur, where_rows
from adpo_jax.model.linear_attention_chunks import rows_with_memory
from adpo_jax.model.mixture import ROUTED
from adpo_jax.model.model_config import Mixture
from adpo_jax.policy.policy import Policy


@dataclasses.dataclass(frozen=True)
class Verbs:
    """The verbs of one model on one layout of the cache; it is hashable and holds no arrays."""

    policy: Policy
    layout: CacheLayout
    attention: str = "xla"  # as `attention_choice.resolve` gave it for decoding

    @property
    def lead(self) -> int:
        """The axis of the rows in each array of a store."""
        return int(self.layout.stacked)

    # --- parameters

    def load_params(self, params):
        """The parameters in the form in which decoding reads them.

        They are cast to the dtype of the computation, so that no step reads them in a wider one;
        norms keep their dtype, and the arithmetic stays the same. They are laid out on the mesh of
        the rollout. Where layers run one by one, they are unstacked and weights of one input may be
        joined, and in float32 adapters are merged into that copy; elsewhere adapters stay beside
        their weights. Parameters that need no change are not copied.
        """
        if self._merges or self._joins:
            return self._unstacked(self._laid_out(params))
        # One after the other, so that no two lie there in more than one form; all processes in the
        # same order, since each takes part in moving what others hold.
        loaded = {}
        for name in sorted(params.keys() - {"layers"}):
            loaded |= self._laid_out({name: params[name]})
        stacked, each = {}, [{} for _ in range(self.policy.config.num_layers)]
        for name, x in sorted(params["layers"].items()):
            one = self._laid_out({"layers": {name: x}})
            if self.layout.stacked:
                stacked |= one["layers"]
            else:
                for layer, of_layer in zip(each, self._unstacked(one)["layers"], strict=True):
                    layer |= of_layer
        return loaded | {"layers": stacked if self.layout.stacked else tuple(each)}

    def _laid_out(self, params):
        """Some of the parameters, cast and on the mesh of the rollout."""
        params = self.cast(params)
        if self.policy.mesh is None:
            return params
        return moving.move(params, self.policy.shardings(params))

    def cast(self, params):
        """The parameters, or some of them, in the dtypes that decoding reads them in."""
        if jnp.dtype(self.policy.dtype) == jnp.dtype(self.policy.param_dtype):
            return params
        return self._cast(params)

    @functools.partial(jax.jit, static_argnums=0)
    def _cast(self, params):
        def cast(path, leaf):
            row = parameters.at(tuple(key.key for key in path))
            return leaf if row.keeps_dtype else leaf.astype(self.policy.dtype)

        return jax.tree_util.tree_map_with_path(cast, params)

    @property
    def _merges(self) -> bool:
        """Whether adapters are merged into weights."""
        return not self.layout.stacked and self.policy.lora and self.policy.dtype == jnp.float32

    @property
    def _joins(self) -> bool:
        """Whether weights of one input become one; XLA's compiler for GPUs does so by itself."""
        alone = self.policy.mesh is None or self.policy.mesh.size == 1
        return not self.layout.stacked and alone and _platform(self.policy) == "cpu"

    @functools.partial(jax.jit, static_argnums=0)
    def _unstacked(self, params):
        scale = self.policy.lora.scale if self._merges else None
        return unstacked.decoding_params(
            params, self.policy.config, lora_scale=scale, join=self._joins
        )

    def abstract_params(self):
        """The shapes and shardings of `load_params`'s result."""
        params = self._abstract_cast()
        return params if self.layout.stacked else _abstract_result(Verbs._unstacked, self, params)

    def _abstract_cast(self):
        params = self.policy.abstract_params()
        dtypes = jax.eval_shape(self._cast, params)
        return jax.tree.map(
            lambda p, d: jax.ShapeDtypeStruct(p.shape, d.dtype, sharding=p.sharding), params, dtypes
        )

    def copied_bytes(self, given: Policy) -> int:
        """Bytes that `load_params` copies on one device from parameters that lie as `given`'s."""
        loaded = self._abstract_cast()
        if not self.layout.stacked:
            return sharding.device_bytes(loaded)

        def copied(old, new):
            same = old.dtype == new.dtype and old.sharding == new.sharding
            return 0 if same else sharding.device_bytes(new)

        return sum(jax.tree.leaves(jax.tree.map(copied, given.abstract_params(), loaded)))

    def loading(self, given: Policy) -> tuple[int, tuple[jax.stages.Traced, int] | None]:
        """What `load_params` needs besides its result, from parameters that lie as `given`'s.

        Returns:
          Bytes of one device of the parameter that takes most on the way, cast and, where layers
          are unstacked, in one piece; and, as of `moving.traced_part`, the program that moves it.
        """
        here = self._abstract_cast()
        cast = jax.tree.map(
            lambda old, new: jax.ShapeDtypeStruct(old.shape, new.dtype, sharding=old.sharding),
            given.abstract_params(),
            here,
        )

        def on_the_way(old, cast, new):
            is_cast = sharding.device_bytes(cast) if old.dtype != cast.dtype else 0
            return is_cast + (0 if self.layout.stacked else sharding.device_bytes(new))

        each = jax.tree.map(on_the_way, given.abstract_params(), cast, here)
        if self.policy.mesh is None:
            return max(jax.tree.leaves(each)), None
        shardings = jax.tree.map(lambda x: x.sharding, here)
        return max(jax.tree.leaves(each)), moving.traced_part(cast, shardings)

    # --- the state

    def abstract_state(self, sizes: Sizes) -> DecodeState:
        """The shapes and shardings of `init_decode_state`'s result."""
        return _abstract_result(Verbs.init_decode_state, self, sizes)

    @functools.partial(jax.jit, static_argnums=(0, 1))
    def init_decode_state(self, sizes: Sizes) -> DecodeState:
        """An empty state of these sizes, which has no past rows yet."""
        assert not sizes.past_rows  # else it would be compiled for each number of them
        slots, columns, rows, width, prefix, *_, pages = sizes
        ints, pool = jnp.zeros(slots, jnp.int32), None
        if pages is not None:
            kv = self.sharded(self.layout.without_states.zeros(pages.pages, pages.page))
            pool = Pages(kv, jnp.zeros((slots, pages.most), jnp.int32))
        return DecodeState(
            ring=self.sharded(self.layout.zeros(slots, columns)),
            prefix=Prefixes(
                self.sharded(self.layout.zeros(rows, prefix)), jnp.zeros(rows, jnp.int32)
            ),
            slots=Slots(
                token=ints,
                position=ints,
                generated=ints,
                active=jnp.zeros(slots, bool),
                row=ints,
                rank=ints,
                key_data=jnp.zeros((slots, 2), jnp.uint32),
                before=None if pages is None else ints,
            ),
            members=jnp.zeros((rows, width), jnp.int32),
            column=jnp.zeros((), jnp.int32),
            pages=pool,
        )

    def sharded(self, kv: KV) -> KV:
        """The store with its rows split over the batch axes, its heads over the tensor axis."""

        def place(x):
            rest = (None,) * (x.ndim - self.lead - 2)
            return constrain(x, self.policy.mesh, *(None,) * self.lead, "batch", "kv_heads", *rest)

        return jax.tree.map(place, kv)

    # --- prefill, insert

    @functools.partial(jax.jit, static_argnums=(0, 4))
    def prefill(
        self, params, tokens: jax.Array, true_length: jax.Array, with_experts: bool = False
    ) -> Prefixes:
        """Keys and values of prompts.

        Args:
          tokens: [rows, T] int32, padded on the right.
          true_length: [rows] int32, the number of tokens of each; may be 0.
          with_experts: whether to return the experts too, whole on every device.
        """
        rows, T = tokens.shape
        positions = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), (rows, T))
        segments = (positions < true_length[:, None]).astype(jnp.int32)
        attend_within = kernels.prefill_attention(self.attention, self.policy, positions, segments)
        layout = self.layout

        def attend(q, k, v, layer, kv):
            out, _ = attend_within(q, k, v, layer, None)
            return out, layout.write(kv, layer, layout.pack(k, v))

        def recur(inputs, layer, kv):
            out, memory = rows_with_memory(inputs, segments, self.policy.mesh)
            return out, layout.write(kv, layer, memory)

        attend = self.attention_of(attend, recur)
        empty = self.sharded(self.layout.zeros(rows, T))
        ffn = self.policy.ffn(segments)
        _, kv, extras = self.policy(params, tokens, positions, empty, attend, ffn)
        experts = None
        if with_experts:
            dtype = self.experts_dtype
            experts = jnp.moveaxis(extras[ROUTED], 0, 2).astype(dtype)
            experts = constrain(experts, self.policy.mesh, *(None,) * experts.ndim)
        return Prefixes(kv, true_length, experts)

    def attention_of(self, attend: Attend, recur: Recur) -> Attend:
        """The attention of all layers; `recur` is that of the linear ones, if there are any."""
        return Hybrid(attend, recur) if self.layout.linear else attend

    @functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
    def insert(self, state: DecodeState, prefixes: Prefixes, rows: jax.Array) -> DecodeState:
        """Puts prompts into prefix rows.

        Args:
          prefixes: prompts with as many columns as the state's prefix rows, or fewer.
          rows: int32, the prefix row of each prompt. The same row twice is fine for the same
            prompt.
        """

        def put_at_once(stored, new):
            sizes = [slice(size) for size in new.shape]
            return stored.at[(*sizes[: self.lead], rows, *sizes[self.lead + 1 :])].set(new)

        def put_in_turn(stored, new):
            def one(i, stored):
                row = jax.lax.dynamic_slice_in_dim(new, i, 1, axis=self.lead)
                at = [0] * stored.ndim
                at[self.lead] = rows[i]
                return jax.lax.dynamic_update_slice(stored, row, at)

            return jax.lax.fori_loop(0, rows.shape[0], one, stored)

        # A GPU launches a kernel for each row and layer in turn; a CPU scatters slowly.
        put = put_at_once if _platform(self.policy) == "gpu" else put_in_turn
        kv = jax.tree.map(put, state.prefix.kv, prefixes.kv)
        lengths = state.prefix.lengths.at[rows].set(prefixes.lengths)
        return state._replace(prefix=Prefixes(kv, lengths))

    @functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
    def assign(
        self, state: DecodeState, fresh: jax.Array, slots: Slots, members: jax.Array
    ) -> DecodeState:
        """Starts samples in slots, and stops those that `slots` marks inactive.

        Args:
          fresh: [B] bool, the slots to overwrite.
          slots: the values to write there.
          members: [P, M] int32, the new table of members.
        """

        def choose(new, old):
            return jnp.where(fresh.reshape(-1, *(1,) * (old.ndim - 1)), new, old)

        if self.layout.linear:
            state = self._with_states(state, fresh & (age(slots) == 0), slots)
        return state._replace(slots=jax.tree.map(choose, slots, state.slots), members=members)

    def _with_states(self, state: DecodeState, starts: jax.Array, slots: Slots) -> DecodeState:
        """Gives starting slots their state of linear attention.

        It is that after the sample's past, where there is one, else that after the prompt. With
        pages the slot of a sample that goes on has it already.
        """
        *others, memory = state.ring
        if state.pages is not None:
            starts &= slots.before == 0
        begun = functools.partial(state_store.begun, lead=self.lead, mesh=self.policy.mesh)
        memory = begun(memory, state.prefix.kv[-1], starts, slots.row)
        if state.past is not None:
            goes_on = starts & (slots.before > 0)
            memory = begun(memory, state.past.kv[-1], goes_on, state.past.view.row)
        return state._replace(ring=(*others, memory))

    # --- generate

    @functools.partial(jax.jit, static_argnums=(0, 4, 5), donate_argnums=2)
    def generate(
        self,
        params,
        state: DecodeState,
        knobs: Knobs,
        method: Method,
        num_steps: int,
        stop_at: jax.Array,
        max_steps: jax.Array,
    ) -> tuple[DecodeState, ResultTokens]:
        """Decodes up to `num_steps` tokens of every active slot.

        The loop ends early after `max_steps`, or as soon as no more than `stop_at` slots are
        active, so that the host can refill or shrink the batch.
        """
        B = state.slots.token.shape[0]
        zeros = jnp.zeros((num_steps, B), jnp.float32)
        alternatives = None
        if method.num_alternatives:
            A = min(method.num_alternatives, self.policy.config.vocab_size)
            many = jnp.zeros((num_steps, B, A), jnp.float32)
            alternatives = Alternatives(many.astype(jnp.int32), many)
        experts = None
        if method.routed_experts:
            experts = jnp.zeros((num_steps, B, *self.experts_shape), self.experts_dtype)
        results = ResultTokens(
            tokens=jnp.zeros((num_steps, B), jnp.int32),
            log_probs=zeros,
            full_log_probs=zeros if method.full_log_probs else None,
            alternatives=alternatives,
            valid=jnp.zeros((num_steps, B), bool),
            stopped=jnp.zeros((num_steps, B), bool),
            experts=experts,
        )
        # One call draws for all steps, which saves fifty small operations a step.
        ahead = jnp.arange(num_steps, dtype=jnp.int32)[:, None] + state.slots.generated
        uniforms = jax.vmap(sampling.uniforms, (None, 0))(state.slots.key_data, ahead)

        def more(carry):
            step, state, _ = carry
            active = jnp.sum(state.slots.active, dtype=jnp.int32)
            return (step < jnp.minimum(num_steps, max_steps)) & (active > stop_at)

        def one(carry):
            step, state, results = carry
            state, result = self._step(params, state, uniforms[step], knobs, method)
            results = jax.tree.map(
                lambda all_steps, new: jax.lax.dynamic_update_slice(
                    all_steps, new[None], (step,) + (0,) * new.ndim
                ),
                results,
                result,
            )
            return step + 1, state, results

        _, state, results = jax.lax.while_loop(more, one, (jnp.int32(0), state, results))
        # The results lie whole on every device, so that every process can read them.
        results = jax.tree.map(lambda x: constrain(x, self.policy.mesh, None, None), results)
        return state, results

    def _step(self, params, state: DecodeState, uniform, knobs: Knobs, method: Method):
        """Samples one token of every slot; the tokens of inactive slots are discarded."""
        slots = state.slots
        hidden, ring, extras = self._forward(params, state)
        logits = self.policy.head(params, hidden)
        drawn = sampling.sample(logits, uniform, slots.generated, knobs, method, self.policy.mesh)
        stopped = jnp.any(drawn.tokens[:, None] == knobs.stop_ids, axis=-1) & slots.active
        generated = slots.generated + 1
        going_on = slots.active & ~stopped & (generated < knobs.max_tokens)

        def advance(new, old):
            return jnp.where(slots.active, new, old)

        experts = None
        if method.routed_experts:
            experts = jnp.moveaxis(extras[ROUTED][:, :, 0], 0, 1).astype(self.experts_dtype)
        result = ResultTokens(*drawn, valid=slots.active, stopped=stopped, experts=experts)
        columns = kv_cache.num_columns(ring)
        state = state._replace(
            ring=ring,
            slots=slots._replace(
                token=advance(drawn.tokens, slots.token),
                position=advance(slots.position + 1, slots.position),
                generated=advance(generated, slots.generated),
                active=going_on,
            ),
            column=jnp.mod(state.column + 1, columns),
        )
        return state, result

    def _forward(self, params, state: DecodeState):
        """Hidden states [B, D] of the slots' tokens, the ring with what they add to it, extras."""
        slots, layout, pages = state.slots, self.layout, None
        if state.pages is not None:
            pages = PageView(state.pages.table, place=slots.generated, length=slots.before)
        view = View(
            position=slots.position,
            age=jnp.where(slots.active, age(slots), -1),
            column=state.column,
            row=slots.row,
            rank=slots.rank,
            slot=state.members,
            prefix_length=state.prefix.lengths,
            past=None if state.past is None else state.past.view,
            pages=pages,
        )
        config = self.policy.config
        attend_part = kernels.attend_part(
            self.attention, layout, config.attention_soft_cap, self.policy.mesh
        )

        def attend(q, k, v, layer, ring):
            ring = layout.write(ring, layer, layout.pack(k, v), state.column)
            out = group_attention(
                q[:, 0],
                ring,
                state.prefix.kv,
                layer,
                view,
                scale=config.attention_scale,
                attend=attend_part,
                mesh=self.policy.mesh,
                past=None if state.past is None else state.past.kv,
                pages=None if state.pages is None else state.pages.kv,
            )
            return out[:, None], ring

        attend_step = kernels.attend_step(self.attention, layout, self.policy)
        # Their kernels know two stores.
        if attend_step and state.past is None and state.pages is None:

            def turn(heads, layer, ring):
                of_layers = (kv_cache.of_kind(kv, layer) for kv in (ring, state.prefix.kv))
                out, changed = attend_step(heads, *of_layers, layer, view)
                return out, kv_cache.with_kind(ring, layer, changed)

            attend = Turning(attend, turn)

        def recur(inputs, layer, ring):
            old = layout.read(ring, layer)
            out, new = linear_attention.step(inputs, old)
            # A sample that has ended may go on later, so its state must stay as it is.
            return out, layout.write(ring, layer, where_rows(slots.active, new, old))

        attend = self.attention_of(attend, recur)
        tokens, positions = slots.token[:, None], slots.position[:, None]
        ffn = self.policy.ffn(slots.active[:, None])
        hidden, ring, extras = self.policy(params, tokens, positions, state.ring, attend, ffn)
        return hidden[:, 0], ring, extras

    @property
    def experts_shape(self) -> tuple[int, int]:
        """(L, k) of a mixture: its layers, and the experts of a token.

        Raises:
          ValueError: for a model without one.
        """
        return self.policy.config.num_mixtures, self._mixture.chosen

    @property
    def experts_dtype(self) -> Any:
        """The narrowest dtype for the number of an expert.

        Raises:
          ValueError: for a model without any.
        """
        return jnp.uint8 if self._mixture.num_experts <= 256 else jnp.uint16

    @property
    def _mixture(self) -> Mixture:
        if mixture := self.policy.config.mixture:
            return mixture
        raise ValueError(
            "routed_experts and prompt_experts ask for experts, and the model has none; leave them "
            "False"
        )

    # --- resize

    @functools.partial(jax.jit, static_argnums=(0, 2))
    def with_columns(self, kv: KV, columns: int) -> KV:
        """The store with this many columns: cut off, or padded with empty ones at the end."""

        def fit(x, axis):
            x = jax.lax.slice_in_dim(x, 0, min(columns, x.shape[axis]), axis=axis)
            widths = [(0, 0)] * x.ndim
            widths[axis] = (0, columns - x.shape[axis])
            return jnp.pad(x, widths)

        return self.sharded(self.layout.by_columns(fit, kv))

    def grow(self, state: DecodeState, columns: int, column: int) -> DecodeState:
        """Lengthens a ring that has not gone round. It copies the ring, while `resize` gathers it.

        Args:
          column: steps written so far, at most the old columns.
        """
        return state._replace(ring=self.with_columns(state.ring, columns), column=np.int32(column))

    def resize(
        self, state: DecodeState, old_slots: jax.Array, members: jax.Array, columns: int, kept
    ) -> DecodeState:
        """Gathers slots into a batch of another size, over a ring of another length.

        Args:
          old_slots: [new B] int32, the old slot of each new one; one past the last for an empty
            one.
          members: [P, M] int32, the table of members by new slots.
          kept: int32 scalar, the most tokens that a slot has in the ring; so many of the newest
            columns move to columns 0 .. kept - 1.
        """
        ring, slots, column = self.gather_slots(
            state.ring, state.slots, state.column, old_slots, columns, kept
        )
        return state._replace(ring=ring, slots=slots, column=column, members=members)

    def regroup(
        self, state: DecodeState, old_rows: jax.Array, row: jax.Array, rank: jax.Array
    ) -> DecodeState:
        """Gathers prefix rows, after a `resize` whose table of members has the new rows already.

        Args:
          old_rows: [new P] int32, the old row of each new one.
          row, rank: [B] int32, the place of each slot among the members.
        """
        prefix = self.rows_of(state.prefix, old_rows)
        slots = state.slots._replace(row=row, rank=rank)
        return state._replace(prefix=prefix, slots=slots)

    @functools.partial(jax.jit, static_argnums=0)
    def rows_of(self, prefix: Prefixes, rows: jax.Array) -> Prefixes:
        """The prompts of these rows; a row may be taken several times."""
        kv = self.sharded(self.layout.take(prefix.kv, rows))
        return Prefixes(kv, jnp.take(prefix.lengths, rows, mode="clip"))

    @functools.partial(jax.jit, static_argnums=(0, 5))
    def gather_slots(self, ring: KV, slots: Slots, column, old_slots, columns: int, kept):
        first = jnp.mod(column - kept, kv_cache.num_columns(ring))

        def rotate(x, axis):
            # A slice is taken, since gathering columns takes several times as long.
            size = min(columns, x.shape[axis])
            return jax.lax.dynamic_slice_in_dim(jnp.concatenate([x, x], axis), first, size, axis)

        rotated = self.with_columns(self.sharded(self.layout.by_columns(rotate, ring)), columns)
        moved = self.layout.take(rotated, old_slots)
        exists = old_slots < slots.token.shape[0]
        slots = jax.tree.map(lambda x: jnp.take(x, old_slots, axis=0, mode="clip"), slots)
        slots = slots._replace(active=slots.active & exists)
        return self.sharded(moved), slots, jnp.mod(jnp.asarray(kept, jnp.int32), columns)


def _platform(policy: Policy) -> str:
    return policy.attention_settings.platform


def _abstract_result(jitted, verbs: Verbs, *args):
    """The shapes and shardings of a jitted function's result."""
    lowered, mesh = jitted.lower(verbs, *args), verbs.policy.mesh
    if mesh is not None and mesh.size == 1:  # the program itself names no device
        layout = NamedSharding(mesh, PartitionSpec())
        return jax.tree.map(
            lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=layout), lowered.out_info
        )
    return jax.tree.map(
        lambda s, layout: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=layout),
        lowered.out_info,
        lowered.compile().output_shardings,
    )
