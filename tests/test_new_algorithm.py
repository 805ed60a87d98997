"""A new algorithm is one file and one line in the table; all else follows from what it declares.

The algorithm is LUSPO, in tests/data/luspo.py. A copy of the package gets it, and a process of its
own tries that copy.
"""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from adpo_jax.losses import PaddedTokens
from adpo_jax.losses.tokens import StreamTokens

ROOT = Path(__file__).resolve().parents[1]
FILE = ROOT / "tests" / "data" / "luspo.py"

# Runs in the copy; its arguments are the copy and the folder to train in.
DRIVER = """
import json, runpy, sys
from pathlib import Path

import adpo_jax
from adpo_jax import losses
from adpo_jax.config import default_config
from adpo_jax.run.config_checks import finalized
from adpo_jax.log.metrics import read_jsonl
from adpo_jax.train import train

root, folder = map(Path, sys.argv[1:])
assert Path(adpo_jax.__file__).parent == root / "adpo_jax"


def config(**changes):
    made = runpy.run_path(str(root / "configs" / "arithmetic.py"))["get_config"]()
    made.algorithm.adv_estimator = "luspo"
    with made.unlocked():
        made.update(changes)
    return finalized(made)


def refusal(**changes):
    try:
        config(**changes)
    except ValueError as error:
        return str(error)


tiny = {
    "actor_rollout_ref": {
        "model": {
            "hf_config": {
                "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "head_dim": 8
            }
        },
        "actor": {"ppo_mini_batch_size": 4, "optim": {"lr": 0.01}},
    },
    "data": {"train_batch_size": 8, "max_response_length": 6, "val_files": ""},
    "algorithm": {"num_generations": 2, "beta_reference_kl": 0.1},
    "sft": {"steps": 0},
    "trainer": {"total_training_steps": 2, "save_freq": 0, "log_samples_freq": 0},
}
found = {
    "default": default_config().algorithm.to_dict(),
    "final": config().algorithm.to_dict(),
    "grpo": config(algorithm={"adv_estimator": "grpo"}).algorithm.clip_low,
    "changed": config(algorithm={"clip_low": 0.1}).algorithm.clip_low,
    "tau": refusal(algorithm={"tau": 0.5}),
    "clip_low": refusal(trainer={"best_metric": "luspo/loss"}, algorithm={"clip_low": -1.0}),
    "fixed": refusal(anchor={"mode": "fixed"}),
    "best_metric": refusal(trainer={"best_metric": "luspo/clip_fraction"}),
    "under adpo": refusal(algorithm={"adv_estimator": "adpo", "clip_high": 0.1}),
}
for name in ("config", "metrics"):
    script = runpy.run_path(str(root / "scripts" / f"make_{name}_reference.py"))
    found[f"docs of {name}"] = script["reference"]()
train(config(**tiny), folder)
found["rows"] = read_jsonl(folder / "metrics.jsonl")
(root / "found.json").write_text(json.dumps(found))
"""


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What the copy of the package with LUSPO in it says and does."""
    root = tmp_path_factory.mktemp("copy")
    for name in ("adpo_jax", "configs", "scripts", "docs"):
        shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(FILE, root / "adpo_jax" / "losses")
    table = root / "adpo_jax" / "losses" / "__init__.py"
    text = table.read_text()
    for line, added in (
        ("from adpo_jax.losses.rloo import Rloo\n", "from adpo_jax.losses.luspo import Luspo\n"),
        ("        Rloo,\n", "        Luspo,\n"),
    ):
        assert text.count(line) == 1
        text = text.replace(line, line + added)
    table.write_text(text)
    (root / "driver.py").write_text(DRIVER)
    environment = os.environ | {"PYTHONPATH": str(root), "JAX_PLATFORMS": "cpu"}
    environment["XLA_FLAGS"] = "--xla_backend_optimization_level=0"
    done = subprocess.run(
        [sys.executable, root / "driver.py", root, root / "run"],
        cwd=root,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads((root / "found.json").read_text())


def test_the_config_has_its_parameters_and_each_algorithm_its_own_defaults(found):
    # grpo clips at 0.2, luspo much nearer, so the key itself has no default.
    assert (found["default"]["clip_low"], found["default"]["clip_high"]) == (None, None)
    assert (found["final"]["clip_low"], found["final"]["clip_high"]) == (3e-4, 4e-4)
    assert found["grpo"] == 0.2
    assert found["changed"] == 0.1


def test_what_has_no_effect_or_cannot_work_under_it_is_refused(found):
    assert found["tau"] == (
        "algorithm.tau: no effect under algorithm.adv_estimator=luspo; leave at the default"
    )
    assert "clip_high: no effect under algorithm.adv_estimator=adpo" in found["under adpo"]
    assert "clip_low must be a finite number above 0 and at most 1" in found["clip_low"]
    assert "adv_estimator=luspo" in found["fixed"]
    assert "needs anchor.mode=on_policy or sampler; given 'fixed'" in found["fixed"]
    assert "did you mean luspo/clip_frac?" in found["best_metric"]


def test_it_is_in_the_documentation_of_keys_and_metrics(found):
    section = found["docs of config"].split("## `algorithm`")[1].split("## ")[0]
    rows = {line.split("|")[1].strip(): line for line in section.splitlines() if "`" in line}
    assert ", rloo, luspo, opd |" in rows["`adv_estimator`"]
    assert "0.0003 for gspo and luspo" in rows["`clip_low`"]
    assert "not under adpo, tpo, lpo, sapo and rloo" in rows["`clip_low`"]
    assert "not under reinforce_pp, rloo and opd" in rows["`scale_rewards`"]
    assert "not under adpo, tpo, lpo, rloo and luspo" in rows["`loss_aggregation`"]
    rows = [line for line in found["docs of metrics"].splitlines() if "`luspo/" in line]
    assert any("`luspo/clip_frac` | share | luspo | of completions whose" in row for row in rows)
    assert any("`luspo/anchor_kl`" in row and "as under adpo" in row for row in rows)


def test_it_trains_and_logs(found):
    rows = [row for row in found["rows"] if "luspo/loss" in row]
    assert [row["step"] for row in rows] == [1, 2]
    of_it = {name for name in rows[0] if name.startswith(("luspo/", "adpo/", "grpo/", "rloo/"))}
    assert of_it == {
        f"luspo/{name}"
        for name in (
            "loss", "anchor_kl", "abs_log_ratio", "kl_penalty", "reference_kl", "dropped_prompts",
            "zero_std_frac", "clip_frac",
        )
    }  # fmt: skip
    assert all(np.isfinite(row[name]) for row in rows for name in of_it)
    assert not any(row["update/skipped"] for row in rows)
    # The second iteration begins away from where the first one did.
    assert rows[1]["luspo/reference_kl"] > rows[0]["luspo/reference_kl"] > 0


@pytest.fixture(scope="module")
def luspo():
    spec = importlib.util.spec_from_file_location("luspo", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.Luspo


def test_its_loss_is_that_of_the_paper_in_rectangles_and_in_streams(luspo):
    P, G, T, low, high = 2, 3, 5, 0.05, 0.1
    rng = np.random.default_rng(0)
    anchor = -rng.exponential(1.0, (P, G, T)).astype(np.float32)
    policy = anchor + rng.normal(0.0, 0.3, (P, G, T)).astype(np.float32)
    rewards = rng.normal(size=(P, G)).astype(np.float32)
    lengths = np.array([[1, 5, 3], [4, 2, 5]])
    total, clipped, expected = 0.0, 0, np.zeros((P, G, T))
    for p, g in np.ndindex(P, G):
        A = (rewards[p, g] - rewards[p].mean()) / (rewards[p].std(ddof=1) + 1e-6)
        length = lengths[p, g]
        ratio = np.exp((policy - anchor)[p, g, :length].mean())
        limited = min(max(ratio, 1 - low), 1 + high)
        total -= length * min(ratio * A, limited * A) / (P * G)
        if limited * A < ratio * A:
            clipped += 1
        else:
            expected[p, g, :length] = -A * ratio / (P * G)
    assert 0 < clipped < P * G

    algorithm = luspo(clip_low=low, clip_high=high)
    trained = np.arange(T) < lengths[..., None]
    completion = np.broadcast_to(np.arange(G)[:, None], (P, G, T)).reshape(P, G * T)
    layouts = (
        ((P, G, T), PaddedTokens(jnp.asarray(trained))),
        ((P, G * T), StreamTokens(jnp.asarray(trained).reshape(P, -1), completion, P, G)),
    )
    for shape, tokens in layouts:

        def loss(log_probs, anchor, rewards, tokens=tokens):
            prepared = algorithm.prepare(rewards, tokens)
            return algorithm.loss({"policy": log_probs, "anchor": anchor}, tokens, prepared)

        loss_and_gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))
        arrays = policy.reshape(shape), anchor.reshape(shape), rewards
        (value, metrics), gradient = loss_and_gradient(*arrays)
        np.testing.assert_allclose(value, total, rtol=1e-5)
        np.testing.assert_allclose(metrics["luspo/clip_frac"], clipped / (P * G), rtol=1e-6)
        np.testing.assert_allclose(gradient.reshape(P, G, T), expected, rtol=1e-5, atol=1e-7)
