import re

import pytest

from adpo_jax.data import arithmetic
from adpo_jax.rewards import good_accuracy


def solve(question: str) -> list[int]:
    """The totals after each change, read from the words, independently of the generator."""
    totals = [int(re.search(r"has (\d+)", question)[1])]
    for change in re.search(r"\. \w+ (.*)\. How", question)[1].split(", "):
        verb, operand = change.split()
        if change == arithmetic.DOUBLE:
            totals.append(totals[-1] * 2)
        elif verb in arithmetic.GAINS:
            totals.append(totals[-1] + int(operand))
        else:
            assert verb in arithmetic.LOSSES
            totals.append(totals[-1] - int(operand))
    return totals


def test_answers_and_their_working_are_what_the_words_say():
    rows = arithmetic.rows("val")
    for question, answer in zip(rows["question"], rows["answer"]):
        totals = solve(question)
        working, final = answer.split(" #### ")
        assert int(final) == totals[-1]
        assert [int(n) for n in re.findall(r": (\d+)", working)] == totals[1:]
        assert all(0 < total <= arithmetic.LARGEST for total in totals)


def test_no_verb_comes_twice_in_a_problem():
    for question in arithmetic.rows("val")["question"]:
        verbs = [change.split()[0] for change in question.split(". ")[1].split(", ")]
        assert len(set(verbs)) == len(verbs)


def test_splits_are_disjoint_and_the_same_every_time():
    splits = {name: arithmetic.rows(name) for name in ("train", "val", "demonstrations")}
    questions = {name: set(rows["question"]) for name, rows in splits.items()}
    assert not questions["train"] & questions["val"]
    assert not questions["demonstrations"] & (questions["train"] | questions["val"])
    assert splits["val"] == arithmetic.rows("val")
    with pytest.raises(ValueError, match="has the splits"):
        arithmetic.rows("test")


def test_most_demonstrations_blurt_out_a_wrong_answer_and_those_with_working_are_right():
    rows = arithmetic.rows("demonstrations")
    solutions = [answer.rsplit("#### ", 1)[1] for answer in rows["answer"]]
    right = [reward == 1.0 for reward in good_accuracy(rows["completion"], solutions)]
    careful = [":" in text for text in rows["completion"]]
    assert right == careful
    share = sum(careful) / len(careful)
    assert abs(share - arithmetic.CAREFUL_SHARE) < 0.02
    assert share < 0.5


def test_the_tokenizer_keeps_numbers_whole_and_gives_every_text_back():
    tokenizer = arithmetic.make_tokenizer()
    assert len(tokenizer) <= arithmetic.MODEL_CONFIG["vocab_size"]
    rows = arithmetic.rows("demonstrations")
    for text in rows["question"][:50] + rows["answer"][:50]:
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    for number in range(2, arithmetic.LARGEST + 1):
        assert len(tokenizer(f" {number}")["input_ids"]) == 1
