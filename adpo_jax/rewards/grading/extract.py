r"""Finding the answer in a completion, by linear scans.

The kinds, best first: the last balanced `\boxed{}` (or `\fbox{}`, `\boxed 5`), the last closed
`<answer>`, the last `####` that can be read as an answer, the last sentence that says what the
answer is, a last line. Of one kind the last that says something counts. Text after the last
`</think>` is searched first, so that a draft made while thinking does not beat the final answer;
boxes, tags and hashes before it count when there is none after it and its last line is no answer.

Every regular expression here is a plain alternation or has bounded repeats: time is linear in the
completion, whatever it says.
"""

import json
import re

from adpo_jax.rewards.grading import sentence
from adpo_jax.rewards.grading.limits import MAX_ANSWER_CHARS, MAX_SEARCHED_CHARS
from adpo_jax.rewards.grading.markup import first_block, undressed, without_calculations
from adpo_jax.rewards.grading.words import choice_of

_BULLET = re.compile(r"\A[-–•*][ \t]+")
_REFERS = re.compile(r"\[\d{1,3}\]")  # to a source
_NAMED = re.compile(r"[$\\(\[{ ]{0,8}[A-Za-z]\w{0,20}[ }]{0,4}=")
_MAX_LOOKS = 16  # back over tags and hashes
_BRACES = re.compile(r"\\(?:boxed|fbox)(?![A-Za-z])|\\[\\{}]|[{}]")
_UNBRACED = re.compile(r"\s{0,8}([^\s${}\\]{1,64})")
_TAGS = re.compile(r"<(/?)(?:final[_ ]?)?answer>", re.I)
_PLACEHOLDER = re.compile(
    r"[.…_? ]{0,20}|\\[lc]?dots|(?:(?:your|the|final|my|numerical) ){0,3}"
    r"(?:answer|result|value|number|solution)(?: here)?",
    re.I,
)
_PLACEHOLDER_DRESS = re.compile(r"\\(?:text|mathrm|textbf|mathbf)\{|[{}$\[\]<>]")
_HEADING = re.compile(
    r"[*_]{0,3}(?:\d{1,3}[.)] {1,4}[*_]{0,3}[A-Za-z]|\d{1,3}\)$"
    r"|(?:step|part|case|question|problem|method|example|section|exercise|way|note)\b"
    r"|(?!(?:total|sum|result|answer|about)\b)[A-Za-z]{3,20} \d{1,3}(?:$|[:.)]| -))",
    re.I,
)
_LABEL = re.compile(r"[*_]{0,3}[A-Za-z][A-Za-z ]{1,30}[*_]{0,3}(?::[*_]{0,3} {0,2}| = )")
_DELIMITER_LINES = {"\\]", "\\)", "$$", "$", "\\[", "```", "**", "</s>", ""}


def find_answer(completion: str) -> str | None:
    """The text of the answer that a completion gives, or None.

    Args:
      completion: what the model wrote; any string.

    Returns:
      The answer without its box or tag and without what dresses or explains it, stripped, possibly
      empty; None where nothing was found or where it is too long to be an answer.
    """
    text = completion[-MAX_SEARCHED_CHARS:]
    think_end = text.rfind("</think>")
    tail = text[think_end + len("</think>") :] if think_end >= 0 else text
    answer = _marked(tail)
    if not answer:
        said = sentence.stated_answer(tail)
        if not said and think_end >= 0:
            said = _last_answer(tail) or _marked(text)
        answer = said or answer
    if answer is None:
        answer = _last_line(tail)
    if answer is None or len(answer) > 2 * MAX_ANSWER_CHARS:
        return None
    return answer.strip()


def _last_answer(text: str) -> str | None:
    """The last line where it is an answer without any mark: a choice or a value, not `OK`.

    An equation is one where its left side is a name, as in `x = 41`, and not `48/2 = 24`.
    """
    line = _BULLET.sub("", _last_line(text) or "")
    if _REFERS.fullmatch(line) or ("=" in line and not _NAMED.match(line)):
        return None
    is_value = sentence.is_readable(line) and not line.isalpha()
    return line if choice_of(line) is not None or is_value else None


def find_reference(solution: object) -> str:
    """The reference answer in a data set's solution column.

    A solution is usually the bare answer; a worked solution is reduced to its `\\boxed{}`, its
    `#### N`, its `<answer>` or to what it says that the answer is, and a list of one element to it.
    """
    text = (written(only_element(solution)) or "").strip()
    for find in (_last_box, _after_hashes, _last_tag):
        found = find(text)
        if found:
            return found.strip()
    if "\n" in text:
        return (sentence.stated_answer(text) or text).strip()
    text = undressed(text) or text
    if "nswer" in text and not sentence.is_readable(text):
        return sentence.stated_answer(text) or text
    return text


def written(value: object) -> str | None:
    """A value as text; None where Python writes none, as of an integer of over 4,300 digits."""
    try:
        return str(value)
    except ValueError:
        return None


