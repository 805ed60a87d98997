"""Numbers known up to an error: a complex midpoint of 320 bits and a bound on how far off it is.

A ball stands for every z with |z - midpoint| <= 2**err. Carrying the bound through each operation
is what lets two expressions be called equal for good reason: `sqrt(50)` and `5 sqrt(2)` overlap to
2**-310, while `10**60 + sqrt(2) - 10**60` cannot pass for anything that is not as close to it.

The midpoints are mpmath's raw numbers, used through its pure functions: no context, hence no state
shared between threads. Error bounds are exponents of two, rounded up generously.
"""

from fractions import Fraction

from mpmath import libmp
from mpmath.libmp import fzero

from adpo_jax.rewards.grading.limits import MAX_BITS

PRECISION = 320
_ROUND = "n"
_ZERO_MAG = -(10**15)
_MAX_MAG = 10**12  # numbers of mpmath have exponents of any size


class Undefined(ArithmeticError):
    """A value that does not exist, cannot be told, or is beyond the limits."""


def _mag(x: tuple) -> int:
    """The least m with |x| < 2**m."""
    return x[2] + x[3] if x[1] else _ZERO_MAG


class Ball:
    """`re + i im` up to 2**err. A part that may be zero is kept as zero."""

    __slots__ = ("err", "im", "mag", "re")

    def __init__(self, re: tuple, im: tuple = fzero, err: int | None = None):
        if (re[1] == 0 and re != fzero) or (im[1] == 0 and im != fzero):
            raise Undefined("infinite or not a number")
        mag = max(_mag(re), _mag(im))
        rounding = mag - PRECISION + 1
        err = rounding if err is None else max(err, rounding) + 1
        self.re = fzero if _mag(re) <= err else re
        self.im = fzero if _mag(im) <= err else im
        self.err = err
        self.mag = max(_mag(self.re), _mag(self.im))
        if (
            self.mag > _MAX_MAG
            or _ZERO_MAG < self.mag < -_MAX_MAG
            or self.err > max(self.mag, 0) - 64
        ):
            raise Undefined("too large, or too inexact to tell anything from")

    @property
    def is_real(self) -> bool:
        return self.im == fzero

    @property
    def is_zero(self) -> bool:
        """Whether it cannot be told from zero."""
        return self.mag == _ZERO_MAG

    @property
    def sign(self) -> int:
        return libmp.mpf_sign(self.re)


def from_fraction(x: Fraction) -> Ball:
    return Ball(libmp.from_rational(x.numerator, x.denominator, PRECISION, _ROUND))


def pi() -> Ball:
    return Ball(libmp.mpf_pi(PRECISION))


def imaginary_unit() -> Ball:
    return Ball(fzero, libmp.fone)


def overlap(a: Ball, b: Ball) -> bool:
    """Whether both can be the same number, known well enough to mean it (30 digits)."""
    tolerance = max(a.err, b.err) + 2
    if tolerance > max(a.mag, b.mag) - 100 and tolerance > -100:
        return False
    re = libmp.mpf_sub(a.re, b.re, PRECISION, _ROUND)
    im = libmp.mpf_sub(a.im, b.im, PRECISION, _ROUND)
    return re == im == fzero or max(_mag(re), _mag(im)) <= tolerance


def compare(a: Ball, b: Ball) -> int:
    """-1, 0 or 1 for two real balls; 0 where they overlap."""
    difference = _sum(a, neg(b))
    if not difference.is_real:
        raise Undefined("no order between complex numbers")
    return 0 if difference.is_zero else difference.sign


def add(a: Ball, b: Ball) -> Ball:
    """Raises Undefined where one of them is so small that the sum would not show it."""
    result = _sum(a, b)
    if _ZERO_MAG < min(a.mag, b.mag) <= result.err:
        raise Undefined("a term too small to tell anything from")
    return result


def _sum(a: Ball, b: Ball) -> Ball:
    re = libmp.mpf_add(a.re, b.re, PRECISION, _ROUND)
    im = libmp.mpf_add(a.im, b.im, PRECISION, _ROUND)
    return Ball(re, im, max(a.err, b.err) + 1)


def neg(a: Ball) -> Ball:
    return Ball(libmp.mpf_neg(a.re), libmp.mpf_neg(a.im), a.err)


def mul(a: Ball, b: Ball) -> Ball:
    err = max(a.mag + b.err, b.mag + a.err, a.err + b.err) + 2
    if a.im == fzero and b.im == fzero:
        return Ball(libmp.mpf_mul(a.re, b.re, PRECISION, _ROUND), fzero, err)
    re, im = libmp.mpc_mul((a.re, a.im), (b.re, b.im), PRECISION, _ROUND)
    return Ball(re, im, err)


