"""Whether an answer equals the reference.

First what is cheap: the same text, the same number. Then both are parsed and compared part by part.
"""

import functools
import re
from collections.abc import Callable
from fractions import Fraction
from typing import NamedTuple

from adpo_jax.rewards.grading import faults, values
from adpo_jax.rewards.grading.ball import Undefined
from adpo_jax.rewards.grading.dress import undress
from adpo_jax.rewards.grading.evaluate import evaluate, symbols
from adpo_jax.rewards.grading.left_sides import values_behind
from adpo_jax.rewards.grading.lexer import Token, Unreadable, normalise, tokenize
from adpo_jax.rewards.grading.limits import MAX_ANSWER_CHARS
from adpo_jax.rewards.grading.parse import Tree, parse
from adpo_jax.rewards.grading.structure import same_tree
from adpo_jax.rewards.grading.units import SHORT_NOUNS, differ, split_unit
from adpo_jax.rewards.grading.words import (
    based_numeral,
    is_choice,
    is_word_list,
    same_time,
    same_words,
    words,
)

_NUMBER = re.compile(
    r"(?:\\?\$)?([-+]?)(?:\\?\$)?([0-9]{1,3}(?:,[0-9]{3}){1,200}|[0-9]{1,600})(\.[0-9]{0,600})?"
)
# References that are read as words: Tim; and letters that no formula has: dog.
_WORD = re.compile(r"[A-Z][a-z]{2,}|[a-np-z]{0,2}o[a-z]{0,2}")
_CAPITALS = frozenset(("NO", "ON", "NE", "NW", "SE", "SW", "EN", "WN", "ES", "WS"))
_ROMAN = re.compile(r"M{0,3}(?:CM|CD|D?C{0,3})(?:XC|XL|L?X{0,3})(?:IX|IV|V?I{0,3})")
# References whose parts are no numbers to compute with: 2024-03-04, 10/12/2023, 5-10, 3-1.
_PARTS = re.compile(r"[0-9]+(?:[-–][0-9]+)+|[0-9]+/[0-9]+/[0-9]{4}|[0-9]{4}/[0-9]+/[0-9]+")
_RELATION = re.compile(r"[=<>]|\\(?:le|ge|leq|geq|ne|neq|in)(?![a-z])")
_DIGITS = re.compile(r"[0-9]+")
# What a number may have without another value: 1,000.00
_NO_PARTS = re.compile(r"(?<=[0-9]),(?=[0-9]{3}(?![0-9]))|\.0+(?![0-9])")
_ROUNDED = re.compile(r"[-+]?[0-9,]*\.[0-9]{2,}")


class Verdict(NamedTuple):
    """Whether the answer is right, and whether it could be read at all."""

    right: bool
    parsed: bool


class Answer(NamedTuple):
    """An answer read: its tree without its unit, or no tree where it is outside the grammar."""

    text: str
    tokens: list[Token] | None
    tree: Tree | None
    unit: str | None
    is_percent: bool
    based: tuple[str, int] | None


def compare(answer: str, reference: str) -> Verdict:
    """Compares an answer with the reference, both without boxes and tags.

    Never raises, whatever either says: a fault of the grader is reported (see `faults`), and the
    answer counts as one that cannot be read.
    """
    try:
        return _compare(answer, reference)
    except Exception as error:
        faults.report(error, answer, reference)
        return Verdict(False, False)


def _compare(answer: str, reference: str) -> Verdict:
    answer, reference = answer.strip(), reference.strip()
    if not answer or _is_nan(reference):
        return Verdict(False, False)
    if answer == reference:
        return Verdict(True, True)
    if len(answer) > MAX_ANSWER_CHARS:
        return Verdict(False, False)
    x, y = _plain_number(answer), _plain_number(reference)
    if x is not None and y is not None and x == y:
        return Verdict(True, True)
    read_answer = read(answer)
    try:
        right = _same(read_answer, read_reference(reference))
        if not right and "," in answer and "," in reference:
            right = _same_lists(answer, reference)
        if not right and "=" in answer and not _RELATION.search(reference):
            right = _is_named(read_answer.text, read_reference(reference))
    except (Undefined, RecursionError):
        return Verdict(False, False)
    return Verdict(right, right or read_answer.tree is not None or read_answer.based is not None)


