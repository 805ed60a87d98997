"""The one table of functions: how answers spell each, and what gives its value.

The lexer, the parser, the evaluation and the fuzzer all read it, so a word that one of them knows
is known to all.
"""

from collections.abc import Callable
from fractions import Fraction
from math import gcd, lcm
from typing import NamedTuple

from adpo_jax.rewards.grading import ball, values


class Function(NamedTuple):
    """A function of the grammar.

    value: takes the arguments' values to the result's; raises Undefined where there is none.
    spellings: the words that stand for it, bare or as LaTeX commands; none where the grammar has a
      notation of its own for it.
    """

    value: Callable[..., values.Value]
    spellings: str = ""


def _reciprocal(f):
    return lambda x: values.div(Fraction(1), f(x))


def _of_reciprocal(f):
    return lambda x: f(values.div(Fraction(1), x))


def _cis(x: values.Value) -> values.Value:
    return values.add(values.cos(x), values.mul(ball.imaginary_unit(), values.sin(x)))


TABLE = {
    "sin": Function(values.sin, "sin"),
    "cos": Function(values.cos, "cos"),
    "tan": Function(values.tan, "tan tg"),
    "sec": Function(_reciprocal(values.cos), "sec"),
    "csc": Function(_reciprocal(values.sin), "csc cosec"),
    "cot": Function(lambda x: values.div(values.cos(x), values.sin(x)), "cot ctg cotg"),
    "sinh": Function(values.sinh, "sinh"),
    "cosh": Function(values.cosh, "cosh"),
    "tanh": Function(values.tanh, "tanh"),
    "sech": Function(_reciprocal(values.cosh), "sech"),
    "csch": Function(_reciprocal(values.sinh), "csch"),
    "coth": Function(_reciprocal(values.tanh), "coth"),
    "arcsin": Function(values.asin, "arcsin asin"),
    "arccos": Function(values.acos, "arccos acos"),
    "arctan": Function(values.atan, "arctan atan arctg"),
    "arcsec": Function(_of_reciprocal(values.acos), "arcsec"),
    "arccsc": Function(_of_reciprocal(values.asin), "arccsc"),
    "arccot": Function(_of_reciprocal(values.atan), "arccot arcctg"),
    "arcsinh": Function(values.asinh, "arcsinh arsinh asinh"),
    "arccosh": Function(values.acosh, "arccosh arcosh acosh"),
    "arctanh": Function(values.atanh, "arctanh artanh atanh"),
    "sgn": Function(values.sign, "sgn"),
    "cis": Function(_cis, "cis"),
    "ln": Function(values.ln, "ln"),
    "log": Function(values.log, "log lg"),
    "exp": Function(values.exp, "exp"),
    "abs": Function(values.absolute, "abs"),
    "root": Function(values.root, "sqrt cbrt"),
    "floor": Function(values.floor, "floor"),
    "ceil": Function(values.ceil, "ceil"),
    "factorial": Function(values.factorial),
    "binomial": Function(values.binomial),
    "max": Function(values.extreme(1), "max"),
    "min": Function(values.extreme(-1), "min"),
    "gcd": Function(values.of_integers(gcd), "gcd"),
    "lcm": Function(values.of_integers(lcm), "lcm"),
}

# The function that each spelling stands for.
NAMES = {spelling: name for name, (_, spellings) in TABLE.items() for spelling in spellings.split()}
FUNCTION_WORDS = frozenset(NAMES)
