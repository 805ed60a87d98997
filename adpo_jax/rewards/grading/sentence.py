r"""What prose says the answer is: "The answer is 72, so she sold 72 clips." says 72.

A claim is judged by its words before anything is read: a negated, hypothetical or asked one counts
for nothing, one with two values keeps both ("72 or 70"), and one that only talks about the answer
("correct", "on the next line") is passed over.

Every regular expression here is a plain alternation or has bounded repeats, and the number of
claims and of their shortenings is bounded: time is linear in the text, whatever it says.
"""

import re
from collections import deque

from adpo_jax.rewards.grading.compare import read
from adpo_jax.rewards.grading.hedges import is_correcting, is_doubted, is_supposed
from adpo_jax.rewards.grading.limits import MAX_ANSWER_CHARS
from adpo_jax.rewards.grading.markup import (
    EMOJI,
    first_block,
    undressed,
    without_calculations,
    without_emphasis,
)
from adpo_jax.rewards.grading.remarks import remarks_after
from adpo_jax.rewards.grading.sentence_words import (
    COMMENTS,
    NO_ANSWERS,
    NO_NUMBERS,
    NO_READING,
    OUTRIGHT,
)
from adpo_jax.rewards.grading.shortening import IN_TOTAL, WHY_CUT, WINDOW, WITHIN, shortened
from adpo_jax.rewards.grading.words import choice_of

MAX_CLAIMS = 16  # looked back over


_NUMBERED = re.compile(r"(?:\d{1,3}[.)]|[-*•])\s{1,4}[*_`]{0,3}[A-Za-z]")

# Where a text says what the answer is. "deny" is a denial; an empty match at a line's end announces
# the lines below.
_SAYS = re.compile(
    r"(?P<label>^[^\w\n]{0,10}(?:the |my |our )?(?:(?:final|correct|right) )?answer"
    r"(?:[ \t*_]{0,4}(?:[-–—]{1,2}>?[ \t]{1,4})|[ \t*_]{1,4}(?=[$\\\d]|\([A-J]\))|[^\w\n:=]{0,8}$))"
    r"|\b(?:(?:answer|ans)s?|(?:correct|right) (?:option|choice))\b"
    r"(?:[ ,]{1,2}(?:to|for|of|in|when|rounded|we|I|you|which|that) [^.:\n]{1,60}?"
    r"| \([^()\n]{1,60}\)"
    r"|, (?:then|therefore|thus|however|indeed|naturally|finally|of course|as expected),)?"
    r"[*_`\s,]{0,4}"
    r"(?:(?P<deny>\b(?:is|are|was|were|can|could)(?:n['’]t| ?not| never| no longer)(?: be)?\b"
    r"|\b(?:should|must|would|will)(?:n['’]t| not) be\b)"
    r"|\b(?:is|are|was|were|equals|(?:would|should|must|will|has to) (?:then )?be|becomes"
    r"|comes (?:out )?(?:to(?: be)?|as)|(?:works|turns) out (?:to be|as|to)|remains)\b"
    r"|['’]s(?= [*_]{0,2}[$\\\d(-])|\bof(?= [*_]{0,2}[$\\\d(])|:|=(?!=)|→|[-=]>)"
    r"|(?P<inverse>(?<=\S)[*_`]{0,3} (?:is|are)(?P<not>n['’]t| not)?"
    r" (?:the|our|my)(?: (?:final|correct|right|required|desired))? answer\b)",
    re.I | re.M,
)
_MENTION = re.compile(r"\bans|(?:correct|right) (?:option|choice)", re.I)
_LEAD = re.compile(
    r"(?:[ \t,:]{1,4}|[=→]|\*\*|__|(?:also|still|now|then|simply|just|only|exactly|precisely|about"
    r"|approximately|around|roughly|therefore|thus|hence|indeed|clearly|obviously|definitely"
    r"|certainly|of course|actually|equal to|given by|found to be|to be|a total of|in fact|again|is"
    r"|either|the (?:number|value|integer|fraction|following))\b|approx\b\.?"
    r"|\((?:about|approximately|approx\.?|around|roughly|exactly|rounded[^()\n]{0,40}"
    r"|(?:after|in|to the nearest) [A-Za-z ]{2,30})\))",
    re.I,
)
_LEAD_BEFORE = re.compile(
    r"^(?:so|thus|hence|therefore|then|and|but|wait|no|clearly|i (?:think|believe)"
    r"|(?:this|that|which) means|we (?:see|find|get|conclude)|that)\b,?",
    re.I,
)
_FIRST_WORD = re.compile(r"[^\w.,;!?]{0,40}\w{1,40}")
_WRONG = re.compile(
    r"[\s*_]{0,4}(?:(?:clearly|obviously|definitely|therefore|thus|also|actually) )?"
    r"(?:wrong|incorrect|false|mistaken|nonsense)"
    r"(?=[\s*_]{0,4}(?:[.,;!\n]|$)| (?:because|since|as) )",
    re.I,
)
_INSTEAD = re.compile(r",? (?:instead|rather|then|though|after all)$", re.I)
_DENIED = re.compile(r"(?:hardly|not|never|no longer|neither)\b", re.I)
_BUT = re.compile(r",? but (?:rather |actually |it is |is )?|[;,] it(?: is|['’]s) ", re.I)
_DENIED_END = re.compile(r"[,;!?]|\.(?:\s|$)|\s(?:but|because|since|as|so)\b", re.I)
_END = re.compile(
    r"""\.(?=["'”’)\]*_`]{0,4}(?:\s|$))|\?(?=["'”’)*_`]{0,4}(?:\s|$))"""
    rf"""|!(?=!|["'”’*_`]{{0,4}}(?:\s*$|\s+["'(*_A-Z{EMOJI}]))"""
)
_RETRACTED = re.compile(r"""["'”’)\]*_`.\s]{0,8}(?:or\b|no[,.][^.!?\n]{0,40}\d)""", re.I)
# A plain number, which needs no parsing.
_PLAIN = re.compile(r"(?:\\?\$)?-?[0-9]{1,40}(?:,[0-9]{3}){0,9}(?:\.[0-9]{1,40})?")
# "*42*" and "_42_" at the beginning of a claim.
_ITALIC = re.compile(r"\A([ \t:]{0,8})([*_])(?![\s*_])([^*_\n]{1,80})(?<!\s)\2(?![\w*_])")
_BULLET = re.compile(r"[ \t>]{0,4}([-–]|[*•‣◦]|\d{1,2}[.)])[ \t]{1,4}(?=\S)")
_MAX_BULLETS = 20
_RANGE = re.compile(r"\d \w{0,20} ?to\b|\bto \$?\d")
_PART_OF = re.compile(
    r"(\\?\$?[-+]?\d[\d,./]{0,30}(?: [A-Za-z]{1,20})?) of [A-Za-z][A-Za-z ]{1,60}"
)
_ASIDE = re.compile(r" \([^()\n]{0,80}=[^()\n]{0,80}\)$")
_VALUE = re.compile(r"[\d\\$]|^[(\[{]?[A-Za-z](?![A-Za-z])|[π√∞]")
_CODE = re.compile(r"""[_{}"`\[\]#]|\\(?!\$)|\w(?:[*(]\S|'(?!(?:s|t|re|ll|ve|d|m)\b)\S)""")
_NUMBERS = re.compile(
    r"(?<![^\s(:=$€£])[-−]?(?:\\?\$|[€£])?[-−]?\d[\d,]{0,40}(?:\.\d{1,40})?(?:/\d{1,20})?(?![\w])"
)
_WORD = re.compile(r"(?<!\\)\b[A-Za-z'’]{2,24}\b")