def _is_named(answer: str, reference: Answer) -> bool:
    """Whether the answer is an equation that gives the reference a name, as `P(X=2) = ...`."""
    if reference.tree is None:
        return False
    sides = values_behind(answer, of_function=bool(symbols(reference.tree)))
    return bool(sides) and all(_same(read(side), reference) for side in sides)


def _is_nan(reference: str) -> bool:
    """Whether a table without a value there has become the reference; nothing equals it."""
    return len(reference) < 40 and "nan" in reference.lower() and words(reference).lower() == "nan"


def read(text: str, join_thousands: bool = True) -> Answer:
    """Reads an answer. Never raises; `tree` is None where it is outside the grammar."""
    if len(text) > 2 * MAX_ANSWER_CHARS:
        return Answer("", None, None, None, False, None)
    text = undress(text)
    based = based_numeral(text)
    if based is not None:
        return Answer(text, None, None, None, False, based)
    tokens = tree = unit = None
    try:
        tokens = tokenize(normalise(text), join_thousands)
        bare, unit = split_unit(tokens)
        tree = parse(bare)
    except (Unreadable, RecursionError):
        return Answer(text, tokens, None, None, False, None)
    is_percent = _is_each(tree, "percent")
    if is_percent:
        tree = _each(tree, lambda value: value[1])
    elif unit in (None, "c", "f") and _is_each(tree, "degree"):
        tree, unit = _each(tree, lambda value: value[1]), unit or "degree"
    return Answer(text, tokens, tree, unit, is_percent, None)


def _is_each(tree: Tree, kind: str) -> bool:
    """Whether a value, what a name is given, or each of several values is of a kind."""
    if tree[0] == "neg":
        return _is_each(tree[1], kind)
    if tree[0] == "rel":
        return tree[1] in (("=",), ("~",)) and _is_each(tree[2][1], kind)
    if tree[0] in ("list", "or", "set"):
        return bool(tree[1]) and all(_is_each(member, kind) for member in tree[1])
    return tree[0] == kind


def _each(tree: Tree, change: Callable[[Tree], Tree]) -> Tree:
    """The tree with its value changed, or each of its values, as `_is_each` counts them."""
    if tree[0] == "neg":
        return ("neg", _each(tree[1], change))
    if tree[0] == "rel":
        return (*tree[:2], (tree[2][0], *(_each(side, change) for side in tree[2][1:])))
    if tree[0] in ("list", "or", "set"):
        return (tree[0], tuple(_each(member, change) for member in tree[1]))
    return change(tree)


@functools.lru_cache(4096)
def read_reference(text: str) -> Answer:
    return read(text)


def _plain_number(text: str) -> int | Fraction | None:
    match = _NUMBER.fullmatch(text)
    if match is None:
        return None
    sign, whole, decimals = match.groups()
    whole = int(whole.replace(",", ""))
    if decimals and decimals.strip(".0"):
        whole += Fraction("0" + decimals)
    return -whole if sign == "-" else whole


def _same(a: Answer, b: Answer) -> bool:
    is_same_time = same_time(a.text, b.text)
    if is_same_time is not None:
        return is_same_time
    if a.based or b.based:
        return a.based == b.based
    if a.tree is None or b.tree is None:
        return _same_text(a, b)
    if _is_anagram(a.text, b.text) or _has_other_parts(a.text, b.text):
        return False
    if differ(a.unit, b.unit):
        return False
    if (a.is_percent and b.unit and not b.is_percent) or (
        b.is_percent and a.unit and not a.is_percent
    ):
        return False
    left, right = a.tree, b.tree
    if same_tree(left, right) or _is_rounding(a, b):
        return True
    if a.is_percent != b.is_percent:
        hundred = ("num", Fraction(100))
        left, right = (
            _each(t, lambda value: ("div", value, hundred)) if x.is_percent else t
            for t, x in ((left, a), (right, b))
        )
        return same_tree(left, right)
    if (a.unit == "degree") != (b.unit == "degree"):
        left, right = (
            _each(t, lambda value: ("degree", value)) if x.unit == "degree" else t
            for t, x in ((left, a), (right, b))
        )
        return same_tree(left, right)
    return _same_text(a, b) if _is_wordlike(b.text) else False


