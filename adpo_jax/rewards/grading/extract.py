r"""Finding the answer in a completion, by linear scans.

The order: the last balanced `\boxed{}` (or `\fbox{}`, `\boxed 5`), the last closed `<answer>`,
`#### N`, "the answer is ..." or "Answer: ...", a last line. Text after the last `</think>` is
searched first, so that a draft made while thinking does not beat the final answer; boxes, tags and
hashes before it count when there is none after it.

Every regular expression here is a plain alternation or has bounded repeats: time is linear in the
completion, whatever it says.
"""

import re

from adpo_jax.rewards.grading.limits import MAX_ANSWER_CHARS, MAX_SEARCHED_CHARS

_BRACES = re.compile(r"\\(?:boxed|fbox)(?![A-Za-z])|\\[\\{}]|[{}]")
_UNBRACED = re.compile(r"\s{0,8}([^\s${}\\]{1,64})")
_PHRASE = re.compile(
    r"\banswer(?: (?:to|for|of) [^.:\n]{1,60}?)?[*_\s]{0,4}(?:\bis\b|\bare\b|:|=)[*_ \t]{0,4}:?",
    re.IGNORECASE,
)
_CONNECTIVE = re.compile(
    r"[ \t]{0,4}(?:therefore|thus|simply|just|equal to|indeed)\b[ ,:]{0,4}", re.I
)
_DELIMITER_LINES = {"\\]", "\\)", "$$", "$", "\\[", "```", "**", "</s>", ""}


def find_answer(completion: str) -> str | None:
    """The text of the answer that a completion gives, or None.

    Args:
      completion: what the model wrote; any string.

    Returns:
      The answer without its box or tag, stripped, possibly empty; None where nothing was found or
      where it is too long to be an answer.
    """
    text = completion[-MAX_SEARCHED_CHARS:]
    think_end = text.rfind("</think>")
    tail = text[think_end + len("</think>") :] if think_end >= 0 else text
    answer = _marked(tail)
    if answer is None:
        answer = _after_phrase(tail)
    if answer is None and think_end >= 0:
        answer = _marked(text)
    if answer is None:
        answer = _last_line(tail)
    if answer is None or len(answer) > 2 * MAX_ANSWER_CHARS:
        return None
    return answer.strip()


def find_reference(solution: object) -> str:
    """The reference answer in a data set's solution column.

    A solution is usually the bare answer; a worked solution is reduced to its `\\boxed{}`, its
    `#### N` or its `<answer>`.
    """
    text = str(solution).strip()
    for find in (_last_box, _after_hashes, _last_tag):
        found = find(text)
        if found is not None:
            return found.strip()
    if "\n" in text:
        return (_after_phrase(text) or text).strip()
    return text


def _marked(text: str) -> str | None:
    """The answer in a box, a tag or after hashes."""
    box = _last_box(text)
    if box is not None:
        return box
    tag = _last_tag(text)
    if tag is not None:
        inside = _after_hashes(tag)
        return inside if inside is not None else _after_phrase(tag) or tag
    return _after_hashes(text)


def _last_box(text: str) -> str | None:
    """The content of the box that closes last: of nested boxes the outer one."""
    first = min((i for i in (text.find("\\boxed"), text.find("\\fbox")) if i >= 0), default=-1)
    if first < 0:
        return None
    answer = None
    opened: list[int] = []  # where the content of each open brace starts; -1 for braces of no box
    box_ends = -1  # end of a `\boxed` whose brace has not come yet
    for match in _BRACES.finditer(text, first):
        token = match.group()
        if token == "{":
            is_box = box_ends >= 0 and (
                match.start() == box_ends or not text[box_ends : match.start()].strip()
            )
            opened.append(match.end() if is_box else -1)
        elif token == "}":
            start = opened.pop() if opened else -1
            if start >= 0:
                answer = text[start : match.start()]
        box_ends = -1
        if token[:2] in ("\\b", "\\f"):
            box_ends = match.end()
            unbraced = _UNBRACED.match(text, box_ends)
            if unbraced and (
                text[box_ends : box_ends + 1] in " \t" or unbraced[1][0] in "0123456789"
            ):
                answer = unbraced[1].rstrip(".,;")
    return answer


def _last_tag(text: str) -> str | None:
    end = text.rfind("</answer>")
    start = text.rfind("<answer>", 0, end) if end >= 0 else -1
    return text[start + len("<answer>") : end] if start >= 0 else None


def _after_hashes(text: str) -> str | None:
    """What follows the last `####` that is no heading of a section."""
    end = len(text)
    for _ in range(64):
        start = text.rfind("####", 0, end)
        if start < 0:
            return None
        line_end = text.find("\n", start)
        rest = text[start + 4 : line_end if line_end >= 0 else len(text)].strip()
        word = rest.split(None, 1)[0] if rest else ""
        if rest and (len(word) == 1 or word == rest or not word[0].isalpha()):
            return rest
        end = start
    return None


def _after_phrase(text: str) -> str | None:
    """What follows the last "answer is" or "Answer:", to the end of the sentence."""
    last = None
    for match in _PHRASE.finditer(text):
        last = match
    if last is None:
        return None
    rest = text[last.end() : last.end() + 4 * MAX_ANSWER_CHARS].strip(" \t*_")
    rest = rest.lstrip("\n")
    connective = _CONNECTIVE.match(rest)
    line = rest[connective.end() if connective else 0 :].split("\n", 1)[0]
    for stop in (". ", "! ", "? "):
        line = line.split(stop, 1)[0]
    line = _undressed(line)
    is_prose = len(line.split()) > 3 and line.replace(" ", "").isalpha()  # "on the next line"
    return line if line and not is_prose else None


def _last_line(text: str) -> str | None:
    for line in reversed(text[-4 * MAX_ANSWER_CHARS :].split("\n")):
        if line.strip() not in _DELIMITER_LINES:
            # A line cut by the window above is longer than any answer.
            return _undressed(line) if len(line) <= 2 * MAX_ANSWER_CHARS else None
    return None


def _undressed(line: str) -> str:
    """A line without what emphasises or ends it."""
    line = line.strip().strip("*_`").strip()
    return line[:-1].rstrip() if line.endswith(".") and not line.endswith("..") else line
