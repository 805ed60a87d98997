"""Rows travel to the experts of other devices and back, along the axis `expert` of a mesh.

Each device sends the others the rows that chose their experts, in one exchange with places for
somewhat more rows than an even choice of experts needs. Where the choice is less even, the rows
that found no place stay where they are, and the weights come to them: those of each device that had
too few places go to all others, one device after the other, and every device multiplies its own
rows. So whatever the routers choose, a device multiplies at most `ROOM` times an even share of rows
for others and, of its own, those that were left; no row is dropped, and memory stays the same.

Letters: S rows of a device, a pair of a token and an expert each; E experts, X devices along
`expert`, C places of an exchange for each of them, D model width.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from adpo_jax.model import grouped

# The places of an exchange, over those that an even choice of experts needs.
ROOM = 1.25


class Exchange(NamedTuple):
    """Where the rows of a device go, which are sorted by expert.

    Attributes:
      ids_S: int32, the expert of each row among those of its device.
      device_S: int32; X where the row has no expert.
      first_X: int32, the first row of each device.
      rows_X: int32, the rows of each device.
    """

    ids_S: jax.Array
    device_S: jax.Array
    first_X: jax.Array
    rows_X: jax.Array

    @classmethod
    def of(cls, sizes_E: jax.Array, num_rows: int, num_parts: int) -> "Exchange":
        """That of rows of which each expert has so many."""
        per_device = len(sizes_E) // num_parts
        ends_E = jnp.cumsum(sizes_E)
        expert_S = jnp.searchsorted(ends_E, jnp.arange(num_rows), side="right").astype(jnp.int32)
        rows_X = sizes_E.reshape(num_parts, -1).sum(1)
        first_X = jnp.cumsum(rows_X) - rows_X
        return cls(expert_S % per_device, expert_S // per_device, first_X, rows_X)

    @property
    def places(self) -> int:
        """C."""
        (S,), X = self.ids_S.shape, len(self.rows_X)
        return -(-math.ceil(ROOM * S / X) // 8) * 8

    def sent(self) -> tuple[jax.Array, jax.Array]:
        """(the row in each of the X C places, the place of each row), -1 for none."""
        (S,), X, C = self.ids_S.shape, len(self.rows_X), self.places
        at_C, first_X1, rows_X1 = jnp.arange(C), self.first_X[:, None], self.rows_X[:, None]
        row = jnp.where(at_C < rows_X1, first_X1 + at_C, -1)
        device = jnp.minimum(self.device_S, X - 1)
        at_S = jnp.arange(S) - self.first_X[device]
        return row.reshape(-1), jnp.where((self.device_S < X) & (at_S < C), device * C + at_S, -1)

    def left(self, device: jax.Array, part: jax.Array) -> tuple[jax.Array, jax.Array]:
        """`sent` of the rows that found no place, C at a time.

        Args:
          device: the one whose experts they chose.
          part: the number of these C rows.
        """
        C = self.places
        first = self.first_X[device] + (1 + part) * C
        end = self.first_X[device] + self.rows_X[device]
        at_C, at_S = first + jnp.arange(C), jnp.arange(len(self.ids_S)) - first
        is_here = (at_S >= 0) & (at_S < C) & (self.device_S == device)
        return jnp.where(at_C < end, at_C, -1), jnp.where(is_here, at_S, -1)

    def parts_left(self, device: jax.Array) -> jax.Array:
        """The number of times that `left` gives rows."""
        return jnp.maximum(-(-self.rows_X[device] // self.places) - 1, 0)

    def ids(self, row: jax.Array, none: int) -> jax.Array:
        """The experts of rows, `none` for -1."""
        return jnp.where(row < 0, none, self.ids_S[jnp.maximum(row, 0)])


def _through_others(experts, exchange: Exchange, params, rows, weights_S1, likes):
    """What the experts of all devices make of the rows that found a place, and 0 for others."""
    row, place = exchange.sent()
    per_device = params["experts_gate"].shape[0]

    def travel(x):
        return jax.lax.all_to_all(x, experts.expert, split_axis=0, concat_axis=0, tiled=True)

    ids = travel(exchange.ids(row, per_device))
    came, came_weights = (travel(grouped.moved(1, x, row, place)) for x in (rows, weights_S1))
    to, back, sizes = grouped.sorted_by(ids, per_device)
    came, came_weights = (grouped.moved(1, x, to, back) for x in (came, came_weights))
    y = experts.apply_rows(params, likes, came, came_weights, sizes)
    return grouped.moved(1, travel(grouped.moved(1, y, back, to)), place, row)


def _through_own(experts, exchange: Exchange, device, part, params, rows, weights_S1, likes):
    """What a device's experts make here of some rows that found no place there, 0 for others."""
    row, place = exchange.left(device, part)
    per_device = params["experts_gate"].shape[0]
    ids = exchange.ids(row, per_device)
    sizes = jnp.sum(ids[:, None] == jnp.arange(per_device), axis=0, dtype=jnp.int32)
    kept, kept_weights = (grouped.moved(1, x, row, place) for x in (rows, weights_S1))
    y = experts.apply_rows(params, likes, kept, kept_weights, sizes)
    return grouped.moved(1, y, place, row)


