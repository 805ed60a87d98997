"""Values of trees: constants once, expressions in variables at fixed sample points.

Two expressions in the same variables are taken for equal when they agree at the points: exactly
where only rational operations are involved, to 30 digits and more otherwise.
"""

import functools
import zlib
from fractions import Fraction

from adpo_jax.rewards.grading import ball, values
from adpo_jax.rewards.grading.ball import Undefined
from adpo_jax.rewards.grading.functions import TABLE
from adpo_jax.rewards.grading.parse import Tree
from adpo_jax.rewards.grading.values import Value

# Ranges of the sample points. The first are positive, where roots and logarithms are real; then
# come negative ones, which tell x from |x|.
_RANGES = ((1, 4), (0, 1), (4, 12), (1, 2), (-3, -1), (-1, 0), (-9, -4), (-2, 1))
NUM_POINTS = len(_RANGES)
_DENOMINATORS = (1009, 1013, 1019, 1021, 1031, 1033, 1039, 1049)  # primes

_BINARY = {
    "add": values.add,
    "mul": values.mul,
    "div": values.div,
    "pow": values.power,
}


def evaluate(tree: Tree, point: int = 0) -> Value:
    """The value of a scalar tree, its variables standing at one of the sample points.

    Raises:
      Undefined: there is no value, or the tree is no scalar.
    """
    kind = tree[0]
    if kind == "num":
        return tree[1]
    if kind == "sym":
        return sample(tree[1], point)
    if kind == "const":
        return _constant(tree[1])
    if kind in _BINARY:
        return _BINARY[kind](evaluate(tree[1], point), evaluate(tree[2], point))
    if kind == "neg":
        return values.neg(evaluate(tree[1], point))
    if kind == "call":
        return TABLE[tree[1]].value(*(evaluate(t, point) for t in tree[2:]))
    if kind == "percent":
        return values.div(evaluate(tree[1], point), Fraction(100))
    if kind == "degree":
        return values.mul(evaluate(tree[1], point), values.div(values.pi(), Fraction(180)))
    raise Undefined(f"no value of a {kind}")


@functools.cache
def _constant(name: str) -> Value:
    if name == "pi":
        return values.pi()
    return values.exp(Fraction(1)) if name == "e" else ball.imaginary_unit()


@functools.lru_cache(4096)
def sample(name: str, point: int) -> Fraction:
    """Where a variable stands at a sample point: a rational fixed by its name."""
    low, high = _RANGES[point]
    denominator = _DENOMINATORS[point]
    offset = zlib.crc32(f"{name} {point}".encode("utf-8", "replace"))
    return low + Fraction(offset % ((high - low) * denominator - 1) + 1, denominator)


def symbols(tree: Tree) -> frozenset[str]:
    """The variables of a tree."""
    found: set[str] = set()
    left = [tree]
    while left:
        tree = left.pop()
        if tree[0] == "sym":
            found.add(tree[1])
        elif tree[0] != "num":
            left.extend(children(tree))
    return frozenset(found)


def mentions(tree: Tree, *heads: tuple) -> bool:
    """Whether a node that starts like one of the heads occurs in the tree."""
    left = [tree]
    while left:
        tree = left.pop()
        for head in heads:
            if tree[: len(head)] == head:
                return True
        if tree[0] not in ("num", "sym"):
            left.extend(children(tree))
    return False


def children(tree: Tree) -> list[Tree]:
    if tree[0] == "matrix":
        return [t for row in tree[1] for t in row]
    found = []
    for part in tree[1:]:
        if isinstance(part, tuple) and part:
            if isinstance(part[0], tuple):
                found.extend(part)
            elif tree[0] != "rel" or part is not tree[1]:
                found.append(part)
    return found


def with_sign(tree: Tree, sign: int) -> Tree:
    """The tree with every plus-minus sign read as the given one, every minus-plus as the other."""
    if tree[0] in ("pm", "mp"):
        left, right = with_sign(tree[1], sign), with_sign(tree[2], sign)
        plus = (sign > 0) == (tree[0] == "pm")
        return ("add", left, right if plus else ("neg", right))
    if tree[0] in ("num", "sym", "const", "inf", "reals"):
        return tree
    return tuple(_with_sign_in(part, sign) for part in tree)


def _with_sign_in(part, sign: int):
    if not isinstance(part, tuple) or not part:
        return part
    if isinstance(part[0], tuple):
        return tuple(_with_sign_in(p, sign) for p in part)
    return with_sign(part, sign) if not _is_operators(part) else part


def _is_operators(part: tuple) -> bool:
    return all(p in ("=", "<", ">", "<=", ">=", "!=", "in", "~") for p in part)


def exact(tree: Tree) -> Fraction | None:
    """The value of a constant where it is rational and within the limits, else None."""
    if tree[0] == "num":
        return tree[1]
    value = None if symbols(tree) else value_or_none(tree)
    return value if isinstance(value, Fraction) else None


def value_or_none(tree: Tree, point: int = 0) -> Value | None:
    """As evaluate, with None where there is no value."""
    try:
        return evaluate(tree, point)
    except Undefined:
        return None
