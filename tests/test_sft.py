"""The cold start: supervised steps in micro-batches, and what happens when one goes wrong."""

import dataclasses
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from adpo_jax.devices import sharding
from adpo_jax.losses.imitation import Imitation
from adpo_jax.model.lora import Lora
from adpo_jax.records import Batch
from adpo_jax.run.cold_start import ColdStart
from adpo_jax.run.guard import TrainingStopped
from adpo_jax.run.interruption import Interrupted
from adpo_jax.update import init_state, make_update, sft
from adpo_jax.update.packing import PackedBatch

PROMPTS = [[3, 1, 4], [1, 5], [9, 2, 6, 5], [3, 5, 8], [9], [7, 9, 3], [2, 3], [8, 4, 6]]
COMPLETIONS = [[2, 7, 1], [8], [2, 8, 1, 8, 2], [8, 4], [5, 9, 0], [4, 5], [2, 3, 5, 3, 6], [0, 2]]
EXAMPLES = sft.demonstrations(PROMPTS, COMPLETIONS)
ALL = np.arange(len(PROMPTS))
BATCH = sft.InRows(EXAMPLES, prompt_length=4, completion_length=5)(ALL)


def in_streams(policy, steps=(ALL,), tile=None, **options):
    """The layout of demonstrations in streams."""
    with pytest.MonkeyPatch.context() as patch:
        if tile:
            patch.setattr(sft, "tile_of", lambda *_: tile)
        return sft.InStreams(
            policy, EXAMPLES, steps, prompt_length=4, completion_length=5, **options
        )


def descended(policy, params, batch=BATCH, **kwargs):
    """Parameters after one SGD step of rate 1, and its metrics."""
    optimizer = optax.sgd(1.0)
    state = init_state(policy, jax.tree.map(jnp.copy, params), optimizer)
    state, metrics = sft.make_sft_step(policy, optimizer, batch_size=8, **kwargs)(state, batch)
    return jax.device_get(state.params), jax.device_get(metrics)


def mean_nll(policy, params):
    rows = (jnp.asarray(x[:, 0]) for x in (BATCH.tokens_PGS, BATCH.attention_mask_PGS))
    log_probs, _ = policy.completion_log_probs(params, *rows, num_completion=5)
    mask = BATCH.completion_mask_PGT[:, 0]
    return -(log_probs * mask).sum() / mask.sum()


def assert_close(one, other, atol=2e-6):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=atol), one, other)


def test_a_limit_of_the_kl_to_an_anchor_is_refused_where_there_is_none():
    policy, _ = tiny.policy_and_params()
    with pytest.raises(ValueError, match="max_anchor_kl=0.1 limits the KL to an anchor, and sft"):
        make_update(policy, Imitation(), optax.sgd(1.0), max_anchor_kl=0.1)


@pytest.mark.parametrize("rows_per_micro", [0, 3])
@pytest.mark.parametrize("layout", ["packed", "rows"])
def test_a_step_descends_the_mean_over_tokens_however_the_batch_is_cut(layout, rows_per_micro):
    policy, params = tiny.policy_and_params()
    loss, gradient = jax.value_and_grad(lambda params: mean_nll(policy, params))(params)
    batch = BATCH
    if layout == "packed":
        batch = in_streams(policy, tile=4, rows_per_micro=rows_per_micro)(ALL)
        # The 46 tokens in streams of at most 27.
        assert batch.num_micro_B == (2 if rows_per_micro else 1)
    found, metrics = descended(policy, params, batch, rows_per_micro=rows_per_micro)
    assert metrics["sft/loss"] == pytest.approx(float(loss), rel=1e-5)
    assert_close(found, jax.tree.map(jnp.subtract, params, gradient))


def test_a_mesh_and_adapters_take_the_same_step():
    policy, params = tiny.policy_and_params()
    policy, params = policy.with_adapters(params, Lora(2, 4.0), jax.random.key(1))
    expected, _ = descended(policy, params)
    policy = dataclasses.replace(policy, mesh=sharding.make_mesh(2, 2, 2))
    layout = jax.tree.map(lambda s: s.sharding, policy.abstract_params())
    for batch in (BATCH, in_streams(policy, tile=4)(ALL)):
        found, _ = descended(policy, jax.device_put(params, layout), batch)
        assert_close(found, expected, atol=1e-5)
        assert_close(found["embed"], params["embed"])


def test_all_steps_have_the_shape_of_the_fullest_and_no_more():
    policy, _ = tiny.policy_and_params()
    steps = [np.array(rows) for rows in ([0, 4], [2, 6], [1, 3])]
    lay_out = in_streams(policy, steps, tile=4)
    first, *others = (jax.tree.map(np.shape, lay_out(rows)) for rows in steps)
    assert all(other == first for other in others)
    # Prompts without their last tokens: 2, 4 and 3; completions: 6, 10 and 3.
    assert lay_out.size[:3] == (1, 4, 12)
    assert lay_out(steps[2]).trained.sum() == 3


def test_demonstrations_are_packed_where_that_halves_the_places():
    policy, _ = tiny.policy_and_params()
    longest = {"prompt_length": 4, "completion_length": 5, "batch_size": 8}
    assert isinstance(sft.choose_layout(policy, EXAMPLES, [ALL], **longest), sft.InRows)
    longest = {"prompt_length": 4, "completion_length": 60, "batch_size": 8}
    assert isinstance(sft.choose_layout(policy, EXAMPLES, [ALL], **longest), sft.InStreams)


def test_a_step_that_is_not_finite_leaves_the_parameters_as_they_were():
    policy, params = tiny.policy_and_params()
    params["final_norm"] = params["final_norm"].at[0].set(jnp.nan)
    found, metrics = descended(policy, params)
    assert metrics["update/skipped"] == 1.0
    jax.tree.map(np.testing.assert_array_equal, found, params)


def five_steps(policy, save_freq=0, **options):
    """A stage of five steps on the prompts of this file."""
    lengths = {"prompt_length": 4, "completion_length": 100}
    options |= {"num_steps": 5, "batch_size": 4, "seed": 0, "save_freq": save_freq, **lengths}
    return ColdStart(policy, optax.sgd(1.0), PROMPTS, COMPLETIONS, **options)


@pytest.mark.parametrize("how", ["due", "interrupted"])
def test_no_checkpoint_of_a_stage_is_saved_without_the_steps_that_were_left_out(how):
    policy, params = tiny.policy_and_params()
    params["final_norm"] = params["final_norm"].at[0].set(jnp.nan)
    stage = five_steps(policy, save_freq=1, layout="rows")
    checkpoints = mock.Mock(is_due=lambda *_, **__: how == "due")
    stop = mock.Mock(check=mock.Mock(side_effect=[None, Interrupted("a test")]))
    with pytest.raises(TrainingStopped, match="1 of the cold start's steps up to 1 was not finite"):
        stage.train(stage.init_state(params), mock.Mock(), checkpoints, stop)
    assert not checkpoints.save.called
    assert not checkpoints.save_now.called


def test_a_stage_goes_on_with_the_batches_that_it_would_have_had():
    policy, _ = tiny.policy_and_params()
    stage = five_steps(policy)
    whole, rest = list(stage._batches(0)), list(stage._batches(3))
    assert all(isinstance(batch, PackedBatch) for batch in whole)
    jax.tree.map(np.testing.assert_array_equal, whole[3:], rest)
    in_rows = dataclasses.replace(stage, layout="rows")
    assert all(isinstance(batch, Batch) for batch in in_rows._batches(0))
