"""The ready rewards, and the patterns behind format_reward."""

import random
import re

import pytest

from adpo_jax.rewards import exact_match, format_reward, good_accuracy, length_penalty
from adpo_jax.rewards.grading.linear_regex import LinearRegex


def test_good_accuracy_is_one_when_right_and_penalises_repetition_when_wrong():
    # "no no no no no no": 3 four-grams, 1 distinct: 0.1 * -0.5 * (1 - 1/3)
    completions = ["so \\boxed{5}", "no no no no no no", "a b c d e f", "short", ""]
    scores = good_accuracy(completions, ["5"] * 5)
    assert scores == pytest.approx([1.0, -0.1 / 3, 0.0, 0.0, 0.0])
    assert all(str(s) != "-0.0" for s in scores)


def test_good_accuracy_takes_chats_settings_and_any_column():
    chats = [[{"role": "assistant", "content": "no NO no no"}]]
    scores = good_accuracy(
        chats,
        solution=["5"],
        ngram_size=1,
        max_penalty=-1.0,
        penalty_scale_factor=0.5,
        prompt=["q"],
    )
    assert scores == pytest.approx([-0.5 * 0.75])


def test_good_accuracy_is_right_whatever_it_repeats():
    assert good_accuracy(["no " * 50 + "\\boxed{5}"], [5]) == [1.0]


@pytest.mark.parametrize(
    "settings", [{"ngram_size": 0}, {"max_penalty": 0.1}, {"penalty_scale_factor": -1.0}]
)
def test_good_accuracy_refuses_settings_that_could_reward_a_wrong_answer(settings):
    with pytest.raises(ValueError, match="wanted ngram_size >= 1"):
        good_accuracy(["a"], ["b"], **settings)


def test_good_accuracy_refuses_columns_of_another_length():
    with pytest.raises(ValueError, match="2 completions but 1 values"):
        good_accuracy(["a", "b"], ["1"])


def test_exact_match_wants_the_same_text_but_for_spaces():
    completions = ["\\boxed{x + 1}", "\\boxed{x  +  1}", "\\boxed{1 + x}", "", "\\boxed{x+1}"]
    assert exact_match(completions, ["x + 1"] * 5) == [1.0, 1.0, 0.0, 0.0, 1.0]
    pairs = [("\\frac {1}{2}", "\\frac{1}{2}"), ("(1, 2)", "(1,2)"), ("3 1/2", "31/2")]
    completions, references = [f"\\boxed{{{pair[0]}}}" for pair in pairs], [p[1] for p in pairs]
    assert exact_match(completions, references) == [1.0, 1.0, 0.0]


def test_format_reward_wants_the_whole_completion_to_match():
    completions = [
        "<think>\nhm\n</think>\n<answer>5</answer>",
        " <think></think><answer></answer>\n",
        "<think>hm</think> so <answer>5</answer>",
        "<answer>5</answer>",
        "<think>hm</think><answer>5</answer> and more",
        "",
    ]
    assert format_reward(completions) == [1.0, 1.0, 0.0, 0.0, 0.0, 0.0]
    assert format_reward(["ab12", "ab", "12ab"], pattern=r"^[a-z]+\d{2}$") == [1.0, 0.0, 0.0]


def test_length_penalty_falls_over_the_buffer():
    tokens = [0, 768, 769, 896, 1024, 5000]
    penalties = length_penalty([""] * 6, tokens, max_length=1024, buffer_length=256)
    assert penalties == pytest.approx([0.0, 0.0, -1 / 256, -0.5, -1.0, -1.0])


def test_length_penalty_needs_lengths_and_a_buffer_that_fits():
    with pytest.raises(ValueError, match="needs the column completion_tokens"):
        length_penalty(["a"])
    with pytest.raises(ValueError, match="buffer_length <= max_length"):
        length_penalty(["a"], [1], max_length=10, buffer_length=20)


PATTERNS = [
    r"a*b", r"(a|b)*abb", r"a{2,4}b?", r"a{2}", r"a{1,}b", r"[a-c]+[^a]", r"(?:ab)+|c", r"[^\s]+",
    r"\s*<t>.*?</t>\s*", r"[\s\S]*b", r"^a.c$", r"(a+)+b", r"(?P<x>a)b?", r"[]a]b", r"[\w-]+",
    r"a|b|", r"\d+\.\d*", r"[^a-c]*", r"[\d\s]+", r"()b", r"(a|b|ab)*c", r"\<t\>", r".*a.{3}",
]  # fmt: skip


PIECES = ["a", "a", "b", "b", "c", "abb", "<t>", "</t>", " ", "-", "]", "1", ".", "\n"]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_patterns_match_what_the_backtracking_engine_matches(pattern):
    rng = random.Random(pattern)
    linear, reference = LinearRegex(pattern), re.compile(pattern, re.DOTALL)
    matched = 0
    for _ in range(2000):
        text = "".join(rng.choice(PIECES) for _ in range(rng.randint(0, 5)))
        expected = reference.fullmatch(text) is not None
        # Python's `$` also matches before a last newline; here the end is the end.
        if not (pattern.endswith("$") and text.endswith("\n")):
            assert linear.fullmatch(text) == expected, text
            matched += expected
    assert matched


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        (r"(?=a)b", "cannot be matched in linear time"),
        (r"(a)\1", "not supported"),
        (r"a\b", "not supported"),
        (r"(?i)a", "cannot be matched in linear time"),
        (r"a{1000}", "too many repeats"),
        (r"(a{50}){50}", "too large"),
        ("a**", "a repeat of a repeat"),
        ("(", "unclosed"),
        ("a)", "unbalanced"),
        ("[a", "unexpected end"),
        ("*a", "no meaning here"),
        ("a{x}", "wanted {m}"),
        ("(" * 30 + ")" * 30, "nested too deeply"),
        ("[z-a]", "bad range"),
    ],
)
def test_patterns_that_need_backtracking_or_make_no_sense_are_refused(pattern, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        LinearRegex(pattern)
