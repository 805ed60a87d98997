"""Whether an answer equals the reference."""

import re
from fractions import Fraction
from typing import NamedTuple

from adpo_jax.rewards.limits import MAX_ANSWER_CHARS

_NUMBER = re.compile(
    r"[-+]?(?:[0-9]{1,3}(?:,[0-9]{3}){1,20}|[0-9]{1,60})(?:\.[0-9]{0,60})?|[-+]?\.[0-9]{1,60}"
)


class Verdict(NamedTuple):
    """Whether the answer is right, and whether it could be read at all."""

    right: bool
    parsed: bool


def compare(answer: str, reference: str) -> Verdict:
    """Compares an answer with the reference, both without boxes and tags."""
    if len(answer) > MAX_ANSWER_CHARS:
        return Verdict(False, False)
    a, b = (s.strip().replace("$", "").replace("\\", "").strip() for s in (answer, reference))
    if a == b and a:
        return Verdict(True, True)
    x, y = _number(a), _number(b)
    return Verdict(x is not None and x == y, x is not None)


def _number(text: str) -> Fraction | None:
    if not _NUMBER.fullmatch(text):
        return None
    return Fraction(text.replace(",", "").rstrip("."))
