"""Numbers too large to be written out, compared exactly without being computed.

An expression is mapped into the integers modulo a prime. The map keeps sums, products, quotients
and powers, so equal expressions have equal images whatever their size: of 2^2009 - 1 only 2009
squarings' worth is ever done, modulo the prime. Different ones have the same image with a
probability of 2^-256, for nobody builds an answer to meet this one prime.

What the arithmetic of the field cannot express, such as the sine of 1 or a cube root, is mapped to
an element drawn from a digest of its parts. Equal images still mean equal expressions then, but
different images say nothing, and the image is said to be inexact.
"""

import functools
import hashlib
from fractions import Fraction

from adpo_jax.rewards.grading import values
from adpo_jax.rewards.grading.ball import Undefined
from adpo_jax.rewards.grading.evaluate import exact
from adpo_jax.rewards.grading.limits import MAX_TABLED_FACTORIAL
from adpo_jax.rewards.grading.parse import Tree

_SMALL_PRIMES = tuple(p for p in range(2, 98) if all(p % q for q in range(2, p)))
# A prime of 257 bits that is 1 modulo 8 and modulo every small prime, which makes -1 and the small
# primes squares: so the field holds i and their roots, and sqrt(2) sqrt(3) = sqrt(6) in it.
PRIME = 2**256 + 0x6C140E0B46FF60A0197BC9F73736B1A9
_MAX_BINOMIAL_FACTORS = 1000

Image = tuple[int, bool]  # the element, and whether it is exact


def same(a: Tree, b: Tree) -> bool | None:
    """Whether two scalar trees are the same number or function; None where that cannot be told.

    Raises:
      Undefined: a part of them has no value.
    """
    (x, x_is_exact), (y, y_is_exact) = image(a), image(b)
    if x == y:
        return True
    return False if x_is_exact and y_is_exact else None


def image(tree: Tree) -> Image:
    """Where a scalar tree is mapped.

    Raises:
      Undefined: it divides by zero, or is no scalar.
    """
    kind = tree[0]
    if kind == "num":
        return _rational(tree[1]), True
    if kind == "sym":
        return _drawn("sym", tree[1]), True
    if kind == "const":
        # e is transcendental, but powers of it are not known to the field.
        return (_root_of_minus_one(), True) if tree[1] == "i" else (_drawn(*tree), tree[1] == "pi")
    if kind == "neg":
        x, is_exact = image(tree[1])
        return -x % PRIME, is_exact
    if kind in ("add", "mul", "div"):
        (x, x_is_exact), (y, y_is_exact) = image(tree[1]), image(tree[2])
        is_exact = x_is_exact and y_is_exact
        if kind == "div":
            return x * _inverse(y) % PRIME, is_exact
        return (x + y if kind == "add" else x * y) % PRIME, is_exact
    if kind == "percent":
        x, is_exact = image(tree[1])
        return x * _inverse(100) % PRIME, is_exact
    if kind == "degree":
        return image(("div", ("mul", tree[1], ("const", "pi")), ("num", Fraction(180))))
    if kind == "pow":
        return _power(tree[1], tree[2])
    if kind == "call":
        return _call(tree)
    raise Undefined(f"no value of a {kind}")


def _power(base: Tree, exponent: Tree) -> Image:
    n = exact(exponent)
    if n is None:
        if image(base)[0] == 0:
            raise Undefined("zero to an unknown power")
        return _opaque("pow", base, exponent)
    if n.denominator > 1:
        return _root(base, n)
    x, is_exact = image(base)
    if x == 0:
        if n <= 0:
            raise Undefined("zero to a power that is not positive")
        return 0, is_exact
    return pow(x, n.numerator % (PRIME - 1), PRIME), is_exact


def _root(base: Tree, exponent: Fraction) -> Image:
    """A base to a power that is no integer, exactly where square roots of small primes suffice."""
    sign, factors = 1, _factors(base)
    if factors is None and exponent.denominator == 2:
        negated = base[1] if base[0] == "neg" else ("neg", base)
        factors = _factors(negated)
        sign = pow(_root_of_minus_one(), exponent.numerator % 4, PRIME)  # principal: i sqrt(3)
    if factors is None:
        x, _ = image(base)
        if x == 0:
            if exponent <= 0:
                raise Undefined("zero to a power that is not positive")
            return 0, False
        drawn = _drawn("root", x, exponent.denominator)
        return pow(drawn, exponent.numerator % (PRIME - 1), PRIME), False
    result, is_exact = sign, True
    for prime, power in factors.items():
        whole, rest = divmod(power * exponent, 1)
        result = result * pow(prime % PRIME, whole % (PRIME - 1), PRIME) % PRIME
        if rest == Fraction(1, 2) and prime in _SMALL_PRIMES:
            result = result * _square_root(prime) % PRIME
        elif rest:
            drawn = _drawn("root", prime, rest.denominator)
            result = result * pow(drawn, rest.numerator, PRIME) % PRIME
            is_exact = False
    return result, is_exact


