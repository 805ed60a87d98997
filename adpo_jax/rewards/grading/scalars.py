"""The grammar of scalars: sums, products, powers, functions, down to numbers and letters.

The trees are described in `parse`, whose parser adds lists, sets, relations and matrices.
"""

from fractions import Fraction

from adpo_jax.rewards.grading.functions import FUNCTION_WORDS, NAMES
from adpo_jax.rewards.grading.lexer import Token, Unreadable
from adpo_jax.rewards.grading.limits import MAX_DEPTH

Tree = tuple

INFINITIES = {"infinity", "inf", "Infinity"}
END = Token("", "", False)
_GREEK = """
    alpha beta gamma delta epsilon varepsilon zeta eta theta vartheta iota kappa lambda mu nu xi
    rho sigma tau upsilon phi varphi chi psi omega Gamma Delta Theta Lambda Xi Sigma Phi Psi Omega
    ell hbar
"""
_FONTS = """
    text textbf textit textrm mathrm mathbf mathit mathsf mathtt mathcal boldsymbol bm bold boxed
    fbox operatorname mbox hbox underline vec hat
"""
_GREEK_NAMES, _FONT_NAMES = set(_GREEK.split()), set(_FONTS.split())
_OTHER_FACTORS = {"frac", "binom", "dbinom", "tbinom", "pi", "infty", "lfloor", "lceil"}
FACTOR_COMMANDS = _GREEK_NAMES | _FONT_NAMES | FUNCTION_WORDS | _OTHER_FACTORS
_INVERTIBLE = {"arcsin", "arccos", "arctan", "arcsec", "arccsc", "arccot", "arcsinh",
               "arccosh", "arctanh"}  # fmt: skip
_TEN = ("num", Fraction(10))


