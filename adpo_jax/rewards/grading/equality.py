"""Whether two scalar trees stand for the same number or function."""

from fractions import Fraction

from adpo_jax.rewards.grading import canonical, values
from adpo_jax.rewards.grading.ball import Undefined
from adpo_jax.rewards.grading.evaluate import NUM_POINTS, mentions, symbols, value_or_none
from adpo_jax.rewards.grading.parse import Tree


def equal_scalars(a: Tree, b: Tree) -> bool:
    """Whether two scalar trees stand for the same number or function.

    Rational numbers within the limits are computed. What is beyond them, and functions, are
    compared by their canonical images, which are exact for all but roots and transcendental
    functions; those are compared to 30 digits and more, functions at sample points. Sample points
    where neither has a real value are passed over when the values differ, since principal values
    disagree there for expressions that are the same where they are real (`sqrt(x**3)` and
    `x sqrt(x)`); where one is real and the other not, they differ. Expressions in i are compared
    everywhere.

    Raises:
      Undefined: one has no value, or a limit keeps both from being told apart.
    """
    if a == b:
        return True
    if a[0] == "inf" or b[0] == "inf" or a == ("neg", ("inf",)) or b == ("neg", ("inf",)):
        return False
    is_constant = not symbols(a) and not symbols(b)
    if is_constant:
        x, y = value_or_none(a), value_or_none(b)
        if isinstance(x, Fraction) and isinstance(y, Fraction):
            return x == y
    same = canonical.same(a, b)
    if same is not None:
        return same
    if is_constant:
        if x is None or y is None:
            raise Undefined("beyond the limits")
        return values.equal(x, y)
    return _agree_at_points(a, b)


def _agree_at_points(a: Tree, b: Tree) -> bool:
    is_complex = mentions(a, ("const", "i")) or mentions(b, ("const", "i"))
    agreed = 0
    for point in range(NUM_POINTS):
        x, y = value_or_none(a, point), value_or_none(b, point)
        if x is None and y is None:
            continue
        if x is None or y is None:
            return False
        if values.equal(x, y):
            agreed += 1
        elif is_complex or values.is_real(x) or values.is_real(y):
            return False
    return agreed >= 3
