"""Coverage-guided fuzzing of the grader, by hand: `pip install atheris`, then

    python scripts/fuzz_grading.py -max_total_time=600 -rss_limit_mb=1024

Fails on any exception, on any fault that the grader reports instead of raising, on a comparison of
over 0.2 s of processor time, and on memory that grows.
"""

import sys
import time

import atheris

with atheris.instrument_imports(include=["adpo_jax.rewards"]):
    from adpo_jax.rewards.builtin import good_accuracy
    from adpo_jax.rewards.grading import faults
    from adpo_jax.rewards.grading.compare import compare
    from adpo_jax.rewards.grading.vocabulary import vocabulary

MAX_SECONDS = 0.2
# Of the grammar, from the grader's own tables; beside them numbers and what surrounds an answer.
WORDS = vocabulary() + [
    "1", "2", "12", "0", "7", "0.5", "1e5", "99", "400", "1" * 30, "3:30", r"\log_2", r"\sqrt[3]",
    "½", "∞", "γ", "<answer>", "####", "answer:", "60!", "apples", "|x|", "max(", "sqrt(", "e^{",
    "the answer is", "The answer:\n- ", "even", ". Wait,", "that can't be right.", "It is",
    "I meant", "no, ", "if", "but", "thinks", "wrong", "\n", "(about)", "in 2 months",
]  # fmt: skip
REFERENCES = [
    "12", r"\frac{3}{8}", "x^2-9", "(2,7]", r"\{4,9\}", r"\sqrt{5}", "y=3x-4", "2-5i", "3^{n+2}",
    r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", r"\infty", "C", r"\text{Monday}", "x>3", "0.33", "n!",
    r"15\%", r"\tan^2 y+1", r"(0,1)\cup(1,3)", "1011_2", r"3\pm\sqrt2", "|x|", r"10\text{ cm}",
    "2:3", "3:30 PM", r"\begin{cases}x=1\\y=2\end{cases}", "2^{2009}-1", "2009!", "B, C",
]  # fmt: skip


def test_one_input(data: bytes) -> None:
    source = atheris.FuzzedDataProvider(data)
    reference = REFERENCES[source.ConsumeIntInRange(0, len(REFERENCES) - 1)]
    if source.ConsumeBool():
        answer = source.ConsumeUnicode(1000)
    else:
        glue = " " if source.ConsumeBool() else ""
        count = source.ConsumeIntInRange(0, 200)
        answer = glue.join(WORDS[source.ConsumeIntInRange(0, len(WORDS) - 1)] for _ in range(count))
    with faults.collected() as found:
        started = time.process_time()
        compare(answer, reference)
        seconds = time.process_time() - started
        if seconds > MAX_SECONDS:
            raise AssertionError(f"{seconds:.2f} s for {answer!r} against {reference!r}")
        (score,) = good_accuracy([answer], [reference])
    if found:
        raise AssertionError(found[0])
    assert score == 1.0 or -0.05 <= score <= 0.0


if __name__ == "__main__":
    atheris.Setup(sys.argv, test_one_input)
    atheris.Fuzz()
