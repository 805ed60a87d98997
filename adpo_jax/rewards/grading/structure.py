"""Whether two trees are the same answer: scalars by value, everything else part by part."""

from fractions import Fraction

from adpo_jax.rewards.grading import realset, values
from adpo_jax.rewards.grading.ball import Undefined
from adpo_jax.rewards.grading.evaluate import (
    NUM_POINTS,
    equal_scalars,
    evaluate,
    mentions,
    symbols,
    with_sign,
)
from adpo_jax.rewards.grading.parse import Tree

_FUNCTION_NAMES = set("fghFGHPQpqrTV")
_FLIPPED = {"<": ">", ">": "<", "<=": ">=", ">=": "<=", "=": "=", "!=": "!="}


def same_tree(a: Tree, b: Tree) -> bool:
    """Whether the answer a is the reference b.

    Raises:
      Undefined: a part of them has no value.
    """
    a, b = _settled(a), _settled(b)
    if a[0] == "rel" and b[0] != "rel":
        a = _assigned(a) or a
    elif b[0] == "rel" and a[0] != "rel":
        b = _assigned(b) or b
    same_variables = not symbols(a) or not symbols(b) or symbols(a) == symbols(b)
    if same_variables and (realset.is_set(a) or realset.is_set(b)):
        left, right = _intervals(a), _intervals(b)
        if left is not None and right is not None:
            return realset.same(left, right)
    if a[0] == "list" and b[0] == "tuple" and b[1:3] == ("(", ")"):
        a = _as_point(a)
    left, right = _collected(a), _collected(b)
    if left is not None and right is not None:
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
        return _same_items(a[1], b[1])
    if a[0] == "matrix":
        return len(a[1]) == len(b[1]) and all(_same_items(r, s) for r, s in zip(a[1], b[1]))
    if a[0] == "rel":
        return _same_relations(a, b)
    return equal_scalars(a, b)


def _same_items(a: tuple, b: tuple) -> bool:
    return len(a) == len(b) and all(same_tree(x, y) for x, y in zip(a, b))


def _intervals(tree: Tree):
    try:
        return realset.to_intervals(tree)
    except Undefined:
        return None


# Lists and sets


def _collected(tree: Tree) -> list[Tree] | None:
    """The members of a list, a set, or of an expression with a plus-minus sign; else None."""
    if tree[0] in ("list", "or", "set"):
        members = [m for t in tree[1] for m in _both_signs(t)]
        return _without_assignments(members)
    members = _both_signs(tree)
    return _without_assignments(members) if len(members) > 1 else None


def _as_point(tree: Tree) -> Tree:
    """x = 2, y = -1 as (2, -1), the names being in the order of the alphabet."""
    names = [t[2][0] if t[0] == "rel" and t[1] == ("=",) else ("none",) for t in tree[1]]
    letters = [n[1] for n in names if n[0] == "sym"]
    if len(letters) < len(names) or letters != sorted(set(letters)):
        return tree
    return ("tuple", "(", ")", tuple(t[2][1] for t in tree[1]))


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

    A chain whose sides differ stays as it is, and equals nothing but itself.
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
        if any(symbols(s) for s in sides):
            return tree
    for operator, x, y in zip(operators, sides, sides[1:]):
        if symbols(x) or symbols(y):
            if operator == "~" or not equal_scalars(x, y):
                return tree
        elif not (equal_scalars(x, y) or (operator == "~" and _close(x, y))):
            return tree
    return sides[0] if name is None else ("rel", ("=",), (name, sides[0]))


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
    if len(a[1]) > 1:
        flipped = tuple(_FLIPPED.get(op, op) for op in reversed(a[1]))
        return (a[1] == b[1] and _same_items(a[2], b[2])) or (
            flipped == b[1] and _same_items(a[2][::-1], b[2])
        )
    if a[1] == b[1] and _same_or_false(a[2], b[2]):
        return True
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
