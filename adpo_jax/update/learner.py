"""One iteration's learning: log-probs of other policies, then optimizer steps over mini-batches.

The anchor's log-probs cost no forward where the anchor is the sampler, or the policy of the very
step (on-policy, one optimizer step an iteration); otherwise they cost one an iteration, and so they
do where the algorithm reads the anchor's entropy. The reference costs another one where the loss
pulls towards it and it is not a fixed anchor, and so does a teacher whose log-probs the loss reads.

Letters: P prompts, G completions of a prompt, T completion tokens.
"""

import collections
import dataclasses
import functools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from adpo_jax import update
from adpo_jax.devices import distributed, offload
from adpo_jax.devices.meter import Meter
from adpo_jax.devices.sharding import BatchSharding, device_bytes, first_device
from adpo_jax.losses import Algorithm
from adpo_jax.model import lora
from adpo_jax.model.model_config import ModelConfig
from adpo_jax.policy.policy import Policy
from adpo_jax.records import Batch, Sequences, make_batch, pad_values
from adpo_jax.update import TrainState
from adpo_jax.update import anchor as anchor_lib
from adpo_jax.update.anchor import Anchor
from adpo_jax.update.optimizer import steps_taken
from adpo_jax.update.packing import PackedBatch, Packing, balanced, starts_of
from adpo_jax.update.plan import BatchPlan
from adpo_jax.update.stream_sizes import KnownSizes, tile_of

Ragged = list[list[np.ndarray]]


@dataclasses.dataclass(frozen=True)
class LaidOut:
    """Sequences as they run through the model.

    Attributes:
      batch: host arrays, or their shapes.
      log_probs: log-probs under other policies beside a padded batch; a packed batch holds them.
      padding_frac: the share of the places run through the model that hold no token.
      num_micro: micro-batches of a packed batch that hold anything, which the program does not
        say; 1 for rows, whose number it says.
      ragged: turns values in the shape of the layout into P lists of G arrays, one a completion.
      load_imbalance: as of `Packing`; 1 where no devices share a stream.
    """

    batch: Batch | PackedBatch
    log_probs: dict[str, np.ndarray]
    padding_frac: float
    num_micro: int
    ragged: Callable[[np.ndarray], Ragged]
    load_imbalance: float = 1.0


