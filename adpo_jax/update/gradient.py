"""The gradient of a loss of completions, however they are cut into micro-batches.

The gradient is taken in two steps. The first step differentiates the loss of the whole mini-batch
by the log-probs, which costs next to nothing and gives one weight a token. The second step
differentiates the sum of weights times log-probs by the parameters, micro-batch by micro-batch. So
the loss and gradient are the same however a mini-batch is cut, and a group need not fit in a
micro-batch.

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


class Scored(NamedTuple):
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
    """

    policy: Policy
    params: Any
    beta: float


class Load(NamedTuple):
    """How the tokens of a micro-batch spread over experts.

    `of` gives None for a model without experts.

    tokens and probabilities are [layers, experts] float32, and changed is [layers] float32, as in
    the extras of a mixture; changed is None where the router chooses everywhere.
    """

    tokens: jax.Array
    probabilities: jax.Array
    changed: jax.Array | None = None

    @classmethod
    def of(cls, extras) -> "Load | None":
        names = (mixture.LOAD, mixture.PROBABILITY, mixture.CHANGED)
        return cls(*map(extras.get, names)) if extras else None

    def balance_loss(self, num_tokens: jax.Array) -> jax.Array:
        """The auxiliary loss of `mixture.balance_loss`, of a batch of so many tokens.

        That of a batch is the mean of those of its micro-batches, weighted by their tokens.
        """
        own = jnp.sum(self.probabilities[0])
        share = own / jnp.maximum(num_tokens, 1.0)
        return jax.lax.stop_gradient(share) * mixture.balance_loss(
            self.tokens, self.probabilities, jax.lax.stop_gradient(own)
        )


class Variables(NamedTuple):
    """What a micro-batch has a gradient by: the trained parameters, and perhaps the whole head."""

    trained: Any
    head: Whole | None = None


@dataclasses.dataclass(frozen=True)
class Scorer:
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

    @property
    def _head(self) -> dict:
        names = ("temperature", "with_entropy")
        return {name: getattr(self, name) for name in names} | {"mesh": self.policy.mesh}

    def micro(self, params, micro: MicroBatch):
        """Log-probs, entropies and, with a teacher, divergences, [rows, places] each."""
        return self._micro(params, micro)[0]

    def _micro(self, params, micro: MicroBatch, whole: Whole | None = None):
        """(`micro`, the load of the experts)."""
        hidden, targets, extras = micro.hidden_and_targets(self.policy, params)
        found = token_log_probs(
            self.policy.config, params, hidden, targets, whole=whole, **self._head
        )
        return (*found, *self._divergences(params, hidden, micro)), Load.of(extras)

    def _divergences(self, params, hidden, micro: MicroBatch) -> tuple[jax.Array, ...]:
        """The divergences from the teacher, where there is one."""
        if self.teacher is None:
            return ()
        teacher, teacher_params, beta = self.teacher
        return (
            token_divergences(
                self.policy.config,
                params,
                hidden,
                teacher.config,
                teacher_params,
                micro.hidden_and_targets(teacher, teacher_params)[0],
                beta=beta,
                temperature=self.temperature,
                mesh=self.policy.mesh,
            ),
        )

    def batch(self, params, layout: Layout):
        """What `micro` finds, of a batch and in the shape of its layout."""
        _, parts = layout.loop(lambda _, i: (None, self.micro(params, layout.micro(i))), None)
        return jax.tree.map(layout.in_layout, parts)

    def _balance_loss(self, load: Load | None, num_tokens: Callable) -> jax.Array | None:
        """The weighted auxiliary loss; None where there is none."""
        if load is None or not self.balance_weight:
            return None
        return self.balance_weight * load.balance_loss(num_tokens())

    def gradient(
        self,
        variables: "Variables",
        frozen,
        micro: MicroBatch,
        weights: Scored,
        num_tokens: Callable,
    ):
        """The gradient of the sum of weights times what was scored, what `micro` gives, the load.

        Args:
          weights: in the shape of the micro-batch's part of the batch; 0 at tokens that are not
            trained on.
          num_tokens: gives the tokens of the whole batch.
        """

        def weighted(variables: Variables):
            params = lora.join(variables.trained, frozen)
            hidden, targets, extras = micro.hidden_and_targets(self.policy, params)
            value, scored = weighted_log_probs(
                self.policy.config,
                params,
                hidden,
                targets,
                *(None if w is None else micro.rows(w) for w in weights[:2]),
                whole=variables.head,
                **self._head,
            )
            divergences = self._divergences(params, hidden, micro)
            for found in divergences:
                value += jnp.sum(micro.rows(weights.divergence) * found)
            load = Load.of(extras)
            balance = self._balance_loss(load, num_tokens)
            value = value if balance is None else value + balance
            return value, ((*scored, *divergences), load)

        grads, (scored, load) = jax.grad(weighted, has_aux=True)(variables)
        return grads, scored, load

    def gradient_of(
        self,
        variables: "Variables",
        frozen,
        micro: MicroBatch,
        weights_of: Callable,
        num_tokens: Callable,
    ):
        """As `gradient`, with the weights that `weights_of` makes of what was scored."""

        def scored_and_balance(variables: Variables):
            params = lora.join(variables.trained, frozen)
            scored, load = self._micro(params, micro, variables.head)
            return (scored, self._balance_loss(load, num_tokens)), load

        (scored, balance), pull, load = jax.vjp(scored_and_balance, variables, has_aux=True)
        weights = weights_of(Scored(*map(micro.from_rows, scored)))
        cotangents = (
            jnp.zeros_like(x) if w is None else micro.rows(w) for x, w in zip(scored, weights)
        )
        balance = None if balance is None else jnp.ones_like(balance)
        return pull((tuple(cotangents), balance))[0], scored, load


