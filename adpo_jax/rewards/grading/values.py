"""Values of expressions: exact rationals as long as possible, then balls.

Everything raises Undefined where there is no value or where it is beyond the limits; no operation
starts work that the limits do not bound.
"""

from fractions import Fraction
from math import isqrt

from adpo_jax.rewards.grading import ball
from adpo_jax.rewards.grading.ball import Ball, Undefined
from adpo_jax.rewards.grading.limits import MAX_BITS, MAX_FACTORIAL

Value = Fraction | Ball


def to_ball(x: Value) -> Ball:
    return x if isinstance(x, Ball) else ball.from_fraction(x)


def equal(x: Value, y: Value) -> bool:
    if isinstance(x, Fraction) and isinstance(y, Fraction):
        return x == y
    return ball.overlap(to_ball(x), to_ball(y))


def order(x: Value, y: Value) -> int:
    """-1, 0 or 1, as x is below, equal to or above y. Both must be real."""
    if isinstance(x, Fraction) and isinstance(y, Fraction):
        return (x > y) - (x < y)
    return ball.compare(to_ball(x), to_ball(y))


def is_real(x: Value) -> bool:
    return isinstance(x, Fraction) or x.is_real


def is_zero(x: Value) -> bool:
    return x == 0 if isinstance(x, Fraction) else x.is_zero


def is_negative(x: Value) -> bool:
    return x < 0 if isinstance(x, Fraction) else x.is_real and x.sign < 0


def _bits(x: Fraction) -> int:
    return max(x.numerator.bit_length(), x.denominator.bit_length())


def _bounded(x: Fraction) -> Value:
    return x if _bits(x) <= MAX_BITS else ball.from_fraction(x)


def add(x: Value, y: Value) -> Value:
    if isinstance(x, Fraction) and isinstance(y, Fraction):
        return _bounded(x + y)
    return ball.add(to_ball(x), to_ball(y))


def neg(x: Value) -> Value:
    return -x if isinstance(x, Fraction) else ball.neg(x)


def sub(x: Value, y: Value) -> Value:
    return add(x, neg(y))


def mul(x: Value, y: Value) -> Value:
    if isinstance(x, Fraction) and isinstance(y, Fraction):
        return _bounded(x * y)
    return ball.mul(to_ball(x), to_ball(y))


def div(x: Value, y: Value) -> Value:
    if is_zero(y):
        raise Undefined("division by zero")
    if isinstance(x, Fraction) and isinstance(y, Fraction):
        return _bounded(x / y)
    return ball.mul(to_ball(x), ball.inverse(to_ball(y)))


def power(x: Value, y: Value) -> Value:
    """x to the y. A negative real to a fraction with an odd denominator is the real root."""
    if is_zero(x):
        if is_real(y) and not is_negative(y) and not is_zero(y):
            return Fraction(0)
        raise Undefined("zero to a power that is not positive")
    if isinstance(y, Fraction):
        if y.denominator == 1:
            return _integer_power(x, y.numerator)
        if y.denominator <= 64:
            exact = exact_root(x, y.denominator) if isinstance(x, Fraction) else None
            if exact is not None:
                return _integer_power(exact, y.numerator)
            if y.denominator % 2 and is_negative(x):
                magnitude = power(neg(x), y)
                return neg(magnitude) if y.numerator % 2 else magnitude
        if y == Fraction(1, 2):
            return ball.sqrt(to_ball(x))
    return ball.exp(ball.mul(to_ball(y), ball.log(to_ball(x))))


def _integer_power(x: Value, n: int) -> Value:
    if isinstance(x, Fraction):
        if abs(x) == 1:
            return x if n % 2 else Fraction(1)
        if _bits(x) * abs(n) <= MAX_BITS:
            return x**n
    if abs(n) > 4 * MAX_BITS:
        raise Undefined("power too large")
    return ball.integer_power(to_ball(x), n)


def exact_root(x: Fraction, n: int) -> Fraction | None:
    """The real n-th root of x where it is rational, else None."""
    if x < 0:
        root = exact_root(-x, n) if n % 2 else None
        return None if root is None else -root
    top, bottom = _integer_root(x.numerator, n), _integer_root(x.denominator, n)
    return None if top is None or bottom is None else Fraction(top, bottom)


