"""One iteration's learning: anchor log-probs, then optimizer steps over mini-batches of prompts.

One optimizer step an iteration under the on-policy anchor costs no anchor forward: the anchor is
the policy of that very step. Everything else costs one.

Letters: P prompts, G completions of a prompt, T completion tokens.
"""

import collections
import dataclasses
import functools
import math
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax

from adpo_jax import distributed, lora, losses, offload, profiling, update
from adpo_jax.anchor import Anchor
from adpo_jax.batch_plan import BatchPlan
from adpo_jax.flops import traced_flops
from adpo_jax.guard import SKIPPED
from adpo_jax.optimizer import steps_taken
from adpo_jax.packing import Batch, PackedBatch, balanced, pack
from adpo_jax.policy import Policy
from adpo_jax.sharding import BatchSharding, device_bytes
from adpo_jax.update import TrainState


@dataclasses.dataclass(frozen=True)
class Learner:
    """Turns a scored batch of completions into a new state.

    Attributes:
      algorithm: `losses.Adpo`, `losses.Grpo` or `losses.Rloo`.
      schedule: the optimizer's learning rate by optimizer step, for the log.
      temperature: of the sampler.
      seed: of the order of prompts over mini-batches.
      max_anchor_kl: nats a token beyond which an optimizer step is skipped; 0 for no limit.
      offload_optimizer: its state waits in the host's memory while completions are sampled.
    """

    policy: Policy
    algorithm: losses.Algorithm
    optimizer: optax.GradientTransformation
    schedule: optax.Schedule
    anchor: Anchor
    plan: BatchPlan
    temperature: float = 1.0
    seed: int = 0
    max_anchor_kl: float = 0.0
    offload_optimizer: bool = False

    def __post_init__(self):
        mesh = self.policy.mesh if self.policy else None
        device = jax.devices()[0] if mesh is None else mesh.devices.flat[0]
        if self.offload_optimizer:
            offload.check(device, "actor.optimizer_offload")
        if self.anchor.offload:
            offload.check(device, "anchor.offload")

    @functools.cached_property
    def _update(self) -> Callable:
        return update.make_update(
            self.policy,
            self.algorithm,
            self.optimizer,
            num_micro=self.plan.num_micro,
            temperature=self.temperature,
            max_anchor_kl=self.max_anchor_kl,
        )

    @functools.cached_property
    def _plain_update(self) -> Callable:
        """The update that recomputes nothing, to count what the model itself asks for."""
        policy = dataclasses.replace(self.policy, gradient_checkpointing="none")
        return dataclasses.replace(self, policy=policy)._update

    def _arithmetic(self, state: TrainState, part, turns: int) -> collections.Counter:
        """Floating-point operations of an update: of the model, and with what is recomputed."""
        model = traced_flops(self._plain_update.trace(state, *part), turns)
        all_of_it = traced_flops(self._update.trace(state, *part), turns)
        return collections.Counter(mfu=model, hfu=all_of_it)

    @functools.cached_property
    def _log_probs(self) -> Callable:
        num_micro = self.plan.num_prompts // self.plan.micro_prompts
        return update.make_log_probs(self.policy, num_micro=num_micro, temperature=self.temperature)

    @functools.cached_property
    def _peak_flops(self) -> float | None:
        """What the devices can do at most, FLOP/s; None where that is not published."""
        mesh = self.policy.mesh
        return profiling.peak_flops(jax.devices()[:1] if mesh is None else list(mesh.devices.flat))

    def laid_out(self, batch: Batch, *, whole_groups: bool = False) -> Batch | PackedBatch:
        """The batch as the plan has it run through the model, host arrays.

        Args:
          whole_groups: where a micro-batch has the room, keep the groups whole.
        """
        plan, G = self.plan, batch.tokens_PGS.shape[1]
        num_shards = BatchSharding(self.policy.mesh).num_shards
        if plan.layout == "rows":
            return batch
        return pack(
            batch,
            # The anchor's forward over all mini-batches takes no more memory than an update.
            completions_per_micro=plan.micro_completions or plan.mini_prompts // num_shards * G,
            num_shards=num_shards,
            whole_groups=whole_groups and not 0 < plan.micro_completions < G,
        )

    def _balanced(self, batch: Batch) -> np.ndarray:
        """The order of the prompts in which the devices have about equally much to do."""
        return balanced(batch, BatchSharding(self.policy.mesh).num_shards)

    @property
    def _tau_follows_entropy(self) -> bool:
        return (
            isinstance(self.algorithm, losses.Adpo)
            and self.algorithm.use_adaptive_tau
            and self.algorithm.adaptive_tau_mode == "policy_entropy"
        )

    @property
    def needs_anchor_forward(self) -> bool:
        """Whether an iteration runs the anchor over its completions."""
        one_step = self.plan.updates_per_iteration == 1
        return self.anchor.keeps_params or not one_step or self._tau_follows_entropy

    def init_state(self, params) -> TrainState:
        """The state before the first iteration; it takes `params` over."""
        anchor_params = self.anchor.init(lora.split(params)[0])
        state = update.init_state(self.policy, params, self.optimizer, anchor_params)
        return self.put_away(state)

    def put_away(self, state: TrainState) -> TrainState:
        """The state with what is not needed before the next update in the host's memory."""
        if self.offload_optimizer:
            state = state.replace(opt_state=offload.to_host(state.opt_state))
        if self.anchor.offload:
            state = state.replace(anchor_params=offload.to_host(state.anchor_params))
        return state

    def abstract_state(self) -> TrainState:
        """The shapes and layout of `init_state`'s result, to restore a checkpoint into."""
        return update.abstract_state(
            self.policy, self.optimizer, keeps_anchor=self.anchor.keeps_params
        )

    def state_bytes(self) -> dict[str, int]:
        """Bytes of one device of the parts of the state."""
        state = self.abstract_state()
        return {
            "parameters": device_bytes(state.params),
            "optimizer": device_bytes(state.opt_state),
            "anchor": device_bytes(state.anchor_params),
        }

    @property
    def parts_on_host(self) -> frozenset[str]:
        """The parts of the state that wait in the host's memory until they are needed."""
        away = {"optimizer": self.offload_optimizer, "anchor": self.anchor.offload}
        return frozenset(part for part, is_away in away.items() if is_away)

    def resident_bytes(self) -> int:
        """Bytes of one device of the state while completions are sampled."""
        return sum(n for part, n in self.state_bytes().items() if part not in self.parts_on_host)

    def learn(
        self, state: TrainState, batch: Batch, rewards_PG: np.ndarray
    ) -> tuple[TrainState, dict[str, float]]:
        """One iteration.

        Args:
          state: donated.
          batch: P prompts with their G completions each, host arrays.
          rewards_PG: [P, G] float32.

        Returns:
          The new state, one iteration on, and the iteration's metrics; "update/skipped" is the
          share of its optimizer steps that were not sound and left the parameters as they were. At
          1, the anchor is what it was too.
        """
        step, started = int(state.step), time.perf_counter()
        with jax.profiler.TraceAnnotation("anchor"):
            anchor_log_probs, entropy_P = self._anchor_forward(state, batch)
        anchored = time.perf_counter()
        kwargs = {"policy_entropy_P": entropy_P} if self._tau_follows_entropy else {}
        scores = jax.device_get(self.algorithm.score(jnp.asarray(rewards_PG), **kwargs))

        if self.offload_optimizer:
            state = state.replace(opt_state=offload.to_device(state.opt_state))
        history, arithmetic = [], collections.Counter()
        whole = (batch, scores, anchor_log_probs)
        for rows in self._mini_batches(step):
            rows = rows[self._balanced(_rows(batch, rows))]
            mini, *others = _rows(whole, rows)
            mini = self.laid_out(mini, whole_groups=anchor_log_probs is not None)
            part = self.put((mini, *others))
            if self._peak_flops:
                arithmetic += self._arithmetic(state, part, _turns(mini))
            with jax.profiler.TraceAnnotation("update"):
                state, metrics = self._update(state, *part)
                metrics = jax.device_get(metrics)
            history.append(metrics | {"update/padding_frac": mini.padding_frac})
        seconds = time.perf_counter() - anchored
        metrics = _iteration_metrics(history, self.plan.epochs)
        metrics |= {"time/anchor": anchored - started, "time/update": seconds}
        metrics["update/tokens_per_s"] = metrics["update/tokens"] * self.plan.epochs / seconds
        for name, flops in arithmetic.items():
            metrics[f"update/{name}"] = flops / seconds / self._peak_flops
        metrics["update/lr"] = float(self.schedule(max(steps_taken(state.opt_state) - 1, 0)))

        anchor_params, renewed = state.anchor_params, False
        if metrics[SKIPPED] < 1.0:  # or nothing has moved, and neither does the anchor
            if self.anchor.offload:
                anchor_params = offload.to_device(anchor_params)
            anchor_params, renewed = self.anchor.refresh(
                anchor_params, state.trained, measured_kl=self._measured_kl(history)
            )
        metrics["anchor/renewed"] = float(renewed)
        state = state.replace(step=state.step + 1, anchor_params=anchor_params)
        return self.put_away(state), metrics

    def log_probs(self, params, batch: Batch) -> tuple[np.ndarray, np.ndarray]:
        """Log-probs and entropies [P, G, T] float32 of a batch's completions, on the host."""
        order = self._balanced(batch)
        laid_out = self.laid_out(_rows(batch, order))
        found = distributed.fetch(self._log_probs(params, self.put(laid_out)))
        return _rows(found, np.argsort(order))

    def trace(self, batch: Batch) -> dict[str, tuple[jax.stages.Traced, int]]:
        """The programs of `learn`, from shapes alone: "update", and "anchor" where it is needed.

        Args:
          batch: of an iteration, as for `learn`; only its shapes matter.

        Returns:
          For each name the program and how often its loop over micro-batches turns.
        """
        state, mask = self.abstract_state(), batch.completion_mask_PGT
        kwargs, traced, anchor_log_probs = {}, {}, None
        if self._tau_follows_entropy:
            kwargs = {"policy_entropy_P": np.zeros(mask.shape[:1], np.float32)}
        if self.needs_anchor_forward:
            anchor_log_probs = np.zeros_like(mask)
            whole = self.laid_out(batch)
            traced["anchor"] = (
                self._log_probs.trace(state.params, self._abstract(whole)),
                _turns(whole),
            )
        scores = jax.device_get(self.algorithm.score(jnp.zeros(mask.shape[:2]), **kwargs))
        part = (batch, scores, anchor_log_probs)
        mini, *others = _rows(part, np.arange(self.plan.mini_prompts))
        mini = self.laid_out(mini, whole_groups=anchor_log_probs is not None)
        traced["update"] = (
            self._update.trace(state, *self._abstract((mini, *others))),
            _turns(mini),
        )
        return traced

    def _abstract(self, tree):
        return BatchSharding(self.policy.mesh).abstract(tree)

    def _anchor_forward(self, state: TrainState, batch: Batch):
        """Anchor log-probs [P, G, T] and mean token entropy [P] over log V; None where unneeded."""
        if not self.needs_anchor_forward:
            return None, None
        if self.anchor.offload:
            state = state.replace(anchor_params=offload.to_device(state.anchor_params))
        params = state.anchor if self.anchor.keeps_params else state.params
        log_probs, entropy = self.log_probs(params, batch)
        mask = batch.completion_mask_PGT
        tokens_P = np.maximum(mask.sum((1, 2)), 1.0)
        entropy_P = (entropy * mask).sum((1, 2)) / tokens_P
        return log_probs, entropy_P / math.log(self.policy.config.vocab_size)

    def _mini_batches(self, step: int):
        """The prompts of each optimizer step, a fresh order every epoch."""
        P, size = self.plan.num_prompts, self.plan.mini_prompts
        for epoch in range(self.plan.epochs):
            if size == P:
                yield np.arange(P)
                continue
            order = np.random.default_rng([self.seed, step, epoch]).permutation(P)
            yield from order.reshape(-1, size)

    def put(self, tree):
        """Host arrays with a leading batch axis -> device arrays, spread over the mesh."""
        return BatchSharding(self.policy.mesh).put(tree)

    def _measured_kl(self, history) -> float:
        """Nats a token between the anchor and the policy before the iteration's last step."""
        (name,) = [name for name in history[-1] if name.endswith("/anchor_kl")]
        return float(history[-1][name])


