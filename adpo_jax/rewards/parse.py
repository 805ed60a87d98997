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

from fractions import Fraction

from adpo_jax.rewards.lexer import FUNCTION_WORDS, Token, Unreadable
from adpo_jax.rewards.limits import MAX_DEPTH, MAX_ITEMS

Tree = tuple

_RELATIONS = {"=": "=", "==": "=", "<": "<", ">": ">", "<=": "<=", ">=": ">=", "!=": "!="}
_RELATION_COMMANDS = {"in": "in", "approx": "~", "equiv": "=", "simeq": "~"}
_SET_COMMANDS = {"cup": "union", "cap": "intersection", "setminus": "setminus",
                 "backslash": "setminus"}  # fmt: skip
_GREEK = set(
    "alpha beta gamma delta epsilon varepsilon zeta eta theta vartheta iota kappa lambda mu nu xi "
    "rho sigma tau upsilon phi varphi chi psi omega Gamma Delta Theta Lambda Xi Sigma Phi Psi "
    "Omega ell hbar".split()
)
_FONTS = set(
    "text textbf textit textrm mathrm mathbf mathit mathsf mathtt mathcal boldsymbol bm bold boxed "
    "fbox operatorname mbox hbox underline vec hat".split()
)
_ALIASES = {"asin": "arcsin", "acos": "arccos", "atan": "arctan", "cosec": "csc", "lg": "log"}
_MATRICES = {"pmatrix", "bmatrix", "matrix", "vmatrix", "Bmatrix", "smallmatrix", "array"}
_INFINITIES = {"infinity", "inf", "Infinity"}
_END = Token("", "", False)
_OPENING, _CLOSING = ("(", "[", "\\{"), (")", "]", "\\}")
_TEN = ("num", Fraction(10))


def parse(tokens: list[Token]) -> Tree:
    """The tree of an answer.

    Raises:
      Unreadable: the tokens are no answer of the grammar.
    """
    parser = _Parser(_split_words(tokens))
    tree = parser.items()
    if parser.peek() is not _END:
        raise Unreadable(f"unexpected {parser.peek().text!r}")
    return tree


def _split_words(tokens: list[Token]) -> list[Token]:
    """Splits runs of letters into known names and single letters: "xsin" into x and sin."""
    split: list[Token] = []
    for i, token in enumerate(tokens):
        word = token.text
        if word == "U" and 0 < i < len(tokens) - 1:
            if tokens[i - 1].text in _CLOSING and tokens[i + 1].text in _OPENING:
                split.append(Token("cmd", "cup", False))
                continue
        if token.kind != "word" or len(word) == 1 or word in FUNCTION_WORDS or word in _INFINITIES:
            split.append(token)
        elif word.lower() in ("and", "or"):
            split.append(Token("text", word.lower(), False))
        else:
            glued = token.glued
            for name in _names_in(word):
                split.append(Token("word", name, glued))
                glued = True
    return split


def _names_in(word: str) -> list[str]:
    names, letters, position = [], 0, 0
    while position < len(word):
        name = next(
            (word[position : position + n] for n in (6, 5, 4, 3, 2)
             if word[position : position + n] in FUNCTION_WORDS | {"pi"}),
            word[position],
        )  # fmt: skip
        letters += len(name) == 1
        position += len(name)
        names.append(name)
    if letters > (3 if letters == len(word) else 2):
        raise Unreadable(f"{word!r} is a word")
    return names