def _integer_root(x: int, n: int) -> int | None:
    if n == 2:
        root = isqrt(x)
    else:
        low, root = 0, 1 << -(-x.bit_length() // n)
        while low < root:  # the largest integer whose n-th power is at most x, by bisection
            middle = (low + root + 1) // 2
            low, root = (middle, root) if middle**n <= x else (low, middle - 1)
    return root if root**n == x else None


def root(n: Value, x: Value) -> Value:
    return power(x, div(Fraction(1), n))


def pi() -> Value:
    return ball.pi()


def factorial(x: Value) -> Value:
    if isinstance(x, Fraction) and x.denominator == 1:
        if not 0 <= x <= MAX_FACTORIAL:
            raise Undefined("factorial of a negative or too large number")
        result = 1
        for i in range(2, x.numerator + 1):
            result *= i
        return Fraction(result)
    return ball.gamma(to_ball(add(x, Fraction(1))))


def binomial(n: Value, k: Value) -> Value:
    """n over k: exact for an integer k up to 60, by gamma functions otherwise."""
    if isinstance(k, Fraction) and k.denominator == 1 and isinstance(n, Fraction):
        if n.denominator == 1 and 0 <= n - k < k:
            k = n - k
        if k < 0:
            return Fraction(0)
        if k > MAX_FACTORIAL:
            raise Undefined("binomial too large")
        result = Fraction(1)
        for i in range(k.numerator):
            result = result * (n - i) / (i + 1)
        return _bounded(result)
    return div(factorial(n), mul(factorial(k), factorial(sub(n, k))))


def absolute(x: Value) -> Value:
    return abs(x) if isinstance(x, Fraction) else ball.absolute(x)


def ln(x: Value) -> Value:
    if is_zero(x):
        raise Undefined("logarithm of zero")
    return Fraction(0) if x == 1 else ball.log(to_ball(x))


def log(base: Value, x: Value) -> Value:
    return div(ln(x), ln(base))


def exp(x: Value) -> Value:
    return Fraction(1) if x == 0 else ball.exp(to_ball(x))


def sin(x: Value) -> Value:
    return ball.sin(to_ball(x))


def cos(x: Value) -> Value:
    return ball.cos(to_ball(x))


def tan(x: Value) -> Value:
    return div(sin(x), cos(x))


def sinh(x: Value) -> Value:
    return div(sub(exp(x), exp(neg(x))), Fraction(2))


def cosh(x: Value) -> Value:
    return div(add(exp(x), exp(neg(x))), Fraction(2))


def tanh(x: Value) -> Value:
    return div(sinh(x), cosh(x))


def asinh(x: Value) -> Value:
    return ln(add(x, _square_root(add(mul(x, x), Fraction(1)))))


def acosh(x: Value) -> Value:
    roots = _square_root(sub(x, Fraction(1))), _square_root(add(x, Fraction(1)))
    return ln(add(x, mul(*roots)))


def atanh(x: Value) -> Value:
    return div(ln(div(add(Fraction(1), x), sub(Fraction(1), x))), Fraction(2))


def sign(x: Value) -> Value:
    return Fraction(order(x, Fraction(0)))


def _square_root(x: Value) -> Value:
    return Fraction(0) if is_zero(x) else power(x, Fraction(1, 2))


def asin(x: Value) -> Value:
    return ball.asin(to_ball(x))


def acos(x: Value) -> Value:
    return ball.acos(to_ball(x))


def atan(x: Value) -> Value:
    return ball.atan(to_ball(x))


def floor(x: Value) -> Value:
    return Fraction(x.__floor__() if isinstance(x, Fraction) else ball.floor(x))


def ceil(x: Value) -> Value:
    return neg(floor(neg(x)))


def extreme(sign: int):
    def pick(first: Value, *rest: Value) -> Value:
        for x in rest:
            first = x if order(x, first) == sign else first
        return first

    return pick


def of_integers(combine):
    def apply(*values: Value) -> Value:
        if not all(isinstance(v, Fraction) and v.denominator == 1 for v in values):
            raise Undefined("wanted integers")
        return _bounded(Fraction(combine(*(v.numerator for v in values))))

    return apply
