"""Coverage-guided fuzzing of the grader, by hand: `pip install atheris`, then

    python scripts/fuzz_grading.py -max_total_time=600 -rss_limit_mb=1024

Fails on any exception, on a comparison of over 0.2 s of processor time, and on memory that grows.
"""

import sys
import time

import atheris

with atheris.instrument_imports(include=["adpo_jax.rewards"]):
    from adpo_jax.rewards.builtin import good_accuracy
    from adpo_jax.rewards.grading.compare import compare

MAX_SECONDS = 0.2
WORDS = r"""
    \frac \dfrac { } ( ) [ ] \{ \} 1 2 12 0 7 0.5 1e5 99 x y n e i \pi \sqrt \sqrt[3] ^ ^{ ^2 _ ! \%
    + - * / \cdot = < \le \ne , ; : | \left( \right) \text{ \text{and} or and \cup \setminus \in
    \infty \pm \sin \cos \tan \ln \log_2 \arcsin \exp \binom \begin{pmatrix} \end{pmatrix} & \\ 400
    \boxed{ \circ ^\circ \lfloor \rfloor \mathbb{R} $ million apples cm ** \approx \overline{3} max(
    gcd( sqrt( |x| 123456789012345678901234567890 n! e^{ \tan( \gamma ½ ∞ <answer> #### answer: 60!
""".split()  # noqa: SIM905
REFERENCES = [
    "12", r"\frac{3}{8}", "x^2-9", "(2,7]", r"\{4,9\}", r"\sqrt{5}", "y=3x-4", "2-5i", "3^{n+2}",
    r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", r"\infty", "C", r"\text{Monday}", "x>3", "0.33", "n!",
    r"15\%", r"\tan^2 y+1", r"(0,1)\cup(1,3)", "1011_2", r"3\pm\sqrt2", "|x|", r"10\text{ cm}",
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
    started = time.process_time()
    compare(answer, reference)
    seconds = time.process_time() - started
    if seconds > MAX_SECONDS:
        raise AssertionError(f"{seconds:.2f} s for {answer!r} against {reference!r}")
    (score,) = good_accuracy([answer], [reference])
    assert score == 1.0 or -0.05 <= score <= 0.0


if __name__ == "__main__":
    atheris.Setup(sys.argv, test_one_input)
    atheris.Fuzz()