def _rows(tree, rows: np.ndarray):
    """Some of the prompts of whatever has a row for each."""
    return jax.tree.map(lambda x: x[rows], tree)


def _turns(batch: Batch | PackedBatch) -> int:
    """How often the loop over packed micro-batches turns, which the program itself does not say."""
    return int(batch.num_micro_B[0]) if isinstance(batch, PackedBatch) else 1


# Means over the tokens of a mini-batch; all other metrics are means over its groups, or counts.
_TOKEN_MEANS = ("rollout/entropy", "/anchor_kl", "/kl_penalty", "/clip_frac")


def _iteration_metrics(history: list[dict], epochs: int) -> dict[str, float]:
    """Metrics of an iteration from those of its optimizer steps.

    Token means are weighted by tokens and counts are summed over an epoch, so that they do not
    depend on the size of a mini-batch. What compares with the sampler is that of the first step,
    before the policy has moved.
    """
    tokens = [m["update/tokens"] for m in history]
    metrics = {}
    for name in history[0]:
        values = [m[name] for m in history]
        if name.startswith("rollout/mismatch"):
            metrics[name] = float(values[0])
        elif name.endswith("/dropped_prompts") or name == "update/tokens":
            metrics[name] = float(sum(values)) / epochs
        else:
            by_token = name.endswith(_TOKEN_MEANS) and sum(tokens) > 0
            metrics[name] = float(np.average(values, weights=tokens if by_token else None))
    return metrics