class _Parser:
    """Recursive descent over tokens; one method a level of the grammar."""

    def __init__(self, tokens: list[Token]):
        self.tokens = tokens
        self.position = 0
        self.depth = 0
        self.bars = 0  # open |...| at this level of brackets

    def peek(self, ahead: int = 0) -> Token:
        i = self.position + ahead
        return self.tokens[i] if i < len(self.tokens) else _END

    def next(self) -> Token:
        token = self.peek()
        self.position += 1
        return token

    def accept(self, *texts: str) -> str | None:
        """Steps over one of these operators, if it comes next."""
        token = self.peek()
        if token.kind == "op" and token.text in texts:
            self.position += 1
            return token.text
        return None

    def expect(self, *texts: str) -> str:
        found = self.accept(*texts)
        if found is None:
            raise Unreadable(f"wanted {texts[0]!r}, got {self.peek().text!r}")
        return found

    def nested(self, rule):
        """Applies a rule inside brackets."""
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise Unreadable("too deep")
        bars, self.bars = self.bars, 0
        tree = rule()
        self.bars = bars
        self.depth -= 1
        return tree

    # Lists, relations, sets

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
            return ("ratio", tuple(items))
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
            elif token.kind == "cmd" and token.text in ("lor", "vee", "land", "wedge"):
                found = "or" if token.text in ("lor", "vee") else "and"
            else:
                return found
            self.position += 1

    def relation(self) -> Tree:
        operators, sides = [], [self.set_expression()]
        while True:
            token = self.peek()
            if token.kind == "op" and token.text in _RELATIONS:
                operators.append(_RELATIONS[token.text])
            elif token.kind == "cmd" and token.text in _RELATION_COMMANDS:
                operators.append(_RELATION_COMMANDS[token.text])
            else:
                break
            self.position += 1
            sides.append(self.set_expression())
        return ("rel", tuple(operators), tuple(sides)) if operators else sides[0]

    def set_expression(self) -> Tree:
        tree = self.expression()
        while True:
            token = self.peek()
            if token.kind == "cmd" and token.text in _SET_COMMANDS:
                operator = _SET_COMMANDS[token.text]
            else:
                return tree
            self.position += 1
            tree = (operator, tree, self.expression())

    # Arithmetic

    def expression(self) -> Tree:
        if self.peek() == ("cmd", "approx", self.peek().glued):
            self.position += 1  # a leading "about" leaves the value as it stands
        sign = self.sign()
        tree = self.term()
        if sign:
            zero = ("num", Fraction(0))
            tree = ("neg", tree) if sign == "neg" else (sign, zero, tree) if sign != "add" else tree
        while True:
            sign = self.sign()
            if not sign:
                return tree
            right = self.term()
            tree = ("add", tree, ("neg", right)) if sign == "neg" else (sign, tree, right)

    def sign(self) -> str | None:
        token = self.peek()
        if token.kind == "op" and token.text in "+-":
            if token.text == "+" and self.peek(1).text == "-" and self.peek(1).glued:
                self.position += 2  # "+-" written plainly
                return "pm"
            self.position += 1
            return "add" if token.text == "+" else "neg"
        if token.kind == "cmd" and token.text in ("pm", "mp"):
            self.position += 1
            return token.text
        return None

    def term(self) -> Tree:
        tree = self.signed_factor()
        while True:
            operator = self.accept("*", "/")
            if operator:
                right = self.signed_factor()
                tree = ("mul" if operator == "*" else "div", tree, right)
            elif self.peek() == ("cmd", "choose", self.peek().glued):
                self.position += 1
                tree = ("call", "binomial", tree, self.factor())
            elif self.starts_factor():
                tree = ("mul", tree, self.factor())
            else:
                return tree

    def signed_factor(self) -> Tree:
        sign = self.accept("+", "-")
        factor = self.factor()
        return ("neg", factor) if sign == "-" else factor

    def starts_factor(self) -> bool:
        """Whether a factor follows without a sign between, as in 2x."""
        token = self.peek()
        if token.kind in ("num", "repeat"):
            return self.tokens[self.position - 1].kind not in ("num", "repeat")
        if token.kind == "word":
            return True
        if token.kind == "cmd":
            name = token.text
            return (
                name in _GREEK or name in _FONTS or name in FUNCTION_WORDS
                or name in ("frac", "binom", "dbinom", "tbinom", "pi", "infty", "lfloor", "lceil")
            )  # fmt: skip
        return token.kind == "op" and (token.text in "({" or (token.text == "|" and not self.bars))

    def factor(self) -> Tree:
        tree = self.primary()
        while True:
            token = self.peek()
            if token.kind == "op" and token.text == "!":
                tree = ("call", "factorial", tree)
                self.position += 1
                if self.peek().kind == "op" and self.peek().text == "!":
                    raise Unreadable("double factorial")
            elif token.kind == "op" and token.text == "%":
                tree = ("percent", tree)
                self.position += 1
            elif token.kind == "op" and token.text in ("^", "**"):
                self.position += 1
                tree = ("degree", tree) if self.degree_sign() else ("pow", tree, self.exponent())
            elif token.kind == "cmd" and token.text in ("degree", "circ"):
                self.position += 1
                tree = ("degree", tree)
            else:
                return tree

    def degree_sign(self) -> bool:
        braced = self.peek().text == "{" and self.peek(2).text == "}"
        token = self.peek(1 if braced else 0)
        if token.kind == "cmd" and token.text in ("circ", "degree"):
            self.position += 3 if braced else 1
            return True
        return False

    def exponent(self) -> Tree:
        if self.accept("-"):
            return ("neg", self.exponent())
        if self.accept("+"):
            return self.exponent()
        tree = self.nested(self.primary)
        if self.accept("^", "**"):
            tree = ("pow", tree, self.nested(self.exponent))
        return tree

    # The smallest parts

    def primary(self) -> Tree:
        token = self.next()
        if token.kind == "num":
            return self.number(token)
        if token.kind == "repeat":
            return ("num", _repeating(token.text))
        if token.kind == "word":
            return self.word(token.text)
        if token.kind == "cmd":
            return self.command(token.text)
        if token.kind == "begin":
            return self.matrix(token.text)
        if token.kind == "op":
            if token.text in ("(", "["):
                return self.bracket(token.text)
            if token.text == "\\{":
                return self.braces()
            if token.text == "{":
                tree = self.nested(self.items)
                self.expect("}")
                return ("set", tree[1]) if tree[0] == "list" else tree
            if token.text == "|":
                return self.absolute()
        raise Unreadable(f"unexpected {token.text!r}" if token.text else "unexpected end")

    def number(self, token: Token) -> Tree:
        value = _fraction(token.text)
        if value.denominator == 1 and token.text.isdecimal():
            part = self.proper_fraction()
            if part is not None:
                return ("num", value + part)
        return ("num", value)

    def proper_fraction(self) -> Fraction | None:
        """The fraction of a mixed number, 1/4 in `7 1/4` and `7\\frac{1}{4}`, if one comes next."""
        start = self.position
        top = bottom = None
        if self.peek().kind == "cmd" and self.peek().text == "frac":
            self.position += 1
            top, bottom = self.argument(), self.argument()
        elif self.peek().kind == "num" and not self.peek().glued and self.peek(1).text == "/":
            self.position += 2
            top, bottom = ("num", _fraction(self.tokens[start].text)), ("num", Fraction(0))
            if self.peek().kind == "num":
                bottom = ("num", _fraction(self.next().text))
        if top and bottom and top[0] == bottom[0] == "num" and 0 < top[1] < bottom[1]:
            part = top[1] / bottom[1]
            if top[1].denominator == bottom[1].denominator == 1:
                return part
        self.position = start
        return None

    def argument(self) -> Tree:
        """A TeX argument: a group, one command, one letter, or one digit of a number."""
        token = self.peek()
        if token.kind == "num" and len(token.text) > 1 and token.text.isdecimal():
            self.tokens[self.position] = Token("num", token.text[1:], True)
            return ("num", Fraction(int(token.text[0])))
        return self.nested(self.primary)

    def word(self, word: str) -> Tree:
        if word in FUNCTION_WORDS:
            return self.function(word)
        if word in _INFINITIES:
            return ("inf",)
        if word in ("pi", "e", "i") and self.peek().text != "_":
            return ("const", word)
        return self.symbol(word)

    def symbol(self, name: str) -> Tree:
        while True:
            if self.accept("'"):
                name += "'"
            elif self.accept("_"):
                token = self.next()
                if token.kind == "op" and token.text == "{":
                    start = self.position
                    while self.peek().text not in ("}", "{", ""):
                        self.position += 1
                    name += "_" + "".join(t.text for t in self.tokens[start : self.position])
                    self.expect("}")
                elif token.kind in ("num", "word", "text"):
                    name += "_" + token.text
                else:
                    raise Unreadable("subscript")
            else:
                return ("sym", name)

    def command(self, name: str) -> Tree:
        if name == "frac":
            top = self.argument()
            return ("div", top, self.argument())
        if name in ("binom", "dbinom", "tbinom"):
            top = self.argument()
            return ("call", "binomial", top, self.argument())
        if name in FUNCTION_WORDS:
            return self.function(name)
        if name in _GREEK:
            return self.symbol("\\" + name)
        if name == "pi":
            return ("const", "pi")
        if name == "infty":
            return ("inf",)
        if name == "mathbbR":
            return ("reals",)
        if name in ("emptyset", "varnothing"):
            return ("set", ())
        if name in _FONTS:
            return self.nested(self.primary)
        if name in ("lfloor", "lceil"):
            inner = self.nested(self.expression)
            if self.next().text != ("rfloor" if name == "lfloor" else "rceil"):
                raise Unreadable("unclosed floor or ceiling")
            return ("call", "floor" if name == "lfloor" else "ceil", inner)
        raise Unreadable(f"unknown command {name!r}")

    def bracket(self, opening: str) -> Tree:
        if opening == "(" and self.accept(")"):
            raise Unreadable("empty brackets")
        tree = self.nested(self.items)
        closing = self.expect(")", "]")
        if tree[0] == "list":
            return ("tuple", opening, closing, tree[1])
        if (opening == "(") != (closing == ")"):
            raise Unreadable("brackets do not match")
        return tree

    def braces(self) -> Tree:
        if self.accept("\\}"):
            return ("set", ())
        if self.peek().kind == "word" and self.peek(1).text in (":", "|"):
            self.position += 2  # {x : x > 3} and {x | x > 3} are their conditions
            tree = self.nested(self.items)
            self.expect("\\}")
            return tree
        tree = self.nested(self.items)
        self.expect("\\}")
        return ("set", tree[1] if tree[0] == "list" else (tree,))

    def absolute(self) -> Tree:
        def inside():
            self.bars = 1
            return self.expression()

        tree = self.nested(inside)
        self.expect("|")
        return ("call", "abs", tree)

    def matrix(self, environment: str) -> Tree:
        if environment not in _MATRICES:
            raise Unreadable(f"environment {environment!r}")
        if environment == "array" and self.accept("{"):
            while not self.accept("}"):  # the format of the columns
                if self.next() is _END:
                    raise Unreadable("unclosed column format")
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
        return ("matrix", tuple(rows))

    def function(self, name: str) -> Tree:
        name = _ALIASES.get(name, name)
        if name in ("sqrt", "cbrt"):
            degree = ("num", Fraction(2 if name == "sqrt" else 3))
            if self.accept("["):
                degree = self.nested(self.expression)
                self.expect("]")
            return ("call", "root", degree, self.nested(self.primary))
        base = _TEN
        if name == "log" and self.accept("_"):
            base = self.argument()
        power = None
        if self.accept("^"):
            power = self.exponent()
            if power == ("neg", ("num", Fraction(1))) and "arc" + name in _INVERTIBLE:
                name, power = "arc" + name, None
        arguments = self.function_arguments(name)
        tree = ("call", name, base, *arguments) if name == "log" else ("call", name, *arguments)
        return tree if power is None else ("pow", tree, power)

    def function_arguments(self, name: str) -> tuple[Tree, ...]:
        if self.peek().kind == "op" and self.peek().text in ("(", "{", "["):
            argument = self.nested(self.primary)
            if argument[0] == "tuple" and name in ("max", "min", "gcd", "lcm"):
                return argument[3]
            return (argument,)
        if self.peek().kind == "op" and self.peek().text == "-":
            self.position += 1
            return (("neg", self.function_arguments(name)[0]),)
        argument = self.nested_factor()
        while self.starts_factor() and not self.starts_function():
            argument = ("mul", argument, self.nested_factor())
        return (argument,)

    def nested_factor(self) -> Tree:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise Unreadable("too deep")
        tree = self.factor()
        self.depth -= 1
        return tree

    def starts_function(self) -> bool:
        token = self.peek()
        return token.text in FUNCTION_WORDS and token.text != "sqrt" or token.text == "("


_INVERTIBLE = {"arcsin", "arccos", "arctan", "arcsec", "arccsc", "arccot"}


def _fraction(text: str) -> Fraction:
    digits, _, exponent = text.lower().partition("e")
    if exponent and abs(int(exponent)) > 400:
        raise Unreadable("exponent too large")
    return Fraction(digits) * (Fraction(10) ** int(exponent) if exponent else 1)


def _repeating(text: str) -> Fraction:
    """0.1\\overline{6} as 1/6."""
    start, _, cycle = text.partition("\\")
    cycle = "".join(c for c in cycle if c in "0123456789")
    whole, _, prefix = start.partition(".")
    nines = (10 ** len(cycle) - 1) * 10 ** len(prefix)
    return Fraction(start.rstrip(".") if start.strip(".") else 0) + Fraction(int(cycle), nines)
