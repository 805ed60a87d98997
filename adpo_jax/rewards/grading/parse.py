"""The grammar of answers: tokens in, a tree of plain tuples out.

A tree is a scalar

    ("num", Fraction)  ("sym", name)  ("const", "pi" | "e" | "i")  ("inf",)
    ("add" | "mul" | "div" | "pow" | "pm" | "mp", a, b)  ("neg" | "percent" | "degree", a)
    ("call", function, *arguments)

or made of scalars

    ("list" | "set" | "ratio", items)    separated by commas, "and", "or"; in braces; by colons
    ("or", items)                        a list whose parts were joined by "or"
    ("tuple", opening, closing, items)   in brackets: a point, or an interval if it has two items
    ("matrix", rows)
    ("union" | "intersection" | "setminus", a, b)  ("reals",)
    ("rel", operators, sides)            a chain such as 2 < x <= 7

Nothing is computed while parsing, so the limits on length and depth bound all the work; no name
that a model writes is ever looked up anywhere but in the tables below.
"""

from adpo_jax.rewards.grading.functions import FUNCTION_WORDS
from adpo_jax.rewards.grading.lexer import Token, Unreadable
from adpo_jax.rewards.grading.limits import MAX_ITEMS
from adpo_jax.rewards.grading.scalars import END, INFINITIES, ScalarParser, Tree

__all__ = ["Tree", "parse"]

_RELATIONS = {"=": "=", "==": "=", "<": "<", ">": ">", "<=": "<=", ">=": ">=", "!=": "!="}
RELATION_COMMANDS = {"in": "in", "approx": "~", "equiv": "=", "simeq": "~"}
SET_COMMANDS = {"cup": "union", "cap": "intersection", "bigcup": "union", "setminus": "setminus",
                 "backslash": "setminus"}  # fmt: skip
DETERMINANTS = {"vmatrix"}
MAX_DETERMINANT = 4  # rows of a determinant that is multiplied out
MATRICES = {"pmatrix", "bmatrix", "matrix", "vmatrix", "Bmatrix", "smallmatrix", "array"}
SCALARS = {"num", "sym", "const", "add", "mul", "div", "pow", "neg", "percent", "degree", "call"}
_OPENING, _CLOSING = ("(", "[", "\\{"), (")", "]", "\\}")


def parse(tokens: list[Token]) -> Tree:
    """The tree of an answer.

    Raises:
      Unreadable: the tokens are no answer of the grammar.
    """
    parser = Parser(_split_words(tokens))
    tree = parser.items()
    if parser.peek()[:2] == ("cmd", "over"):
        parser.position += 1
        tree = ("div", tree, parser.items())
    if parser.peek() is not END:
        raise Unreadable(f"unexpected {parser.peek().text!r}")
    return tree


def _split_words(tokens: list[Token]) -> list[Token]:
    """Splits runs of letters into known names and single letters: "xsin" into x and sin."""
    split: list[Token] = []
    for i, token in enumerate(tokens):
        word = token.text
        is_between_sets = (
            0 < i < len(tokens) - 1
            and tokens[i - 1].text in _CLOSING
            and tokens[i + 1].text in _OPENING
        )
        if word == "U" and is_between_sets:
            split.append(Token("cmd", "cup", False))
        elif word in ("x", "X") and _is_times(tokens, i):
            split.append(Token("op", "*", False))
        elif word == "to" and 0 < i < len(tokens) - 1:
            split.append(Token("text", word, False))
        elif token.kind != "word" or len(word) == 1 or word in FUNCTION_WORDS or word in INFINITIES:
            split.append(token)
        elif word.lower() in ("and", "or"):
            split.append(Token("text", word.lower(), False))
        else:
            glued = token.glued
            for name in _names_in(word):
                split.append(Token("word", name, glued))
                glued = True
    return split


def _is_times(tokens: list[Token], i: int) -> bool:
    """Whether the letter x is a multiplication sign, as in `4.5 x 10^4`."""
    around = tokens[max(i - 1, 0) : i + 3]
    return len(around) == 4 and (
        around[0].kind == "num" and around[2].text == "10" and around[3].text in ("^", "**")
    )


def _names_in(word: str) -> list[str]:
    names, letters, position = [], 0, 0
    while position < len(word):
        name = next(
            (word[position : position + n] for n in (7, 6, 5, 4, 3, 2)
             if word[position : position + n] in FUNCTION_WORDS | {"pi"}),
            word[position],
        )  # fmt: skip
        letters += len(name) == 1
        position += len(name)
        names.append(name)
    if letters > (3 if letters == len(word) else 2):
        raise Unreadable(f"{word!r} is a word")
    return names


def _ratio(items: list[Tree]) -> Tree:
    """Parts joined by colons; a : b = 2 : 3 comes as a, b = 2 and 3 and is an equation."""
    equations = [i for i, item in enumerate(items) if item[0] == "rel"]
    if len(equations) == 1:
        _, operators, sides = items[equations[0]]
        left, right = (*items[: equations[0]], sides[0]), (sides[-1], *items[equations[0] + 1 :])
        if operators == ("=",) and len(left) == len(right):
            return ("rel", ("=",), (("ratio", left), ("ratio", right)))
    return ("ratio", tuple(items))