def is_readable(text: str) -> bool:
    """Whether a text is an answer of the grammar, and none of its words says that it is none."""
    if not text or len(text) > MAX_ANSWER_CHARS:
        return False
    if _PLAIN.fullmatch(text):
        return True
    words = {word.lower() for word in _WORD.findall(text)}
    if words & NO_ANSWERS or (" " in text and words & NO_READING):
        return False
    answer = read(text)
    return answer.tree is not None or answer.based is not None


def stated_answer(text: str) -> str | None:
    """What the last claim about the answer says, or None where no claim says anything.

    Words that may only describe the answer ("even", "final") count where no claim gives a value.

    Args:
      text: prose; "The answer is 18.\\n\\nThe answer is correct." says "18".
    """
    mentions = deque(_MENTION.finditer(text), 4 * MAX_CLAIMS)
    if not mentions:
        return None
    matches = deque(_SAYS.finditer(text, max(0, mentions[0].start() - 20)), MAX_CLAIMS)
    denied: set[str] = set()
    words, is_wrong = None, False
    while matches:
        match = matches.pop()
        before = text[max(0, match.start() - 60) : match.start()]
        if match["inverse"] is not None:
            found = _claim_before(before)
            if found and match["not"]:
                denied.add(_bare(found))
                found = None
        else:
            if is_supposed(before):
                continue
            rest = text[match.end() : match.end() + WINDOW]
            if _WRONG.match(rest):  # or the answer of a question whether something is true
                other = _after_remarks(None, text, match.end(), denied)
                if other:
                    return other
                is_wrong, words = True, words or _claim_after(rest, denied, False, False)
                continue
            if match["deny"] or is_doubted(before):
                rest = "not " + rest
            is_last = match.end() + WINDOW >= len(text)
            is_label = ":" in (match.group().rstrip(" \t*_")[-1:], rest.lstrip(" \t*_`")[:1])
            found = _claim_after(rest, denied, is_label, is_last)
        if not found or _bare(found) in denied:
            continue
        found = _after_remarks(found, text, match.end(), denied)
        if is_wrong and found:
            return None if _VALUE.search(found) else words
        if found is None or _is_outright(found) or is_correcting(before):
            return found
        words = words or found
    return words


