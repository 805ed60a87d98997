"""Whether two trees are the same answer: scalars by value, everything else part by part."""

from fractions import Fraction
from math import gcd

from adpo_jax.rewards.grading import realset, values
from adpo_jax.rewards.grading.ball import Undefined
from adpo_jax.rewards.grading.equality import equal_scalars
from adpo_jax.rewards.grading.evaluate import (
    NUM_POINTS,
    evaluate,
    mentions,
    symbols,
    with_sign,
)
from adpo_jax.rewards.grading.parse import SCALARS, Tree

_FUNCTION_NAMES = set("fghFGHPQpqrTV")
_FLIPPED = {"<": ">", ">": "<", "<=": ">=", ">=": "<=", "=": "=", "!=": "!="}


def same_tree(a: Tree, b: Tree) -> bool:
    """Whether the answer a is the reference b.

    Raises:
      Undefined: a part of them has no value.
    """
    if a == b:
        return True
    a, b = _settled(a), _settled(b)
    if a[0] == "rel" and b[0] != "rel":
        a = _assigned(a) or a
    elif b[0] == "rel" and a[0] != "rel":
        b = _assigned(b) or b
    a, b = _multiplied_out(a), _multiplied_out(b)
    if (realset.is_set(a) or realset.is_set(b)) and _same_variables(a, b):
        same = _same_intervals(a, b)
        if same is not None:
            return same
    if a[0] == "list" and b[0] == "set" and len(b[1]) == 1 and _is_point(b[1][0]):
        b = b[1][0]  # the one solution of a system, as a set
    if _is_point(b):
        a = _as_point(a)
    elif _is_point(a):
        b = _as_point(b)
    left, right = _collected(a), _collected(b)
    if left is not None and right is not None:
        if a[0] == "or" and b[0] != "or" and all(_is_choice(t) for t in right):
            return False  # B or C is one of them
        if _named_apart(left) != _named_apart(right):
            return False
        return _same_collections(left, right, as_sets="set" in (a[0], b[0]))
    if left is not None or right is not None:
        if a[0] == "set" and len(left) == 1:
            return same_tree(left[0], b)
        return b[0] == "set" and len(right) == 1 and same_tree(a, right[0])
    if a[0] != b[0] and {a[0], b[0]} & {"tuple", "ratio", "matrix", "rel", "reals"}:
        return False
    if a[0] == "tuple":
        return a[1:3] == b[1:3] and _same_items(a[3], b[3])
    if a[0] == "ratio":
        return _same_ratios(a[1], b[1])
    if a[0] == "matrix":
        return len(a[1]) == len(b[1]) and all(_same_items(r, s) for r, s in zip(a[1], b[1]))
    if a[0] == "rel":
        return _same_relations(a, b)
    return equal_scalars(a, b)


def _same_ratios(a: tuple, b: tuple) -> bool:
    """Whether 4:6 is 2:3: the parts of one are those of the other times one number."""
    if len(a) != len(b):
        return False
    if _same_items(a, b):
        return True
    if _is_time(b) or any(t[0] not in SCALARS for t in a + b):
        return False
    zero = ("num", Fraction(0))
    if same_tree(a[0], zero) or same_tree(b[0], zero):
        return False
    return all(same_tree(("mul", x, b[0]), ("mul", a[0], y)) for x, y in zip(a[1:], b[1:]))


def _is_time(parts: tuple) -> bool:
    """Whether parts can be the hour and minutes of a time, and no reduced ratio: 3:30, not 3:10."""
    numbers = [t[1] for t in parts if t[0] == "num" and t[1].denominator == 1]
    if len(numbers) < len(parts) or not 2 <= len(parts) <= 3:
        return False
    hour, *rest = (n.numerator for n in numbers)
    return 0 <= hour <= 24 and all(10 <= n < 60 for n in rest) and gcd(hour, *rest) > 1


def _same_items(a: tuple, b: tuple) -> bool:
    return len(a) == len(b) and all(same_tree(x, y) for x, y in zip(a, b))


def _same_variables(a: Tree, b: Tree) -> bool:
    return not symbols(a) or not symbols(b) or symbols(a) == symbols(b)


def _same_intervals(a: Tree, b: Tree) -> bool | None:
    """Whether two sets of reals are the same; None where an end of one cannot be placed."""
    try:
        left, right = realset.to_intervals(a), realset.to_intervals(b)
        return None if left is None or right is None else realset.same(left, right)
    except Undefined:
        return None


# Matrices and vectors


