"""Tokens of an answer, written in LaTeX or plainly.

What only dresses an answer (`$`, `\\left`, spacing, fonts) disappears here; what the grammar has no
use for is refused. Only ASCII digits are digits.
"""

import re
from typing import NamedTuple

from adpo_jax.rewards.grading.functions import FUNCTION_WORDS
from adpo_jax.rewards.grading.limits import MAX_ANSWER_CHARS, MAX_DIGITS, MAX_TOKENS
from adpo_jax.rewards.grading.words import words


class Unreadable(ValueError):
    """The text is no answer of the grammar, or is beyond the limits."""


class Token(NamedTuple):
    """A piece of an answer.

    kind: "num", "repeat" (a repeating decimal), "word" (letters), "cmd" (LaTeX, without its
      backslash), "op", "text" (what \\text{} holds), "begin" and "end" (an environment's name).
    glued: no space stands before it.
    """

    kind: str
    text: str
    glued: bool


_UNICODE = {
    "−": "-", "–": "-", "×": "*", "·": "*", "⋅": "*", "∗": "*", "÷": "/", "∕": "/", "⁄": "/",
    "π": "\\pi ", "√": "\\sqrt ", "∞": "\\infty ", "≤": "\\le ", "≥": "\\ge ", "⩽": "\\le ",
    "⩾": "\\ge ", "≠": "\\ne ", "≈": "\\approx ", "∪": "\\cup ", "∩": "\\cap ", "∈": "\\in ",
    "±": "\\pm ", "∓": "\\mp ", "°": "^\\circ ", "º": "^\\circ ", "∅": "\\emptyset ",
    "ℝ": "\\mathbb{R}", "²": "^2", "³": "^3", "½": "\\frac12 ", "⅓": "\\frac13 ",
    "¼": "\\frac14 ", "¾": "\\frac34 ", "⅔": "\\frac23 ", "θ": "\\theta ", "α": "\\alpha ",
    "β": "\\beta ", "γ": "\\gamma ", "φ": "\\phi ", "λ": "\\lambda ", "€": "\\euro ",
    "£": "\\pound ", "¢": "\\text{ cents}", "∠": "\\angle ", "′": "'", "’": "'", "％": "%",
    "\u00a0": " ", "\u2009": " ", "\u202f": " ", "\u2002": " ", "\u2003": " ", "\t": " ",
    "\n": " ", "\r": " ",
}  # fmt: skip
_TRANSLATION = str.maketrans(_UNICODE)

# \left, \right and the \big family disappear, with the dot that stands for no delimiter.
_SIZES = re.compile(
    r"\\(?:left|right|middle)(?![A-Za-z])[ ]{0,4}\.?|\\[bB]igg?[lrm]?(?![A-Za-z])"
    r"|\\(?:displaystyle|textstyle|limits|nolimits)(?![A-Za-z])|(?<!\\)\\[()\[\]]"
)
_TEXT = re.compile(
    r"\\(?:text(?:bf|it|rm|sf|tt|up|normal)?|mbox|hbox|mathrm|mathbf|mathit|mathsf|mathtt|mathcal"
    r"|bold|bm|boldsymbol|operatorname\*?|underline|boxed|fbox|mathbb)[ ]{0,4}"
    r"\{((?:[^{}\\$]|\\[,;:! ]){0,120})\}"
)
_LENGTH = re.compile(r"\|([A-Z]{2})\|(?= ?=)")  # of a segment, as a label
_SPACES = re.compile(r"~|\\[,;:! ]")
_BRACED_CIRC = re.compile(r"\{ ?\\circ ?\}")
# What an angle is called is no part of its measure: "m∠ABC = ".
# After a number it is a phasor's: "5\angle 30".
_ANGLE = re.compile(
    r"(?<![A-Za-z\\0-9)}])(?<![0-9)}] )(?:m ?)?(?:\\angle(?![A-Za-z])|∠) ?(?:[A-Z]{1,3} ?= ?)?"
)
_WHOLE_TEXT = re.compile(r"\\(?:text[a-z]{0,6}|mbox|mathrm|mathbf|bm|boldsymbol)\{([^{}]*)\}")
# Upright letters above and below behind a number are units, as they are in \text: 12 m/s.
_UNITS = re.compile(
    r"([0-9)}](?:\\[,;:! ]|[ ~]){0,3}\\[dt]?frac)\{\\mathrm(\{[A-Za-z]{1,4}\})\}"
    r"\{\\mathrm(?=\{[A-Za-z]{1,4}\}(?:\^(?:[23]|\{[23]\}))?\})"
)
_REALS = {"all real numbers", "all reals", "the real numbers", "all real numbers x",
          "the set of all real numbers", "the set of real numbers"}  # fmt: skip
