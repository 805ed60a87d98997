"""ADPO on problems small enough to know the answer: a notebook in the form of a script.

    python scripts/adpo_by_example.py

A contextual bandit stands for a language model: a prompt is a context, a completion one of a few
actions, its log-probability a log-softmax over a table of logits. Cells begin with `# %%`, which
editors run one by one. Takes some seconds on a CPU.

Letters: C contexts (prompts), A actions, G completions of a prompt, N groups.
"""

# %%
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

from adpo_jax.losses import Adpo, PaddedTokens


def group_loss(algorithm: Adpo, s_NG, s_anchor_NG, rewards_NG):
    """The ADPO loss of groups whose completions are one token long."""
    tokens = PaddedTokens(jnp.ones((*s_NG.shape, 1), bool))
    prepared = algorithm.prepare(rewards_NG, tokens)
    log_probs = {"policy": s_NG[..., None], "anchor": s_anchor_NG[..., None]}
    return algorithm.loss(log_probs, tokens, prepared)[0]


# %% [markdown]
# ## Where it converges
#
# With every action in the group, the loss is a cross-entropy between q and p = softmax((s -
# s_anchor) / tau). It is smallest where p = q, that is s = s_anchor + tau log q + a constant:
#
#     pi = pi_anchor * q^tau / Z
#
# So a large tau means an optimum far from the anchor, a small one an optimum close to it.


