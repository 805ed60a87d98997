"""The update: a batch of scored completions -> new parameters.

The loss of a mini-batch is a sum over micro-batches of whole groups whose normalisers were folded
in beforehand (`losses`), so however a mini-batch is split, it gives the same gradient.

Left out: packing, prompts shared within a group, and groups larger than a micro-batch.

Letters: P prompts, G completions of a prompt, S prompt and completion tokens, T completion tokens.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec

from adpo_jax import groups, lora
from adpo_jax.policy import Policy


class Batch(NamedTuple):
    """Completions of one iteration, the group axis explicit.

    A row is the prompt, padded on its left, followed by the completion, padded on its right, so
    that completions start in the same column everywhere.
    """

    tokens_PGS: np.ndarray  # int32
    attention_mask_PGS: np.ndarray  # int32, 1 at real tokens
    completion_mask_PGT: np.ndarray  # float32, 1 at sampled tokens, the stop token included
    sampler_log_probs_PGT: np.ndarray  # float32, under the distribution they were drawn from

    @property
    def num_completion(self) -> int:
        return self.completion_mask_PGT.shape[-1]


@flax.struct.dataclass
class TrainState:
    """All that a run carries from one iteration to the next.

    Attributes:
      step: int32 scalar, iterations done.
      params: the policy.
      opt_state: of the optimizer, over what is trained of the parameters (`lora.split`).
      anchor_params: a second copy of what is trained where the anchor mode needs one, else None.
      frozen_checksum: uint32 scalar of the frozen parameters under LoRA, else None.
    """

    step: jax.Array
    params: Any
    opt_state: Any
    anchor_params: Any = None
    frozen_checksum: jax.Array | None = None

    @property
    def anchor(self) -> Any:
        """The anchor's whole parameter tree; its frozen part is the policy's."""
        return lora.join(self.anchor_params, lora.split(self.params)[1])

    @property
    def saved(self) -> "TrainState":
        """What a checkpoint holds: all but the frozen parameters, which their source gives back."""
        return self.replace(params=lora.split(self.params)[0])

    def joined(self, params) -> "TrainState":
        """The state of which this is what was `saved`.

        Args:
          params: a tree with the frozen part; not looked at where nothing is frozen.

        Raises:
          ValueError: when the frozen part is not the one that the state was trained on.
        """
        if self.frozen_checksum is None:
            return self
        _, frozen = lora.split(params)
        if self.frozen_checksum != lora.checksum(frozen):
            raise ValueError(
                "the weights of the model are not those that the adapters of this checkpoint were "
                "trained on; give the model back its files, or start a new run"
            )
        return self.replace(params=lora.join(self.params, frozen))


def init_state(
    policy: Policy, params, optimizer: optax.GradientTransformation, anchor_params=None
) -> TrainState:
    """The state before the first iteration, the optimizer's arrays laid out like the parameters."""
    trained, frozen = lora.split(params)
    checksum = lora.checksum(frozen) if policy.lora else None
    if policy.mesh is None:
        opt_state = jax.jit(optimizer.init)(trained)
        return TrainState(jnp.zeros((), jnp.int32), params, opt_state, anchor_params, checksum)
    layout = jax.tree.map(lambda s: s.sharding, abstract_state(policy, optimizer).opt_state)
    opt_state = jax.jit(optimizer.init, out_shardings=layout)(trained)
    everywhere = NamedSharding(policy.mesh, PartitionSpec())
    step = jax.device_put(jnp.zeros((), jnp.int32), everywhere)
    checksum = jax.device_put(checksum, everywhere)
    return TrainState(step, params, opt_state, anchor_params, checksum)


def abstract_state(
    policy: Policy, optimizer: optax.GradientTransformation, *, keeps_anchor: bool = False
) -> TrainState:
    """The state's shapes, dtypes and layout, without any array; `policy` has a mesh."""
    replicated = NamedSharding(policy.mesh, PartitionSpec())
    params = policy.abstract_params()
    trained, _ = lora.split(params)
    opt_state = optax.tree_map_params(
        optimizer,
        lambda _, param: param,
        jax.eval_shape(optimizer.init, trained),
        trained,
        transform_non_params=lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=replicated),
    )
    step = jax.ShapeDtypeStruct((), jnp.int32, sharding=replicated)
    checksum = jax.ShapeDtypeStruct((), jnp.uint32, sharding=replicated) if policy.lora else None
    return TrainState(step, params, opt_state, trained if keeps_anchor else None, checksum)


def split_prompts(tree, num_micro: int):
    """Leaves [P, ...] -> [num_micro, P / num_micro, ...], each part spread over all devices."""

    def split(x):
        return jnp.swapaxes(x.reshape(-1, num_micro, *x.shape[1:]), 0, 1)

    return jax.tree.map(split, tree)


def batch_log_probs(policy: Policy, params, batch: Batch, *, temperature: float):
    """Log-probs and entropies [P, G, T] float32 of a batch's completions."""
    P, G, S = batch.tokens_PGS.shape
    log_probs, entropy = policy.completion_log_probs(
        params,
        batch.tokens_PGS.reshape(P * G, S),
        batch.attention_mask_PGS.reshape(P * G, S),
        num_completion=batch.num_completion,
        temperature=temperature,
    )
    return log_probs.reshape(P, G, -1), entropy.reshape(P, G, -1)