_LETTERS = re.compile(
    r" ?\(?[A-Za-z]\)?(?:(?: ?[,;&]| and| or| & ){1,2} ?\(?[A-Za-z]\)?){1,12}\.? ?", re.IGNORECASE
)
_NUMBER = r"(?:[0-9]+(?:\.[0-9]+)?|\.[0-9]+)"
_GROUPS = r"[0-9]{1,3}(?:%s[0-9]{3}){1,200}(?![0-9])(?:\.[0-9]+)?"
_SAFE_SEPARATOR = r"(?:\{,\}|\\text\{,\}|~|\\,|\\!|,\\!|\\[:; ]|\{\\,\})"
_LEX = re.compile(
    r"(?P<space>(?:[ ~]|\\[,;:!> ]|\\q?quad(?![A-Za-z])|\\hspace\{[^{}]{0,20}\})+)"
    + rf"|(?P<grouped>{_GROUPS % _SAFE_SEPARATOR}|{_GROUPS % ' '}(?! ?/))"
    + rf"|(?P<commas>{_GROUPS % ','})"
    + r"|(?P<repeat>[0-9]*\.[0-9]*\\(?:overline|bar)(?:\{[0-9]+\}|[0-9]))"
    + rf"|(?P<num>{_NUMBER}(?:[eE][-+]?[0-9]{{1,4}}(?![0-9A-Za-z.]))?)"
    + r"|(?P<env>\\(?:begin|end)\{[A-Za-z]{1,12}\*?\})"
    + r"|(?P<cmd>\\[A-Za-z]+|\\[{}%$|&#_\\])"
    + r"|(?P<word>[A-Za-z]+)"
    + r"|(?P<op>\.\.\.|\*\*|<=|>=|!=|==|[-+*/^_=<>(){}\[\]|,;:!%&'])"
)
_ARGUMENT = re.compile(r"(?:\\[,;:! ]| )?[({\\^_0-9a-z]")
_OPENING, _CLOSING = {"(", "[", "\\{"}, {")", "]", "\\}"}
# Commands that stand for an operator; the parser sees the operator.
OPERATORS = {
    "cdot": "*", "times": "*", "ast": "*", "div": "/", "le": "<=", "leq": "<=", "leqslant": "<=",
    "ge": ">=", "geq": ">=", "geqslant": ">=", "ne": "!=", "neq": "!=", "lt": "<", "gt": ">",
    "lvert": "|", "rvert": "|", "vert": "|", "mid": "|", "{": "\\{", "}": "\\}", "%": "%",
    "lbrace": "\\{", "rbrace": "\\}", "colon": ":", "lparen": "(", "rparen": ")", "lbrack": "[",
    "rbrack": "]", "&": "&", "_": "_", "langle": "(", "rangle": ")", "dots": "dots",
}  # fmt: skip