@dataclasses.dataclass(frozen=True)
class Learner:
    """Turns scored completions into a new state.

    Attributes:
      schedule: the optimizer's learning rate by optimizer step, for the log.
      temperature: the temperature of the sampler.
      seed: decides the order of prompts over mini-batches.
      max_anchor_kl: KL to the anchor, in nats a token, beyond which an optimizer step is skipped; 0
        for no limit.
      offload_optimizer: whether the optimizer's state waits in the host's memory while completions
        are sampled.
      fixed: policies that came from folders and never move, by the names "reference" and "teacher";
        their parameters are the state's `fixed_params`.
      sizes: the sizes of streams that the run has used; a checkpoint has them beside the state.
      router_aux_loss_coef: weight of the auxiliary loss of the routers of a mixture.
    """

    policy: Policy
    algorithm: Algorithm
    optimizer: optax.GradientTransformation
    schedule: optax.Schedule
    anchor: Anchor
    plan: BatchPlan
    temperature: float = 1.0
    seed: int = 0
    max_anchor_kl: float = 0.0
    offload_optimizer: bool = False
    fixed: Mapping[str, Policy] = dataclasses.field(default_factory=dict)
    sizes: KnownSizes = dataclasses.field(default_factory=KnownSizes, compare=False)
    router_aux_loss_coef: float = 0.0

    def __post_init__(self):
        device = first_device(self.policy.mesh)
        if self.offload_optimizer:
            offload.check(device, "actor.optimizer_offload")
        if self.anchor.offload:
            offload.check(device, "anchor.offload")

    def _make_update(self, **changes) -> Callable:
        """The optimizer step of this learner; `changes` replace fields of its policy."""
        return update.make_update(
            dataclasses.replace(self.policy, **changes),
            self.algorithm,
            self.optimizer,
            num_micro=self.plan.num_micro,
            temperature=self.temperature,
            max_anchor_kl=self.max_anchor_kl,
            teacher=None if self.algorithm.teacher_beta is None else self.fixed["teacher"],
            router_aux_loss_coef=self.router_aux_loss_coef,
        )

    @functools.cached_property
    def update(self) -> Callable:
        """The jitted optimizer step that `step.make_update` makes."""
        return self._make_update()

    @functools.cached_property
    def forward(self) -> Callable:
        """The jitted forward of this architecture that `step.make_log_probs` makes."""
        return self._make_forward(self.policy)

    @functools.cached_property
    def fixed_forwards(self) -> dict[str, Callable]:
        """As `forward`, of the fixed policies whose log-probs the loss reads, by their names."""
        read = self.fixed.keys() & self.algorithm.needs
        return {name: self._make_forward(self.fixed[name]) for name in sorted(read)}

    def _make_forward(self, policy: Policy) -> Callable:
        num_micro = self.plan.num_prompts // self.plan.micro_prompts
        return update.make_log_probs(policy, num_micro=num_micro, temperature=self.temperature)

    @functools.cached_property
    def judge(self) -> Callable:
        """The algorithm's `judge` as one program: its operations one by one take some 7 ms."""
        return jax.jit(self.algorithm.judge)

    @functools.cached_property
    def meter(self) -> Meter:
        """The meter that counts the arithmetic of this learner's updates."""
        mesh = self.policy.mesh
        devices = jax.devices()[:1] if mesh is None else list(mesh.devices.flat)
        plain = functools.partial(self._make_update, gradient_checkpointing="none")
        return Meter(self.update, plain, devices)

    def laid_out(
        self,
        sequences: Sequences,
        *,
        whole_groups: bool = False,
        abstract: bool = False,
        program: str = "",
    ) -> LaidOut:
        """The sequences in the layout that the plan names.

        Args:
          whole_groups: whether to keep groups whole where a micro-batch has the room.
          abstract: whether a packed batch has shapes in place of arrays; rows are always arrays.
          program: the program whose `sizes` are used again where they waste little; "" for the
            smallest size that there is.
        """
        if self.plan.layout == "rows":
            return self._in_rows(sequences)
        check_experts(self.policy.config, sequences)
        plan, G = self.plan, sequences.lengths.shape[1]
        shards = BatchSharding(self.policy.mesh)
        tile = tile_of(self.policy.attention_settings.platform, plan.completion_length)
        models = (self.policy.config, *(policy.config for policy in self.fixed.values()))
        packing = Packing(
            sequences,
            # The anchor's forward over all mini-batches takes no more memory than an update.
            completions_per_micro=plan.micro_completions
            or plan.mini_prompts // shards.num_shards * G,
            full_length=plan.completion_length,
            prompt_length=plan.prompt_length,
            num_shards=shards.num_shards,
            whole_groups=whole_groups and not 0 < plan.micro_completions < G,
            tile=tile,
            sizes=self.sizes.of(program),
            starts=starts_of(models, tile),
            shares=shards.num_shares,
        )
        if program:
            self.sizes.note(program, packing.size)
        names = ("sampler", *sequences.log_probs)
        batch = packing.abstract(names) if abstract else packing.batch(sequences)
        return LaidOut(
            batch,
            {},
            packing.padding_frac,
            packing.num_micro,
            packing.unpacked,
            packing.load_imbalance,
        )

    def _in_rows(self, sequences: Sequences) -> LaidOut:
        lengths_PG = sequences.lengths
        T = self.plan.completion_length or int(lengths_PG.max())
        batch = make_batch(
            sequences.prompts,
            sequences.completions,
            prompt_length=self.plan.prompt_length or max(map(len, sequences.prompts)),
            completion_length=T,
        )
        log_probs = {name: pad_values(v, T) for name, v in sequences.log_probs.items()}

        def ragged(values_PGT) -> Ragged:
            return [
                [values[:length] for values, length in zip(group, lengths)]
                for group, lengths in zip(values_PGT, lengths_PG)
            ]

        return LaidOut(batch, log_probs, batch.padding_frac, 1, ragged)

    def _balanced(self, sequences: Sequences) -> np.ndarray:
        """An order of the prompts that gives every device about the same number of tokens."""
        num_shards = BatchSharding(self.policy.mesh).num_shards
        return balanced(sequences.tokens_of_groups, num_shards)

    @property
    def needs_anchor_forward(self) -> bool:
        """Whether an iteration runs the anchor over its completions."""
        is_at_hand = self.anchor.mode == "sampler" or self._anchor_is_of_the_step
        return self.algorithm.needs_entropy or not is_at_hand

    @property
    def _anchor_is_of_the_step(self) -> bool:
        """Whether the anchor is the policy of the very step, which finds its log-probs itself.

        Those of a forward would be apart from them by rounding.
        """
        return self.anchor.mode == "on_policy" and self.plan.updates_per_iteration == 1

    @property
    def keeps_reference(self) -> bool:
        """Whether the state has a copy for the reference; a fixed anchor already is one."""
        kept = "reference" in self.algorithm.needs and self.anchor.mode != "fixed"
        return kept and "reference" not in self.fixed

    def init_state(self, params) -> TrainState:
        """The state before the first iteration, without `fixed_params`; it takes `params` over."""
        trained, _ = lora.split(params)
        reference_params = anchor_lib.copied(trained) if self.keeps_reference else None
        state = update.init_state(
            self.policy, params, self.optimizer, self.anchor.init(trained), reference_params
        )
        return self.put_away(state)

    def put_away(self, state: TrainState) -> TrainState:
        """The state with its offloaded parts in the host's memory, where they wait until needed."""
        if self.offload_optimizer:
            state = state.replace(opt_state=offload.to_host(state.opt_state))
        if self.anchor.offload:
            state = state.replace(anchor_params=offload.to_host(state.anchor_params))
        return state

    def abstract_state(self) -> TrainState:
        """The shapes and shardings of `init_state`'s result, to restore a checkpoint into."""
        return update.abstract_state(
            self.policy,
            self.optimizer,
            keeps_anchor=self.anchor.keeps_params,
            keeps_reference=self.keeps_reference,
            fixed=self.fixed,
        )

    def state_bytes(self) -> dict[str, int]:
        """Bytes that each part of the state takes on one device."""
        state = self.abstract_state()
        fixed = {name: device_bytes(params) for name, params in (state.fixed_params or {}).items()}
        return {
            "parameters": device_bytes(state.params),
            "optimizer": device_bytes(state.opt_state),
            "anchor": device_bytes(state.anchor_params),
            "reference": device_bytes(state.reference_params),
        } | fixed

    @property
    def parts_on_host(self) -> frozenset[str]:
        """The parts of the state that wait in the host's memory until they are needed.

        A CPU has no other memory: nothing is freed by their waiting.
        """
        if first_device(self.policy.mesh).platform == "cpu":
            return frozenset()
        away = {"optimizer": self.offload_optimizer, "anchor": self.anchor.offload}
        return frozenset(part for part, is_away in away.items() if is_away)

    def resident_bytes(self) -> int:
        """Bytes that the state takes on one device while completions are sampled."""
        return sum(n for part, n in self.state_bytes().items() if part not in self.parts_on_host)

    def learn(
        self,
        state: TrainState,
        sequences: Sequences,
        rewards: np.ndarray,
        reward_weights: Sequence[float] | None = None,
    ) -> tuple[TrainState, dict[str, float]]:
        """Learns from the completions of one iteration.

        Args:
          state: the state before the iteration; it is donated.
          sequences: P prompts with their G completions each.
          rewards: [P, G] float32; or [P, G, K], K of each completion, which the algorithm sums.
          reward_weights: the weights of the K kinds.

        Returns:
          The new state, one iteration on, and the iteration's metrics. "update/skipped" is the
          share of its optimizer steps that were not sound and left the parameters as they were;
          where it is 1, the anchor has not moved either.
        """
        step, started = int(state.step), time.perf_counter()
        with jax.profiler.TraceAnnotation("anchor"):
            log_probs, entropy_P = self._other_log_probs(state, sequences)
        anchored = time.perf_counter()
        sequences = dataclasses.replace(sequences, log_probs=log_probs)
        with offload.on_the_host():
            scores = self.judge(
                jnp.asarray(rewards),
                reward_weights,
                entropy_P=entropy_P,
                lengths_PG=jnp.asarray(sequences.num_trained, jnp.float32),
            )
        scores = jax.device_get(scores)

        if self.offload_optimizer:
            state = state.replace(opt_state=offload.to_device(state.opt_state))
        history, operations, imbalance = [], collections.Counter(), []
        under_way = []  # metrics of a step that the devices are still at work on
        for rows in self._mini_batches(step):
            rows = rows[self._balanced(sequences.select(rows))]
            mini = self.laid_out(
                sequences.select(rows), whole_groups=self.keeps_groups_whole, program="update"
            )
            part = self.put((mini.batch, _rows(scores, rows), mini.log_probs))
            operations += self.meter.count((state, *part), mini.num_micro)
            with jax.profiler.TraceAnnotation("update"):
                state, metrics = self.update(state, *part)
            history += jax.device_get(under_way)
            under_way = [metrics | {"update/padding_frac": mini.padding_frac}]
            imbalance.append(mini.load_imbalance)
        state = state.replace(step=state.step + 1)
        history += jax.device_get(under_way)
        seconds = time.perf_counter() - anchored
        metrics = self._metrics(history, seconds)
        metrics |= {"time/anchor": anchored - started, "time/update": seconds}
        metrics |= self.meter.shares(operations, seconds)
        if BatchSharding(self.policy.mesh).num_shares > 1:
            metrics["update/load_imbalance"] = float(np.mean(imbalance))
        with offload.on_the_host():
            metrics["update/lr"] = float(self.schedule(max(steps_taken(state.opt_state) - 1, 0)))
        state, renewed = self._refreshed(state, metrics, history)
        metrics["anchor/renewed"] = float(renewed)
        return self.put_away(state), metrics

    def _metrics(self, history: list[dict[str, Any]], seconds: float) -> dict[str, float]:
        """The metrics of an iteration, from those of its optimizer steps and the time they took."""
        declared = (*update.METRICS, *update.MIXTURE_METRICS, *self.algorithm.metrics)
        metrics = update.averaged_metrics(declared, history, self.plan.epochs)
        metrics["update/tokens_per_s"] = metrics["update/tokens"] * self.plan.epochs / seconds
        if self.plan.layout == "packed":
            metrics["update/compiles"] = float(self.sizes.count)
        return metrics

    def _refreshed(
        self, state: TrainState, metrics: dict[str, float], history: list[dict[str, Any]]
    ) -> tuple[TrainState, bool]:
        """The state with the anchor as its mode has it next, and whether the anchor is a new one.

        Args:
          metrics: those of the iteration; history: those of its optimizer steps.
        """
        if metrics[update.SKIPPED] >= 1.0:  # the policy has not moved: the anchor stays too
            return state, False
        anchor_params = state.anchor_params
        if self.anchor.offload:
            anchor_params = offload.to_device(anchor_params)
        # Nats a token between the anchor and the policy before the iteration's last step.
        measured_kl = float(history[-1][self.algorithm.anchor_kl_metric])
        anchor_params, renewed = self.anchor.refresh(
            anchor_params, state.trained, measured_kl=measured_kl
        )
        return state.replace(anchor_params=anchor_params), renewed

    def log_probs(
        self, params, sequences: Sequences, forward: Callable | None = None
    ) -> tuple[Ragged, Ragged]:
        """Log-probs and entropies of the completions' tokens.

        Args:
          forward: that of another model, whose router chooses its experts itself; None for
            `self.forward`, in which tokens take the experts that the sampler took.

        Returns:
          (log-probs, entropies), each P lists of G arrays [T] float32.
        """
        if forward is None:
            forward = self.forward
        else:
            sequences = sequences.without_experts
        order = self._balanced(sequences)
        laid_out = self.laid_out(sequences.select(order), program="forward")
        found = distributed.fetch(forward(params, self.put(laid_out.batch)))
        places = np.argsort(order)
        return tuple([values[place] for place in places] for values in map(laid_out.ragged, found))

    def other_params(self, state: TrainState) -> dict[str, Callable]:
        """Getters of the parameters of the policies whose forwards an iteration runs, by name."""

        def anchor():
            if not self.anchor.keeps_params:
                return state.params
            if not self.anchor.offload:
                return state.anchor
            return state.replace(anchor_params=offload.to_device(state.anchor_params)).anchor

        getters = {"anchor": anchor} if self.needs_anchor_forward else {}
        if self.keeps_reference:
            getters["reference"] = lambda: state.reference
        return getters | {
            name: functools.partial(state.fixed_params.get, name) for name in self.fixed_forwards
        }

    @property
    def other_policies(self) -> list[str]:
        """The policies, by name, whose log-probs an update takes beside its own."""
        names = [] if self._anchor_is_of_the_step else ["anchor"]
        names += ["reference"] * ("reference" in self.algorithm.needs)
        return list(dict.fromkeys([*names, *self.fixed_forwards]))

    @property
    def keeps_groups_whole(self) -> bool:
        """Whether an update's micro-batches are to hold whole groups.

        Such a micro-batch finds what the loss needs without another forward.
        """
        return bool(self.other_policies) or not self.algorithm.slope_is_known

    def _other_log_probs(
        self, state: TrainState, sequences: Sequences
    ) -> tuple[dict[str, Ragged], np.ndarray | None]:
        """Log-probs under the names of their policies, and the anchor's entropy.

        The entropy is [P], a fraction of log(vocabulary size), or None where the algorithm does not
        need it.
        """
        log_probs, entropy_P = {}, None
        for name, params in self.other_params(state).items():
            log_probs[name], entropy = self.log_probs(
                params(), sequences, self.fixed_forwards.get(name)
            )
            if name == "anchor" and self.algorithm.needs_entropy:
                entropy_P = self._mean_entropy(sequences, entropy)
        if self._anchor_is_of_the_step:
            log_probs.pop("anchor", None)  # it ran for its entropy alone
        if self.anchor.mode == "sampler":
            log_probs["anchor"] = sequences.values("sampler")
        if "reference" in self.algorithm.needs - log_probs.keys():
            log_probs["reference"] = log_probs["anchor"]
        return log_probs, entropy_P

    def _mean_entropy(self, sequences: Sequences, entropy: Ragged) -> np.ndarray:
        """[P] float32: the mean entropy of a prompt's trained tokens over log(vocabulary size)."""
        means = []
        for group, values in zip(sequences.completions, entropy):
            trained = np.concatenate([c.trained for c in group])
            total = np.concatenate(values)[trained].sum(dtype=np.float32)
            means.append(total / max(trained.sum(), 1))
        return np.array(means, np.float32) / math.log(self.policy.config.vocab_size)

    def _mini_batches(self, step: int):
        """The prompts of each optimizer step; every epoch has a fresh order."""
        P, size = self.plan.num_prompts, self.plan.mini_prompts
        for epoch in range(self.plan.epochs):
            if size == P:
                yield np.arange(P)
                continue
            order = np.random.default_rng([self.seed, step, epoch]).permutation(P)
            yield from order.reshape(-1, size)

    def put(self, tree):
        """Puts host arrays with a leading batch axis on the devices, spread over the mesh."""
        return BatchSharding(self.policy.mesh).put(tree)


def check_experts(config: ModelConfig, sequences: Sequences) -> None:
    """Refuses experts of another model, as a recording may have them."""
    shape = sequences.experts_shape
    if not shape:
        return
    m = config.mixture
    wanted = (config.num_mixtures, m.chosen) if m else ()
    flat = [c for group in sequences.completions for c in group]
    held = [e for c in flat for e in (c.experts, c.prompt_experts) if e is not None]
    if shape != wanted or any(
        e.shape[1:] != shape or e.max(initial=0) >= m.num_experts for e in held
    ):
        raise ValueError(
            f"the completions say which experts they went through, and not those of this model; "
            f"wanted (layers, experts of a token) = {wanted}, given {shape}"
        )


def _rows(tree, rows: np.ndarray):
    """The given rows of every leaf that has one row a prompt."""
    return jax.tree.map(lambda x: x[rows], tree)
