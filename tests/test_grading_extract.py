"""Finding the answer in a completion."""

import pytest
from hanging import soon

from adpo_jax.rewards.grading.extract import find_answer, find_reference

FOUND = {
    "the last box": (r"Maybe \boxed{6}? No: \boxed{2}.", "2"),
    "nested braces": (r"\boxed{\frac{1}{1+\frac{1}{3}}}", r"\frac{1}{1+\frac{1}{3}}"),
    "the outer of nested boxes": (r"\boxed{x = \boxed{5}}", r"x = \boxed{5}"),
    "an unclosed box counts for nothing": (r"\boxed{3} and then \boxed{4", "3"),
    "a box inside an unclosed one": (r"\boxed{ so \boxed{4}", "4"),
    "escaped braces": (r"\boxed{\{4, 9\}}", r"\{4, 9\}"),
    "an fbox": (r"\fbox{7}", "7"),
    "a space before the brace": (r"\boxed {7}", "7"),
    "a box without braces": (r"so $\boxed 5$.", "5"),
    "a box without braces or space": (r"so $\boxed5$.", "5"),
    "an empty box": (r"\boxed{}", ""),
    "a box beats a later tag": (r"\boxed{4} <answer>3</answer>", "4"),
    "the last tag": ("<answer>3</answer> no <answer> 4 </answer>", "4"),
    "an unclosed tag counts for nothing": ("<answer>3</answer> no <answer>4", "3"),
    "a tag beats hashes": ("#### 3\n<answer>4</answer>", "4"),
    "a sentence in a tag": ("<answer>The answer is 4.</answer>", "4"),
    "hashes": ("2+3=5\n#### 5", "5"),
    "the last hashes": ("#### 5\nor rather\n#### 6\n", "6"),
    "hashes with words after": ("#### 72 clips", "72 clips"),
    "hashes beat a sentence": ("The answer is 4\n#### 5", "5"),
    "a heading is no answer": ("#### Step 2: add\nThe answer is 5.", "5"),
    "a sentence": ("So the answer is 18.", "18"),
    "a sentence with maths": (r"The final answer is $\frac{3}{4}$.", r"$\frac{3}{4}$"),
    "a label": ("Answer: 8", "8"),
    "a bold label": ("**Final Answer:** 8", "8"),
    "a label above": ("**Answer**:\n8", "8"),
    "only the sentence": ("The answer is 18. I am sure of it.", "18"),
    "a sentence about something": ("The answer to the question is 18", "18"),
    "the last sentence": ("The answer is 17. Wait, the answer is 18.", "18"),
    "decimals are no end of a sentence": ("The answer is 3.14.", "3.14"),
    "a last line": ("Adding up.\n\n31\n", "31"),
    "a bold last line": ("Adding up.\n**31**", "31"),
    "a last line in display maths": ("So:\n\\[\n31\n\\]", "31"),
    "after thinking": (r"<think>\boxed{24}?</think><answer>25</answer>", "25"),
    "a sentence that announces a line": ("The final answer is on the next line.\n0.64", "0.64"),
    "a factorial": ("So it is\n5!", "5!"),
    "a line after a thought": ("<think>Maybe the answer is 6. No.</think>\n7", "7"),
    "a bold line after a draft": ("<think>\\boxed{42}? No.</think>\n\n**41**", "41"),
    "maths after a draft": ("<think>\\boxed{42}? No.</think>\n\n$41$", "$41$"),
    "display maths after a draft": ("<think>\n#### 42\nNo.</think>\n$$\nx = 41\n$$", "x = 41"),
    "a choice after a draft": ("<think><answer>A</answer>?</think>\n\n(B)", "(B)"),
    "a choice with its text after a draft": ("<think>\\boxed{A}?</think>\n\nB. Rome", "B. Rome"),
    "an item after a draft": ("<think>so \\boxed{24}</think>\n\nIn total:\n\n- 72", "72"),
    "a source after a draft": ("<think>so \\boxed{24}</think>\n\nDone.\n\n[1]", "24"),
    "a check after a draft": ("<think>so \\boxed{3}</think>\n\n$$2\\cdot 3+1=7$$", "3"),
    "a word after a draft": ("<think>so \\boxed{24}</think>\n\nOK", "24"),
    "a sentence after a draft": ("<think>so \\boxed{24}</think>\n\nShe has 2 cats.", "24"),
    "only while thinking": (r"<think>so \boxed{24}</think> That is all.", "24"),
}


@pytest.mark.parametrize("case", FOUND)
def test_the_answer_is_found(case):
    completion, answer = FOUND[case]
    assert find_answer(completion) == answer


@pytest.mark.parametrize("completion", ["", "   \n ", "x" * 5000])
def test_nothing_is_found_where_nothing_can_be_an_answer(completion):
    assert not find_answer(completion)


@pytest.mark.parametrize(
    ("solution", "reference"),
    [
        ("42", "42"),
        (42, "42"),
        (0.5, "0.5"),
        ("She pays 2+3 = <<2+3=5>>5 dollars.\n#### 5", "5"),
        (r"We get $x=\boxed{\frac{1}{2}}$.", r"\frac{1}{2}"),
        ("<answer>7</answer>", "7"),
        ("**5**", "5"),
        ("`5`", "5"),
        ("The answer is 5.", "5"),
        (["5"], "5"),
        ('["5"]', "5"),
        ("#### **5**", "5"),
        ("(1, 2)", "(1, 2)"),
        (r"\text{Monday}", r"\text{Monday}"),
        ("the answer to everything", "the answer to everything"),
    ],
)
def test_a_worked_solution_is_reduced_to_its_answer(solution, reference):
    assert find_reference(solution) == reference


@pytest.mark.parametrize(
    "piece",
    ["\\boxed{", "{", "}", "\\boxed{1}", "<answer>", "</answer>", "<answer>1</answer>", "####",
     "#### a b\n", "answer", "answer is ", "answer to ", "the answer is: **", "\\boxed ", "\n", " ",
     "</think>", "\\", "$", "2 ", "**", "<b>", "<<", "🎉", "the answer is not ", "\\[ ",
     "#### so 7 since b\n", "answer: x7 as b so c since d for e\n", "7 is the answer ",
     "the answer is 7. wait, that is not it. it is ", "answer is 7\n- 7\n",
     "the answer is 7" + " wait, no, " * 5000, "the answer is 7\n" + ", that is " * 5000],
)  # fmt: skip
def test_finding_takes_time_linear_in_a_hostile_text(piece):
    text = piece * (1_000_000 // len(piece))
    with soon():
        find_answer(text)