class ScalarParser:
    """Recursive descent over tokens; one method a level of the grammar."""

    def __init__(self, tokens: list[Token]):
        self.tokens = tokens
        self.position = 0
        self.depth = 0
        self.bars = 0  # open |...| at this level of brackets

    def peek(self, ahead: int = 0) -> Token:
        i = self.position + ahead
        return self.tokens[i] if i < len(self.tokens) else END

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

    # Arithmetic

    def expression(self) -> Tree:
        sign = self.sign()
        if sign == "add" and self.peek().text == "-" and self.accept("-"):
            sign = "pm"  # "+-5", written plainly
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
            return token.text in FACTOR_COMMANDS
        if token.kind == "begin" or (token.text == "[" and self.peek(1).kind == "begin"):
            return True
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
        if token.kind == "op":
            if token.text in ("(", "[", "]"):
                return self.bracket(token.text)
            if token.text == "{":
                tree = self.nested(self.items)
                if self.peek()[:2] == ("cmd", "over"):
                    self.position += 1
                    tree = ("div", tree, self.nested(self.items))
                self.expect("}")
                return ("set", tree[1]) if tree[0] == "list" else tree
            if token.text == "|":
                return self.absolute()
        return self.structure(token)

    def structure(self, token: Token) -> Tree:
        """What starts with a token that starts no scalar."""
        raise Unreadable(f"unexpected {token.text!r}" if token.text else "unexpected end")

    def items(self) -> Tree:
        """What stands between brackets."""
        return self.expression()

    def number(self, token: Token) -> Tree:
        digits, _, exponent = token.text.lower().partition("e")
        if len(exponent) > 3:  # a thousand digits and more are left as a power
            return ("mul", ("num", Fraction(digits)), ("pow", _TEN, ("num", Fraction(exponent))))
        value = Fraction(int(digits) if digits.isdecimal() else digits)
        if exponent:
            value *= Fraction(10) ** int(exponent)
        if value.denominator == 1 and token.text.isdecimal():
            part = self.proper_fraction()
            if part is not None:
                return ("num", value + part)
        return ("num", value)

    def proper_fraction(self) -> Fraction | None:
        """The fraction of a mixed number, 1/4 in `7 1/4` and `7\\frac{1}{4}`, if one comes next.

        It looks at tokens only: parsing what might be no mixed number, and then once more, would
        double the time with every level of nesting.
        """
        if self.peek()[:2] == ("cmd", "frac"):
            top = self.integer_argument(1, 0)
            bottom = self.integer_argument(*top[1:]) if top else None
        elif not self.peek().glued and self.peek(1)[:2] == ("op", "/"):
            top, bottom = ((_integer(self.peek(ahead)), 3, 0) for ahead in (0, 2))
        else:
            return None
        if not top or not bottom or not 0 < (top[0] or 0) < (bottom[0] or 0):
            return None
        value, ahead, digit = bottom
        self.position += ahead
        if digit:
            self.tokens[self.position] = Token("num", self.peek().text[digit:], True)
        return Fraction(top[0], value)

    def integer_argument(self, ahead: int, digit: int) -> tuple[int, int, int] | None:
        """An integer as a TeX argument, `{12}` or a single digit, at a digit of a later token.

        Returns:
          The integer, and the token and digit after it; None if no integer stands there.
        """
        token = self.peek(ahead)
        if not digit and token[:2] == ("op", "{") and self.peek(ahead + 2)[:2] == ("op", "}"):
            value = _integer(self.peek(ahead + 1))
            return None if value is None else (value, ahead + 3, 0)
        if _integer(token) is None:
            return None
        is_last = digit + 1 == len(token.text)
        following = (ahead + 1, 0) if is_last else (ahead, digit + 1)
        return int(token.text[digit]), *following

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
        if word in INFINITIES:
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
        if name in _GREEK_NAMES:
            return self.symbol("\\" + name)
        if name == "pi":
            return ("const", "pi")
        if name == "infty":
            return ("inf",)
        if name == "mathbbR":
            return ("reals",)
        if name in ("emptyset", "varnothing"):
            return ("set", ())
        if name in _FONT_NAMES:
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
        if opening == "(":
            closing = self.expect(")", "]")
        else:
            closing = self.expect(")", "]", "[")
        if opening == "]" or closing == "[":  # ]0, 1[ is (0, 1)
            if tree[0] != "list" or len(tree[1]) != 2 or closing == ")":
                raise Unreadable("brackets do not match")
            opening, closing = (("(" if c == out else c) for c, out in
                                ((opening, "]"), (closing, "[")))  # fmt: skip
            closing = ")" if closing == "(" else closing
        if tree[0] == "list":
            return ("tuple", opening, closing, tree[1])
        if (opening == "(") != (closing == ")"):
            raise Unreadable("brackets do not match")
        return tree

    def absolute(self) -> Tree:
        def inside():
            self.bars = 1
            return self.expression()

        tree = self.nested(inside)
        self.expect("|")
        return ("call", "abs", tree)

    def function(self, name: str) -> Tree:
        spelling, name = name, NAMES[name]
        if name == "root":
            degree = ("num", Fraction(3 if spelling == "cbrt" else 2))
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
        if self.peek().kind == "op" and self.peek().text in ("(", "{", "[", "\\{"):
            argument = self.nested(self.primary)
            if argument[0] == "set" and name in ("max", "min", "gcd", "lcm") and argument[1]:
                return argument[1]
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
        return (token.text in FUNCTION_WORDS and token.text != "sqrt") or token.text == "("


def _integer(token: Token) -> int | None:
    return int(token.text) if token.kind == "num" and token.text.isdecimal() else None


def _repeating(text: str) -> Fraction:
    """0.1\\overline{6} as 1/6."""
    start, _, cycle = text.partition("\\")
    cycle = "".join(c for c in cycle if c in "0123456789")
    prefix = start.partition(".")[2]
    nines = (10 ** len(cycle) - 1) * 10 ** len(prefix)
    return Fraction(start.rstrip(".") if start.strip(".") else 0) + Fraction(int(cycle), nines)
