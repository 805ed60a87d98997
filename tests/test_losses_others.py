"""The losses against verl's and TRL's own code, whose numbers `scripts/make_loss_vectors.py` wrote.

The numbers are float64, as is the comparison.
"""

import functools
import json
from pathlib import Path

import jax
import numpy as np
import pytest

from adpo_jax import losses

GOLDEN = Path(__file__).parent / "golden" / "losses"
CASES = json.loads((GOLDEN / "cases.json").read_text())


def kind(case):
    """The loss with its parameters, and whose code it is compared with."""
    parameters = ",".join(f"{k}={v}" for k, v in case["parameters"].items())
    return f"{case['loss']}({parameters})-{case['source']}"


@functools.cache
def arrays():
    return dict(np.load(GOLDEN / "arrays.npz"))


@pytest.mark.parametrize("name", dict.fromkeys(map(kind, CASES)))
def test_loss_and_gradient_are_those_of_the_public_code(name):
    chosen = [(i, case) for i, case in enumerate(CASES) if kind(case) == name]
    assert len(chosen) >= 6
    loss_fn = getattr(losses, f"{chosen[0][1]['loss']}_loss")
    with jax.enable_x64(True):
        for number, case in chosen:
            names = ("log_probs", "anchor", "rewards", "mask", "reference", "sampler")
            *batch, reference, sampler = (arrays()[f"{case['batch']}/{n}"] for n in names)
            if case["weights"]:
                batch[2] = arrays()[f"{case['batch']}/several"]
            loss = functools.partial(
                loss_fn,
                num_generations=case["num_generations"],
                reward_weights=case["weights"],
                reference_log_probs=reference,
                sampler_log_probs=sampler,
                **case["parameters"],
            )
            value, gradient = jax.jit(jax.value_and_grad(lambda *b, f=loss: f(*b)[0]))(*batch)
            expected = arrays()[f"case/{number}"]
            scale = np.abs(expected).max()
            np.testing.assert_allclose(gradient, expected, rtol=1e-6, atol=1e-6 * scale)
            if case["value"] is not None:
                # TRL's SAPO has its temperatures in float32, which shows where gains cancel.
                np.testing.assert_allclose(value, case["value"], rtol=1e-6, atol=1e-7)
