"""All words that the grader knows, from its tables: what a fuzzer puts answers together from."""

from adpo_jax.rewards.grading import dress, functions, lexer, parse, scalars, units

_MARKS = r"""
    { } ( ) [ ] \{ \} + - * / ** ^ ^{ _ _{ ! % \% = < > <= >= != , ; : | & \\ ' . ... $ \$ ~ \, \!
    \left( \right) \left\{ \right. \sqrt[ \frac \dfrac{ \over \choose \text{ \mathrm{ \operatorname{
    \begin{aligned} \end{aligned} \begin{cases} \end{cases} \textcolor{red}{ \color{red} \boxed{
    \overline{3} \dot{3} \dot \boxed \pm \mp \circ ^\circ \mathbb{R} \mathbb \log_ \emptyset
    \rfloor \rceil
"""


def vocabulary() -> list[str]:
    """The words in a fixed order, each once."""
    commands = (
        *scalars.FACTOR_COMMANDS,
        *lexer.OPERATORS,
        *parse.RELATION_COMMANDS,
        *parse.SET_COMMANDS,
        *dress.FONTS.split(),
        *dress.NOTHING.split(),
        *dress.SAME,
    )
    words = [
        *_MARKS.split(),
        *functions.FUNCTION_WORDS,
        *(f"\\operatorname{{{word}}}" for word in functions.FUNCTION_WORDS),
        *("\\" + command for command in commands),
        *(f"\\{end}{{{name}}}" for name in parse.MATRICES for end in ("begin", "end")),
        *scalars.INFINITIES,
        *units.CANONICAL,
        *(f"\\text{{ {word} }}" for word in units.CANONICAL),
        *(
            "and",
            "or",
            "to",
            "percent",
            "million",
            "U",
            "x",
            "y",
            "n",
            "e",
            "i",
            "pi",
            "f",
            "C",
            "T",
        ),
    ]
    return sorted(set(words))
