"""What a model might write to fool, hang or take over its grader."""

import re
import subprocess
import sys
import tracemalloc
from pathlib import Path

import pytest
from hanging import soon

from adpo_jax.rewards import exact_match, format_reward, good_accuracy
from adpo_jax.rewards.grading.compare import compare

CANARY = Path("/tmp/adpo_jax_grading_canary")
TOUCH = f"__import__('os').system('touch {CANARY}')"
REFERENCES = ["12", r"\frac{3}{4}", "x+3", r"\sqrt{5}", r"\{1,2\}", "(0,1)", r"\text{yes}", "x=2"]

CODE = [
    TOUCH,
    f'eval("{TOUCH}")',
    f'exec("{TOUCH}")',
    f"12 if {TOUCH} else 0",
    f"12+0*{TOUCH}",
    f"12; {TOUCH}",
    f"12 #{TOUCH}",
    f"lambda: {TOUCH}",
    f"[12 for _ in [{TOUCH}]][0]",
    f"\\text{{{TOUCH}}}",
    f"\\operatorname{{{TOUCH}}}(12)",
    f"\\sqrt[{TOUCH}]{{12}}",
    f"x_{{{TOUCH}}}",
    f"f({TOUCH})",
    f"{{12: {TOUCH}}}",
    f"(12, {TOUCH})",
    f"\\begin{{pmatrix}} {TOUCH} \\end{{pmatrix}}",
    f"\\log_{{{TOUCH}}} 12",
    f"12_{{{TOUCH}}}",
    "().__class__.__mro__[1].__subclasses__()",
    "12.__class__.__base__.__subclasses__()",
    f"{{{{{TOUCH}}}}}",
    f"%({TOUCH})s",
    f"`touch {CANARY}`",
    f"$(touch {CANARY})",
    f"\\input{{|touch {CANARY}}}",
    f"\\write18{{touch {CANARY}}}",
    f"Symbol('x); {TOUCH} #')",
    f"open('{CANARY}', 'w')",
    "import os",
    "globals()",
    "0x0c",
    "0b1100",
    "int('12')",
    "True*12",
    "len('abcdefghijkl')",
]
BOMBS = [
    "8^{8^{8^{8}}}",
    "9^{9^{9^{9^{9}}}}",
    "10^10^7",
    "10**10**8",
    "10^{10^{7}}",
    "(10^{400})^{400}",
    "2^{-99999999}",
    "(((8!)!)!)!",
    "170!",
    "999999999!",
    "99999999999!!",
    r"\binom{999999999}{499999999}",
    r"\binom{10^9}{10^8}",
    r"\gcd(10^{400},10^{399})^{1000}",
    "1e999999999",
    "1e-999999999",
    "9" * 30_000,
    "0." + "9" * 30_000,
    "0." + "0" * 30_000 + "12",
    "(a+b+c+d)^{150}",
    "(x+1)^{99999}",
    "(x^{500}+1)^{500}",
    r"\sqrt[99999999]{12}",
    r"\sin(10^{300})",
    r"e^{e^{e^{e^{9}}}}",
    r"\exp(\exp(\exp(100)))",
    r"\tan(\frac{\pi}{2})",
    r"\Gamma(10^9)",
    r"\frac{1}{0}",
    r"\frac{0}{0}",
    "0^0",
    "0^{-1}",
    r"\ln 0",
    r"\log_1 5",
    r"\int_0^{1} \frac{\sin(x^5)\ln(2+x)}{e^{x}+x^3} dx",
    r"\sum_{n=1}^{10^9} n",
    r"\prod_{n=1}^{\infty} n",
    r"\lim_{x\to 0} x",
    "+".join(["n!"] * 140),
    "+".join([r"\sin x"] * 90),
    r"\pm ".join(["1"] * 200),
    r"\cup ".join(["(1,2)"] * 50),
    ",".join(["1"] * 290),
    "".join([r"\frac{1}{1+"] * 30 + ["x"] + ["}"] * 30),
    "-" * 290 + "12",
    "x^" * 140 + "2",
    "2^-" * 90 + "2",
    r"\sin " * 140 + "2",
    "12" + "!" * 280,
    "12" + "%" * 280,
    "12" + r"^\circ" * 90,
    "2" + r"\frac2" * 90,
    r"2\frac{" * 35 + "1" + "}{2}" * 35,
    r"2\frac{1}{" * 35 + "2" + "}" * 35,
    r"n!**\ln" + "½" * 13 + "12n" + r"\frac" * 34,
    "|" * 290,
    "|x" * 140,
]
STRUCTURES = [
    "\\boxed{" * 10_000,
    "\\boxed{" * 10_000 + "12" + "}" * 10_000,
    "\\boxed{" + "{" * 10_000 + "12" + "}" * 10_000 + "}",
    "\\boxed{" + "(" * 10_000 + "12" + ")" * 10_000 + "}",
    "\\boxed{" + "(" * 250 + "12" + ")" * 250 + "}",
    "\\boxed{" + "\\frac{2}{" * 5_000 + "2" + "}" * 5_000 + "}",
    "<answer>" * 100_000,
    "<answer>" * 100_000 + "</answer>" * 100_000,
    "</answer>" * 100_000,
    "#### " * 100_000,
    "\n" * 1_000_000,
    "the answer is " * 70_000,
    "{" * 1_000_000,
    "\\" * 1_000_000,
    "a" * 1_000_000,
    "1" * 1_000_000,
    "b " * 500_000,
    "2 " * 40_000 + "y",
    "\\boxed{" + "a" * 1_000_000 + "}",
    "<answer>" + " " * 1_000_000 + "</answer>",
    "\\boxed{" + ",".join(["1"] * 100_000) + "}",
    "\\boxed{" + "\\text{" * 100 + "}" * 100 + "}",
]
CHARACTERS = [
    "", " ", "\x00", "1\x002", "1\x001", "\ud83d", "12\ud83d", "\ufffe", "１２", "١٢", "1\u200b2",
    "\u202e21", "①②", "Ⅻ", "十二", "1\u0301 2", "1\u20dd2", "NaN", "nan", "inf", "None", "True",
    "12\x1b[31m", "1\r2", "1_2", "12j", "12L", "1'2", "\x7f", "🎉",
]  # fmt: skip


