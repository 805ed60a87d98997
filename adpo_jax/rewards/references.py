"""Whether the references of a data set can be matched at all.

A reference that no completion can equal gives reward 0 for ever. Each is put in a box and graded
against itself, as a perfect completion would be, before anything is sampled.

Left out: whether a reference is the right answer to its prompt.
"""

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from adpo_jax.rewards.grading.compare import compare
from adpo_jax.rewards.grading.extract import find_answer, find_reference, only_element, written
from adpo_jax.rewards.grading.limits import MAX_ANSWER_CHARS
from adpo_jax.rewards.grading.sentence import is_readable

BUDGET_S = 3.0
REFUSED_SHARE = 0.1  # of references without a match; a few stray rows of a large set are counted
_SHOWN = 3
_MAX_WORDS = 8  # of an answer that is given in words


@dataclass
class Findings:
    """What the check of a data set found.

    Attributes:
      num_rows: rows that were looked at, before the budget was spent.
      unmatched: the number of rows whose reference nothing equals.
      prose: the number of rows whose reference only the same words equal.
      examples: the first unmatched rows, each with its place and what is wrong with it.
      is_complete: whether all rows were looked at.
    """

    num_rows: int = 0
    unmatched: int = 0
    prose: int = 0
    examples: list[str] = field(default_factory=list)
    is_complete: bool = True


def fault_of(reference: Any) -> str | None:
    """Why no completion can equal a reference: "is empty", "is a dict"; None where one can."""
    reference = only_element(reference)
    if isinstance(reference, list | tuple | set) or getattr(reference, "ndim", 0):
        return f"is a list of {len(reference)} values"
    if isinstance(reference, dict):
        return "is a dict"
    if reference is None:
        return "is null"
    if isinstance(reference, float) and math.isnan(reference):
        return "is NaN"
    if written(reference) is None:
        return "is longer than an answer may be"
    text = find_reference(reference)
    if not text:
        return "is empty"
    if text.lower() == "nan":
        return "is NaN"
    if text.startswith(("['", '["', "{'", '{"')) and text.endswith(("]", "}")):
        return "is a list or a dict written as text"
    if len(text) > 2 * MAX_ANSWER_CHARS:
        return "is longer than an answer may be"
    answer = find_answer(f"\\boxed{{{text}}}")
    if not answer or answer.split() != text.split():
        return "does not fit into a box, as its braces do not match"
    if not compare(answer, text).right:
        return "does not equal itself"
    return None


def look_over(
    references: Iterable[Any], where: Callable[[int], str], *, budget_s: float = BUDGET_S
) -> Findings:
    """Checks each distinct reference once.

    Args:
      references: one a row, of any type.
      where: from a row's number, counted from 0, to its place for people ("train.jsonl:7").
      budget_s: the time after which the rest of the rows is left unchecked.
    """
    findings = Findings()
    known: dict[str, tuple[str | None, bool]] = {}
    ends = time.monotonic() + budget_s
    for row, reference in enumerate(references):
        if row % 64 == 63 and time.monotonic() > ends:
            findings.is_complete = False
            break
        verdict = known.get(reference) if isinstance(reference, str) else None
        if verdict is None:
            fault = fault_of(reference)
            verdict = fault, fault is None and _is_prose(reference)
            if isinstance(reference, str):
                known[reference] = verdict
        fault, is_prose = verdict
        findings.num_rows += 1
        findings.prose += is_prose
        if fault is not None:
            findings.unmatched += 1
            if len(findings.examples) < _SHOWN:
                findings.examples.append(f"{where(row)}: {_shorten(reference)} {fault}")
    return findings


def check_references(
    references: Iterable[Any],
    where: Callable[[int], str],
    *,
    column: str,
    may_refuse: bool = True,
    budget_s: float = BUDGET_S,
) -> list[str]:
    """Warnings about references that nothing, or hardly anything, can equal.

    Args:
      references: one a row, of any type.
      where: from a row's number, counted from 0, to its place for people.
      column: what the user calls the references, as "data.answer_key='answer'".
      may_refuse: whether many of them are an error; not where other rewards may grade those rows.
      budget_s: seconds that the check may take.

    Raises:
      ValueError: more than a tenth of the references can be matched by nothing.
    """
    found = look_over(references, where, budget_s=budget_s)
    rows = f"{found.num_rows} rows" if found.is_complete else f"the first {found.num_rows} rows"
    warnings = []
    if found.unmatched:
        message = (
            f"{column}: no completion can match the reference of {found.unmatched} of {rows}, so "
            f"their reward would always be 0: {'; '.join(found.examples)}"
            f"{'; ...' if found.unmatched > len(found.examples) else ''}. Give each row one answer "
            "as text or a number, name the right column, or grade with a reward function of your "
            "own (custom_reward_function.path)"
        )
        if may_refuse and found.unmatched > REFUSED_SHARE * found.num_rows:
            raise ValueError(message)
        warnings.append(message)
    if found.prose:
        warnings.append(
            f"{column}: the reference of {found.prose} of {rows} is prose, which a completion "
            "matches only with the very same words; for worked solutions end each with "
            "\\boxed{} or #### and the answer"
        )
    if not found.is_complete:
        warnings.append(
            f"{column}: the references of {rows} were checked in {budget_s:g} s, the others were "
            "not"
        )
    return warnings


def _is_prose(reference: Any) -> bool:
    text = find_reference(reference)
    return len(text.split()) > _MAX_WORDS and not is_readable(text)


def _shorten(value: Any) -> str:
    if written(value) is None:
        return "a huge number"
    text = ascii(value)
    return text if len(text) <= 60 else text[:57] + "..."
