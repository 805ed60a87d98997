"""`adpo_loss` against the numbers of the published PyTorch reference."""

import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from adpo_jax import adpo_loss

GOLDEN = Path(__file__).parent / "golden" / "adpo_loss"
CASES = json.loads((GOLDEN / "cases.json").read_text())["cases"]


@pytest.fixture(scope="module")
def arrays():
    with np.load(GOLDEN / "arrays.npz") as archive:
        return dict(archive)


@pytest.mark.filterwarnings("ignore:2 of 10 rows are left out:UserWarning")
@pytest.mark.parametrize("x64", [True, False], ids=["float64", "float32"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case['key']}_{case['name']}")
def test_loss_gradient_and_metrics_equal_the_reference(case, x64, arrays):
    tolerance = 1e-6 if x64 else 2e-6
    names = ("log_probs", "anchor_log_probs", "rewards", "completion_mask")
    # The reference scales twice, so that its "none" and "batch" are "group".
    config = case["config"] | {"scale_rewards": "group"}
    with jax.enable_x64(x64):
        inputs = [jnp.asarray(arrays[f"{case['key']}/{name}"]) for name in names]
        loss_fn = jax.jit(jax.value_and_grad(functools.partial(adpo_loss, **config), has_aux=True))
        (loss, metrics), gradient = loss_fn(*inputs)
        assert loss.dtype == (jnp.float64 if x64 else jnp.float32)

    np.testing.assert_allclose(loss, case["loss"], rtol=tolerance)
    expected = arrays[f"{case['key']}/grad_log_probs"]
    # Relative to the largest entry: where p and q meet, p - q has no digits of its own.
    np.testing.assert_allclose(gradient, expected, rtol=0, atol=tolerance * np.abs(expected).max())
    for name, value in case["metrics"].items():
        np.testing.assert_allclose(metrics[name], value, rtol=tolerance, err_msg=name)
    np.testing.assert_allclose(
        metrics["adpo/abs_log_ratio"], case["mean_abs_log_ratio"], rtol=tolerance
    )
