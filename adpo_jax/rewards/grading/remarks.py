r"""What a text says of its answer once it has given it: "Wait, that can't be right. It is 70."

Remarks begin a sentence, or a part of one after a comma or a dash. Only words that take an answer
back, put another in its place or affirm it again make one; "Wait, let me check" is none.

The regular expression has bounded repeats and starts at punctuation: time is linear in the text.
"""

import re
from collections.abc import Iterator

from adpo_jax.rewards.grading.limits import MAX_ANSWER_CHARS

_MAX_REMARKS = 64  # of one text
_SEARCHED = 32_768  # characters of a text, counted from its end
_REST = 4 * MAX_ANSWER_CHARS  # characters in which a value may stand
_SOFT = (
    r"but|and|so|oh|ah|hmm{1,4}|well|okay|ok|yes|then|therefore|thus|hence|now"
    r"|however|unfortunately|sadly|alas|in hindsight|on (?:closer|second|further) [a-z]{3,12}"
    r"|upon (?:[a-z]{3,12} )?[a-z]{3,12}"
)
_RETREAT = (
    r"(?:scratch|strike|forget|ignore) (?:that|this)|never ?mind(?: that)?|i misspoke"
    r"|(?:just )?kidding|i mis[a-z]{3,12}(?: (?:the|that|this|it)(?: [a-z]{2,12})?)?"
    r"|i (?:take|took) (?:that|it) back|i stand corrected|i (?:was|am) (?:wrong|mistaken)"
    r"|i(?: have|['’]ve)? (?:just )?(?:made|make|found) (?:a|an|my) (?:[a-z]{2,12} )?"
    r"(?:mistake|error|slip|typo)|let me (?:correct|fix|rectify) (?:that|this|it|myself|my answer)"
)
_STRONG = (
    r"wait|actually|no|nope|sorry|oops|whoops|correction|correcting|hold on|hang on|rather|instead"
    r"|er{1,3}|um{1,3}|uh{1,3}|on second thoughts?|my (?:mistake|bad|apologies|error)|apologies"
    rf"|or rather|{_RETREAT}"
)
_GAP = r"[\s,.:;!…—–-]{1,6}"
_IT = r"(?:that|this|it)(?: (?:answer|result|value|number|total|one))?"
_SURELY = (
    r"(?: (?:clearly|obviously|definitely|certainly|just|simply|also|completely|totally|surely|be"
    r"|to be|seem|look|quite|really|actually|entirely|indeed|plain|plainly|of course)){0,2}"
)
_WRONG = r"(?:wrong|incorrect|false|impossible|mistaken|nonsense|absurd|an? (?:mistake|lie|error))"
_NOT = (
    r"(?:(?:is|was|does|do|did|could|ca|must|should|would)n['’]?t"
    r"|(?:can|is|was|does|did|could|must|['’]s) ?not)"
)
_SOUND = (
    r"(?:right|correct|true|possible|make sense|work(?: out)?|add up|fit|it|the case"
    r"|(?:the|my) (?:(?:right|correct|final) )?(?:answer|one|value|result|number))"
)
_CLAUSE_END = (
    r"(?=[\s*_\"'”’]{0,4}(?:[.,;:!)…—–\n]|$)"
    r"| (?:because|since|as|so|but|though|at all|either|about|there|again|-))"
)
_VALUE_AHEAD = r"(?=[*_`]{0,3}(?:[-−+]?\d|[-−]?\\?\$|\\[(\[]))"
_REMARK = re.compile(
    rf"(?:^|[.!?;:…)—–,]| -)[\"'”’)*_`]{{0,4}}\s{{0,4}}[*_(]{{0,3}}(?=[a-z0-9$\\−-])"
    rf"(?:(?:(?P<strong>{_STRONG})|(?:{_SOFT}))\b{_GAP}){{0,4}}"
    r"(?:"
    rf"(?P<retreat>(?:{_RETREAT}){_CLAUSE_END}(?! (?:earlier|before)))"
    rf"|(?P<denial>(?:{_IT}|(?:my|the|our) (?:result|value|calculation|arithmetic|reasoning|total))"
    rf"(?:(?:['’]s| is| was| seems| looks| sounds| must be| has to be| appears){_SURELY} {_WRONG}"
    rf"| {_NOT}{_SURELY} {_SOUND}|['’]s not{_SURELY} {_SOUND}){_CLAUSE_END}"
    r"|(?:no|nope|not really|not quite|wrong|incorrect)(?=[*_]{0,3}(?:[.!]|\s{0,4}\Z)))"
    rf"|(?P<not>{_IT}(?:['’]s not| is not| isn['’]t"
    rf"| (?:can|could)(?:not|n['’]t|['’]t| not) be) {_VALUE_AHEAD})"
    rf"|(?P<restored>{_IT}(?:['’]s| is| was){_SURELY} (?:right|correct|fine|true|okay|ok)\b)"
    r"|(?P<meant>i (?:meant|mean)(?: to (?:say|write))?|make (?:it|that)"
    r"|(?:the|my) (?:correct|right|actual|corrected|true|real)"
    r" (?:value|number|result|total|amount|one|sum)(?: is| was| should be| must be)?)\b[ :]{1,3}"
    r"|(?P<should>(?:(?:it|that|this|the (?:result|total|sum|amount)) )?"
    r"(?:should|must|has to|ought to) (?:have been|be) )"
    rf"|(?P<is>(?:{_IT}|the (?:result|value|number|total|sum|amount))"
    r"(?:['’]s| is| was| equals| (?:would|should|must) (?:have been|be))) "
    rf"|(?P<bare>(?(strong){_VALUE_AHEAD}|(?!)))"
    r")",
    re.I | re.M,
)
_SAYS_BACK = re.compile(_RETREAT, re.I)
_ASKED = re.compile(r"\d[^.!?\n]{0,60}\?$")
_NEXT_SENTENCE = re.compile(r"[.!?:][\"'”’)\]*_`]{0,4}\s{1,4}\S|\n")


