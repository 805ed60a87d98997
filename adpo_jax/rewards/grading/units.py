"""Units and other words around a value.

`5 cm`, `5\\text{ apples}`, `$5` and `5 dollars` are 5 with a unit. A unit on one side only does not
matter; two different units do. Beside a money sign words are none, but for a rate: `$5 profit` are
dollars, `$5 per hour` dollars an hour.
"""

from adpo_jax.rewards.grading.functions import FUNCTION_WORDS
from adpo_jax.rewards.grading.lexer import Token
from adpo_jax.rewards.grading.scalars import INFINITIES

_SYNONYMS = {
    "mm": "millimeter millimetre", "cm": "centimeter centimetre cms", "m": "meter metre",
    "km": "kilometer kilometre kms", "in": "inch inches", "ft": "foot feet", "yd": "yard",
    "mi": "mile", "g": "gram gm gms", "kg": "kilogram kilo kgs", "mg": "milligram",
    "lb": "pound lbs", "oz": "ounce", "l": "liter litre L", "ml": "milliliter millilitre mL",
    "s": "second sec secs", "min": "minute mins", "h": "hour hr hrs", "day": "days",
    "week": "wk wks", "month": "mo", "year": "yr yrs", "dollar": "usd bucks buck USD",
    "euro": "eur EUR", "gbp": "GBP", "rupee": "rupees INR", "yen": "JPY",
    "cent": "", "mph": "mileperhour", "degree": "deg degrees",
    "rad": "radian", "unit": "", "hz": "hertz Hz", "n": "newton N", "j": "joule J", "w": "watt W",
    "v": "volt V", "a": "amp ampere A", "mole": "mol", "k": "kelvin K", "ha": "hectare",
    "gal": "gallon", "qt": "quart", "pt": "pint", "ton": "tonne", "ohm": "",
}  # fmt: skip
CANONICAL = {name: unit for unit, names in _SYNONYMS.items() for name in (unit, *names.split())}
_NOUNS = """
    men day toy egg cup car cow dog cat pie pen bag box bus ant bee pig hen hat cap can jar
    key map mug net nut pan pin pot rod rug row set tie tip van way win ice boy guy kid man
    fan sq per of age bar bed big bit bow bun job lap leg log old one pea red tax tea new
"""
SHORT_NOUNS = set(_NOUNS.split())  # words of up to three letters, which are no products of them
_SHORT = set(CANONICAL) | SHORT_NOUNS
_SINGLE_LETTERS = set("mgshLl")  # bare and after a space
_NO_UNITS_IN_TEXT = set("kxz")  # a thousand and no kelvin, and variables
_SCALES = {"hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12}
_TEMPERATURES = {"C", "F", "K", "Celsius", "Fahrenheit"}  # after a degree sign
_SCALES_OF_DEGREES = {
    "celsiu": "c", "fahrenheit": "f", "degreecelsiu": "c", "degreefahrenheit": "f",
    "degreec": "c", "degreef": "f",
}  # fmt: skip
_CURRENCIES = {"USD": "dollar", "US": "dollar", "EUR": "euro", "GBP": "gbp"}
_MONEY = {"dollar": "dollar", "euro": "euro", "pound": "gbp", "rupee": "rupee", "yen": "yen"}
CURRENCIES = {*_MONEY.values(), "cent"}
_NOT_BESIDE_MONEY = {"lb", "negative", "short", "loss", "debt"}
_NO_LABELS = {
    "not", "never", "no", "nor", "or", "but", "except", "anything", "either", "neither", "between",
    "than",
}  # fmt: skip
# Words that say something about the value rather than what is counted.
_NOT_COUNTED = """
    and or not nor no none never to too between among if but maybe perhaps probably possibly
    either neither than more less fewer about approximately approx around roughly almost
    nearly plus minus times over under divided multiplied by is are was be equals equal half
    quarter third dozen dozens percent wrong right correct incorrect false true answer
    something anything any all both except otherwise else when where for with without then so
    thus therefore because since i think guess hope it this that these those which who what as
    like ish least most up down at from until till only just also another other instead rather
    versus vs even odd unknown undefined question reference one two three four five six seven
    eight nine ten eleven twelve twenty mod modulo remainder tenth tenths hundredth hundredths
    thousandth thousandths halves thirds fourths fifths sixths sevenths eighths ninths elevenths
    twelfths twentieths tens pi repeating recurring lakh lakhs crore crores inverse squared
    cubed power base factorial hundreds thousands millions
    billions choose however actually wait sorry could would should may might can cannot will
    now final solution value number
"""
_NO_UNITS = set(_NOT_COUNTED.split())
_OPENING, _CLOSING = {"(", "[", "{", "\\{"}, {")", "]", "}", "\\}"}


def split_unit(tokens: list[Token]) -> tuple[list[Token], str | None]:
    """Takes money signs and a closing unit off; spells out `million` and its like.

    Of a list whose members all have the same unit, it is taken off each.

    Returns:
      The other tokens, and the unit under its canonical name or None.
    """
    if any(map(_separates, tokens)) and any(t.kind in ("text", "word") for t in tokens):
        return _split_each(tokens) or _split(tokens)
    return _split(tokens)


def differ(unit: str | None, other: str | None) -> bool:
    """Whether two units are different ones; of money a rate may be left out, and the money of it.

    `/h` and `dollar` are both `dollar/h`.
    """
    if not unit or not other or unit == other:
        return False
    (money, _, rate), (other_money, _, other_rate) = unit.partition("/"), other.partition("/")
    if CURRENCIES.isdisjoint((money, other_money)):
        return True
    return (money != other_money and bool(money and other_money)) or (
        rate != other_rate and bool(rate and other_rate)
    )


def _split_each(tokens: list[Token]) -> tuple[list[Token], str] | None:
    """The list without the one unit of its members; None where there is no such unit."""
    bare: list[Token] = []
    units: set[str | None] = set()
    member: list[Token] = []
    depth = 0
    for token in [*tokens, None]:
        if token is not None and (depth or not _separates(token)):
            member.append(token)
            if token.kind == "op":
                depth += (token.text in _OPENING) - (token.text in _CLOSING)
            continue
        if member:
            value, unit = _split(member)
            units.add(unit)
            bare += value
        bare += [token] if token is not None else []
        member = []
    return (bare, units.pop()) if len(units) == 1 and None not in units else None


def _separates(token: Token) -> bool:
    if token.kind in ("text", "word"):
        return token.text.strip(" ,").lower() in ("and", "or")
    return token[:2] in (("op", ","), ("op", ";"))


def _split(tokens: list[Token]) -> tuple[list[Token], str | None]:
    unit = None
    if any(t.kind == "cmd" and t.text in _MONEY for t in tokens):
        money = {_MONEY[t.text] for t in tokens if t.kind == "cmd" and t.text in _MONEY}
        tokens = [t for t in tokens if t.kind != "cmd" or t.text not in _MONEY]
        if len(money) > 1:
            return tokens, None
        unit = money.pop()
    if [t.kind for t in tokens[-2:]] == ["num", "cmd"] and tokens[-1].text == "Omega":
        tokens = [*tokens[:-1], Token("text", "ohm", False)]
    if all(t.kind not in ("text", "word") for t in tokens):
        return tokens, unit
    tokens = _without_label(_without_brackets(_in_one_line(_scaled(tokens))))
    if len(tokens) > 1 and tokens[0].text.strip() in _CURRENCIES and tokens[1].kind == "num":
        unit = unit or _CURRENCIES[tokens[0].text.strip()]
        tokens = tokens[1:]
    for start in range(1, len(tokens)):
        if not _ends_value(tokens[start - 1]):
            continue
        if tokens[start].kind in ("text", "word") or _is_rate(tokens[start:]):
            if (
                tokens[start - 1].text in ("circ", "degree")
                and tokens[start].text.strip() in _TEMPERATURES
            ):
                tokens = [
                    *tokens[:start],
                    tokens[start]._replace(kind="text"),
                    *tokens[start + 1 :],
                ]
            name = _unit_name(tokens[start:])
            if name is not None:
                return _beside_money(tokens, start, unit, name) if unit else (tokens[:start], name)
    return tokens, unit


def _beside_money(
    tokens: list[Token], start: int, money: str, name: str
) -> tuple[list[Token], str | None]:
    """The value and the unit of `$5 per hour`, `$5 profit`; of `$5 euros` as it stands and None."""
    first, slash, rate = name.partition("/")
    if first != money and (first in CURRENCIES or first in _NOT_BESIDE_MONEY or len(first) == 1):
        return tokens, None
    if rate in _SCALES or rate in _NOT_BESIDE_MONEY:
        return tokens, None
    return tokens[:start], money + slash + rate if first in ("", money) else money


def _is_rate(tokens: list[Token]) -> bool:
    """Whether tokens begin as `/hour` does: `$5/hour` has no unit before the slash."""
    if tokens[0][:2] != ("op", "/") or len(tokens) < 2:
        return False
    word = tokens[1].text.strip()
    if tokens[1].kind == "text":
        return len(word) > 1 or word in CANONICAL
    return tokens[1].kind == "word" and (
        word in ("day", "min", "h", "hr", "kg") or (len(word) > 3 and word not in INFINITIES)
    )


def _in_one_line(tokens: list[Token]) -> list[Token]:
    r"""`60\frac{\text{mi}}{\text{h}}` as `60\text{mi}/\text{h}`."""
    for i, token in enumerate(tokens):
        if token[:2] != ("cmd", "frac") or not i or not _ends_value(tokens[i - 1]):
            continue
        rest = tokens[i + 1 :]
        ends = [at for at, t in enumerate(rest) if t[:2] == ("op", "}")]
        between = next((at for at in ends if rest[at + 1 : at + 2] and rest[at + 1].text == "{"), 0)
        above, below = rest[1:between], rest[between + 2 : -1]
        is_whole = between and ends[-1] == len(rest) - 1 and rest[0].text == "{"
        if is_whole and above and below and {above[0].kind, below[0].kind} == {"text"}:
            return [*tokens[:i], *above, Token("op", "/", True), *below]
    return tokens


def _ends_value(token: Token) -> bool:
    return token.kind in ("num", "repeat") or token.text in (")", "}", "!", "pi", "circ", "%")


def _without_brackets(tokens: list[Token]) -> list[Token]:
    """`72 (dollars)` as `72 dollars`."""
    opening = next((i for i, t in enumerate(tokens) if t[:2] == ("op", "(")), 0)
    inside = tokens[opening + 1 : -1]
    if not opening or tokens[-1][:2] != ("op", ")") or not _ends_value(tokens[opening - 1]):
        return tokens
    if any(t.kind not in ("text", "word") for t in inside) or not any(
        len(t.text.strip()) > 1 for t in inside
    ):
        return tokens
    first = [] if not inside else [inside[0]._replace(glued=False)]
    return tokens if _unit_name(inside) is None else tokens[:opening] + first + inside[1:]


def _scaled(tokens: list[Token]) -> list[Token]:
    scaled: list[Token] = []
    for token in tokens:
        word = token.text.strip().lower() if token.kind in ("text", "word") else ""
        power = _SCALES.get(word)
        if power and scaled and _ends_value(scaled[-1]):
            scaled += [Token("op", "*", True), Token("num", "1" + "0" * power, True)]
        elif word.startswith(("percent", "per cent")):
            scaled.append(Token("op", "%", True))
            rest = token.text.strip()[word.index("cent") + 4 :]
            if rest[:1] == " ":
                scaled.append(Token("text", rest, False))
            elif rest:
                scaled[-1] = token
        elif word == "cent" and scaled and scaled[-1].text.lower() == "per":
            scaled[-1] = Token("op", "%", True)
        else:
            scaled.append(token)
    return scaled


def _without_label(tokens: list[Token]) -> list[Token]:
    """Without a leading `Total =`, `\\text{Area: }` or `\\text{The area is }`."""
    for i, token in enumerate(tokens[:8]):
        if token.kind == "text" and token.text.rstrip().endswith((":", "=", " is", " are")):
            label, end = token.text.rstrip(" :="), i + 1
        elif i and token.kind == "op" and token.text == "=":
            label, end = " ".join(t.text for t in tokens[:i]), i + 1
        else:
            if token.kind not in ("text", "word"):
                return tokens
            continue
        words = label.lower().split()
        is_words = all(w.isalpha() for w in words) and any(len(w) > 3 for w in words)
        if end < len(tokens) and is_words and not _NO_LABELS & set(words):
            return tokens[end:]
        return tokens
    return tokens


def _unit_name(tokens: list[Token]) -> str | None:
    """The canonical name of a phrase of unit words, as `m/s^2` or `square feet`; else None."""
    parts: list[str] = []
    words = 0
    previous = None
    for token in tokens:
        if token.kind in ("text", "word"):
            for word in token.text.replace("/", " / ").replace("^", " ^ ").split():
                if word in ("/", "^") or (word in ("2", "3") and parts and parts[-1] == "^"):
                    parts.append(word)
                    continue
                after_slash = bool(parts) and parts[-1] in ("/", "*")
                name = _word_name(word.strip(".,()"), token, after_slash)
                if name is None:
                    return None
                parts.append(name)
                words += 1
        elif token.kind == "op" and token.text in ("/", "^", "{", "}", "-", "*"):
            parts += [token.text] if token.text not in ("{", "}") else []
        elif token.kind == "num" and previous and previous.text in ("^", "{", "-"):
            parts.append(token.text)
        else:
            return None
        previous = token
    if not 1 <= words <= 5:
        return None
    name = " ".join(parts).replace("per", "/")
    for adjective, power in (("square", 2), ("sq", 2), ("cubic", 3)):
        if name.startswith(adjective + " "):
            name = f"{name[len(adjective) + 1 :]} ^ {power}"
    name = name.replace(" ", "")
    return "mph" if name == "mi/h" else _SCALES_OF_DEGREES.get(name, name)


def _word_name(word: str, token: Token, after_slash: bool) -> str | None:
    if not word.isascii() or not word.replace("-", "").isalpha():
        return None
    lower = word.lower()
    if lower in _NO_UNITS or word in FUNCTION_WORDS:
        return None
    # A glued M is a million; molar has a space before it.
    in_text = token.kind == "text" and not after_slash
    if in_text and (word in _NO_UNITS_IN_TEXT or token.text == "M"):
        return None
    if token.kind == "word" and not after_slash:
        if len(word) == 1 and (token.glued or word not in _SINGLE_LETTERS):
            return None
        if len(word) in (2, 3) and lower not in _SHORT and lower.rstrip("s") not in _SHORT:
            return None
        if word in ("pi", "infinity"):
            return None
    for candidate in (word, lower, lower.rstrip("s")):
        if candidate in CANONICAL:
            return CANONICAL[candidate]
    return lower.rstrip("s")