def _after_remarks(found: str | None, text: str, start: int, denied: set[str]) -> str | None:
    """An answer as what follows it leaves it: itself, None where it is taken back, or another."""
    stated = found
    first = _FIRST_WORD.match(text, start)  # no remark but a part of the answer: "no" may be it
    start = first.end() if first else start
    for kind, rest in remarks_after(text, start, is_denied=found is None):
        if kind == "denied":
            found = None
        elif kind == "restored":
            found = stated
        elif kind in ("bare", "not"):
            value = without_lead(_sentence(without_emphasis(rest.partition("\n")[0]))[0])
            value = _INSTEAD.sub("", value)
            if kind == "not":
                found = None if found and _bare(value) == _bare(found) else found
                continue
            is_value = "=" not in value and _VALUE.search(value) and is_readable(value)
            found = stated = value if is_value else found
        else:
            value = _claim_after(rest, denied, is_label=False, is_last=False)
            found = stated = value if value and _is_outright(value) else found
    return found if found and _bare(found) not in denied else None


def _is_outright(found: str) -> bool:
    """Whether a claim gives an answer rather than words that may only describe one."""
    first = re.split(r"[ -]", found, maxsplit=1)[0].lower()
    return found[:1].isupper() or first in OUTRIGHT or _VALUE.search(found) is not None


def claim(text: str) -> str | None:
    """The answer that one line gives, without what explains it; None where it gives none.

    "72 because 48 + 24 = 72" gives "72", "72 or 70" itself, "correct" nothing.
    """
    text = undressed(without_emphasis(text))
    if _PLAIN.fullmatch(text):
        return text
    text = _ASIDE.sub("", without_lead(text))
    text = IN_TOTAL.sub("", undressed(text))
    within = WITHIN.search(text, max(0, len(text) - 80))
    text = text[: within.start()] if within and _VALUE.match(text) else text
    part = _PART_OF.fullmatch(text)
    text = part[1] if part else text
    first = _WORD.match(text)
    if not text or (first and first.group().lower() in COMMENTS):
        return None
    forms = [text, *shortened(text)]
    for form in forms:
        if _VALUE.search(form) and is_readable(form):
            return form
    if choice_of(text) is not None:
        return text
    if _VALUE.search(text):
        return None
    why = WHY_CUT.search(text)
    words = text[: why.start()] if why else text
    said = {word.lower() for word in words.split()}
    return undressed(words) if len(said) <= 4 and not said & NO_ANSWERS else None


def without_lead(text: str) -> str:
    """A claim without the words before its value: "about", "therefore", "="."""
    for _ in range(8):
        lead = _LEAD.match(text)
        if not lead:
            break
        text = text[lead.end() :]
    if text.endswith(("**", "__")) and text.count(text[-2:]) % 2:
        text = text[:-2]
    if text.endswith("`") and text.count("`") % 2:
        text = text[:-1]
    return text.strip(" \t\r\n,;:")


def last_words(text: str) -> str | None:
    """The one number of a sentence such as "Janet makes $18 every day", or None.

    Of a sentence with an equation, what stands behind its last sign.
    """
    text = undressed(without_emphasis(without_calculations(text)))
    text = text[:-1] if text[-1:] in (".", "!") else text
    words = [word.lower() for word in _WORD.findall(text)]
    if not words or len(text) > MAX_ANSWER_CHARS or _CODE.search(text):
        return None
    if not NO_NUMBERS.isdisjoint(w for w in words if w != "to") or _RANGE.search(text):
        return None
    if "=" in text:
        side = text.rpartition("=")[2]
        return claim(side) if _VALUE.search(side) else None
    numbers = list(_NUMBERS.finditer(text))
    return claim(text[numbers[0].start() :]) if len(numbers) == 1 else None