@dataclasses.dataclass(frozen=True)
class Gradient:
    """The loss of a batch and its gradient by the trained parameters."""

    scorer: Scorer
    algorithm: Algorithm | Imitation

    def __call__(
        self, trained, frozen, layout: Layout, prepared
    ) -> tuple[Any, Scored, Load | None]:
        """The gradient, in the layout of `trained`, what the policy made of every token, the load.

        The load of the experts is that of all micro-batches.
        """
        weights = self._known_weights(lora.join(trained, frozen), layout, prepared)
        mesh = self.scorer.policy.mesh
        replicas = sharding.num_replicas(mesh)
        if replicas == 1 or self.scorer.balance_weight:
            # The auxiliary loss of routers is of all tokens of a micro-batch together.
            return self._sum(trained, frozen, layout, prepared, weights)

        def of_replica(trained, frozen, batch, log_probs, prepared, weights, fixed_params):
            """The sums over the whole batch, exchanged after the last micro-batch."""
            own = self._with_teacher(fixed_params)
            part = layout.part(batch, log_probs, replicas)
            grads, scored, load = own._sum(trained, frozen, part, prepared, weights)
            grads, load = sharding.sum_of_replicas((grads, load))
            return grads, scored, load

        everywhere, by_row = None, "batch"
        teacher = self.scorer.teacher
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

    def _with_teacher(self, params) -> "Gradient":
        """The same with these parameters of the teacher, where there is one."""
        if params is None:
            return self
        teacher = self.scorer.teacher._replace(params=params)
        return dataclasses.replace(self, scorer=dataclasses.replace(self.scorer, teacher=teacher))

    def _sum(
        self, trained, frozen, layout: Layout, prepared, weights: Scored | None
    ) -> tuple[Any, Scored, Load | None]:
        """The sums over the micro-batches, one after the other.

        Args:
          weights: d loss / d scored; None if each micro-batch finds its own.
        """
        policy = self.scorer.policy
        once = self._head_once(trained, layout)
        name = weight_name(policy.config)
        variables = Variables(trained, None if once is None else once.gather(trained[name]))

        def num_tokens():
            return layout.num_tokens

        def add_micro(sums, i):
            micro = layout.micro(i)

            def weights_of(scored: Scored):
                # The weights of a group depend on the log-probs of that group alone.
                others = jax.tree.map(micro.of, layout.log_probs)
                return self._weights(scored, others, micro.tokens, micro.prepared(prepared))

            sums, of_head = sums
            head = variables.head and variables.head._replace(gradient=of_head)
            here = variables._replace(head=head)
            if weights is None:
                more = self.scorer.gradient_of(here, frozen, micro, weights_of, num_tokens)
            else:
                of_micro = jax.tree.map(micro.of, weights)
                more = self.scorer.gradient(here, frozen, micro, of_micro, num_tokens)
            grads, *found = more
            # Without this the partitioner may sum whole gradients on every device.
            sums = jax.tree.map(jnp.add, sums, policy.constrained(grads.trained))
            return (sums, grads.head and grads.head.gradient), tuple(found)

        zeros = policy.constrained(jax.tree.map(jnp.zeros_like, trained))
        first = zeros, variables.head and variables.head.gradient
        (grads, of_head), (parts, loads) = layout.loop(add_micro, first)
        if once is not None:
            summed = grads[name] + once.settle(of_head).astype(grads[name].dtype)
            grads = policy.constrained({**grads, name: summed})
        load = jax.tree.map(lambda x: jnp.sum(x, axis=0), loads)
        return grads, Scored(*jax.tree.map(layout.in_layout, parts)), load

    def _head_once(self, trained, layout: Layout) -> Once | None:
        """The head that is gathered once for all micro-batches; None where each gathers its own."""
        policy = self.scorer.policy
        weight = trained.get(weight_name(policy.config))
        if weight is None or layout.most_micro == 1:
            return None
        first = layout.micro(0)
        B, T = first.rows(first.of(layout.tokens.trained)).shape
        hidden = jax.ShapeDtypeStruct((B, T, policy.config.hidden_size), policy.dtype)
        return Once.of(policy.config, weight, policy.mesh, hidden)

    def loss_of(self, scored: Scored, layout: Layout, prepared):
        """(loss, metrics) of the whole batch."""
        with jax.named_scope("loss"):
            return self._loss(*self._given(scored, layout.log_probs), layout.tokens, prepared)

    def _loss(self, scored: Scored, others: dict, tokens: Tokens, prepared):
        found = others | {"policy": scored.log_probs}
        if scored.divergence is not None:
            found["divergence"] = scored.divergence
        return self.algorithm.loss(found, tokens, prepared, entropy=scored.entropy)

    def _weights(self, scored: Scored, others: dict, tokens: Tokens, prepared) -> Scored:
        """d loss / d scored."""
        slope = jax.grad(self._loss, has_aux=True)
        return slope(*self._given(scored, others), tokens, prepared)[0]

    def _given(self, scored: Scored, others: dict) -> tuple[Scored, dict]:
        """What the loss depends on: the entropy where it has a bonus, and all other log-probs.

        Without an anchor, the policy's own log-probs stand for it.
        """
        if not self.algorithm.entropy_bonus:
            scored = scored._replace(entropy=None)
        return scored, {"anchor": jax.lax.stop_gradient(scored.log_probs)} | others

    def _known_weights(self, params, layout: Layout, prepared) -> Scored | None:
        """d loss / d scored in the layout's shape; None if each micro-batch finds its own."""
        if "anchor" not in layout.log_probs and self.algorithm.slope_is_known:
            # Only the difference of the log-probs to themselves counts.
            log_probs = jnp.zeros(layout.tokens.trained.shape)
        elif layout.has_whole_groups:
            return None
        else:
            scorer = dataclasses.replace(self.scorer, with_entropy=False, teacher=None)
            log_probs, _ = scorer.batch(params, layout)
        # The loss is linear in entropy and divergence, so its slope needs no value of them.
        zeros = jnp.zeros_like(log_probs)
        scored = Scored(log_probs, zeros, None if self.scorer.teacher is None else zeros)
        return self._weights(scored, layout.log_probs, layout.tokens, prepared)
