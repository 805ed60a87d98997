"""Counts the arithmetic of a program before it is compiled and cut up over devices."""

import math
from typing import NamedTuple

import jax
from jax.extend import core
from jax.interpreters import partial_eval

# Jitted functions of `model.grouped`, and of `model.mixture`: what only an uneven choice of experts
# makes it do.
GROUPED_PRODUCTS = ("grouped_product", "grouped_outer")
OF_ROWS_LEFT = "of_rows_left"
# Kernels without products.
SMALL_KERNELS = ("norm_rope", "norm_rope_gradient", "head_sums", "gated_gradient")


def traced_flops(traced: jax.stages.Traced, unknown_turns: int = 1, of_experts: bool = True) -> int:
    """Floating-point operations of the matrix products of a program, all devices together.

    Operations that a backward pass recomputes are included; those that no result depends on are
    not. The body of a loop counts as often as it runs (XLA's cost analysis counts it once). Of a
    choice the dearest branch counts. A mixture counts the experts that are chosen; where they
    are on several devices, an exchange counts its room for them. A hand-written kernel counts by
    its cost estimate, or not at all if it has none. The body of a `shard_map` counts once for each
    part that the mesh cuts its arrays into, and not for further devices that have the same part.

    Args:
      traced: the result of `jitted.trace(*args)` with arrays or their shapes.
      unknown_turns: the turns of a loop whose end is decided while it runs.
      of_experts: whether the products of experts count.
    """
    jaxpr = traced.jaxpr.jaxpr
    used, _ = partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))
    return _flops(used, _Counting(unknown_turns, of_experts))


class _Counting(NamedTuple):
    """What counts, as in `traced_flops`."""

    unknown_turns: int
    of_experts: bool


def has_kernels(traced: jax.stages.Traced) -> bool:
    """Whether a program calls hand-written kernels of attention, whose operations XLA does not see.

    Those of `GROUPED_PRODUCTS` are one form among others, and there whatever the platform is.
    `SMALL_KERNELS` do not count.
    """
    return _any_kernel(traced.jaxpr.jaxpr)


def has_exchange(traced: jax.stages.Traced) -> bool:
    """Whether rows travel to the experts of other devices, with room for an uneven choice."""

    def any_exchange(jaxpr) -> bool:
        return any(
            eqn.params.get("name") == OF_ROWS_LEFT
            or any(any_exchange(sub) for value in eqn.params.values() for sub in _jaxprs(value))
            for eqn in jaxpr.eqns
        )

    return any_exchange(traced.jaxpr.jaxpr)


def _any_kernel(jaxpr) -> bool:
    return any(
        eqn.primitive.name == "pallas_call"
        or any(_any_kernel(sub) for value in eqn.params.values() for sub in _jaxprs(value))
        for eqn in jaxpr.eqns
        if eqn.params.get("name") not in (*GROUPED_PRODUCTS, *SMALL_KERNELS)
    )


def _flops(jaxpr, counting: _Counting) -> int:
    return sum(_equation_flops(eqn, counting) for eqn in jaxpr.eqns)


def _equation_flops(eqn, counting: _Counting) -> int:
    name, params = eqn.primitive.name, eqn.params
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        lhs = eqn.invars[0].aval.shape
        return 2 * math.prod(eqn.outvars[0].aval.shape) * math.prod(lhs[i] for i in contracted)
    # Differentiation may set numbers apart that such a product has without its rows and matrices.
    is_product = params.get("name") in GROUPED_PRODUCTS and len(eqn.invars) > 2
    if name == "ragged_dot_general" or is_product:
        return _grouped_flops(eqn) if counting.of_experts else 0
    if params.get("name") == OF_ROWS_LEFT:
        return 0
    if name == "pallas_call":
        estimate = params.get("cost_estimate")
        return int(estimate.flops) if estimate else 0
    inner = [_flops(sub, counting) for value in params.values() for sub in _jaxprs(value)]
    if name == "cond":
        return max(inner)
    if name == "scan":
        return sum(inner) * params["length"]
    if name == "while":
        return sum(inner) * counting.unknown_turns
    if name == "shard_map":
        return sum(inner) * _num_parts(params)
    return sum(inner)


def _grouped_flops(eqn) -> int:
    """A product of rows with the matrices of their groups counts one matrix a row."""
    rows, other = (x.aval.shape for x in eqn.invars[:2])
    return 2 * math.prod(rows) * other[-1]


def _num_parts(params) -> int:
    """The number of parts that the arrays of a `shard_map` are cut into."""
    specs = jax.tree.leaves((params["in_specs"], params["out_specs"]))
    axes = {name for spec in specs for name in jax.tree.leaves(tuple(spec))}
    return math.prod(params["mesh"].shape[axis] for axis in axes)


def _jaxprs(value):
    """The programs in a parameter of an equation."""
    if isinstance(value, core.ClosedJaxpr):
        yield value.jaxpr
    elif isinstance(value, core.Jaxpr):
        yield value
    elif isinstance(value, tuple | list):
        for item in value:
            yield from _jaxprs(item)
