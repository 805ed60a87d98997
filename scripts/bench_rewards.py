"""Completions graded a second, and how right, against math-verify where it is installed.

    python scripts/bench_rewards.py [--gsm8k ../shared/data/gsm8k/train.jsonl] [--seconds 3]

Three loads: worked GSM8K solutions ending in a box, the same ending in a sentence, and LaTeX
answers of ten kinds each against its own reference; in this process and through a pool of workers.
math-verify is optional (`pip install "math-verify[antlr4_13_2]"`); it is given the same answers
behind the same extraction.
"""

import argparse
import json
import platform
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path

from option_types import integer, real

from adpo_jax.rewards import RewardFunction, RewardModel, good_accuracy
from adpo_jax.rewards.grading.extract import find_answer

ROOT = Path(__file__).resolve().parents[1]


BOX, SENTENCE = "The answer is $\\boxed{{{given}}}$.", "So the answer is {given}."


def gsm8k(path: Path, ending: str) -> tuple[list[str], list[str], list[bool]]:
    """Worked solutions that end with an answer, every fourth with a digit changed."""
    completions, solutions, verdicts = [], [], []
    for i, line in enumerate(path.read_text().splitlines()):
        work, answer = json.loads(line)["answer"].split("####")
        answer = answer.strip()
        given = answer if i % 4 else f"{answer[:-1]}{(int(answer[-1]) + 1) % 10}"
        completions.append(work + ending.format(given=given))
        solutions.append(answer)
        verdicts.append(bool(i % 4))
    return completions, solutions, verdicts


def latex(count: int) -> tuple[list[str], list[str], list[bool]]:
    """Answers of ten kinds beside references written otherwise, every fourth one wrong."""
    rng = random.Random(0)
    completions, solutions, verdicts = [], [], []
    for i in range(count):
        a, b, c, d = (rng.randint(2, 30) for _ in range(4))
        k = 0 if i % 4 else 1  # what makes it wrong
        surd = rng.choice([2, 3, 5, 7, 11])
        kinds = [
            (f"\\frac{{{a + k}}}{{{a + b + c}}}", f"\\dfrac{{{a * d}}}{{{(a + b + c) * d}}}"),
            (f"\\sqrt{{{a * a * surd + k}}}", f"{a}\\sqrt{{{surd}}}"),
            (f"({a}x+{b})({c}x-{d + k})", f"{a * c}x^2+{b * c - a * d}x-{b * d}"),
            (f"\\{{{a + k}, {a + b}, -{c}\\}}", f"\\{{-{c},{a},{a + b}\\}}"),
            (f"\\left[{a}, \\frac{{{a * b + 1 + k}}}{{{b}}}\\right)", f"[{a},{a}+\\frac1{{{b}}})"),
            (f"{a}+{b + k}i", f"{b}i+{a}"),
            (f"y = {a}x + {b + k}", f"y-{a}x={b}"),
            (f"\\frac{{{a}}}{{{b + k}}}\\pi", f"\\frac{{{a}\\pi}}{{{b}}}"),
            (f"{a}\\ln {surd} + {b + k}", f"\\ln {surd**2}^{{{a}/2}} + {b}"),
            (f"\\begin{{pmatrix}} {a} & {b} \\\\ {c + k} & {d} \\end{{pmatrix}}",
             f"\\begin{{pmatrix}}{a}&{b}\\\\{c}&{d}\\end{{pmatrix}}"),
        ]  # fmt: skip
        answer, reference = kinds[i // 4 % len(kinds)]
        completions.append(f"Thus the answer is $\\boxed{{{answer}}}$.")
        solutions.append(reference)
        verdicts.append(not k)
    return completions, solutions, verdicts


Grader = Callable[[list[str], list[str]], list[bool]]


def ours(completions: list[str], solutions: list[str]) -> list[bool]:
    return [score == 1.0 for score in good_accuracy(completions, solutions)]


def math_verify() -> Grader | None:
    """math-verify behind our extraction, or None where it is not installed."""
    try:
        from math_verify import parse, verify
    except ImportError:
        return None

    def grade(completions: list[str], solutions: list[str]) -> list[bool]:
        verdicts = []
        for completion, solution in zip(completions, solutions):
            answer = find_answer(completion) or ""
            verdicts.append(verify(parse(f"${solution}$"), parse(f"${answer}$")))
        return verdicts

    return grade


def measure(grade: Grader, load: tuple[list[str], list[str], list[bool]], seconds: float):
    """Completions a second over at least `seconds`, and the share of right verdicts."""
    completions, solutions, verdicts = load
    grade(completions[:8], solutions[:8])
    graded = correct = 0
    size = 64
    started = time.perf_counter()
    while (elapsed := time.perf_counter() - started) < seconds:
        part = slice(graded % len(completions), graded % len(completions) + size)
        result = grade(completions[part], solutions[part])
        correct += sum(r == v for r, v in zip(result, verdicts[part]))
        graded += len(result)
    return graded / elapsed, correct / graded


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    default = ROOT.parent / "shared" / "data" / "gsm8k" / "train.jsonl"
    parser.add_argument("--gsm8k", type=Path, default=default, help="GSM8K's train.jsonl")
    parser.add_argument("--seconds", type=real(above=0), default=3.0, help="for each measurement")
    parser.add_argument("--workers", type=integer(1), default=2, help="of the pool")
    arguments = parser.parse_args()
    print(f"Python {platform.python_version()}, {platform.machine()}")
    loads = {"LaTeX": latex(4000)}
    if arguments.gsm8k.exists():
        loads["boxed GSM8K"] = gsm8k(arguments.gsm8k, BOX)
        loads["GSM8K told"] = gsm8k(arguments.gsm8k, SENTENCE)
    else:
        print(f"no {arguments.gsm8k}: GSM8K skipped")
    graders = {"good_accuracy": ours, "math-verify": math_verify()}
    for name, grade in graders.items():
        if grade is None:
            print(f"{name} is not installed: skipped")
            continue
        for load_name, load in loads.items():
            rate, share = measure(grade, load, arguments.seconds)
            print(f"{name:14} {load_name:12} {rate:10,.0f} a second   {share:7.2%} right")
    for load_name, (completions, solutions, verdicts) in loads.items():
        with RewardModel([RewardFunction()], num_workers=arguments.workers) as model:
            model.score(completions[:64], {"solution": solutions[:64]})  # starts the workers
            started = time.perf_counter()
            scores = model.score(completions, {"solution": solutions})
            rate = len(completions) / (time.perf_counter() - started)
        share = sum((s == 1.0) == v for s, v in zip(scores.total, verdicts)) / len(verdicts)
        name = f"pool of {arguments.workers}"
        print(f"{name:14} {load_name:12} {rate:10,.0f} a second   {share:7.2%} right")


if __name__ == "__main__":
    sys.exit(main())