def _claim_after(rest: str, denied: set[str], is_label: bool, is_last: bool) -> str | None:
    """What follows "the answer is": a value, a denied one (kept in `denied`), or None.

    Args:
      rest: the text from there.
      denied: values that are denied.
      is_label: whether a colon stands before the value, so that a sentence or a list may follow.
      is_last: whether the text ends within `rest`.
    """
    rest = _ITALIC.sub(r"\1\3", without_emphasis(without_calculations(rest)))
    line, _, below = rest.partition("\n")
    bare = line.strip(" \t*_:`#>")
    lead = _LEAD.match(bare)
    if not bare or (lead and lead.end() == len(bare)):
        below = below if bare or not line.strip().startswith("```") else rest
        bullets = _bullets(below, is_label)
        if bullets is not None:
            return bullets
        block = first_block(below)
        return None if _NUMBERED.match(block) else _claim_in(block, "")
    if line.rstrip(" \t*_").endswith(":") and not _VALUE.search(bare):
        bullets = _bullets(below, is_label=True)
        if bullets is not None:
            return bullets
    if not _VALUE.search(bare) and below.lstrip().startswith(("\\[", "$$", "```", "$\n")):
        return _claim_in(first_block(below), "") or _claim_in(line, below)
    if line.lstrip(" \t*_:").startswith(("\\[", "$$", "```")):
        return _claim_in(first_block(rest), "")
    line = line.strip(" \t*_:")
    if _DENIED.match(line):
        line = line[_DENIED.match(line).end() :]
        end = _DENIED_END.search(line)
        denied.add(_bare(line[: end.start()] if end else line))
        but = _BUT.search(line)
        if not but:
            return None
        line = line[but.end() :]
    if line.lower().startswith("that "):
        return last_words(_sentence(line[5:])[0])
    found = _claim_in(line, below)
    if found is None and is_label and is_last and line[:1].isalpha() and not below.strip():
        sentence, _, after = _sentence(line)
        found = last_words(line if any(c.isdigit() for c in after) else sentence)
    return found


def _bullets(below: str, is_label: bool) -> str | None:
    """The values that a list gives, a comma between; None where that is no list or no value.

    A dash is a minus sign where one line has it and no colon announces a list.
    """
    items, has_dashes = [], False
    for line in below.lstrip("\n\r \t:").split("\n", 2 * _MAX_BULLETS)[: 2 * _MAX_BULLETS]:
        bullet = _BULLET.match(line)
        if bullet:
            has_dashes = has_dashes or bullet[1] in "-–"
            items.append(_sentence(line[bullet.end() :])[0])
        elif line.strip() or not items:
            break
    if not items or (has_dashes and len(items) == 1 and not is_label):
        return None
    values = [claim(item) for item in items]
    if len(items) == 1 and not values[0]:
        values = [last_words(items[0])]
    if len(items) > _MAX_BULLETS or not all(v and _VALUE.search(v) for v in values):
        return None
    return ", ".join(undressed(v.strip("$ ")) if len(values) > 1 else v for v in values)


def _claim_in(line: str, below: str) -> str | None:
    """The claim of a line's first sentence; with two values where the next begins with "or"."""
    sentence, end, after = _sentence(line)
    if end == "?":
        return None
    found = claim(sentence)
    if found is None:
        # A value that cannot be read is the answer all the same, since it takes back earlier ones.
        said = undressed(sentence)
        starts_with_value = said[:1].isdigit() or said.startswith(("$", "\\", "(", "-", "["))
        return said if starts_with_value or _is_range(said) else None
    if _RETRACTED.match(after or below[:40]):
        return f"{sentence}{end} {after or below.split(chr(10), 1)[0]}"
    return found


def _is_range(said: str) -> bool:
    """Whether a claim says no value but where it lies: "more than 72", "between 70 and 72"."""
    words = {word.lower() for word in _WORD.findall(said[:MAX_ANSWER_CHARS])}
    return bool(words & NO_ANSWERS) and any(c.isdigit() for c in said)


def _claim_before(before: str) -> str | None:
    """What stands before "is the answer"."""
    before = before.rpartition("\n")[2]
    for end in (". ", "! ", "? ", ": "):
        before = before.rpartition(end)[2]
    for _ in range(4):
        before = _LEAD_BEFORE.sub("", before.strip(), 1)
    before = undressed(before.strip(" ,"))
    return before if _VALUE.search(before) and is_readable(before) else None


def _sentence(line: str) -> tuple[str, str, str]:
    """The first sentence of a line, the mark that ends it, and what follows in the line."""
    lead = re.match(r"[ \t*_:]{0,8}approx\.", line)
    for match in _END.finditer(line, lead.end() if lead else 0):
        if line[max(0, match.start() - 3) : match.start()].lower() in ("a.m", "p.m"):
            return line[: match.end()], "", line[match.end() :]
        if match.start():
            return line[: match.start()], match.group(), line[match.end() :].strip("!").lstrip()
    return line, "", ""


def _bare(text: str) -> str:
    return re.sub(r"[\s$*_`.]", "", undressed(text[:MAX_ANSWER_CHARS])).lower()
