"""Arithmetic with exact rationals and with balls."""

from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adpo_jax.rewards.grading import ball, values
from adpo_jax.rewards.grading.ball import Ball, Undefined
from adpo_jax.rewards.grading.evaluate import evaluate
from adpo_jax.rewards.grading.lexer import normalise, tokenize
from adpo_jax.rewards.grading.parse import parse


def value(text: str):
    return evaluate(parse(tokenize(normalise(text))))


def test_rationals_stay_exact():
    x = value(r"\frac{1}{1+\frac13} + 2^{-10} \cdot 3!")
    assert x == Fraction(3, 4) + Fraction(6, 1024)
    assert isinstance(x, Fraction)


@pytest.mark.parametrize(
    ("left", "right"),
    [
        (r"\sqrt{7+4\sqrt3}", r"2+\sqrt3"),
        (r"\sin\frac{\pi}{10}", r"\frac{\sqrt5-1}{4}"),
        (r"4\arctan\frac15-\arctan\frac{1}{239}", r"\frac{\pi}{4}"),
        (r"e^{i\pi}+1", "0"),
        (r"\ln 8", r"3\ln 2"),
        (r"\log_2 8", "3"),
        (r"\cosh^2 1 - \sinh^2 1", "1"),
        (r"\sqrt[3]{-8}", "-2"),
        (r"(-8)^{2/3}", "4"),
        (r"(\frac12)!", r"\frac{\sqrt\pi}{2}"),
        (r"\arcsin 1", r"\frac{\pi}{2}"),
        (r"(1+i)^8", "16"),
        (r"|3-4i|", "5"),
        (r"\lfloor -\sqrt2 \rfloor", "-2"),
        (r"\sec\frac\pi3", "2"),
        (r"\ln 1 \cdot \sin 2", r"\sin 0"),
        (r"0\cdot\pi", "0"),
    ],
)
def test_identities_hold(left, right):
    assert values.equal(value(left), value(right))


@pytest.mark.parametrize(
    ("left", "right"),
    [
        (r"e^{\pi\sqrt{163}}", "262537412640768744"),  # equal to 30 digits
        (r"\sqrt2+10^{-60}", r"\sqrt2"),
        (r"10^{60}+\sqrt2-10^{60}", "1"),
        ("e^{-1000}", "0"),
        (r"10^{-50}\pi", r"2\cdot 10^{-50}\pi"),
        (r"\frac{355}{113}", r"\pi"),
    ],
)
def test_what_is_nearly_equal_is_not(left, right):
    assert not values.equal(value(left), value(right))


@pytest.mark.parametrize(
    "text",
    ["8^{8^{8}}", "61!", r"\frac{1}{0}", r"\frac{1}{\sin\pi}", r"\tan\frac{\pi}{2}", r"\ln 0",
     "0^0", "0^{-1}", r"\sin(10^{300})", "e^{10^5}", "(-3)!", r"\lfloor \log_2 8 \rfloor",
     r"\gcd(1.5,2)"],
)  # fmt: skip
def test_what_has_no_value_or_too_large_a_one_is_refused(text):
    with pytest.raises(Undefined):
        value(text)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(-(10**12), 10**12).filter(bool), min_size=3, max_size=8))
def test_a_ball_contains_the_exact_result(numbers):
    exact, approximate = Fraction(numbers[0], 7), ball.from_fraction(Fraction(numbers[0], 7))
    for i, n in enumerate(numbers[1:]):
        x = Fraction(n, 7**i)
        operation = (values.add, values.mul, values.div)[i % 3]
        exact = operation(exact, x)
        if isinstance(approximate, Ball) and exact == 0:
            return
        approximate = operation(approximate, ball.from_fraction(x))
    difference = ball.add(approximate, ball.neg(ball.from_fraction(exact)))
    assert difference.is_zero
    assert approximate.err < approximate.mag - 250


def test_exact_roots_are_found_and_others_not():
    assert values.exact_root(Fraction(27, 8), 3) == Fraction(3, 2)
    assert values.exact_root(Fraction(-27), 3) == -3
    assert values.exact_root(Fraction(-4), 2) is None
    assert values.exact_root(Fraction(2), 2) is None
    assert values.exact_root(Fraction(10**40), 5) == 10**8