def make_log_probs(policy: Policy, *, num_micro: int, temperature: float = 1.0) -> Callable:
    """A jitted `(params, batch) -> (log_probs, entropy)`, each [P, G, T] float32, no gradient.

    Args:
      num_micro: micro-batches run one after the other; divides P.
    """

    def of_micro(params, micro: Batch):
        return batch_log_probs(policy, params, micro, temperature=temperature)

    def log_probs(params, batch: Batch):
        micros = split_prompts(batch, num_micro)
        parts = jax.lax.map(lambda micro: of_micro(params, micro), micros)
        return jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1).reshape(-1, *x.shape[2:]), parts)

    return jax.jit(log_probs)


def make_update(
    policy: Policy,
    algorithm,
    optimizer: optax.GradientTransformation,
    *,
    num_micro: int = 1,
    temperature: float = 1.0,
    max_anchor_kl: float = 0.0,
) -> Callable:
    """The optimizer step, a jitted `(state, batch, scores, anchor_log_probs) -> (state, metrics)`.

    Args:
      algorithm: `losses.Adpo`, `losses.Grpo` or `losses.Rloo`.
      num_micro: micro-batches whose gradients are summed; divides the number of prompts.
      temperature: of the sampler; the log-probs of the loss are tempered alike.
      max_anchor_kl: nats a token to the anchor beyond which the step is skipped; 0 for no limit.

    A step whose loss or gradient is not finite is skipped too: the state stays as it was and
    "update/skipped" is 1.

    The returned function takes the state (donated), a `Batch` of P prompts, the scores of
    `algorithm.score` for those prompts, and the anchor's log-probs [P, G, T], or None where the
    anchor is the policy of this very step: then they are the policy's own, without gradient, and
    cost no forward. `metrics` is a flat dict of float32 scalars, "update/tokens" the number of
    completion tokens among them.
    """

    def micro_loss(trained, frozen, micro):
        params = lora.join(trained, frozen)
        batch, prepared, anchor_log_probs = micro
        log_probs, entropy = batch_log_probs(policy, params, batch, temperature=temperature)
        if anchor_log_probs is None:
            anchor_log_probs = jax.lax.stop_gradient(log_probs)
        mask = batch.completion_mask_PGT
        loss, metrics = algorithm.loss(log_probs, anchor_log_probs, mask, prepared)
        return loss, metrics | _sampling_sums(log_probs, entropy, batch)

    def update(state: TrainState, batch: Batch, scores, anchor_log_probs):
        prepared = algorithm.normalise(scores, batch.completion_mask_PGT)
        micros = split_prompts((batch, prepared, anchor_log_probs), num_micro)
        trained, frozen = lora.split(state.params)
        gradient = jax.grad(micro_loss, has_aux=True)

        def add_micro(sums, micro):
            return jax.tree.map(jnp.add, sums, gradient(trained, frozen, micro)), None

        if num_micro == 1:
            grads, sums = gradient(trained, frozen, jax.tree.map(lambda x: x[0], micros))
        else:
            first = jax.tree.map(lambda x: x[0], micros)
            shapes = jax.eval_shape(gradient, trained, frozen, first)
            zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
            (grads, sums), _ = jax.lax.scan(add_micro, zeros, micros)

        updates, opt_state = optimizer.update(grads, state.opt_state, trained)
        moved = optax.apply_updates(trained, updates)
        metrics = _batch_metrics(sums) | {"update/grad_norm": optax.global_norm(grads)}
        sound = _is_sound(metrics, max_anchor_kl)
        trained, opt_state = jax.tree.map(
            lambda new, old: jnp.where(sound, new, old),
            (moved, opt_state),
            (trained, state.opt_state),
        )
        metrics["update/skipped"] = 1.0 - sound
        return state.replace(params=lora.join(trained, frozen), opt_state=opt_state), metrics

    return jax.jit(update, donate_argnums=0)


def _is_sound(metrics: dict[str, jax.Array], max_anchor_kl: float) -> jax.Array:
    """Whether loss and gradient are finite and the anchor near."""
    watched = [v for k, v in metrics.items() if k.endswith("/loss") or k == "update/grad_norm"]
    sound = jnp.all(jnp.isfinite(jnp.stack(watched)))
    if max_anchor_kl:
        kls = [value for name, value in metrics.items() if name.endswith("/anchor_kl")]
        sound &= jnp.max(jnp.stack(kls)) <= max_anchor_kl
    return sound


def _sampling_sums(log_probs, entropy, batch: Batch) -> dict[str, jax.Array]:
    """Sums over tokens of what compares the trained policy with the sampler, without gradient."""
    mask = batch.completion_mask_PGT
    log_probs, entropy = jax.lax.stop_gradient((log_probs, entropy))
    log_ratio = jnp.where(mask > 0, log_probs - batch.sampler_log_probs_PGT, 0.0)
    return {
        "sum/tokens": jnp.sum(mask),
        "sum/entropy": jnp.sum(jnp.where(mask > 0, entropy, 0.0)),
        "sum/mismatch_kl": jnp.sum(groups.k3(-log_ratio)),
    }


def _batch_metrics(sums: dict[str, jax.Array]) -> dict[str, jax.Array]:
    tokens = jnp.maximum(sums["sum/tokens"], 1.0)
    metrics = {name: value for name, value in sums.items() if not name.startswith("sum/")}
    metrics["rollout/entropy"] = sums["sum/entropy"] / tokens
    metrics["rollout/mismatch_kl"] = sums["sum/mismatch_kl"] / tokens
    metrics["update/tokens"] = sums["sum/tokens"]
    return metrics