def _is_anagram(answer: str, reference: str) -> bool:
    """Whether two words have the same letters in another order: god for dog, VI for IV.

    The grammar reads short ones as products. `ba` stays right for `ab`, as do `DB` for `BD` and
    `CBA` for `ABC`: choices that are all right, segments, angles and products.
    """
    word, other = _bare_words(reference), words(answer)
    if word.casefold() == other.casefold() or not other.isalpha():
        return False
    if word.isupper():
        is_repeating = len(set(word)) < len(word)  # the sides of coins that fell: TTF
        return is_repeating or word in _CAPITALS or (_is_roman(word) and _is_roman(other))
    if not _WORD.fullmatch(word) and not (len(word) == 3 and word.isalpha()):
        return False
    return bool(_WORD.fullmatch(word)) or not SHORT_NOUNS.isdisjoint((word, other))


def _is_roman(word: str) -> bool:
    """Whether a word is a Roman numeral that is hardly anything else: IV, but not CD, a segment."""
    return bool(_ROMAN.fullmatch(word)) and not set(word).isdisjoint("IVX")


def _has_other_parts(answer: str, reference: str) -> bool:
    """Whether the reference is a date, a range or a score, and the answer has other numbers."""
    reference = _bare_words(reference)
    if not _PARTS.fullmatch(reference):
        return False
    plain = _NO_PARTS.sub("", answer.replace("{,}", ",").replace("\\,", ","))
    wanted, parts = ([int(n) for n in _DIGITS.findall(text)] for text in (reference, plain))
    return parts[: len(wanted)] != wanted  # a unit may have a number behind them: m^2


@functools.lru_cache(4096)
def _bare_words(reference: str) -> str:
    return words(reference)


def _is_wordlike(reference: str) -> bool:
    return is_choice(reference) or reference.isalpha() or is_word_list(reference)


def _same_text(a: Answer, b: Answer) -> bool:
    """For answers outside the grammar: the same words, or the same LaTeX but for spaces."""
    if (b.tree is None or _is_wordlike(b.text)) and same_words(a.text, b.text):
        return True
    if a.tokens is None or b.tokens is None:
        return False
    return bool(a.tokens) and [t[:2] for t in a.tokens] == [t[:2] for t in b.tokens]


def _same_lists(answer: str, reference: str) -> bool:
    """Compares with `1,234` read as two numbers on both sides."""
    a, b = read(answer, join_thousands=False), read(reference, join_thousands=False)
    return bool(a.tree and b.tree and a.tree[0] == b.tree[0] == "list" and _same(a, b))


def _is_rounding(a: Answer, b: Answer) -> bool:
    """Whether the reference is a decimal that rounds the exact answer: 0.33 of 1/3, 3.14 of pi.

    Only for answers that no decimal gives exactly, and references of two decimals and two digits
    or more: 0.8 and 0.75 are taken to be exact otherwise.
    """
    reference = normalise(b.text)
    if not _ROUNDED.fullmatch(reference) or a.is_percent or symbols(a.tree):
        return False
    digits = reference.replace(",", "").lstrip("+-").replace(".", "").lstrip("0")
    if len(digits) < 2 or a.tree[0] not in (
        "num",
        "neg",
        "add",
        "mul",
        "div",
        "pow",
        "call",
        "const",
    ):
        return False
    value = evaluate(a.tree)
    if not values.is_real(value):
        return False
    if isinstance(value, Fraction):
        rest = value.denominator
        while rest % 2 == 0:
            rest //= 2
        while rest % 5 == 0:
            rest //= 5
        if rest == 1:
            return False
    decimals = len(reference.partition(".")[2])
    error = values.absolute(values.sub(value, evaluate(b.tree)))
    return values.order(error, Fraction(1, 2 * 10**decimals)) < 0
