"""References that no completion can match are told before a run, with their rows."""

import json
import logging

import numpy as np
import pytest

from adpo_jax.config import default_config
from adpo_jax.data import arithmetic
from adpo_jax.rewards import good_accuracy
from adpo_jax.rewards.references import check_references, fault_of, look_over
from adpo_jax.run import datasets

MATCHED = [
    "5", "The answer is 5.", "**5**", "`5`", ["5"], '["5"]', 5, 5.0, "5 dollars", r"\boxed{5}",
    np.array(["5"]), np.array([5]), np.array(["5"], object), np.int64(5),
    "2 + 3 = <<2+3=5>>5\n#### 5", "#### **5**", "<answer>5</answer>", "Answer: 5",
]  # fmt: skip


@pytest.mark.parametrize("reference", MATCHED, ids=ascii)
def test_a_reference_in_any_dress_is_matched_by_its_answer(reference):
    assert fault_of(reference) is None
    assert good_accuracy([r"so \boxed{5}", r"so \boxed{6}"], [reference] * 2)[0] == 1.0
    assert good_accuracy([r"so \boxed{6}"], [reference])[0] <= 0.0


@pytest.mark.parametrize(
    ("reference", "fault"),
    [
        (["5", "6"], "is a list of 2 values"),
        ([], "is a list of 0 values"),
        ('["5", "6"]', "a list or a dict written as text"),
        ({"tests": []}, "is a dict"),
        (float("nan"), "is NaN"),
        ("nan", "is NaN"),
        ("", "is empty"),
        (" \n", "is empty"),
        ("{5", "braces do not match"),
        ("5" * 1300, "is longer than an answer may be"),
        (np.array(["5", "6"]), "is a list of 2 values"),
        (np.array([]), "is a list of 0 values"),
    ],
)
def test_a_reference_that_nothing_matches_has_a_fault(reference, fault):
    assert fault in fault_of(reference)


def test_each_distinct_reference_is_checked_once_and_no_longer_than_the_budget():
    found = look_over((f"x+{i}" for i in range(10**6)), str, budget_s=0.1)
    assert 0 < found.num_rows < 10**6
    assert not found.is_complete
    few = look_over([str(i % 7) for i in range(100_000)], str, budget_s=5.0)
    assert few.is_complete
    assert few.num_rows == 100_000


def test_a_few_unmatched_references_are_counted_and_many_are_refused():
    rows = ["5"] * 97 + ["", float("nan"), ["\x1b[2J", "6"]]
    (warning,) = check_references(rows, lambda i: f"a.jsonl: row {i + 1}", column="c")
    assert "no completion can match the reference of 3 of 100 rows" in warning
    assert "a.jsonl: row 98: '' is empty" in warning
    assert "\x1b" not in warning
    with pytest.raises(ValueError, match=r"of 3 of 4 rows.*row 1: '' is empty.*one answer as text"):
        check_references([*rows[-3:], "5"], lambda i: f"a.jsonl: row {i + 1}", column="c")
    assert check_references(["", ""], str, column="c", may_refuse=False)


def test_a_reference_of_thousands_of_digits_is_told_in_plain_words():
    assert fault_of([10**6000]) == "is longer than an answer may be"
    with pytest.raises(ValueError, match="1: a huge number is longer than an answer may be"):
        check_references(["5", -(10**6000)], str, column="c")
    assert good_accuracy(["5"], [10**6000])[0] <= 0.0


def test_references_of_prose_are_told():
    prose = "Since every side is as long as the others the figure is a square"
    (warning,) = check_references([prose, "5"], str, column="c")
    assert "of 1 of 2 rows is prose" in warning


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = [{"question": "1+1=", "answer": "2"}, {"question": "1+2=", "answer": ["3", "4"]}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def _load(data, split="train", **changes):
    config = default_config()
    with config.unlocked():
        config.update_from_flattened_dict(changes)
    return datasets.load_prompts(config, arithmetic.make_tokenizer(), str(data), split=split)


def test_data_of_references_that_nothing_matches_are_refused_with_file_and_row(data):
    with pytest.raises(ValueError, match=r"rows.jsonl: row 2: \['3', '4'\] is a list of 2 values"):
        _load(data)


def test_only_data_that_a_ready_grader_grades_are_checked(data, caplog):
    own = {"custom_reward_function.path": "my.py", "custom_reward_function.name": "f"}
    assert len(_load(data, **own)) == 2
    with pytest.raises(ValueError, match="rows.jsonl: row 2"):
        _load(data, "val", **own, **{"eval.graded_by": "accuracy"})
    both = ({"name": "good_accuracy"}, {"path": "my.py", "name": "f"})
    with caplog.at_level(logging.WARNING):
        assert len(_load(data, reward_functions=both)) == 2
    assert "rows.jsonl: row 2" in caplog.text
