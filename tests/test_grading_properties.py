"""Random answers: right however dressed, wrong when changed, harmless when garbled."""

from fractions import Fraction

from hanging import soon
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from adpo_jax.rewards import good_accuracy
from adpo_jax.rewards.grading.compare import compare
from adpo_jax.rewards.grading.extract import find_answer
from adpo_jax.rewards.grading.words import words

SETTINGS = settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))

small = st.integers(-50, 50)
nonzero = small.filter(bool)
rationals = st.builds(Fraction, st.integers(-9999, 9999), st.integers(1, 999))


def right(answer: str, reference: str) -> bool:
    return compare(answer, reference).right


def latex(x: Fraction) -> str:
    return f"\\frac{{{x.numerator}}}{{{x.denominator}}}" if x.denominator > 1 else str(x)


def dresses(x: Fraction) -> list[str]:
    """Ways to write a rational."""
    sign, n, d = "-" if x < 0 else "", abs(x.numerator), x.denominator
    written = [
        f"{x.numerator}/{d}",
        f"{sign}\\frac{{{n}}}{{{d}}}",
        f"{sign}\\dfrac{{{n}}}{{{d}}}",
        f"\\frac{{{x.numerator}}}{{{d}}}",
        f"\\frac{{{-x.numerator}}}{{{-d}}}",
        f"\\left({sign}\\frac{{{n}}}{{{d}}}\\right)",
        f"${sign}\\tfrac{{ {n} }}{{ {d} }}$",
        f"x = {latex(x)}",
        f"{latex(x * 7)} \\cdot \\frac17",
    ]
    if d > 1 and n > d:
        written += [f"{sign}{n // d}\\frac{{{n % d}}}{{{d}}}", f"{sign}{n // d} {n % d}/{d}"]
    if n < 10 and 1 < d < 10:
        written.append(f"{sign}\\frac{n}{d}")
    if d == 1:
        written += [f"{sign}{n:,}", f"{sign}{n}.00", f"{sign}{n}", f"\\text{{{sign}{n}}}"]
    if 10**6 % d == 0:
        written.append(f"{sign}{n * (10**6 // d) / 10**6:.6f}")
    return written


@SETTINGS
@given(rationals)
def test_a_rational_is_right_in_every_dress(x):
    assert [w for w in dresses(x) if not right(w, latex(x))] == []
    assert [w for w in dresses(x) if not right(latex(x), w)] == []


@SETTINGS
@given(rationals, st.builds(Fraction, st.integers(-3, 3), st.integers(1, 10**6)).filter(bool))
def test_a_rational_changed_a_little_is_wrong(x, change):
    assert [w for w in dresses(x + change) if right(w, latex(x))] == []


@SETTINGS
@given(st.integers(1, 30), st.integers(2, 60), small)
def test_a_surd_is_right_in_every_dress_and_wrong_when_changed(a, b, c):
    assume(int(b**0.5) ** 2 != b)
    reference = f"{c}+{a}\\sqrt{{{b}}}"
    for written in (
        f"{c}+\\sqrt{{{a * a * b}}}",
        f"{a}\\sqrt{{{b}}}+{c}",
        f"{c} + {a} \\cdot {b}^{{1/2}}",
        f"{c}+\\frac{{{a * b}}}{{\\sqrt{{{b}}}}}",
        f"{a}*sqrt({b})+{c}",
        f"{c}+{a}\\sqrt{b}" if b < 10 else reference,
    ):
        assert right(written, reference), written
    for changed in (
        f"{c + 1}+{a}\\sqrt{{{b}}}",
        f"{c}-{a}\\sqrt{{{b}}}",
        f"{c}+{a}\\sqrt{{{b + 1}}}",
        f"{c}+{a + 1}\\sqrt{{{b}}}",
        str(round(c + a * b**0.5, 9)),
    ):
        assert not right(changed, reference), changed


def polynomial(coefficients: list[int], order=lambda terms: terms) -> str:
    terms = [f"({c})x^{{{i}}}" for i, c in enumerate(coefficients)]
    return "+".join(order(terms))


@SETTINGS
@given(nonzero, small, nonzero, small, st.integers(1, 9))
def test_a_product_equals_its_expansion_and_nothing_near_it(a, b, c, d, change):
    product = f"({a}x+{b})({c}x+{d})"
    coefficients = [b * d, a * d + b * c, a * c]
    assert right(product, polynomial(coefficients))
    assert right(polynomial(coefficients, lambda t: t[::-1]), product)
    for i in range(3):
        changed = [k + change * (i == j) for j, k in enumerate(coefficients)]
        assert not right(polynomial(changed), product)
    assert not right(product.replace("x", "y"), product)
    assert not right(product + "=0", product)