def _multiplied_out(tree: Tree) -> Tree:
    """A matrix or vector in one piece, where numbers multiply or divide it and sums join it."""
    if tree[0] not in ("mul", "div", "neg", "add", "pow"):
        return tree
    parts = tuple(_multiplied_out(t) for t in tree[1:])
    kinds = tuple(_is_matrix(t) for t in parts)
    if tree[0] == "neg" and kinds[0]:
        return _each(parts[0], lambda t: ("neg", t))
    if tree[0] == "mul" and kinds in ((True, False), (False, True)):
        scalar, matrix = parts if kinds[1] else parts[::-1]
        return _each(matrix, lambda t: ("mul", scalar, t)) if scalar[0] in SCALARS else tree
    if tree[0] == "div" and kinds == (True, False):
        return _each(parts[0], lambda t: ("div", t, parts[1])) if parts[1][0] in SCALARS else tree
    if tree[0] == "add" and kinds == (True, True):
        return _joined(*parts) or tree
    if tree[0] == "pow" and kinds == (True, False) and parts[1] == ("sym", "T"):
        rows = parts[0][1] if parts[0][0] == "matrix" else (parts[0][3],)
        return ("matrix", tuple(zip(*rows)))
    return tree


def _is_matrix(tree: Tree) -> bool:
    return tree[0] == "matrix" or (_is_point(tree) and all(t[0] in SCALARS for t in tree[3]))


def _each(matrix: Tree, change) -> Tree:
    if matrix[0] == "matrix":
        return ("matrix", tuple(tuple(change(t) for t in row) for row in matrix[1]))
    return (*matrix[:3], tuple(change(t) for t in matrix[3]))


def _joined(a: Tree, b: Tree) -> Tree | None:
    if a[0] != b[0]:
        return None
    if a[0] == "tuple":
        return (*a[:3], _sums(a[3], b[3])) if len(a[3]) == len(b[3]) else None
    if [len(row) for row in a[1]] != [len(row) for row in b[1]]:
        return None
    return ("matrix", tuple(_sums(r, s) for r, s in zip(a[1], b[1])))


def _sums(a: tuple, b: tuple) -> tuple:
    return tuple(("add", x, y) for x, y in zip(a, b))


# Lists and sets


def _collected(tree: Tree) -> list[Tree] | None:
    """The members of a list, a set, or of an expression with a plus-minus sign; else None."""
    if tree[0] in ("list", "or", "set"):
        members = [m for t in tree[1] for m in _both_signs(t)]
        return _without_assignments(members)
    members = _both_signs(tree)
    return _without_assignments(members) if len(members) > 1 else None


def _is_point(tree: Tree) -> bool:
    return tree[0] == "tuple" and tree[1:3] == ("(", ")")


def _as_point(tree: Tree) -> Tree:
    """x = 2, y = -1 as (2, -1), by the names in the order of the alphabet."""
    if tree[0] not in ("list", "set"):
        return tree
    values_of = {}
    for part in tree[1]:
        if part[0] != "rel" or part[1] != ("=",) or part[2][0][0] != "sym":
            return tree
        values_of[part[2][0][1].lstrip("\\")] = part[2][1]
    if len(values_of) < len(tree[1]):
        return tree
    return ("tuple", "(", ")", tuple(values_of[name] for name in sorted(values_of)))


def _is_choice(tree: Tree) -> bool:
    return tree[0] == "sym" and len(tree[1]) == 1 and "A" <= tree[1] <= "J"


def _both_signs(tree: Tree) -> list[Tree]:
    if mentions(tree, ("pm",), ("mp",)):
        return [with_sign(tree, 1), with_sign(tree, -1)]
    return [tree]


def _without_assignments(members: list[Tree]) -> list[Tree]:
    """x = 3, x = 7 as 3, 7, and so x_1 = 3, x_2 = 7; x = 3, y = 4 stay as they are."""
    if not members:
        return members
    names = {_unnumbered(m[2][0]) if m[0] == "rel" and m[1] == ("=",) else None for m in members}
    if len(names) != 1 or None in names:
        # "x = 3, 7" names the variable once.
        first, *rest = members
        if len(names) == 2 and all(m[0] != "rel" for m in rest):
            return [_assigned(_settled(first)) or first, *rest]
        return members
    return [_assigned(m) or m for m in members]


def _named_apart(members: list[Tree]) -> bool:
    """Whether they give values to different variables, which no bare list of values does."""
    return len(members) > 1 and all(m[0] == "rel" for m in members)


def _unnumbered(name: Tree) -> Tree:
    return ("sym", name[1].split("_")[0]) if name[0] == "sym" else name


def _same_collections(a: list[Tree], b: list[Tree], *, as_sets: bool) -> bool:
    """Equality whatever the order; of sets also whatever the repetitions."""
    if as_sets:
        return all(any(_same_or_undefined(x, y) for y in b) for x in a) and all(
            any(_same_or_undefined(x, y) for x in a) for y in b
        )
    if len(a) != len(b):
        return False
    left = list(b)
    for x in a:
        match = next((i for i, y in enumerate(left) if _same_or_undefined(x, y)), None)
        if match is None:
            return False
        del left[match]
    return True