def normalise(text: str) -> str:
    """One spelling for what has several, by replacements that keep the meaning."""
    if "angle" in text or "∠" in text:
        text = _ANGLE.sub("", text)
    if "|" in text:
        text = _LENGTH.sub(r"\1", text)
    if not text.isascii():
        text = text.translate(_TRANSLATION)
    text = text.replace("\t", " ").replace("\n", " ").replace("\r", " ")
    if "\\" in text:
        text = _SIZES.sub(" ", text)
        text = _BRACED_CIRC.sub(r"\\circ ", text)
    if "+/-" in text:
        text = text.replace("+/-", "\\pm ")
    if "$" in text:
        text = text.replace("\\$", "\\dollar ").replace("$", " ")
    text = text.strip()
    if text.startswith("~"):
        text = "\\approx " + text[1:]
    if text.endswith(".") and not text.endswith(".."):
        text = text[:-1].rstrip()
    whole = _WHOLE_TEXT.fullmatch(text)
    if whole and any(c in "0123456789" for c in whole[1]):
        return whole[1].strip()  # `\\text{5 apples}` is no word
    if "\\mathrm{" in text:
        text = _UNITS.sub(r"\1{\\text\2}{\\text", text)
    if "\\text" in text or "\\math" in text or "\\mbox" in text:
        bare = words(text)
        if _LETTERS.fullmatch(bare):
            return bare.replace("&", ",")  # `\\text{B, C}` are letters
        if bare.lower() in _REALS:
            return "\\mathbb{R}"
    return text


def tokenize(text: str, join_thousands: bool = True) -> list[Token]:
    """The tokens of an answer.

    Args:
      text: an answer as `normalise` leaves it.
      join_thousands: read `1,234` outside of brackets as one number.

    Raises:
      Unreadable: a character or a size that no answer has.
    """
    if len(text) > 2 * MAX_ANSWER_CHARS:
        raise Unreadable("too long")
    tokens: list[Token] = []
    depth, end, glued = 0, 0, False
    while end < len(text):
        if text[end] == "\\":
            group = _TEXT.match(text, end)
            if group:
                tokens.append(_text_token(group, glued, text[group.end() : group.end() + 4]))
                end, glued = group.end(), True
                continue
        match = _LEX.match(text, end)
        if match is None:
            raise Unreadable(f"unexpected {text[end]!r}")
        kind, piece, end = match.lastgroup, match.group(), match.end()
        if kind == "space":
            glued = False
            continue
        if kind == "commas" and (depth or not join_thousands):
            match = re.compile(_NUMBER).match(text, match.start())
            kind, piece, end = "num", match.group(), match.end()
        if kind in ("commas", "grouped"):
            kind, piece = "num", re.sub(r"[^0-9.]", "", piece)
        elif kind == "env":
            kind, piece = piece[1:-1].split("{")
        elif kind == "cmd":
            piece = piece[1:]
            if piece in OPERATORS:
                kind, piece = "op", OPERATORS[piece]
            elif piece in ("dfrac", "tfrac", "cfrac", "nicefrac", "sfrac"):
                piece = "frac"
        if kind in ("num", "repeat") and sum(c in "0123456789" for c in piece) > MAX_DIGITS:
            raise Unreadable("number too long")
        if kind == "op":
            depth += (piece in _OPENING) - (piece in _CLOSING)
        tokens.append(Token(kind, piece, glued))
        if len(tokens) > MAX_TOKENS:
            raise Unreadable("too many tokens")
        glued = True
    return tokens


def _text_token(group: re.Match, glued: bool, following: str) -> Token:
    content, command = _SPACES.sub(" ", group[1]), group.group()[1:].split("{", 1)[0].strip()
    if command == "mathbb":
        return Token("cmd", "mathbb" + content.strip(), glued)
    inner = content.strip()
    if command in ("mathbf", "mathit", "bm", "boldsymbol", "boxed", "fbox", "mathrm", "textbf",
                   "underline", "bold", "mathcal", "operatorname", "textit") and (
        re.fullmatch(r"[A-Za-z]", inner)
    ):  # fmt: skip
        return Token("word", inner, glued)
    if re.fullmatch(_NUMBER, inner) and len(inner) <= MAX_DIGITS:
        return Token("num", inner, glued)
    if command.startswith("operatorname") or command == "mathrm":
        return Token(
            "word" if inner.isalpha() and inner in FUNCTION_WORDS else "text", content, glued
        )
    if inner in FUNCTION_WORDS and inner not in ("min", "sec") and _ARGUMENT.match(following):
        return Token("word", inner, glued)
    if inner.lower() == "infinity":
        return Token("cmd", "infty", glued)
    return Token("text", content, glued)