def only_element(solution: object) -> object:
    """The element of a list or an array that has one, also of a list written as JSON.

    Anything else is returned as it is.
    """
    if isinstance(solution, str) and solution.lstrip()[:2] in ('["', "['"):
        try:
            listed = json.loads(solution.replace("'", '"') if '"' not in solution else solution)
        except ValueError:
            return solution
        is_one = isinstance(listed, list) and len(listed) == 1 and isinstance(listed[0], str)
        return listed[0] if is_one else solution
    is_array = hasattr(solution, "tolist") and getattr(solution, "ndim", 0) > 0
    if (is_array or isinstance(solution, list | tuple)) and len(solution) == 1:
        return next(iter(solution))
    return solution


def _marked(text: str) -> str | None:
    """The answer in a box, a tag or after hashes; empty where a box or a tag holds none."""
    box = _last_box(text)
    if box:
        return undressed(box)
    tag = _last_tag(text)
    if tag:
        return tag
    hashed = _after_hashes(text)
    if hashed:
        return hashed
    return box if tag is None else tag


def _is_placeholder(text: str) -> bool:
    """Whether a box or a tag holds no answer: `...`, "your answer"."""
    return len(text) < 60 and bool(
        _PLACEHOLDER.fullmatch(_PLACEHOLDER_DRESS.sub("", text).strip().lower())
    )


def _last_box(text: str) -> str | None:
    """The content of the box that closes last: of nested boxes the outer one.

    Empty boxes and placeholders count where there is no other.
    """
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
            if start >= 0 and not (answer and _is_placeholder(text[start : match.start()][:60])):
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
    """The answer in the closed `<answer>` that closes last and holds one; empty if none does."""
    contents: list[str] = []
    opened = -1
    for match in _TAGS.finditer(text):
        if not match[1]:
            opened = match.end()
        elif opened >= 0:
            contents.append(text[opened : match.start()])
            opened = -1
            del contents[:-_MAX_LOOKS]
    first = None
    for content in reversed(contents):
        answer, is_sure = _in_tag(content)
        if is_sure:
            return answer
        first = answer if first is None or not first else first
    return first


def _in_tag(content: str) -> tuple[str, bool]:
    """The answer in a tag, and whether it is one."""
    content = without_calculations(undressed(content[: 8 * MAX_ANSWER_CHARS]))
    if _is_placeholder(content):
        return "", False
    if sentence.is_readable(content):
        return content, True
    found = _after_hashes(content) or sentence.stated_answer(content)
    if found:
        return found, True
    line = content
    if "\n" in content:
        block = first_block(content)
        line = block if block.strip() == content.strip() else (_last_line(content) or "")
    found = sentence.claim(line) or sentence.last_words(line)
    return found or content, found is not None


def _after_hashes(text: str) -> str | None:
    """What the last `####` that can be read says; it is no heading of a section."""
    end = len(text)
    unread = None
    for _ in range(_MAX_LOOKS):
        start = text.rfind("####", 0, end)
        if start < 0:
            break
        line_end = text.find("\n", start)
        line_end = line_end if line_end >= 0 else len(text)
        rest = text[start + 4 : line_end].strip(" \t#\r")
        after = text[line_end : line_end + 4 * MAX_ANSWER_CHARS].lstrip()
        if not rest and after and text[end - 1 : end] != "#":
            rest, after = first_block(after), ""
        if rest and len(rest) <= 4 * MAX_ANSWER_CHARS:
            found = _on_hash_line(rest, text, line_end, is_last=not after)
            if found is not None:
                return found
            if unread is None and not after and not _HEADING.match(rest):
                unread = undressed(rest)
        while start and text[start - 1] == "#":
            start -= 1
        end = start
    return unread


def _on_hash_line(rest: str, text: str, line_end: int, *, is_last: bool) -> str | None:
    """The answer on a line that begins with hashes, or None: most such lines are headings."""
    rest = undressed(without_calculations(rest))
    if not rest or _HEADING.match(rest):
        return None
    rest = sentence.without_lead(rest) or rest
    found = None if rest[0].isalpha() and len(rest) > 1 else sentence.claim(rest)
    if found is None:
        found = sentence.stated_answer(rest)
    if found is None:
        label = _LABEL.match(rest)
        if label and not _HEADING.match(rest):
            value = sentence.claim(rest[label.end() :])
            found = value if value and any(c.isdigit() or c in "\\$" for c in value) else None
    if found is None and sentence.is_readable(rest) and not rest.isalpha():
        found = rest
    if found is None and is_last:
        found = sentence.last_words(rest)
        if found is None and len(rest.split()) <= 3 and rest.replace(" ", "").isalpha():
            found = sentence.claim(rest)
    has_words = re.search(r"(?<!\\)\b[A-Za-z]{3}", rest) is not None
    if found is None or is_last or not has_words:
        return found
    # "3 cases" is a heading where a sentence further down says the answer.
    return found if sentence.stated_answer(text[line_end:]) is None else None


def _last_line(text: str) -> str | None:
    for line in reversed(text[-4 * MAX_ANSWER_CHARS :].split("\n")):
        if line.strip() not in _DELIMITER_LINES and (bare := undressed(line)):
            # A line cut by the window above is longer than any answer.
            if len(line) > 2 * MAX_ANSWER_CHARS:
                return None
            bare = undressed(without_calculations(bare).strip("*_`").lstrip("#> "))
            is_end = bare.endswith(".") and not bare.endswith("..")
            return undressed(bare[:-1].rstrip()) if is_end else bare
    return None