@pytest.fixture(autouse=True)
def no_file_is_made():
    assert not CANARY.exists()
    yield
    assert not CANARY.exists()


def _graded_soon(completion: str) -> list[float]:
    with soon():
        return [good_accuracy([completion], [r])[0] for r in REFERENCES]


@pytest.mark.parametrize("text", CODE)
def test_code_is_wrong_and_does_not_run(text):
    for completion in (f"\\boxed{{{text}}}", f"<answer>{text}</answer>", f"#### {text}", text):
        assert max(_graded_soon(completion)) <= 0.0


@pytest.mark.parametrize("text", BOMBS, ids=range(len(BOMBS)))
def test_what_would_take_forever_is_wrong_at_once(text):
    for completion in (f"The answer is $\\boxed{{{text}}}$.", f"<answer>{text}</answer>"):
        assert max(_graded_soon(completion)) <= 0.0
    # As a reference it must not hang either.
    with soon():
        compare("12", text)
        compare(text, text + " ")


@pytest.mark.parametrize("text", STRUCTURES, ids=range(len(STRUCTURES)))
def test_huge_structures_are_wrong_at_once(text):
    assert max(_graded_soon(text)) <= 0.0


@pytest.mark.parametrize("text", CHARACTERS, ids=ascii)
def test_odd_characters_are_wrong(text):
    for completion in (f"\\boxed{{{text}}}", f"<answer>{text}</answer>", f"#### {text}", text):
        assert max(_graded_soon(completion)) <= 0.0
        exact_match([completion], ["12"])


def test_catastrophic_patterns_match_in_linear_time():
    for pattern in (r"(a+)+$", r"(a|a)*b", r"(a*)*b", r"(.*)(.*)(.*)x", r"(\s*)*<answer>"):
        with soon():
            scores = format_reward(["a" * 200_000 + "!", " " * 200_000], pattern=pattern)
        assert scores == [0.0, 0.0]


def test_grading_keeps_no_memory():
    answers = [f"\\boxed{{{i}+x^{{{i}}}+\\frac{{{i}}}{{y_{{{i}}}}}}}" for i in range(300)]
    good_accuracy(answers, ["x"] * len(answers))
    tracemalloc.start()
    for _ in range(3):
        good_accuracy(answers, ["x"] * len(answers))
    kept = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert kept < 1_000_000


def test_no_symbolic_engine_and_no_jax_is_ever_imported():
    code = (
        "import sys; from adpo_jax.rewards import good_accuracy, RewardModel, RewardFunction\n"
        "answers = [r'\\boxed{\\sqrt{50}}', r'\\boxed{(x+1)^2}', r'\\boxed{\\{1,2\\}}']\n"
        "assert good_accuracy(answers, [r'5\\sqrt2', 'x^2+2x+1', '2,1']) == [1.0] * 3\n"
        "RewardModel([RewardFunction()]).score(['5'], {'solution': ['5']})\n"
        "print([m for m in ('sympy', 'jax', 'flax', 'transformers') if m in sys.modules])"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"


def test_no_module_of_the_package_evaluates_text():
    folder = Path(__file__).parents[1] / "adpo_jax" / "rewards"
    # `generated` names SymPy's parsers to put its own in their place.
    for path in set(folder.rglob("*.py")) - {folder / "generated.py"}:
        source = path.read_text()
        for name in (
            "eval(",
            "exec(",
            "sympify",
            "parse_expr",
            "lambdify",
            "evalf",
            "import sympy",
        ):
            # `exec_module` loads the user's own file.
            assert not re.search(rf"(?<!\w){re.escape(name)}", source), (path.name, name)
