"""Answers that are words: a weekday, a name, a choice, a time of day, a numeral in some base."""

import re

_COMMAND = re.compile(
    r"\\(?:text[a-z]{0,6}|mathrm|mathbf|mathit|mbox|hbox|boldsymbol|operatorname)\b"
)
_NOISE = re.compile(r"\\[,;:! ()\[\]]|[{}$*`\"]|\\(?:left|right|quad|qquad)\b|~")
_EDGES = " .,;:!'"
_CHOICE = re.compile(
    r"(?:(?:[Oo]ption|[Cc]hoice|[Aa]nswer) )?(?:\( ?([A-Ja-j]) ?\)|([A-Ja-j])(?=$|[).:]))[).:]?(.*)"
)
_OTHER_CHOICE = re.compile(r"\([A-Ja-j]\)|\b(?:or|and|not)\b|\b[A-J]\b")
_COMMAS = re.compile(r"[,;&]| and ")
_AND_NUMBER = re.compile(r"(?<=[a-z]),? and (?=[0-9])")  # 1 hour and 15 minutes
_TIME = re.compile(
    r"(?P<hour>[0-9]{1,2})(?: ?[:.] ?(?P<minute>[0-5][0-9])(?: ?: ?(?P<second>[0-5][0-9]))?)?"
    r"(?: ?o'? ?clock)?"
    r"(?: ?(?P<half>[ap]\.? ?m|(?<= )(?:in the |at )(?:morning|afternoon|evening|night))\.?)?"
)
_SAYS_HALF = re.compile(r"[ap]\.? ?m|noon|night|morning|evening", re.IGNORECASE)
_BASE = r"([0-9]{1,2}|two|three|four|five|six|seven|eight|nine|ten)"
_BASED = re.compile(rf"\(?([0-9A-Za-z]{{1,60}})\)?_\{{?\(?{_BASE}\)?\}}?")
_IN_BASE = re.compile(rf"([0-9A-Za-z]{{1,60}}) \(?(?:in )?base[ -]{_BASE}\)?")
_BASE_NAMES = {
    "two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7, "eight": 8, "nine": 9,
    "ten": 10,
}  # fmt: skip


def words(text: str) -> str:
    """The bare words of an answer, spaces collapsed."""
    text = _NOISE.sub(" ", _COMMAND.sub(" ", text))
    return " ".join(text.split()).strip(_EDGES)


def same_words(answer: str, reference: str) -> bool:
    """Whether two answers say the same; the case matters only for single letters."""
    a, b = words(answer), words(reference)
    if not any(c.isalpha() for c in b):
        return False  # numbers have their own comparison, which nothing here may loosen
    if is_choice(reference):
        return choice_of(answer) == choice_of(reference)
    a, b = _AND_NUMBER.sub(" ", a), _AND_NUMBER.sub(" ", b)
    if a == b:
        return True
    a, b = a.casefold(), b.casefold()
    if is_word_list(b) and _members(a) == _members(b):
        return True
    return (len(b) > 2 and a.removeprefix("the ") == b.removeprefix("the ")) or a == b == "no"


def is_word_list(text: str) -> bool:
    """Whether a text is several words with commas between; letters are left to the grammar."""
    members = _members(words(text))
    are_words = all(m.replace(" ", "").replace("-", "").isalpha() for m in members)
    return len(members) > 1 and are_words and any(len(m) > 1 for m in members)


def _members(text: str) -> list[str]:
    """The members of a list of words in the order of the alphabet: tom, ann and bob."""
    members = [m.strip(_EDGES) for m in _COMMAS.split(text)]
    return sorted(m for m in members if m)


def same_time(answer: str, reference: str) -> bool | None:
    """Whether two texts give the same time of day; None where neither says before or after noon."""
    if not _SAYS_HALF.search(answer) and not _SAYS_HALF.search(reference):
        return None
    a, b = _TIME.fullmatch(_clock(answer)), _TIME.fullmatch(_clock(reference))
    if not ((a and a["half"]) or (b and b["half"])):
        return None
    if not a or not b or any(int(a[g] or 0) != int(b[g] or 0) for g in ("minute", "second")):
        return False
    # A time without its half of the day is right, as a number without its unit is.
    is_half_missing = not a["half"] or not b["half"]
    return _hour(a) == _hour(b) or (is_half_missing and int(a["hour"]) == int(b["hour"]))


def _clock(text: str) -> str:
    text = words(text).lower()
    return {"noon": "12 pm", "midnight": "12 am", "12 noon": "12 pm", "12 midnight": "12 am",
            "12:00 noon": "12 pm", "12:00 midnight": "12 am"}.get(text, text)  # fmt: skip


def _hour(match: re.Match) -> int:
    hour = int(match["hour"])
    if not match["half"]:
        return hour
    is_late = match["half"].startswith("p") or match["half"].endswith(("noon", "evening", "night"))
    return hour % 12 + 12 * is_late


def choice_of(text: str) -> str | None:
    """The letter of `C`, `(C)`, `C.` or `(C) 15`; None where another letter is named as well."""
    match = _CHOICE.fullmatch(words(text))
    if match is None or _OTHER_CHOICE.search(match[3]):
        return None
    return (match[1] or match[2]).upper()


def is_choice(reference: str) -> bool:
    """Whether a reference is the capital letter of a choice."""
    return choice_of(reference) is not None and not any(c.islower() for c in words(reference))


def based_numeral(text: str) -> tuple[str, int] | None:
    """The digits and the base of a numeral as `1011_2` or `2B_{12}`, else None."""
    if "_" not in text and "base" not in text:
        return None
    bare = _COMMAND.sub("", text)
    match = _BASED.fullmatch(_NOISE_IN_NUMERALS.sub("", bare)) or _IN_BASE.fullmatch(words(bare))
    if match is None:
        return None
    digits = match[1].upper()
    base = _BASE_NAMES[match[2]] if match[2].isalpha() else int(match[2])
    has_digit = any(c in "0123456789" for c in digits)
    is_numeral = (has_digit and match[1][0] in "0123456789") or (base > 10 and match[1].isupper())
    if not is_numeral or not 2 <= base <= 36:
        return None
    if any(int(c, 36) >= base for c in digits):
        return None
    return digits.lstrip("0") or "0", base


_NOISE_IN_NUMERALS = re.compile(
    r"[\s$]|\\[,;!]|\{(?=[^{}]{0,60}\}_)|\}(?=_)|(?<=_)\{(?=\{)|\}(?=\}$)"
)