def _same_or_undefined(a: Tree, b: Tree) -> bool:
    try:
        return same_tree(a, b)
    except Undefined:
        return False


# Equations and inequalities


def _settled(tree: Tree) -> Tree:
    """A chain of equations reduced to what it says: `x = 3 + 4 = 7` to `x = 7`, `3 + 4 = 7` to 7.

    A chain whose sides differ stays as it is, and equals nothing but itself; so does one that says
    nothing, as `1 = 1`.
    """
    if tree[0] != "rel" or any(op not in ("=", "~") for op in tree[1]):
        return tree
    operators, sides = tree[1], tree[2]
    if _is_name(sides[0]) and len(sides) > 1:
        if operators[0] == "~" and not _is_decimal(sides[1]):
            return tree
        name, sides, operators = sides[0], sides[1:], operators[1:]
    elif len(sides) == 2 and _is_name(sides[1]) and not symbols(sides[0]):
        name, sides, operators = sides[1], sides[:1], ()
    else:
        name = None
        if any(symbols(s) for s in sides) or all(_is_written_number(s) for s in sides):
            return tree
    for operator, x, y in zip(operators, sides, sides[1:]):
        if symbols(x) or symbols(y):
            if operator == "~" or not equal_scalars(x, y):
                return tree
        elif not (equal_scalars(x, y) or (operator == "~" and _close(x, y))):
            return tree
    return sides[0] if name is None else ("rel", ("=",), (name, sides[0]))


def _is_written_number(tree: Tree) -> bool:
    return tree[0] == "num" or (tree[0] == "neg" and _is_written_number(tree[1]))


def _is_decimal(tree: Tree) -> bool:
    """Whether it is a number that rounding can have given: 3.14 may be approximate, 18 may not."""
    tree = tree[1] if tree[0] == "neg" else tree
    return tree[0] == "num" and tree[1].denominator > 1


def _close(x: Tree, y: Tree) -> bool:
    """Whether y may stand after an "approximately equal" sign: within half a percent of x."""
    exact = evaluate(x)
    error = values.absolute(values.sub(exact, evaluate(y)))
    return values.order(error, values.div(values.absolute(exact), Fraction(200))) <= 0


def _is_name(tree: Tree) -> bool:
    """Whether the left side only names what is computed: x, f(x), AB, (x, y)."""
    if tree[0] == "sym":
        return True
    if tree[0] == "mul" and tree[1][0] == "sym":
        upper = all(t[0] == "sym" and t[1].isupper() for t in tree[1:])
        return upper or (tree[1][1][0] in _FUNCTION_NAMES and tree[2][0] in ("sym", "num", "tuple"))
    if tree[0] == "ratio":
        return all(_is_name(t) for t in tree[1])
    return tree[0] == "tuple" and all(t[0] == "sym" for t in tree[3])


def _assigned(tree: Tree) -> Tree | None:
    """The right side of an equation whose left side is only a name."""
    if tree[0] != "rel" or len(tree[2]) != 2 or tree[1] not in (("=",), ("in",)):
        return None
    left, right = tree[2]
    if not _is_name(left) or (symbols(left) & symbols(right) and left[0] == "sym"):
        return None
    return right


def _same_relations(a: Tree, b: Tree) -> bool:
    if len(a[1]) != len(b[1]):
        return False
    flipped = tuple(_FLIPPED.get(op, op) for op in reversed(a[1]))
    if a[1] == b[1] and _same_or_false(a[2], b[2]):
        return True
    if flipped == b[1] and _same_or_false(a[2][::-1], b[2]):
        return True
    if len(a[1]) > 1:
        return False
    if a[1][0] not in _FLIPPED or b[1][0] not in _FLIPPED:
        return False
    if len(symbols(b)) == 1 and b[2][0][0] == "sym" and not symbols(b[2][1]):
        return False  # solved for its variable: an answer must be solved too
    return _proportional(a, b)


def _same_or_false(a: tuple, b: tuple) -> bool:
    try:
        return _same_items(a, b)
    except Undefined:
        return False


def _proportional(a: Tree, b: Tree) -> bool:
    """Whether left minus right of a is a constant times that of b, of a sign that fits."""
    differences = [("add", t[2][0], ("neg", t[2][1])) for t in (a, b)]
    ratio = None
    for point in range(NUM_POINTS):
        x, y = (evaluate(d, point) for d in differences)
        if values.is_zero(x) or values.is_zero(y):
            return False
        current = values.div(x, y)
        if ratio is not None and not values.equal(current, ratio):
            return False
        ratio = current
    if not values.is_real(ratio):
        return False
    operator = a[1][0] if not values.is_negative(ratio) else _FLIPPED[a[1][0]]
    return operator == b[1][0]