# %%
def converges_to(tau: float, *, steps: int = 3000, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """The policy that gradient descent ends with under a fixed anchor, and the formula's.

    Returns:
      [C, A] each, C = 4, A = 6.
    """
    rng = np.random.default_rng(seed)
    rewards_CA = jnp.asarray(rng.normal(size=(4, 6)), jnp.float32)
    anchor_CA = jax.nn.log_softmax(jnp.asarray(rng.normal(size=(4, 6)), jnp.float32))
    algorithm = Adpo(tau=tau, use_adaptive_tau=False)
    optimizer = optax.adam(optax.cosine_decay_schedule(0.05, steps))

    def loss(logits_CA):
        return group_loss(algorithm, jax.nn.log_softmax(logits_CA), anchor_CA, rewards_CA)

    def step(carry, _):
        logits, state = carry
        updates, state = optimizer.update(jax.grad(loss)(logits), state)
        return (optax.apply_updates(logits, updates), state), None

    start = (anchor_CA, optimizer.init(anchor_CA))
    (logits_CA, _), _ = jax.jit(lambda c: jax.lax.scan(step, c, None, length=steps))(start)
    log_q_CA = jnp.log(algorithm.score(rewards_CA).q_PG)
    formula_CA = jax.nn.softmax(anchor_CA + tau * log_q_CA)
    return np.asarray(jax.nn.softmax(logits_CA)), np.asarray(formula_CA)


# %% [markdown]
# ## The gradient
#
# dL/ds_i = (p_i - q_i) / (N tau), which `Adpo.sequence_weights` gives in closed form.


# %%
def gradients(tau: float, *, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """dL/ds by automatic differentiation and in closed form, [N, G] each, N = 5, G = 8."""
    rng = np.random.default_rng(seed)
    s_NG, anchor_NG, rewards_NG = jnp.asarray(rng.normal(size=(3, 5, 8)), jnp.float32)
    algorithm = Adpo(tau=tau, use_adaptive_tau=False)
    tokens = PaddedTokens(jnp.ones((5, 8, 1), bool))
    prepared = algorithm.prepare(rewards_NG, tokens)
    by_autodiff = jax.grad(group_loss, argnums=1)(algorithm, s_NG, anchor_NG, rewards_NG)
    return np.asarray(by_autodiff), np.asarray(
        algorithm.sequence_weights(s_NG - anchor_NG, tokens, prepared)
    )


# %% [markdown]
# ## The curvature
#
# At the anchor p is uniform, and the Hessian of one group's loss in s is (diag(p) - p p^T) / tau^2:
# every direction but the constant one has curvature 1 / (G tau^2). Small tau: a sharp loss, and a
# first step that is large by 1 / tau.


# %%
def curvature(tau: float, *, group: int = 8) -> np.ndarray:
    """The eigenvalues of the Hessian at the anchor times G tau^2, ascending: 0, then ones."""
    rewards_1G = jnp.arange(group, dtype=jnp.float32)[None]
    algorithm = Adpo(tau=tau, use_adaptive_tau=False)
    zeros = jnp.zeros(group)
    hessian = jax.hessian(lambda s: group_loss(algorithm, s[None], zeros[None], rewards_1G))(zeros)
    return np.linalg.eigvalsh(np.asarray(hessian)) * group * tau**2


# %% [markdown]
# ## A refreshed anchor against a fixed one, under noisy rewards
#
# Groups are sampled from the policy, and each reward is the action's worth plus noise. Under a
# fixed anchor the policy is pulled back to its start by the same loss that moves it; refreshed each
# iteration, each iteration's small tilt is kept and the next adds to it.


# %%
@functools.partial(jax.jit, static_argnames=("anchor", "iterations"))
def learning_curve(
    key: jax.Array, *, anchor: str, noise: float, tau: float = 0.8, iterations: int = 200
) -> jax.Array:
    """How much of the best possible worth the policy has after each iteration, [iterations].

    Args:
      anchor: "on_policy", refreshed each iteration, or "fixed".
      noise: standard deviation of what is added to a reward; worths are standard normal.
    """
    C, A, G = 32, 10, 8
    worth_key, key = jax.random.split(key)
    worth_CA = jax.random.normal(worth_key, (C, A))
    algorithm = Adpo(tau=tau, use_adaptive_tau=False)
    start_CA = jnp.zeros((C, A))

    def loss(logits_CA, anchor_CA, actions_CG, rewards_CG):
        def taken(table_CA):
            return jnp.take_along_axis(jax.nn.log_softmax(table_CA), actions_CG, 1)

        return group_loss(algorithm, taken(logits_CA), taken(anchor_CA), rewards_CG)

    def iteration(logits_CA, key):
        key, noise_key = jax.random.split(key)
        actions_CG = jax.random.categorical(key, logits_CA[:, None], shape=(C, G))
        rewards_CG = jnp.take_along_axis(worth_CA, actions_CG, 1)
        rewards_CG += noise * jax.random.normal(noise_key, (C, G))
        anchor_CA = logits_CA if anchor == "on_policy" else start_CA
        gradient_CA = jax.grad(loss)(logits_CA, anchor_CA, actions_CG, rewards_CG)
        logits_CA = logits_CA - 0.5 * C * gradient_CA
        return logits_CA, (jax.nn.softmax(logits_CA) * worth_CA).sum(1).mean()

    curve = jax.lax.scan(iteration, start_CA, jax.random.split(key, iterations))[1]
    return curve / worth_CA.max(1).mean()


# %%
def main():
    """Runs every cell and prints what came out."""
    print(
        "policy after descent against pi_anchor * q^tau, and how far it is from the anchor's start"
    )
    for tau in (0.2, 0.8, 2.0):
        policy, formula = converges_to(tau)
        print(
            f"  tau {tau}: largest difference of a probability {np.abs(policy - formula).max():.1e}"
        )
    print("gradient by autodiff against (p - q) / (N tau)")
    for tau in (0.2, 0.8):
        by_autodiff, closed = gradients(tau)
        print(f"  tau {tau}: largest difference {np.abs(by_autodiff - closed).max():.1e}")
    print("curvature at the anchor, times G tau^2")
    for tau in (0.2, 0.8):
        print(f"  tau {tau}: {np.round(curvature(tau), 4)}")
    print("share of the best possible worth after 200 iterations, mean of 8 seeds (least to most)")
    keys = jax.random.split(jax.random.key(0), 8)
    for noise in (0.0, 1.0, 3.0):
        for anchor in ("on_policy", "fixed"):
            curve = functools.partial(learning_curve, anchor=anchor, noise=noise)
            ends = np.asarray(jax.vmap(curve)(keys))[:, -1]
            row = f"{ends.mean():.2f} ({ends.min():.2f} to {ends.max():.2f})"
            print(f"  noise {noise}, {anchor}: {row}")


if __name__ == "__main__":
    main()