def _with_those_left(experts, exchange: Exchange, params, sums, device_term: Callable) -> Any:
    """The sums, with `device_term(device, params)` added for each device with too few places."""

    @jax.jit
    def of_rows_left(sums):  # `devices/flops.py` knows the name
        is_full_X = (exchange.rows_X > exchange.places).astype(jnp.int32)
        # All devices of the mesh turn as often, since they talk to each other in every turn.
        is_full_X = jax.lax.pmax(is_full_X, experts.everywhere)
        order_X, here = jnp.argsort(-is_full_X), jax.lax.axis_index(experts.expert)

        def one(i, sums):
            device = order_X[i]
            theirs = jax.tree.map(
                lambda p: jax.lax.psum(
                    jnp.where(here == device, p, jnp.zeros_like(p)), experts.expert
                ),
                params,
            )
            return jax.tree.map(jnp.add, sums, device_term(device, theirs))

        return jax.lax.fori_loop(0, jnp.sum(is_full_X), one, sums)

    return of_rows_left(sums)


def _sum_of_parts(exchange: Exchange, device, zeros, part_term: Callable) -> Any:
    """The sum of `part_term(part)` over the parts that a device left here."""
    return jax.lax.fori_loop(
        0,
        exchange.parts_left(device),
        lambda part, sums: jax.tree.map(jnp.add, sums, part_term(part)),
        zeros,
    )


def _whole(experts, params, dtype):
    gathers = dict(experts.gathers)
    return {name: grouped.whole(gathers.get(name), p, dtype) for name, p in params.items()}


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def exchanged(experts, rows, weights_S1, params, sizes_E):
    """Rows sorted by expert through the experts of all devices along `expert`, weighted.

    The backward pass runs the experts again.

    Args:
      experts: `mixture._Experts`.
      rows: [S, D].
      weights_S1: [S, 1] float32.
      params: those of the experts of this device.
      sizes_E: [E] int32, the rows of each expert.
    """
    exchange = Exchange.of(sizes_E, len(rows), experts.num_parts)
    params = _whole(experts, params, rows.dtype)
    # Without a gather in the products: the parts are gathered once for all rows.
    alone = dataclasses.replace(experts, gathers=())

    def device_term(device, theirs):
        def part_term(part):
            return _through_own(alone, exchange, device, part, theirs, rows, weights_S1, None)

        return _sum_of_parts(exchange, device, jnp.zeros_like(rows), part_term)

    y = _through_others(alone, exchange, params, rows, weights_S1, None)
    return _with_those_left(experts, exchange, params, y, device_term)


def _exchanged_backward(experts, residuals, g):
    rows, weights_S1, params, sizes_E = residuals
    exchange = Exchange.of(sizes_E, len(rows), experts.num_parts)
    whole = _whole(experts, params, rows.dtype)
    likes = {name: jnp.zeros(p.shape, jnp.float32) for name, p in whole.items()}
    here = jax.lax.axis_index(experts.expert)

    def gradient(forward):
        return jax.vjp(forward, rows, weights_S1, likes)[1](g)

    def device_term(device, theirs):
        def part_term(part):
            return gradient(
                lambda *args: _through_own(experts, exchange, device, part, theirs, *args)
            )

        zeros = jnp.zeros_like(rows), jnp.zeros_like(weights_S1), likes
        d_rows, d_weights, d_theirs = _sum_of_parts(exchange, device, zeros, part_term)
        d_theirs = jax.lax.psum(d_theirs, experts.expert)
        return d_rows, d_weights, jax.tree.map(lambda d: jnp.where(here == device, d, 0), d_theirs)

    sums = gradient(lambda *args: _through_others(experts, exchange, whole, *args))
    d_rows, d_weights, d_params = _with_those_left(experts, exchange, whole, sums, device_term)
    gathers = dict(experts.gathers)
    d_params = {
        name: grouped.parts(gathers.get(name), d).astype(params[name].dtype)
        for name, d in d_params.items()
    }
    return d_rows, d_weights, d_params, None


exchanged.defvjp(
    lambda experts, *args: (exchanged(experts, *args), args),
    _exchanged_backward,
)
