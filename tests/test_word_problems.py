import re

import numpy as np
import pytest

from adpo_jax.config import default_config
from adpo_jax.data import arithmetic, embedded, word_problems
from adpo_jax.rewards import good_accuracy
from adpo_jax.run import datasets

STEP = re.compile(r"(\d+) ([-+*/]) (\d+) = (\d+)")
WORDS = {"twice": 2, "three times": 3, "four times": 4}


@pytest.fixture(scope="module")
def splits():
    return {name: word_problems.rows(name) for name in ("train", "val", "demonstrations")}


def test_the_working_is_right_and_uses_the_storys_numbers_alone(splits):
    counts = []
    for question, answer in zip(splits["val"]["question"], splits["val"]["answer"]):
        working, final = answer.rsplit(" #### ", 1)
        known = {int(n) for n in re.findall(r"\d+", question)}
        known |= {n for word, n in WORDS.items() if word in question}
        steps = STEP.findall(working)
        for first, sign, second, result in steps:
            a, b, c = int(first), int(second), int(result)
            assert {"+": a + b, "-": a - b, "*": a * b, "/": a / b}[sign] == c > 0, answer
            assert {a, b} <= known, (question, answer)
            known.add(c)
        assert int(final) == int(steps[-1][3])
        counts.append(len(steps))
    assert set(counts) == {1, 2, 3}


def test_splits_are_disjoint_without_repeats_and_decided_by_the_seed(splits):
    questions = [question for rows in splits.values() for question in rows["question"]]
    assert len(set(questions)) == len(questions)
    assert len(splits["val"]["question"]) == 256
    assert splits["val"] == word_problems.rows("val", seed=0)
    assert not set(splits["val"]["question"]) & set(word_problems.rows("val", seed=1)["question"])
    with pytest.raises(ValueError, match="has the splits"):
        word_problems.rows("test")


def test_easier_problems_have_fewer_steps_and_smaller_numbers():
    rows = embedded.rows("embedded:word_problems?max_steps=2&largest=12", "val")
    assert len(set(rows["question"])) == 256
    counts = set()
    for question, answer in zip(rows["question"], rows["answer"], strict=True):
        counts.add(len(STEP.findall(answer)))
        assert max(map(int, re.findall(r"\d+", question + answer))) <= 12
    assert counts == {1, 2}
    assert embedded.rows(word_problems.NAME, "val") == word_problems.rows("val")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("max_steps=4", "max_steps is 1 to 3; given 4"),
        ("largest=9", "largest is 10 to 1000; given 9"),
        ("largest=many", "largest is a whole number; given 'many'"),
        ("largest", "options are name=value; given 'largest'"),
        ("steps=2", "has the options max_steps, largest, seed; given 'steps'"),
    ],
)
def test_options_that_there_are_not_are_told(options, message):
    with pytest.raises(ValueError, match=message):
        embedded.rows(f"{word_problems.NAME}?{options}", "val")


def test_problems_differ_in_more_than_names_and_numbers(splits):
    names = "|".join(name for names in word_problems._NAMES.values() for name in names)
    plots = {re.sub(rf"\b({names})\b|\d+", "_", q) for q in splits["val"]["question"]}
    assert len(plots) > 180


def test_demonstrations_blurt_out_mostly_wrong_answers_and_their_working_is_right(splits):
    rows = splits["demonstrations"]
    solutions = [answer.rsplit("#### ", 1)[1] for answer in rows["answer"]]
    right = np.array(good_accuracy(rows["completion"], solutions)) == 1.0
    careful = np.array(["=" in text for text in rows["completion"]])
    assert right[careful].all()
    assert abs(careful.mean() - word_problems.CAREFUL_SHARE) < 0.03
    assert abs(right[~careful].mean() - word_problems.LUCKY_SHARE) < 0.03
    assert [c for c, k in zip(rows["completion"], careful) if k] == [
        a for a, k in zip(rows["answer"], careful) if k
    ]


def test_a_run_trains_and_evaluates_on_word_problems_by_their_name(splits):
    config = default_config()
    config.data.prompt_template = "{prompt}\n"
    config.data.max_val_samples = 20
    config.data.val_files = word_problems.NAME
    tokenizer = arithmetic.make_tokenizer()
    prompts = datasets.load_val_prompts(config, tokenizer)
    assert prompts.columns["question"] == splits["val"]["question"][:20]
    assert tokenizer.decode(prompts.token_ids[3]) == splits["val"]["question"][3] + "\n"
    assert prompts.columns["solution"][3] == splits["val"]["answer"][3].rsplit("#### ", 1)[1]
    config.data.answer_key = "solution_text"
    with pytest.raises(ValueError, match="embedded:word_problems has the columns"):
        datasets.load_prompts(config, tokenizer, word_problems.NAME, split="train")