def inverse(a: Ball) -> Ball:
    _away_from_zero(a)
    err = a.err - 2 * a.mag + 4
    if a.im == fzero:
        return Ball(libmp.mpf_div(libmp.fone, a.re, PRECISION, _ROUND), fzero, err)
    re, im = libmp.mpc_div((libmp.fone, fzero), (a.re, a.im), PRECISION, _ROUND)
    return Ball(re, im, err)


def integer_power(a: Ball, n: int) -> Ball:
    if n < 0:
        return inverse(integer_power(a, -n))
    result = Ball(libmp.fone)
    while n:
        if n & 1:
            result = mul(result, a)
        n >>= 1
        if n:
            a = mul(a, a)
    return result


def exp(a: Ball) -> Ball:
    if a.mag > 13:  # |a| < 8192
        raise Undefined("exponent too large")
    re, im = libmp.mpc_exp((a.re, a.im), PRECISION, _ROUND)
    return Ball(re, im, max(_mag(re), _mag(im)) + max(a.err, -PRECISION) + 2)


def log(a: Ball) -> Ball:
    """The principal natural logarithm."""
    _away_from_zero(a)
    err = a.err - a.mag + 3
    if a.im == fzero and a.sign > 0:
        return Ball(libmp.mpf_log(a.re, PRECISION, _ROUND), fzero, err)
    re, im = libmp.mpc_log((a.re, a.im), PRECISION, _ROUND)
    return Ball(re, im, err)


def sqrt(a: Ball) -> Ball:
    """The principal square root."""
    if a.is_zero:
        return Ball(fzero, fzero, (a.err + 1) // 2)
    err = a.err - (a.mag - 1) // 2 + 1
    if a.im == fzero and a.sign > 0:
        return Ball(libmp.mpf_sqrt(a.re, PRECISION, _ROUND), fzero, err)
    re, im = libmp.mpc_sqrt((a.re, a.im), PRECISION, _ROUND)
    return Ball(re, im, err)


def absolute(a: Ball) -> Ball:
    return Ball(libmp.mpc_abs((a.re, a.im), PRECISION, _ROUND), fzero, a.err + 1)


def _circular(real_function, complex_function):
    def apply(a: Ball) -> Ball:
        if a.mag > 60 or _mag(a.im) > 10:
            raise Undefined("angle too large")
        if a.im == fzero:
            return Ball(real_function(a.re, PRECISION, _ROUND), fzero, a.err + 1)
        re, im = complex_function((a.re, a.im), PRECISION, _ROUND)
        growth = (3 << max(_mag(a.im), 0)) // 2 + 2  # log2 of cosh|im|, bounded from above
        return Ball(re, im, a.err + growth)

    return apply


sin = _circular(libmp.mpf_sin, libmp.mpc_sin)
cos = _circular(libmp.mpf_cos, libmp.mpc_cos)


def _inverse_circular(real_function, complex_function):
    def apply(a: Ball) -> Ball:
        # Half of the digits are given up: near the branch points -1, 1, i and -i the function
        # changes like a square root or faster, elsewhere it is harmless.
        err = (max(a.err, a.mag - PRECISION) + 3) // 2
        try:
            if a.im == fzero:
                return Ball(real_function(a.re, PRECISION, _ROUND), fzero, err)
        except libmp.ComplexResult:
            pass
        if a.mag > 200:
            raise Undefined("too large")
        re, im = complex_function((a.re, a.im), PRECISION, _ROUND)
        return Ball(re, im, err)

    return apply


asin = _inverse_circular(libmp.mpf_asin, libmp.mpc_asin)
acos = _inverse_circular(libmp.mpf_acos, libmp.mpc_acos)
atan = _inverse_circular(libmp.mpf_atan, libmp.mpc_atan)


def gamma(a: Ball) -> Ball:
    """The gamma function of a real number in (-170, 170) away from its poles."""
    if not a.is_real or a.mag > 7 or a.mag < -64 or a.err > -64:
        raise Undefined("no gamma function of this")
    try:
        z = libmp.mpf_gamma(a.re, PRECISION, _ROUND)
    except ValueError as error:
        raise Undefined("pole of the gamma function") from error
    # |gamma'| = |gamma psi|; psi is below 2**70 as far from a pole as sample points lie.
    return Ball(z, fzero, _mag(z) + a.err + 70)


def floor(a: Ball) -> int:
    """Raises Undefined where the ball holds an integer."""
    if not a.is_real:
        raise Undefined("no floor of a complex number")
    if a.mag > MAX_BITS:
        raise Undefined("too large for its last digit to be known")
    result = libmp.to_int(libmp.mpf_floor(a.re))
    below = add(a, neg(from_fraction(Fraction(result))))
    above = add(a, neg(from_fraction(Fraction(result + 1))))
    if below.is_zero or above.is_zero:
        raise Undefined("cannot tell on which side of an integer")
    return result


def _away_from_zero(a: Ball) -> None:
    if a.is_zero or a.err > a.mag - 32:
        raise Undefined("division by, or logarithm of, what may be zero")
