"""The gradient of a loss of completions, however they are cut into micro-batches.

The gradient is taken in two steps. The first step differentiates the loss of the whole mini-batch
by the log-probs, which costs next to nothing and gives one weight a token. The second step
differentiates the sum of weights times log-probs by the parameters, micro-batch by micro-batch. So
the loss and gradient are the same however a mini-batch is cut, and a group need not fit in a
micro-batch. The auxiliary loss of routers alone is of a micro-batch's tokens together.

The weights need the log-probs of whole groups. They are known beforehand where the anchor is the
policy of this very step and the loss needs nothing else, since every log-ratio is then 0.
Otherwise a micro-batch of whole groups finds them between its forward and backward pass. Only where
groups are split, a forward without gradient over all micro-batches comes first.

Each replica of the parameters (the mesh axis `data`, which may reach over a slow network) sums the
gradients of its micro-batches, and the sums are exchanged once an optimizer step. Within a replica
that holds for the weight of the head, the largest one, where memory allows (`head.Once`).

Letters: P prompts, G completions of a prompt.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from adpo_jax.devices import sharding
from adpo_jax.losses.algorithm import Algorithm
from adpo_jax.losses.imitation import Imitation
from adpo_jax.losses.tokens import Tokens
from adpo_jax.model import lora, mixture
from adpo_jax.model.divergence import token_divergences
from adpo_jax.model.head import Once, Whole, token_log_probs, weight_name, weighted_log_probs
from adpo_jax.policy.policy import Policy
from adpo_jax.update.layouts import Layout, MicroBatch


class TokenValues(NamedTuple):
    """What the model finds of each token, in the shape of a layout; or weights of the same shape.

    entropy is None where nothing depends on it, divergence where there is no teacher.
    """

    log_probs: jax.Array
    entropy: jax.Array | None
    divergence: jax.Array | None = None


class Teacher(NamedTuple):
    """A model that the policy's distributions are compared with at every token.

    Attributes:
      beta: as for `token_divergences`.
      params: its parameters; None before `ForwardPass.with_teacher`.
    """

    policy: Policy
    beta: float
    params: Any = None


class Load(NamedTuple):
    """How the tokens of a micro-batch spread over experts; or the sum of several.

    Attributes:
      tokens, probabilities: [layers, experts] float32, as in the extras of a mixture.
      balance: float32 scalar, the auxiliary loss of `mixture.balance_loss` of each micro-batch,
        times its tokens.
      changed: [layers] float32, as in the extras; None where the router chooses everywhere.
    """

    tokens: jax.Array
    probabilities: jax.Array
    balance: jax.Array
    changed: jax.Array | None = None

    @classmethod
    def of(cls, extras) -> "Load | None":
        """That which the extras of the layers tell; None for a model without experts."""
        if not extras:
            return None
        tokens, probabilities = extras[mixture.LOAD], extras[mixture.PROBABILITY]
        own = jax.lax.stop_gradient(jnp.sum(probabilities[0]))
        balance = own * mixture.balance_loss(tokens, probabilities, own)
        return cls(tokens, probabilities, balance, extras.get(mixture.CHANGED))

    def balance_loss(self, num_tokens: jax.Array) -> jax.Array:
        """Its part of the auxiliary loss of a batch of so many tokens.

        The loss of a batch is the mean of those of its micro-batches, weighted by their tokens.
        """
        return self.balance / jnp.maximum(num_tokens, 1.0)


class Variables(NamedTuple):
    """What a micro-batch has a gradient by: the trained parameters, and perhaps the whole head."""

    trained: Any
    head: Whole | None = None


@dataclasses.dataclass(frozen=True)
class ForwardPass:
    """Computes log-probs of micro-batches, and their gradient by `Variables`.

    Attributes:
      teacher: the model to find divergences from; None for none.
      balance_weight: what the auxiliary loss of routers is multiplied by; 0 for none.
    """

    policy: Policy
    temperature: float
    with_entropy: bool
    teacher: Teacher | None = None
    balance_weight: float = 0.0

    def with_teacher(self, params) -> "ForwardPass":
        """The same with these parameters of the teacher, where there is one."""
        if self.teacher is None:
            return self
        return dataclasses.replace(self, teacher=self.teacher._replace(params=params))

    @property
    def _head(self) -> dict:
        names = ("temperature", "with_entropy")
        return {name: getattr(self, name) for name in names} | {"mesh": self.policy.mesh}

    def _values(
        self, params, micro: MicroBatch, whole: Whole | None = None
    ) -> tuple[tuple[jax.Array, ...], Load | None]:
        """(log-probs, entropies and, with a teacher, divergences, [rows, places] each; load)."""
        hidden, targets, extras = micro.hidden_and_targets(self.policy, params)
        found = token_log_probs(
            self.policy.config, params, hidden, targets, whole=whole, **self._head
        )
        return (*found, *self._divergences(params, hidden, micro)), Load.of(extras)

    def _divergences(self, params, hidden, micro: MicroBatch) -> tuple[jax.Array, ...]:
        """The divergences from the teacher, where there is one."""
        if self.teacher is None:
            return ()
        teacher, beta, teacher_params = self.teacher
        return (
            token_divergences(
                self.policy.config,
                params,
                hidden,
                teacher.config,
                teacher_params,
                micro.without_experts.hidden_and_targets(teacher, teacher_params)[0],
                beta=beta,
                temperature=self.temperature,
                mesh=self.policy.mesh,
            ),
        )

    def batch(self, params, layout: Layout):
        """Log-probs, entropies and, with a teacher, divergences in the shape of the layout."""

        def of_micro(_, i):
            values, _ = self._values(params, layout.micro(i))
            return None, values

        _, parts = layout.loop(of_micro, None)
        return jax.tree.map(layout.in_layout, parts)

    def _balance_loss(self, load: Load | None, num_tokens: jax.Array | None) -> jax.Array | None:
        """The weighted auxiliary loss; None where there is none."""
        if load is None or num_tokens is None:
            return None
        return self.balance_weight * load.balance_loss(num_tokens)

    def gradient_by(
        self,
        weights: TokenValues,
        variables: Variables,
        frozen,
        micro: MicroBatch,
        num_tokens: jax.Array | None,
    ) -> "Found":
        """The gradient of sum(weights * values), with weights that are known beforehand.

        Args:
          weights: in the shape of the micro-batch's part of the batch; 0 at tokens that are not
            trained on.
          num_tokens: the tokens of the whole batch; None without an auxiliary loss.
        """

        def weighted(variables: Variables):
            params = lora.join(variables.trained, frozen)
            hidden, targets, extras = micro.hidden_and_targets(self.policy, params)
            total, found = weighted_log_probs(
                self.policy.config,
                params,
                hidden,
                targets,
                *(None if w is None else micro.rows(w) for w in weights[:2]),
                whole=variables.head,
                **self._head,
            )
            divergences = self._divergences(params, hidden, micro)
            for divergence in divergences:
                total += jnp.sum(micro.rows(weights.divergence) * divergence)
            load = Load.of(extras)
            balance = self._balance_loss(load, num_tokens)
            total = total if balance is None else total + balance
            return total, ((*found, *divergences), load)

        grads, (values, load) = jax.grad(weighted, has_aux=True)(variables)
        return Found(grads, values, load)

    def gradient_by_found(
        self,
        weights_of: Callable[[TokenValues], TokenValues],
        variables: Variables,
        frozen,
        micro: MicroBatch,
        num_tokens: jax.Array | None,
    ) -> "Found":
        """As `gradient_by`, with the weights that `weights_of` makes of the values."""

        def values_and_balance(variables: Variables):
            params = lora.join(variables.trained, frozen)
            values, load = self._values(params, micro, variables.head)
            return (values, self._balance_loss(load, num_tokens)), load

        (values, balance), pull, load = jax.vjp(values_and_balance, variables, has_aux=True)
        weights = weights_of(TokenValues(*map(micro.from_rows, values)))
        cotangents = (
            jnp.zeros_like(x) if w is None else micro.rows(w) for x, w in zip(values, weights)
        )
        balance = None if balance is None else jnp.ones_like(balance)
        return Found(pull((tuple(cotangents), balance))[0], values, load)


class Found(NamedTuple):
    """What a micro-batch gives.

    values are log-probs, entropies and, with a teacher, divergences, [rows, places] each.
    """

    grads: Variables
    values: tuple[jax.Array, ...]
    load: Load | None


@dataclasses.dataclass(frozen=True)
class Gradient:
    """The loss of a batch and its gradient by the trained parameters."""

    forward: ForwardPass
    algorithm: Algorithm | Imitation

    def __call__(
        self, trained, frozen, layout: Layout, prepared
    ) -> tuple[Any, TokenValues, Load | None]:
        """The gradient, in the layout of `trained`, what the policy made of every token, the load.

        The load of the experts is that of all micro-batches.
        """
        weights = self._known_weights(lora.join(trained, frozen), layout, prepared)
        mesh = self.forward.policy.mesh
        replicas = sharding.num_replicas(mesh)
        if replicas == 1 or self.forward.balance_weight:
            # The auxiliary loss of routers is of all tokens of a micro-batch together.
            return self._sum(trained, frozen, layout, prepared, weights)

        def of_replica(trained, frozen, batch, log_probs, prepared, weights, fixed_params):
            """The sums over the whole batch, exchanged after the last micro-batch."""
            own = dataclasses.replace(self, forward=self.forward.with_teacher(fixed_params))
            part = layout.part(batch, log_probs, replicas)
            grads, values, load = own._sum(trained, frozen, part, prepared, weights)
            grads, load = sharding.sum_of_replicas((grads, load))
            return grads, values, load

        everywhere, by_row = None, "batch"
        teacher = self.forward.teacher
        return sharding.of_replicas(
            of_replica,
            mesh,
            (everywhere, everywhere, by_row, by_row, by_row, by_row, everywhere),
            (everywhere, by_row, everywhere),
        )(
            *(trained, frozen, layout.batch, layout.log_probs),
            prepared if weights is None else None,
            weights,
            None if teacher is None else teacher.params,
        )

    def _sum(
        self, trained, frozen, layout: Layout, prepared, weights: TokenValues | None
    ) -> tuple[Any, TokenValues, Load | None]:
        """The sums over the micro-batches, one after the other.

        Args:
          weights: d loss / d values; None if each micro-batch finds its own.
        """
        policy = self.forward.policy
        once = self._head_once(trained, layout)
        name = weight_name(policy.config)
        variables = Variables(trained, None if once is None else once.gather(trained[name]))

        def add_micro(sums, i):
            micro = layout.micro(i)
            num_tokens = layout.num_tokens if self.forward.balance_weight else None

            def weights_of(values: TokenValues):
                # The weights of a group depend on the log-probs of that group alone.
                others = jax.tree.map(micro.of, layout.log_probs)
                return self._weights(values, others, micro.tokens, micro.prepared(prepared))

            sums, of_head = sums
            head = variables.head and variables.head._replace(gradient=of_head)
            here = variables._replace(head=head)
            if weights is None:
                found = self.forward.gradient_by_found(weights_of, here, frozen, micro, num_tokens)
            else:
                of_micro = jax.tree.map(micro.of, weights)
                found = self.forward.gradient_by(of_micro, here, frozen, micro, num_tokens)
            # Without this the partitioner may sum whole gradients on every device.
            sums = jax.tree.map(jnp.add, sums, policy.constrained(found.grads.trained))
            head = found.grads.head
            return (sums, head and head.gradient), (found.values, found.load)

        zeros = policy.constrained(jax.tree.map(jnp.zeros_like, trained))
        first = zeros, variables.head and variables.head.gradient
        (grads, of_head), (parts, loads) = layout.loop(add_micro, first)
        if once is not None:
            summed = grads[name] + once.settle(of_head).astype(grads[name].dtype)
            grads = policy.constrained({**grads, name: summed})
        load = jax.tree.map(lambda x: jnp.sum(x, axis=0), loads)
        return grads, TokenValues(*jax.tree.map(layout.in_layout, parts)), load

    def _head_once(self, trained, layout: Layout) -> Once | None:
        """The head that is gathered once for all micro-batches; None where each gathers its own."""
        policy = self.forward.policy
        weight = trained.get(weight_name(policy.config))
        if weight is None or layout.most_micro == 1:
            return None
        first = layout.micro(0)
        B, T = first.rows(first.of(layout.tokens.trained)).shape
        hidden = jax.ShapeDtypeStruct((B, T, policy.config.hidden_size), policy.dtype)
        return Once.of(policy.config, weight, policy.mesh, hidden)

    def loss_of(self, values: TokenValues, layout: Layout, prepared):
        """(loss, metrics) of the whole batch."""
        with jax.named_scope("loss"):
            return self._loss(*self._given(values, layout.log_probs), layout.tokens, prepared)

    def _loss(self, values: TokenValues, others: dict, tokens: Tokens, prepared):
        found = others | {"policy": values.log_probs}
        if values.divergence is not None:
            found["divergence"] = values.divergence
        return self.algorithm.loss(found, tokens, prepared, entropy=values.entropy)

    def _weights(self, values: TokenValues, others: dict, tokens: Tokens, prepared) -> TokenValues:
        """d loss / d values."""
        slope = jax.grad(self._loss, has_aux=True)
        return slope(*self._given(values, others), tokens, prepared)[0]

    def _given(self, values: TokenValues, others: dict) -> tuple[TokenValues, dict]:
        """What the loss depends on: the entropy where it has a bonus, and all other log-probs.

        Without an anchor, the policy's own log-probs stand for it.
        """
        if not self.algorithm.entropy_bonus:
            values = values._replace(entropy=None)
        return values, {"anchor": jax.lax.stop_gradient(values.log_probs)} | others

    def _known_weights(self, params, layout: Layout, prepared) -> TokenValues | None:
        """d loss / d values in the layout's shape; None if each micro-batch finds its own."""
        if "anchor" not in layout.log_probs and self.algorithm.slope_is_known:
            # Only the difference of the log-probs to themselves counts.
            log_probs = jnp.zeros(layout.tokens.trained.shape)
        elif layout.has_whole_groups:
            return None
        else:
            forward = dataclasses.replace(self.forward, with_entropy=False, teacher=None)
            log_probs, _ = forward.batch(params, layout)
        # The loss is linear in entropy and divergence, so its slope needs no value of them.
        zeros = jnp.zeros_like(log_probs)
        values = TokenValues(log_probs, zeros, None if self.forward.teacher is None else zeros)
        return self._weights(values, layout.log_probs, layout.tokens, prepared)
