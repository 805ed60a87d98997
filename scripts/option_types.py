"""Types of options for the scripts beside this file: `argparse` refuses what they do not take.

parser.add_argument("--repeats", type=integer(1), default=3)
parser.add_argument("--staleness", type=listed(integer(0)), default="0,1,2,4")
parser.add_argument("--cases", type=listed(among(CASES)), default=",".join(CASES))
"""

import argparse
import math
from collections.abc import Callable, Iterable
from typing import Any


def integer(least: int) -> Callable[[str], int]:
    """A whole number from `least` on."""

    def read(text: str) -> int:
        try:
            found = int(text)
        except ValueError:
            found = None
        if found is None or found < least:
            raise argparse.ArgumentTypeError(f"wanted a whole number from {least}; given {text!r}")
        return found

    return read


def real(*, least: float = -math.inf, above: float = -math.inf) -> Callable[[str], float]:
    """A finite number, not below `least` and larger than `above`."""
    bounds = {"of at least": least, "above": above}
    told = "".join(f" {word} {bound:g}" for word, bound in bounds.items() if bound != -math.inf)

    def read(text: str) -> float:
        try:
            found = float(text)
        except ValueError:
            found = math.nan
        if not (math.isfinite(found) and found >= least and found > above):
            raise argparse.ArgumentTypeError(f"wanted a finite number{told}; given {text!r}")
        return found

    return read


def among(names: Iterable[str]) -> Callable[[str], str]:
    """One of several names."""
    known = tuple(names)

    def read(text: str) -> str:
        if text not in known:
            raise argparse.ArgumentTypeError(f"there are {', '.join(known)}; given {text!r}")
        return text

    return read


def listed(of: Callable[[str], Any], *, least: int = 1) -> Callable[[str], list]:
    """Values with commas between them, at least so many, each as `of` reads it."""

    def read(text: str) -> list:
        found = [of(part.strip()) for part in text.split(",")] if text else []
        if len(found) < least:
            raise argparse.ArgumentTypeError(
                f"wanted {least} or more, with commas between; given {text!r}"
            )
        return found

    return read
