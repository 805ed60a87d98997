"""AdamW with warm-up, a schedule, a clip by global norm, and no decay of norms and biases."""

import jax
import optax

from adpo_jax.model import parameters

SCHEDULES = ("constant", "cosine", "linear")


def make_schedule(
    lr: float, *, warmup_steps: int, total_steps: int, kind: str, min_lr_ratio: float = 0.0
) -> optax.Schedule:
    """Learning rate by optimizer step: linear warm-up from 0, then `kind` down to the floor.

    Args:
      lr: peak learning rate.
      warmup_steps: optimizer steps until the peak; 0 starts at the peak.
      total_steps: optimizer steps of the whole run.
      kind: "constant", "cosine" or "linear".
      min_lr_ratio: the floor of cosine and linear, as a fraction of `lr`.

    Raises:
      ValueError: for an unknown kind, or a warm-up longer than the run.
    """
    if kind not in SCHEDULES:
        raise ValueError(f"lr_scheduler_type is one of {SCHEDULES}, given {kind!r}")
    if not 0 <= warmup_steps <= total_steps:
        raise ValueError(
            f"the learning rate warms up over {warmup_steps} steps, but there are {total_steps} "
            "optimizer steps; lower warmup_steps"
        )
    rest = max(total_steps - warmup_steps, 1)
    after = {
        "constant": lambda: optax.constant_schedule(lr),
        "cosine": lambda: optax.cosine_decay_schedule(lr, rest, alpha=min_lr_ratio),
        "linear": lambda: optax.linear_schedule(lr, lr * min_lr_ratio, rest),
    }[kind]()
    if not warmup_steps:
        return after
    # The first step already moves: step k of the warm-up has the rate lr (k + 1) / warmup_steps.
    warmup = optax.linear_schedule(lr / warmup_steps, lr, max(warmup_steps - 1, 1))
    return optax.join_schedules([warmup, after], [warmup_steps])


def make_optimizer(
    schedule: optax.Schedule,
    *,
    weight_decay: float,
    grad_clip: float,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    mu_dtype: str = "float32",
) -> optax.GradientTransformation:
    """AdamW (Loshchilov and Hutter 2019, arXiv 1711.05101) after a clip by global norm.

    Args:
      schedule: learning rate by optimizer step.
      grad_clip: largest global norm of the gradient; 0 turns the clip off.
      mu_dtype: dtype of the first moment, "float32" or "bfloat16". (The second moment stays
        float32: a step of 1 - b2 = 0.001 is lost in bfloat16's 8 bits.)

    Raises:
      ValueError: for another dtype.
    """
    if mu_dtype not in ("float32", "bfloat16"):
        raise ValueError(f"mu_dtype is float32 or bfloat16, given {mu_dtype!r}")

    def decay_mask(params):
        return jax.tree_util.tree_map_with_path(
            lambda path, _: parameters.at(tuple(key.key for key in path)).decays, params
        )

    adamw = optax.adamw(
        schedule,
        b1=b1,
        b2=b2,
        eps=eps,
        weight_decay=weight_decay,
        mask=decay_mask,
        mu_dtype=mu_dtype,
    )
    clip = optax.clip_by_global_norm(grad_clip) if grad_clip else optax.identity()
    return optax.chain(clip, adamw)


def steps_taken(opt_state) -> int:
    """Optimizer steps that this state has taken, without skipped ones; 0 where it has no count."""
    counts = optax.tree.get_all_with_path(opt_state, "count")
    return max((int(count) for _, count in counts), default=0)
