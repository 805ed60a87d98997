"""The state of training: all that a run carries from one iteration to the next."""

from collections.abc import Mapping
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec

from adpo_jax.model import lora
from adpo_jax.model.parameters import check_params
from adpo_jax.policy.policy import Policy


@flax.struct.dataclass
class TrainState:
    """All that a run carries from one iteration to the next.

    Attributes:
      step: int32 scalar, iterations done.
      params: the policy's parameters, trained and frozen.
      opt_state: the optimizer's state, over the `trained` parameters.
      anchor_params: the anchor's copy of the trained parameters where its mode needs one, else
        None.
      reference_params: the trained parameters as they were before the first iteration, where the
        loss pulls towards them and the anchor is another policy, else None.
      frozen_checksum: uint32 scalar, a checksum of the frozen parameters under LoRA, else None.
      fixed_params: the parameters of policies that came from folders and never move, by "reference"
        and "teacher"; None for none.
    """

    step: jax.Array
    params: Any
    opt_state: Any
    anchor_params: Any = None
    reference_params: Any = None
    frozen_checksum: jax.Array | None = None
    fixed_params: Any = None

    @property
    def trained(self) -> Any:
        """The part of the parameters that the optimizer changes (`lora.split`)."""
        return lora.split(self.params)[0]

    @property
    def frozen(self) -> Any:
        """The rest of the parameters."""
        return lora.split(self.params)[1]

    @property
    def anchor(self) -> Any:
        """The anchor's whole parameter tree, which shares the policy's frozen part."""
        return lora.join(self.anchor_params, self.frozen)

    @property
    def reference(self) -> Any:
        """The reference's whole parameter tree, which shares the policy's frozen part."""
        return lora.join(self.reference_params, self.frozen)

    @property
    def saved(self) -> "TrainState":
        """The state without what never moves, as a checkpoint holds it.

        Frozen and fixed parameters are read from their source again.
        """
        return self.replace(params=self.trained, fixed_params=None)

    def with_frozen(self, params) -> "TrainState":
        """The whole state again, from a state as `saved` gives it.

        Args:
          params: a parameter tree that has the frozen part; unused where nothing is frozen.

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
    policy: Policy,
    params,
    optimizer: optax.GradientTransformation,
    anchor_params=None,
    reference_params=None,
) -> TrainState:
    """The state before the first iteration; the optimizer's arrays lie as the parameters do.

    The state takes `params` over, and the step of `make_update` donates the state. Copy the arrays
    that are to outlive the first update: `jax.tree.map(jnp.copy, params)`.

    Raises:
      TypeError: for a policy, parameters or an optimizer that are none.
    """
    check_kind("policy", policy, Policy, "the first of what Policy.from_pretrained returns")
    check_kind("optimizer", optimizer, optax.GradientTransformation, "optax.adamw(1e-5), say")
    check_params(params)
    trained, frozen = lora.split(params)
    checksum = lora.checksum(frozen) if policy.lora else None
    if policy.mesh is None:
        opt_state, step = jax.jit(optimizer.init)(trained), jnp.zeros((), jnp.int32)
    else:
        layout = jax.tree.map(lambda s: s.sharding, abstract_state(policy, optimizer).opt_state)
        opt_state = jax.jit(optimizer.init, out_shardings=layout)(trained)
        everywhere = NamedSharding(policy.mesh, PartitionSpec())
        step = jax.device_put(jnp.zeros((), jnp.int32), everywhere)
        checksum = jax.device_put(checksum, everywhere)
    return TrainState(step, params, opt_state, anchor_params, reference_params, checksum)


def abstract_state(
    policy: Policy,
    optimizer: optax.GradientTransformation,
    *,
    keeps_anchor: bool = False,
    keeps_reference: bool = False,
    fixed: Mapping[str, Policy] | None = None,
) -> TrainState:
    """The state's shapes, dtypes and shardings without any array; `policy` must have a mesh.

    Args:
      fixed: the policies of `TrainState.fixed_params`, by their names.
    """
    replicated = NamedSharding(policy.mesh, PartitionSpec())
    params = policy.abstract_params()
    trained, _ = lora.split(params)
    opt_state = optax.tree_map_params(
        optimizer,
        lambda s, param: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=param.sharding),
        jax.eval_shape(optimizer.init, trained),
        trained,
        transform_non_params=lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=replicated),
    )
    step = jax.ShapeDtypeStruct((), jnp.int32, sharding=replicated)
    checksum = jax.ShapeDtypeStruct((), jnp.uint32, sharding=replicated) if policy.lora else None
    anchor, reference = (trained if keeps else None for keeps in (keeps_anchor, keeps_reference))
    others = {name: other.abstract_params() for name, other in (fixed or {}).items()} or None
    return TrainState(step, params, opt_state, anchor, reference, checksum, others)


def check_kind(name: str, value: Any, kind: Any, meaning: str) -> None:
    """Raises TypeError where the value of an argument is of another kind."""
    if not isinstance(value, kind):
        wanted = getattr(kind, "__name__", kind)
        raise TypeError(f"{name} is a {wanted} ({meaning}); given {type(value).__name__}")