def _factors(tree: Tree) -> dict[int, Fraction] | None:
    """A positive product of powers of rationals as integers with exponents, else None."""
    kind = tree[0]
    if kind == "num":
        return _factored(tree[1])
    if kind in ("mul", "div"):
        left, right = _factors(tree[1]), _factors(tree[2])
        if left is None or right is None:
            return None
        sign = 1 if kind == "mul" else -1
        return {p: left.get(p, 0) + sign * right.get(p, 0) for p in left | right}
    if kind == "percent":
        return _factors(("div", tree[1], ("num", Fraction(100))))
    if kind == "pow" or tree[:2] == ("call", "root"):
        base, exponent = (tree[1], exact(tree[2])) if kind == "pow" else (tree[3], exact(tree[2]))
        factors = _factors(base)
        if factors is None or exponent is None or (kind == "call" and exponent == 0):
            return None
        exponent = exponent if kind == "pow" else 1 / exponent
        return {p: power * exponent for p, power in factors.items()}
    value = exact(tree)
    return None if value is None else _factored(value)


def _factored(x: Fraction) -> dict[int, Fraction] | None:
    if x <= 0:
        return None
    factors: dict[int, Fraction] = {}
    for number, sign in ((x.numerator, 1), (x.denominator, -1)):
        for prime in _SMALL_PRIMES:
            while number % prime == 0:
                number //= prime
                factors[prime] = factors.get(prime, Fraction(0)) + sign
        if number > 1:
            root = values.exact_root(Fraction(number), 2)
            base, power = (number, sign) if root is None else (root.numerator, 2 * sign)
            factors[base] = factors.get(base, Fraction(0)) + power
    return factors


def _call(tree: Tree) -> Image:
    name, arguments = tree[1], tree[2:]
    if name == "root":
        degree = exact(arguments[0])
        if degree:
            return _power(arguments[1], ("num", 1 / degree))
    elif name == "factorial":
        n = exact(arguments[0])
        if n is not None and n.denominator == 1:
            if n < 0:
                raise Undefined("factorial of a negative number")
            if n <= MAX_TABLED_FACTORIAL:
                return _factorials()[n.numerator], True
    elif name == "binomial":
        return _binomial(*arguments)
    else:
        value = exact(tree)
        if value is not None:
            return _rational(value), True
    return _opaque(name, *arguments)


def _binomial(n_tree: Tree, k_tree: Tree) -> Image:
    n, k = exact(n_tree), exact(k_tree)
    if n is None or k is None or k.denominator > 1:
        return _opaque("binomial", n_tree, k_tree)
    if n.denominator == 1 and 0 <= n - k < k:
        k = n - k
    if k < 0 or (n.denominator == 1 and 0 <= n < k):
        return 0, True
    if n.denominator == 1 and 0 <= n <= MAX_TABLED_FACTORIAL:
        table = _factorials()
        below = table[k.numerator] * table[(n - k).numerator]
        return table[n.numerator] * _inverse(below) % PRIME, True
    if k > _MAX_BINOMIAL_FACTORS:
        return _opaque("binomial", n_tree, ("num", k))
    top, bottom, x = 1, 1, _rational(n)
    for i in range(k.numerator):
        top = top * (x - i) % PRIME
        bottom = bottom * (i + 1) % PRIME
    return top * _inverse(bottom) % PRIME, True


def _opaque(name: str, *arguments: Tree) -> Image:
    return _drawn(name, *(image(t)[0] for t in arguments)), False


def _drawn(*parts: object) -> int:
    """An element that depends on the parts alone."""
    text = "\0".join(str(p) for p in parts).encode("utf-8", "replace")
    return int.from_bytes(hashlib.blake2b(text, digest_size=48).digest(), "big") % PRIME


def _rational(x: Fraction) -> int:
    if x.denominator == 1:
        return x.numerator % PRIME
    return x.numerator * _inverse(x.denominator) % PRIME


def _inverse(x: int) -> int:
    if x % PRIME == 0:
        raise Undefined("division by zero")
    return pow(x, -1, PRIME)


@functools.cache
def _factorials() -> tuple[int, ...]:
    """n! for every n that is looked up, once a process."""
    table = [1]
    for n in range(1, MAX_TABLED_FACTORIAL + 1):
        table.append(table[-1] * n % PRIME)
    return tuple(table)


@functools.cache
def _root_of_minus_one() -> int:
    # g^((p-1)/4) for the least g that is no square.
    return pow(_non_square(), (PRIME - 1) // 4, PRIME)


@functools.cache
def _non_square() -> int:
    return next(g for g in range(2, 1000) if pow(g, (PRIME - 1) // 2, PRIME) == PRIME - 1)


@functools.cache
def _square_root(x: int) -> int:
    """A square root of a square, by Tonelli and Shanks."""
    odd, twos = PRIME - 1, 0
    while odd % 2 == 0:
        odd, twos = odd // 2, twos + 1
    generator, root, rest = (pow(b, e, PRIME) for b, e in
                             ((_non_square(), odd), (x, (odd + 1) // 2), (x, odd)))  # fmt: skip
    while rest != 1:
        # rest = x^odd-like unit of order 2^k < 2^twos; root^2 = x rest throughout.
        k, power = 0, rest
        while power != 1:
            power, k = power * power % PRIME, k + 1
        step = pow(generator, 1 << (twos - k - 1), PRIME)
        root, rest = root * step % PRIME, rest * step * step % PRIME
    return root
