"""The programs of an iteration: traced, and what each costs as it is compiled.

Letters: P prompts, G completions of a prompt.
"""

import dataclasses
import functools
import time
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import numpy as np

from adpo_jax.devices import sharding
from adpo_jax.devices.chips import Chip
from adpo_jax.devices.flops import (
    GROUPED_PRODUCTS,
    OF_ROWS_LEFT,
    has_exchange,
    has_kernels,
    traced_flops,
)
from adpo_jax.devices.topologies import lowered
from adpo_jax.dry_run import forecast
from adpo_jax.dry_run.forecast import Least
from adpo_jax.dry_run.hlo import Program
from adpo_jax.dry_run.report import ProgramCost
from adpo_jax.engine.engine import Engine
from adpo_jax.engine.sampling import SamplingParams
from adpo_jax.model.exchange import ROOM
from adpo_jax.model.model_config import ModelConfig
from adpo_jax.policy.policy import Policy
from adpo_jax.records import Completion, Sequences
from adpo_jax.update.learner import Learner


class Asked(NamedTuple):
    """A program of an iteration, before it is compiled.

    Attributes:
      devices: those that run it.
      calls: how often it runs in an iteration whose completions all have full length.
      least: what a call cannot do without.
      turns: how often its loops without a fixed end turn.
      steps_of_call: steps that a call makes; all that is said of a call is of one of them.
      expected_calls, expected_share: as of `ProgramCost`.
    """

    traced: jax.stages.Traced
    devices: Sequence[jax.Device]
    calls: int
    least: Least
    turns: int = 1
    steps_of_call: int = 1
    expected_calls: int | None = None
    expected_share: float = 1.0