@SETTINGS
@given(st.lists(small, min_size=2, max_size=6, unique=True), st.randoms())
def test_sets_and_lists_have_no_order_and_tuples_have_one(members, random):
    shuffled = random.sample(members, len(members))
    assert right(
        f"\\{{{', '.join(map(str, shuffled))}\\}}", f"\\{{{','.join(map(str, members))}\\}}"
    )
    assert right(", ".join(map(str, shuffled)), ", ".join(map(str, members)))
    in_order = shuffled == members
    point, other = (f"({', '.join(map(str, m))})" for m in (members, shuffled))
    assert right(other, point) == in_order
    changed = [members[0] + 101, *members[1:]]
    assert not right(
        f"\\{{{','.join(map(str, changed))}\\}}", f"\\{{{','.join(map(str, members))}\\}}"
    )
    assert not right(", ".join(map(str, members[1:])), ", ".join(map(str, members)))


@SETTINGS
@given(rationals, rationals, st.sampled_from("(["), st.sampled_from(")]"))
def test_an_interval_equals_its_inequality_and_no_other_ends(x, y, opening, closing):
    assume(x < y)
    reference = f"{opening}{latex(x)},{latex(y)}{closing}"
    low, high = ("<" if opening == "(" else "\\le"), ("<" if closing == ")" else "\\le")
    assert right(f"{latex(x)} {low} x {high} {latex(y)}", reference)
    assert right(f"{opening} {float(x)!r} , {latex(y)} {closing}", reference) == (
        Fraction(repr(float(x))) == x
    )
    for o, c in (("(", ")"), ("(", "]"), ("[", ")"), ("[", "]")):
        written = f"\\left{o}{latex(x)}, {latex(y)}\\right{c}"
        assert right(written, reference) == (o == opening and c == closing)


# Fuzzing. Pieces that the grammar knows, so that many garbled answers get past the lexer.
VOCABULARY = r"""
    \frac \dfrac { } ( ) [ ] \{ \} 1 2 12 0 7 0.5 1e5 99 x y n e i \pi \sqrt \sqrt[3] ^ ^{ ^2 _ !
    \% + - * / \cdot = < \le \ne , ; : | \left( \right) \text{ \text{and} or and \cup \setminus \in
    \infty \pm \sin \cos \tan \ln \log_2 \arcsin \exp \binom \begin{pmatrix} \end{pmatrix} & \\
    \boxed{ \circ ^\circ \lfloor \rfloor \mathbb{R} $ million apples cm ** \approx \overline{3} max(
    gcd( sqrt( |x| 123456789012345678901234567890 n! e^{ \tan( \gamma ½ ∞ <answer> #### +/-
"""
PIECES = VOCABULARY.split()
REFERENCES = [
    "12", r"\frac{3}{8}", "x^2-9", "(2,7]", r"\{4,9\}", r"\sqrt{5}", "y=3x-4", "2-5i", "3^{n+2}",
    r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", r"\infty", "C", r"\text{Monday}", "x>3", "0.33", "n!",
    r"15\%", r"\tan^2 y+1", r"(0,1)\cup(1,3)", "1011_2", r"3\pm\sqrt2", "|x|", r"10\text{ cm}",
]  # fmt: skip
garbled = st.one_of(
    st.lists(st.sampled_from(PIECES), max_size=60).map(" ".join),
    st.lists(st.sampled_from(PIECES), max_size=60).map("".join),
    st.text(max_size=300),
    st.text(st.characters(categories=["Cs", "Cc", "Nd", "Sm", "Po"]), max_size=50),
)


@settings(SETTINGS, max_examples=2000)
@given(garbled, st.sampled_from(REFERENCES))
def test_garbled_answers_never_raise_and_take_little_time(answer, reference):
    with soon():
        compare(answer, reference)
        compare(reference, answer)
    find_answer(answer)
    score = good_accuracy([f"\\boxed{{{answer}}}"], [reference])[0]
    assert score == 1.0 or -0.05 <= score <= 0.0


@settings(SETTINGS, max_examples=500)
@given(garbled)
def test_an_answer_that_can_be_read_equals_itself(answer):
    is_nan = words(answer).lower() == "nan"  # which equals nothing
    if answer.strip() and len(answer) < 600 and not is_nan:
        assert compare(answer, answer).right
