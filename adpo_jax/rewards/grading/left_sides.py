r"""Left sides of an equation that only name the value behind them, and are outside the grammar.

`P(X=2) = \frac16` says `\frac16`, and `x+y = 3` says `3`. An equation that leaves something to be
solved says nothing of the kind: `2x = 10`, `x(x+1) = 6`, `|x| = 3`.
"""

import re

from adpo_jax.rewards.grading.lexer import normalise

_OPENING, _CLOSING = "([{", ")]}"
_EQUALS = re.compile(r"(?<![<>!:=])=(?![=>])")
_GREEK = r"\\(?:theta|alpha|beta|gamma|phi|varphi)"
_WORD = r"\\(?:text|mathrm|operatorname)\{[A-Za-z]{2,20}\}"
_EVENT = r"(?:[A-Z]'?|[^()]*(?:[=<>|]|\\(?:le|ge|leq|geq|mid|vert|cup|cap|text)(?![a-z])).*)"
_SET = r"[A-Z](?:\\(?:cup|cap|setminus)[A-Z]){0,4}"
_BAR = r"(?:\||\\[lr]?vert)"
# f(g(3)), f^{-1}(x), g''(2); of a text without spaces, as the next.
_CALLED = r"[fghFGH](?:'{1,3}|\^\{?-1\}?|\^\{?\\prime\}?)?\("
_FUNCTION = re.compile(_CALLED + r".*\)")
# f(x), f(g(x)): of a variable alone, since f(2x) = 5x says another thing than f(x) = 5x.
_FUNCTION_OF_NAME = re.compile(rf"(?:{_CALLED}){{1,3}}[A-Za-z]\){{1,3}}")
_WORDS = "if|on|is|in|so|or|of|to|an|as|at|be|by|do|go|he|it|me|my|no|up|us|we"
_NAMES = re.compile(
    _FUNCTION.pattern
    # P(X=2), \mathbb{P}(A), E[X], \text{Var}(X)
    + rf"|(?:\\?Pr|P|\\mathbb\{{P\}})\({_EVENT}\)|(?:E|\\mathbb\{{E\}}|{_WORD})(?:\[.*\]|\([A-Z]\))"
    # \bar{x}, \overline{AB}
    r"|\\(?:bar|overline|hat|widehat|tilde)(?:\{[A-Za-z]{1,2}\}|[A-Za-z])"
    # \det A, [ABC], |A \cup B|, n(A), \|v\|, \varphi(12)
    rf"|\\det(?:\([A-Z]\)|[A-Z])|\[[A-Z]{{3,6}}\]|{_BAR}{_SET}{_BAR}|n\({_SET}\)"
    r"|\\\|[A-Za-z]\\\||\\(?:var)?phi\([0-9]{1,20}\)"
    # \sin\theta, \cos 2x, \tan(A+B)
    rf"|\\(?:sin|cos|tan|cot|sec|csc)(?:{_GREEK}|[A-Za-z]|\((?:{_GREEK}|[A-Za-z])\))"
    # x+y, a-b+c, xy, AB+BC
    r"|[A-Za-z]{1,2}(?:[-+][A-Za-z]{1,2}){1,5}"
    rf"|(?!([A-Za-z])\1|(?:{_WORDS})$)[A-Za-z]{{2}}"
    r"|\\[dt]?frac\{[A-Za-z]\}\{[A-Za-z]\}|[A-Za-z]/[A-Za-z]"
)


def values_behind(answer: str, *, of_function: bool) -> list[str]:
    r"""The sides of an answer behind a left side that names their value; none where there is none.

    Args:
      answer: as `undress` leaves it; `P(A) = \frac12 = 0.5` gives two sides.
      of_function: whether the left side must be a function's, as where the value has variables.
    """
    first, *values = _sides(normalise(answer))
    name = re.sub(r"\\[,;:! ]|\s", "", first)
    pattern = _FUNCTION_OF_NAME if of_function else _NAMES
    return values if values and len(name) < 80 and _is_name(name, pattern) else []


def _is_name(name: str, pattern: re.Pattern) -> bool:
    if not pattern.fullmatch(name):
        return False
    if name.endswith((")", "]")) and name[0] not in "[|":  # one call, and no product of two
        start = min(i for i in (name.find("("), name.find("[")) if i >= 0)
        return _end_of_group(name, start) == len(name) - 1
    return True


def _end_of_group(text: str, start: int) -> int:
    depth = 0
    for at in range(start, len(text)):
        depth += (text[at] in _OPENING) - (text[at] in _CLOSING)
        if depth == 0:
            return at
    return len(text)


def _sides(text: str) -> list[str]:
    """The sides of the equations of a text; signs in brackets part none."""
    sides, depth, start, at = [], 0, 0, 0
    signs = {match.start() for match in _EQUALS.finditer(text)}
    for at, c in enumerate(text):
        depth += (c in _OPENING) - (c in _CLOSING)
        if depth == 0 and at in signs:
            sides.append(text[start:at])
            start = at + 1
    return [*sides, text[start:]]
