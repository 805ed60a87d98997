"""The development set of 120 graded answers, and GSM8K against itself."""

import json
from pathlib import Path

import pytest
from hanging import soon

from adpo_jax.rewards import good_accuracy

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
DEV = DATA / "grading" / "dev_grading.jsonl"
GSM8K = DATA / "gsm8k" / "train.jsonl"


@pytest.mark.skipif(
    not DEV.exists(),
    reason="the 120 graded answers are not part of the repository: they would be "
    "shared/data/grading/dev_grading.jsonl beside the checkout",
)
def test_the_development_set_is_graded_right_and_runs_nothing():
    rows = [json.loads(line) for line in DEV.read_text().splitlines()]
    canaries = [Path(row["canary"]) for row in rows if "canary" in row]
    assert len(rows) == 120
    assert canaries
    assert not any(path.exists() for path in canaries)
    with soon():
        scores = good_accuracy([r["completion"] for r in rows], [r["solution"] for r in rows])
    assert [r["id"] for r, s in zip(rows, scores) if (s == 1.0) != r["expected"]] == []
    assert not any(path.exists() for path in canaries)


DRESSES = {
    "boxed": "So\nthe answer is $\\boxed{%s}$.",
    "hashes": "So\n#### %s",
    "tag": "<think>So</think>\n<answer>%s</answer>",
    "sentence": "So\nThe answer is %s.",
}
FORMATS = {
    "plain": lambda n: n,
    "thousands": lambda n: f"{int(n):,}" if n.lstrip("-").isdigit() else n,
    "dollars": lambda n: "$" + n,
    "escaped dollars": lambda n: "\\$" + n,
    "cents": lambda n: n + ".00" if "." not in n else n + "0",
}


@pytest.fixture(scope="module")
def solutions():
    if not GSM8K.exists():
        pytest.skip(
            "GSM8K is not part of the repository: it would be shared/data/gsm8k beside the checkout"
        )
    return [json.loads(line)["answer"] for line in GSM8K.read_text().splitlines()]


def _with_another_digit(number: str, i: int) -> str:
    """The number with its i-th digit (counted around) replaced by another one, never by 0."""
    places = [at for at, c in enumerate(number) if c.isdigit()]
    at = places[i % len(places)]
    other = str(int(number[at]) % 9 + 1)
    return number[:at] + ("1" if other == number[at] else other) + number[at + 1 :]


@pytest.mark.parametrize("dress", DRESSES)
def test_gsm8k_answers_are_right_in_every_dress_and_wrong_with_a_digit_changed(dress, solutions):
    numbers = [s.split("####")[1].strip().replace(",", "") for s in solutions]
    assert len(numbers) == 7473
    others = [_with_another_digit(n, i) for i, n in enumerate(numbers)]
    for name, write in FORMATS.items():
        right = good_accuracy([DRESSES[dress] % write(n) for n in numbers], solutions)
        assert right == [1.0] * len(numbers), name
        wrong = good_accuracy([DRESSES[dress] % write(n) for n in others], solutions)
        assert max(wrong) <= 0.0, name
