"""The mathematics of ADPO where the answer is known: scripts/adpo_by_example.py."""

import runpy
from pathlib import Path

import jax
import numpy as np
import pytest

SCRIPT = Path(__file__).resolve().parents[1] / "scripts" / "adpo_by_example.py"


@pytest.fixture(scope="module")
def example():
    return runpy.run_path(str(SCRIPT))


@pytest.mark.parametrize("tau", [0.2, 2.0])
def test_descent_ends_at_the_anchor_times_q_to_the_tau(example, tau):
    policy, formula = example["converges_to"](tau, steps=1500)
    np.testing.assert_allclose(policy, formula, atol=2e-4)
    assert np.abs(policy - policy[:1]).max() > 0.1  # not the same for all prompts


def test_the_closed_form_gradient_is_that_of_autodiff(example):
    by_autodiff, closed = example["gradients"](0.4)
    np.testing.assert_allclose(by_autodiff, closed, atol=1e-6)


def test_the_curvature_is_one_over_g_tau_squared_but_for_a_constant(example):
    for tau in (0.2, 0.8):
        values = example["curvature"](tau, group=4)
        np.testing.assert_allclose(values, [0, 1, 1, 1], atol=1e-4)


def test_a_refreshed_anchor_learns_more_than_a_fixed_one_under_noise(example):
    ends = {
        anchor: example["learning_curve"](jax.random.key(0), anchor=anchor, noise=1.0)[-1]
        for anchor in ("on_policy", "fixed")
    }
    assert ends["on_policy"] > ends["fixed"] + 0.1