def programs_of(
    config,
    engine: Engine,
    learner: Learner,
    sampling: SamplingParams,
    *,
    num_processes: int,
    expected_steps: int,
    expected_share: float,
) -> dict[str, Asked]:
    """The programs of an iteration, by name.

    Args:
      expected_steps: decode steps of an iteration with the lengths of the forecast.
      expected_share: the share of the other work of learning that there is with these lengths.
    """
    P, G = config.data.train_batch_size, config.algorithm.num_generations
    # All prompts and completions of the iteration have full length.
    completion = Completion.sampled(*np.zeros((2, config.data.max_response_length)), "length")
    prompt = [0] * config.data.max_prompt_length
    sequences = Sequences([prompt] * P, [[completion] * G] * P)
    least = least_of(config, engine, learner.policy.mesh, learner.fixed)
    here, there = (list(p.mesh.devices.flat) for p in (engine.policy, learner.policy))
    own = own_prompts(config, num_processes)
    traced = engine.trace(sampling)
    waves = -(-own * G // engine.num_slots)
    of_rollout = {
        "prefill": Asked(
            traced["prefill"],
            here,
            -(-own // engine.prefill_rows) * engine.prefill_pieces,
            least["prefill"],
        ),
        "decode": Asked(
            traced["decode"],
            here,
            waves * config.data.max_response_length,
            least["decode"],
            steps_of_call=engine.steps_per_dispatch,
            expected_calls=expected_steps,
        ),
    }
    return of_rollout | {
        name: Asked(
            program,
            there,
            learner.plan.updates_per_iteration if name == "update" else 1,
            least[name],
            turns,
            expected_share=expected_share,
        )
        for name, (program, turns) in traced_learning(learner, sequences).items()
    }


def own_prompts(config, num_processes: int) -> int:
    """Prompts of an iteration that one process samples from."""
    return -(-config.data.train_batch_size // num_processes)


def traced_learning(
    learner: Learner, sequences: Sequences
) -> dict[str, tuple[jax.stages.Traced, int]]:
    """The programs "update", and "anchor" where other policies run over the completions.

    A policy from a folder whose log-probs are read has a program of its own, by its name.
    """
    abstract = sharding.BatchSharding(learner.policy.mesh).abstract
    state, shape_PG, traced = learner.abstract_state(), sequences.lengths.shape, {}
    if run := learner.other_params(state).keys():
        whole = learner.laid_out(sequences, abstract=True)
        whole_batch, fixed = abstract(whole.batch), learner.fixed_forwards
        if run - fixed.keys():
            traced["anchor"] = learner.forward.trace(state.params, whole_batch), whole.num_micro
        for name, forward in fixed.items():
            traced[name] = forward.trace(state.fixed_params[name], whole_batch), whole.num_micro
    entropy_P = np.zeros(shape_PG[0]) if learner.algorithm.needs_entropy else None
    rewards = np.zeros((*shape_PG, 1) if learner.algorithm.decouples_rewards else shape_PG)
    scores = learner.algorithm.judge(rewards, entropy_P=entropy_P)
    rows = range(learner.plan.mini_prompts)
    others = dict.fromkeys(learner.other_policies, sequences.values("sampler"))
    mini = dataclasses.replace(sequences, log_probs=others).select(rows)
    mini = learner.laid_out(mini, whole_groups=learner.keeps_groups_whole, abstract=True)
    scores = jax.tree.map(lambda x: x[: len(rows)], jax.device_get(scores))
    part = abstract((mini.batch, scores, mini.log_probs))
    traced["update"] = learner.update.trace(state, *part), mini.num_micro
    return traced


def _per_pair(model: ModelConfig) -> int:
    """Operations of a query and a key that it sees, in all layers.

    They are two products, of 2 D operations each, in every head of every layer that has full
    attention.
    """
    full = model.num_layers - sum(map(model.is_linear, range(model.num_layers)))
    per_pair = 4 * model.num_heads * model.head_dim * full
    if model.global_layers:
        count = sum(map(model.is_global, range(model.num_layers)))
        per_pair += 4 * model.num_heads * (model.global_layers.head_dim - model.head_dim) * count
    return per_pair


def least_of(config, engine: Engine, mesh, fixed: Mapping[str, Policy]) -> dict[str, Least]:
    """What a call of each program cannot do without; completions have full length.

    Of the forward passes of an update the attention of one is counted, and 2.5 times as much of its
    backward pass (five products for two).
    """
    layout, data, per_pair = engine.verbs.layout, config.data, _per_pair(engine.policy.config)
    P, G = data.train_batch_size, config.algorithm.num_generations
    prompt, response = data.max_prompt_length, data.max_response_length
    pairs = P * forecast.causal_pairs(prompt, response, G)
    local, slots = engine.policy.mesh.size, engine.num_slots
    rows = -(-slots // G)
    own = (response + 1) // 2  # tokens behind a sample, on average over its steps
    seen = slots * own + rows * (prompt - 1)
    # The state of linear attention is read and written.
    state = 2 * layout.linear.row_bytes() * slots if layout.linear else 0
    splits = (layout.token_bytes() * seen + state) // local
    weights = sharding.device_bytes(engine.verbs.abstract_params())
    prefill_pairs = engine.prefill_rows * prompt * (prompt - 1) // 2 // engine.prefill_pieces
    mini = config.actor_rollout_ref.actor.ppo_mini_batch_size
    return {
        "prefill": Least(per_pair * prefill_pairs // local),
        "decode": Least(per_pair * slots * (own + prompt) // local, weights + splits),
        "anchor": Least(per_pair * pairs // mesh.size),
        **{
            name: Least(_per_pair(other.config) * pairs // mesh.size)
            for name, other in fixed.items()
        },
        "update": Least(int(3.5 * per_pair * pairs * mini / P) // mesh.size),
    }


def compiled(name: str, asked: Asked, chip: Chip | None, *, of_processes: bool) -> ProgramCost:
    """Compiles a program, and reads what it costs; where a call makes several steps, one of them.

    Args:
      of_processes: whether a process counts as a slice of its own (`sharding.slice_numbers`).
    """
    traced, devices, least = asked.traced, asked.devices, asked.least
    started = time.perf_counter()
    executable = lowered(traced, devices[0]).compile()
    seconds = time.perf_counter() - started
    memory = executable.memory_analysis()
    slices = sharding.slice_numbers(list(devices), of_processes=of_processes)
    # No device has rows left where routers choose evenly.
    read = functools.partial(
        Program, executable.as_text(), asked.turns, slices, not_entered=(OF_ROWS_LEFT,)
    )
    step = read()
    # What comes before the loop of the steps, and after it, is shared out over them.
    call = step if asked.steps_of_call == 1 else read(outer_turns=asked.steps_of_call)
    results = memory.output_size_in_bytes - memory.alias_size_in_bytes
    moved = memory.argument_size_in_bytes + results if least.moved is None else least.moved
    traced_dense = traced_flops(traced, asked.turns, of_experts=False)
    dense = step.flops_without(GROUPED_PRODUCTS)
    of_attention = least.kernel_flops if has_kernels(traced) else 0
    # What experts multiply depends on what routers choose: this is the room for it, and the rows
    # of an even choice where nothing is exchanged.
    of_experts = (traced_flops(traced, asked.turns) - traced_dense) // len(devices)
    cost = ProgramCost(
        name=name,
        calls=asked.calls,
        temporary=memory.temp_size_in_bytes + results,
        moved=moved,
        flops=dense + of_attention + int(of_experts / (ROOM if has_exchange(traced) else 1)),
        balance=dense * len(devices) / max(traced_dense, 1),
        collectives=step.collectives,
        launches=round(call.launches / asked.steps_of_call),
        compile_s=seconds,
        expected_calls=asked.expected_calls,
        expected_share=asked.expected_share,
    )
    if chip is None:
        return cost
    # Grouped products are in the program, or in kernels that it does not show.
    hidden = of_attention + (of_experts if step.flops == dense else 0)
    # The kernels of decoding read what is seen, each its part of it.
    share = moved // max(sum(step.kernel_calls.values()), 1) if name == "decode" else 0
    kernel_s = call.seconds(
        chip.flops,
        chip.bandwidth,
        launch=forecast.LAUNCH_S.get("gpu" if chip.gpu else "tpu", 0.0),
        of_kernels=dict.fromkeys(step.kernel_calls, share),
    )
    linked_s = sum(c.bytes for c in call.collectives) / (chip.link or chip.bandwidth)
    return dataclasses.replace(
        cost,
        kernel_s=kernel_s / asked.steps_of_call + hidden / chip.flops,
        linked_s=linked_s / asked.steps_of_call,
    )
