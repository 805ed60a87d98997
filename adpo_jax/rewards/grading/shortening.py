"""A claim without what explains its value: "72 because she sold ..." is 72.

All repeats in the regular expressions are bounded, and so is the number of cuts.
"""

import re

from adpo_jax.rewards.grading.limits import MAX_ANSWER_CHARS
from adpo_jax.rewards.grading.markup import EMOJI, undressed
from adpo_jax.rewards.grading.sentence_words import NO_NUMBERS

WINDOW = 4 * MAX_ANSWER_CHARS  # characters of a claim that are looked at
_MAX_CUTS = 5  # of one claim

_HEDGE = re.compile(
    r"\b(?:or|maybe|perhaps|possibly|otherwise|alternatively|unless|wait|actually|however|hmm"
    r"|either)\b|\b(?:could|might|may) be\b|[_{}]"
    r"|\b(?:which|that|this|it) (?:is|was|seems|looks)(?: clearly| obviously)?"
    r" (?:wrong|incorrect|false|impossible|not)\b"
    r"|\b(?:which|that|this|it) (?:can|could)(?:not|n['’]t|['’]t| not) be (?:right|correct|true)\b",
    re.I,
)
_WHY = (
    r"because|since|as|so|which|where|when|thus|therefore|hence|making|meaning|giving|namely"
    r"|i\.e\.|rather than|instead of|given that|given|after|assuming|from|using"
    r"|(?:definitely |certainly )?not"
    r"|by [a-z]{2,12}ing|for (?=[a-z]{2})|and (?:not|we|i|she|he|it|they|you|that|this|so|thus"
    r"|therefore|hence)\b"
)
_CUT = re.compile(
    rf"[,;]? (?:{_WHY})(?![A-Za-z])|, (?:approximately|about|roughly)\b"
    rf"|(?P<mark> [-–—]{{1,2}} |—|[:;] |, (?=[a-z]{{2}})| of (?=[a-z]))"
    rf"| \("
    rf"|[{EMOJI}]",
    re.I,
)
WHY_CUT = re.compile(rf"[,;]? (?:{_WHY})(?![A-Za-z])| \(|[{EMOJI}]", re.I)
_COUNTED = re.compile(
    r"((?:\\?\$ ?)?[-+]?\d(?:[\d,]{0,30}\d)?(?:\.\d{1,30})?|\$[^$\n]{1,200}\$"
    r"|\\\([^\n()]{1,200}\\\)) ((?:[A-Za-z][A-Za-z'’-]{1,20}[, ]{1,2}){2,40})"
)
IN_TOTAL = re.compile(
    r" (?:in total|altogether|in all|overall|combined|left over|left|remaining|total"
    r"|(?:an?|each|every) [a-z]{2,12})$",
    re.I,
)
# "72 clips in 2 months": what follows says in how long.
WITHIN = re.compile(
    r" (?:in|within|for|during|(?<=[A-Za-z] )over)"
    r" (?:(?:the|just|only|about|all|next|first|last) ){0,2}\d{1,6}"
    r" [A-Za-z]{3,15}(?: [A-Za-z]{2,15}){0,2}$"
)
_SPELLED = re.compile(r"[A-Za-z -]{3,60} \(([-+]?\$?\d[\d,.]{0,30})\)")  # "seventy-two (72)"


def shortened(text: str) -> list[str]:
    """The text cut before what explains it, the longest first; none of it may hedge."""
    if len(text) > WINDOW:
        return []
    forms = []
    for cut in _CUT.finditer(text):
        tail = text[cut.start() :]
        if _HEDGE.search(tail):
            continue
        is_aside = cut["mark"] is not None and tail[:2] in (", ", " o", " -", " –")
        if is_aside and any(c.isdigit() for c in tail):
            continue
        head = undressed(text[: cut.start()].rstrip(" ,;:"))
        forms.append(IN_TOTAL.sub("", head))
        if len(forms) == _MAX_CUTS:
            break
    forms.reverse()
    spelled = _SPELLED.fullmatch(text)
    if spelled:
        forms.append(spelled[1])
    for form in (text, *forms[-2:]):
        counted = _COUNTED.fullmatch(form.rstrip(" .,") + " ")
        if not counted or _HEDGE.search(counted[2]):
            continue
        if not {w.strip(",").lower() for w in counted[2].split()} & NO_NUMBERS:
            forms.append(counted[1])
            break
    return forms
