r"""Words before "the answer is" that take the force of what follows, or give it more.

Each function takes the last characters of the text before a claim, few enough that the repeats in
the expressions, all bounded, cost nothing.
"""

import re

_SUPPOSED = re.compile(
    r"\b(?:(?:if|unless)(?! (?:I|we)(?:['’]?m| am|['’]?re| are) (?:not )?(?:mistaken|wrong|right"
    r"|correct)\b)|suppose|supposing|assume|assuming|whether|imagine|(?:might|may|could) (?:think"
    r"|say|guess)|thought|claims|claimed)\b[^.!?\n]{0,40}$"
    r"|\b(?:wrong|incorrect|previous|earlier|first|initial|original|old|partial|intermediate"
    r"|example|sample|another|no|other|(?<!only )(?<!best )possible|potential|plausible|tentative"
    r"|provisional|candidate|guessed|alleged|supposed|conceivable) {1,2}$",
    re.I,
)
# A guess, and what somebody says; whose it is stands before it.
_GUESSED = re.compile(
    r"\b(?P<guess>guess|hunch|conjecture|attempt|suspicion) (?:[a-z]{2,5} ){0,3}$"
    r"|\b(?:say|says|said|think|thinks|believe|believes|believed|argue|argues|argued|insists?"
    r"|insisted|told (?:me|us|him|her|them))(?: that)? (?:the|my|our|his|her|their|its)"
    r" (?:(?:final|correct|right) )?$",
    re.I,
)
_A = re.compile(r"\b(?:my|a|an|our|the|one|first|best|initial|his|her|their|wild|rough) $", re.I)
_SOMEBODY = re.compile(
    r"\b(?!(?:I|we|you|would|can|could|to|let|must|should|and|so|which|that)\b)[A-Za-z]{2,20}"
    r" (?:(?:would|might|may|could|will) )?$",
    re.I,
)
# What ends a supposition: "if x were 3 ..., but x is 4, so the answer is 80".
_SUPPOSED_NO_MORE = re.compile(r"\bbut\b|;(?! then)|, (?:however|here)\b", re.I)
# Words before a claim that put it in the place of an earlier one.
_CORRECTING = re.compile(
    r"\b(?:wait|no|actually|correction|sorry|oops|rather|instead)[\s,.:;!…—–-]{1,4}"
    r"(?:(?:so|then|but|now) )?(?:(?:the|my|our) )?(?:(?:final|correct|right) )?$",
    re.I,
)
_DOUBTED = re.compile(
    r"\b(?:not true|untrue|false|wrong|incorrect|an? (?:mistake|lie|myth|error)|doubt(?:ful)?|not"
    r"(?: (?:the case|so|clear|certain|sure|convinced|persuaded|likely|possible|right|correct))?"
    r"|hardly|(?:cannot|can['’]t|can not|could not|couldn['’]t) be"
    r"|\w{2,5}n['’]t (?:think|believe|the case|true|so|possible)|no way|impossible|unlikely)"
    r"(?: to (?:say|think|claim|believe|assume|conclude|state))?(?: that)?"
    r" {1,2}(?:the|my|our|your) (?:(?:final|correct|right) )?$",
    re.I,
)


def is_supposed(before: str) -> bool:
    """Whether a claim is a supposition, a guess, a draft or what somebody else says."""
    before = _SUPPOSED_NO_MORE.split(before)[-1]
    if _SUPPOSED.search(before):
        return True
    said = _GUESSED.search(before)
    if not said:
        return False
    whose = _A if said["guess"] else _SOMEBODY
    return whose.search(before, max(0, said.start() - 30), said.start()) is not None


def is_doubted(before: str) -> bool:
    """Whether a claim is denied or doubted as a whole: "it is not true that the answer is 72"."""
    return _DOUBTED.search(before) is not None


def is_correcting(before: str) -> bool:
    """Whether a claim says that it takes the place of an earlier one: "wait, the answer is"."""
    return _CORRECTING.search(before) is not None
