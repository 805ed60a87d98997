"""Sets of real numbers: intervals, points, unions and what inequalities describe.

A set is kept as disjoint intervals in order, so `(0,1) \\cup (1,3)` and `(0,3) \\setminus \\{1\\}`
are the same and `(0,3)` is not.
"""

from fractions import Fraction
from typing import NamedTuple

from adpo_jax.rewards.grading import values
from adpo_jax.rewards.grading.ball import Undefined
from adpo_jax.rewards.grading.evaluate import evaluate, symbols
from adpo_jax.rewards.grading.parse import Tree
from adpo_jax.rewards.grading.values import Value


class End(NamedTuple):
    """A cut of the real line, just before (side 0) or just after (side 1) a number.

    infinity is -1 or 1 for the ends of the line, where value and side do not matter.
    """

    infinity: int
    value: Value = Fraction(0)
    side: int = 0


Intervals = list[tuple[End, End]]
_LINE: Intervals = [(End(-1), End(1))]


def to_intervals(tree: Tree) -> Intervals | None:
    """The set that a tree describes; None if it describes none.

    Raises:
      Undefined: an endpoint has no real value.
    """
    kind = tree[0]
    if kind == "reals":
        return _LINE
    if kind == "tuple" and len(tree[3]) == 2:
        low, high = (_end(t) for t in tree[3])
        if (low.infinity and tree[1] == "[") or (high.infinity and tree[2] == "]"):
            return None
        low = low._replace(side=int(tree[1] == "("))
        high = high._replace(side=int(tree[2] == "]"))
        return [(low, high)] if _order(low, high) < 0 else None
    if kind == "set":
        return _union([_point(t) for t in tree[1]])
    if kind in ("union", "intersection", "setminus"):
        left, right = to_intervals(tree[1]), to_intervals(tree[2])
        if left is None or right is None:
            return None
        if kind == "union":
            return _union(left + right)
        return _intersection(left, right if kind == "intersection" else _complement(right))
    if kind == "or":
        parts = [to_intervals(t) for t in tree[1]]
        if None in parts or not _all_relations(tree[1]):
            return None
        return _union([interval for part in parts for interval in part])
    if kind == "list" and _all_relations(tree[1]):
        result = _LINE
        for part in tree[1]:
            intervals = to_intervals(part)
            if intervals is None:
                return None
            result = _intersection(result, intervals)
        return result
    return _from_relation(tree) if kind == "rel" else None


def same(a: Intervals, b: Intervals) -> bool:
    return len(a) == len(b) and all(_order(x, y) == 0 for p, q in zip(a, b) for x, y in zip(p, q))


def is_set(tree: Tree) -> bool:
    """Whether a tree is written as a set of reals and cannot be anything else."""
    if tree[0] in ("union", "intersection", "setminus", "reals"):
        return True
    if tree[0] == "tuple" and len(tree[3]) == 2:
        return (tree[1] == "(") != (tree[2] == ")") or any(
            t in (("inf",), ("neg", ("inf",)), ("add", ("inf",))) for t in tree[3]
        )
    if tree[0] == "rel":
        return any(op != "=" for op in tree[1])
    return tree[0] in ("or", "list") and _all_relations(tree[1])


def _all_relations(items: tuple) -> bool:
    return all(t[0] == "rel" and any(op not in ("=", "~") for op in t[1]) for t in items)


def _from_relation(tree: Tree) -> Intervals | None:
    operators, sides = tree[1], tree[2]
    variables = [s for s in sides if s[0] == "sym"]
    if len(variables) != 1 or any(symbols(s) for s in sides if s[0] != "sym"):
        return None
    at = sides.index(variables[0])
    if operators == ("in",):
        return to_intervals(sides[1]) if at == 0 else None
    result = _LINE
    for i, operator in enumerate(operators):
        if i not in (at - 1, at):
            return None  # a bound that is not on the variable
        bound = sides[i + 1] if i == at else sides[i]
        intervals = _bounded_by(operator, _end(bound), variable_is_left=i == at)
        if intervals is None:
            return None
        result = _intersection(result, intervals)
    return result


def _bounded_by(operator: str, bound: End, variable_is_left: bool) -> Intervals | None:
    before, after = bound._replace(side=0), bound._replace(side=1)
    if operator in ("=", "!="):
        point = [(before, after)]
        return point if operator == "=" else _complement(point)
    if operator not in ("<", "<=", ">", ">="):
        return None
    if (operator[0] == "<") == variable_is_left:
        return [(End(-1), after if operator[1:] else before)]
    return [(before if operator[1:] else after, End(1))]


def _end(tree: Tree) -> End:
    if tree == ("inf",):
        return End(1)
    if tree == ("neg", ("inf",)):
        return End(-1)
    if symbols(tree):
        raise Undefined("an endpoint in variables")
    value = evaluate(tree)
    if not values.is_real(value):
        raise Undefined("an endpoint that is not real")
    return End(0, value)


def _point(tree: Tree) -> tuple[End, End]:
    end = _end(tree)
    return end._replace(side=0), end._replace(side=1)


def _order(a: End, b: End) -> int:
    if a.infinity or b.infinity:
        return (a.infinity > b.infinity) - (a.infinity < b.infinity)
    return values.order(a.value, b.value) or (a.side > b.side) - (a.side < b.side)


def _union(intervals: Intervals) -> Intervals:
    merged: Intervals = []
    for low, high in _sorted(intervals):
        if merged and _order(low, merged[-1][1]) <= 0:
            if _order(high, merged[-1][1]) > 0:
                merged[-1] = (merged[-1][0], high)
        else:
            merged.append((low, high))
    return merged


def _sorted(intervals: Intervals) -> Intervals:
    result: Intervals = []
    for interval in intervals:
        at = len(result)
        while at and _order(interval[0], result[at - 1][0]) < 0:
            at -= 1
        result.insert(at, interval)
    return result


def _complement(intervals: Intervals) -> Intervals:
    gaps, low = [], End(-1)
    for start, end in intervals:
        if _order(low, start) < 0:
            gaps.append((low, start))
        low = end
    if _order(low, End(1)) < 0:
        gaps.append((low, End(1)))
    return gaps


def _intersection(a: Intervals, b: Intervals) -> Intervals:
    return _complement(_union(_complement(a) + _complement(b)))