def remarks_after(text: str, start: int, is_denied: bool = False) -> Iterator[tuple[str, str]]:
    """What is said of the answer that ends about `start`, in the order of the text.

    Args:
      text: the whole text.
      start: where the answer or the words before it begin.
      is_denied: whether the answer has been taken back already, so that "it is 70" gives another.

    Yields:
      ("denied", ""): the answer is taken back; ("restored", ""): it holds after all;
      ("instead", rest): what follows is said to be the answer, if it is a value; ("bare", rest):
      so it is if it is nothing but a value; ("not", rest): it is not what follows. Each
      rest is the text from where the value would begin.
    """
    start = max(start, len(text) - _SEARCHED)
    for count, match in enumerate(_REMARK.finditer(text, start)):
        if count == _MAX_REMARKS:
            return
        kind = match.lastgroup if match.lastgroup != "strong" else "bare"
        is_sure = match["strong"] is not None
        if kind == "retreat" or (kind == "denial" and _is_about_it(text, start, match, is_sure)):
            is_denied = True
            yield "denied", ""
            continue
        if is_sure and _SAYS_BACK.fullmatch(match["strong"]):
            is_denied = True
            yield "denied", ""
        if kind == "restored" and is_denied:
            is_denied = False
            yield "restored", ""
        rest = text[match.end() : match.end() + _REST]
        if kind == "meant" or (kind in ("is", "should") and (is_sure or is_denied)):
            yield "instead", rest
        elif kind in ("bare", "not") or (kind == "should" and _is_next(text, start, match)):
            yield "not" if kind == "not" else "bare", rest


def _is_about_it(text: str, start: int, match: re.Match, is_sure: bool) -> bool:
    """Whether "that is wrong" is said of the answer: at once, or after "wait"; not of a guess."""
    before = text[max(start, match.start() - 80) : match.start() + 1]
    if _ASKED.search(before):
        return False
    if match.group()[0] == "," and not is_sure:
        return False
    return is_sure or _is_next(text, start, match)


def _is_next(text: str, start: int, match: re.Match) -> bool:
    """Whether a remark follows the sentence with the answer at once."""
    return not _NEXT_SENTENCE.search(text[start : match.start()].strip())