class Parser(ScalarParser):
    """Adds to the scalars what is made of them."""

    in_determinant = False

    def structure(self, token: Token) -> Tree:
        if token.kind == "begin":
            return self.matrix(token.text)
        if token[:2] == ("op", "\\{"):
            return self.braces()
        return super().structure(token)

    def items(self) -> Tree:
        items, separators = [self.relation()], set()
        while True:
            separator = self.separator()
            if separator is None:
                break
            separators.add(separator)
            items.append(self.relation())
            if len(items) > MAX_ITEMS:
                raise Unreadable("too many items")
        if not separators:
            return items[0]
        if ":" in separators:
            if separators != {":"}:
                raise Unreadable("a ratio in a list")
            return _ratio(items)
        return ("or" if separators <= {"or", ","} and "or" in separators else "list", tuple(items))

    def separator(self) -> str | None:
        found = None
        while True:
            token = self.peek()
            word = token.text.strip(" ,").lower() if token.kind == "text" else None
            if token.kind == "op" and token.text in (",", ";", ":"):
                found = found or ("," if token.text == ";" else token.text)
            elif word in ("and", "or"):
                found = word
            elif word == "to" and found is None:
                found = ":"
            elif token.kind == "cmd" and token.text in ("lor", "vee", "land", "wedge"):
                found = "or" if token.text in ("lor", "vee") else "and"
            else:
                return found
            self.position += 1

    def relation(self) -> Tree:
        operators: list[str] = []
        # A leading "approximately" is said of something without a name.
        is_about = self.peek()[:2] in (("cmd", "approx"), ("cmd", "simeq"))
        sides = [("sym", "")] if is_about else [self.set_expression()]
        while True:
            token = self.peek()
            if token.kind == "op" and token.text in _RELATIONS:
                operators.append(_RELATIONS[token.text])
            elif token.kind == "cmd" and token.text in RELATION_COMMANDS:
                operators.append(RELATION_COMMANDS[token.text])
            else:
                break
            self.position += 1
            sides.append(self.set_expression())
        return ("rel", tuple(operators), tuple(sides)) if operators else sides[0]

    def set_expression(self) -> Tree:
        tree = self.expression()
        while True:
            token = self.peek()
            if token.kind == "cmd" and token.text in SET_COMMANDS:
                operator = SET_COMMANDS[token.text]
            else:
                return tree
            self.position += 1
            tree = (operator, tree, self.expression())

    def braces(self) -> Tree:
        if self.accept("\\}"):
            return ("set", ())
        is_of_reals = self.peek(1)[:2] == ("cmd", "in") and self.peek(2)[:2] == ("cmd", "mathbbR")
        behind = 3 if is_of_reals else 1
        if self.peek().kind == "word" and self.peek(behind).text in (":", "|"):
            self.position += behind + 1  # {x : x > 3} and {x | x > 3} are their conditions
            tree = self.nested(self.items)
            self.expect("\\}")
            return tree
        tree = self.nested(self.items)
        self.expect("\\}")
        return ("set", tree[1] if tree[0] == "list" else (tree,))

    def matrix(self, environment: str) -> Tree:
        if environment not in MATRICES:
            raise Unreadable(f"environment {environment!r}")
        if environment == "array" and self.accept("{"):
            while not self.accept("}"):  # the format of the columns
                if self.next() is END:
                    raise Unreadable("unclosed column format")
        is_determinant = environment in DETERMINANTS
        if is_determinant and self.in_determinant:
            raise Unreadable("a determinant in a determinant")
        self.in_determinant = self.in_determinant or is_determinant
        rows, row = [], []
        while True:
            row.append(self.nested(self.expression))
            if self.accept("&"):
                continue
            rows.append(tuple(row))
            row = []
            if self.peek()[:2] == ("cmd", "\\"):
                self.position += 1
            elif self.peek().kind != "end":
                raise Unreadable("matrix")
            if self.peek()[:2] == ("end", environment):
                self.position += 1
                break
        if len({len(r) for r in rows}) != 1:
            raise Unreadable("rows of different lengths")
        if environment in ("matrix", "smallmatrix") and len(rows) == len(rows[0]) == 1:
            return rows[0][0]
        if is_determinant:
            self.in_determinant = False
            return _determinant(rows)
        return ("matrix", tuple(rows))


def _determinant(rows: list[tuple[Tree, ...]]) -> Tree:
    """A determinant multiplied out along its first row."""
    if len(rows) != len(rows[0]) or len(rows) > MAX_DETERMINANT:
        raise Unreadable("a determinant that is not square or too large")
    if any(entry[0] not in SCALARS for row in rows for entry in row):
        raise Unreadable("a determinant of what is no number")
    if len(rows) == 1:
        return rows[0][0]
    total = None
    for i, entry in enumerate(rows[0]):
        term = ("mul", entry, _determinant([row[:i] + row[i + 1 :] for row in rows[1:]]))
        term = ("neg", term) if i % 2 else term
        total = term if total is None else ("add", total, term)
    return total
