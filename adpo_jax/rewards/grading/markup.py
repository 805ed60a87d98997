r"""What encloses an answer in Markdown, HTML and LaTeX: bold, code, emoji, tags, displayed maths.

Every regular expression here has bounded repeats, so that time is linear in the text.
"""

import re

EMOJI = "\U0001f000-\U0001faff\u2600-\u27bf\u2b00-\u2bff\u25a0-\u25ff\u220e\ufe0f"
_EDGE_EMOJI = re.compile(rf"[{EMOJI}\s]{{1,64}}")
_TAG = (
    r"</?(?:b|strong|i|em|u|code|span|p|br|div|center|mark|font|big|small|answer|s|h[1-6])"
    r"(?:\s[^<>]{0,80})?/?>|<\|[a-z_]{2,20}\|>|<(?:end|start)_of_turn>"
)
_OPENING_TAG = re.compile(rf"(?:{_TAG}|\s){{1,8}}", re.I)
_CLOSING_TAG = re.compile(rf"(?:{_TAG}|\s){{1,8}}$", re.I)
_INNER_TAG = re.compile(_TAG, re.I)
_EMPHASIS = re.compile(r"(?<![\w*)])\*{2,3}(?!\*)|(?<!\*)\*{2,3}(?![\w*(])|(?<!`)`(?!`)")
_PAIRS = ("***", "**", "__", "~~", "```", "``", "`", "*", "_", '"')
_DRESSING = tuple('<>*_~`"')
_CALCULATION = re.compile(r"<<[^<>\n]{0,160}>>")  # GSM8K's calculator notes

_BLOCKS = (("\\[", "\\]"), ("$$", "$$"), ("```", "```"), ("\\(", "\\)"))
_FENCE_LANGUAGE = re.compile(r"[A-Za-z]{1,12}\s*\n")
_ENVIRONMENT = re.compile(r"\\begin\{([A-Za-z]{1,12}\*?)\}")
_LAYOUTS = {"align", "aligned", "equation", "gather", "gathered", "split", "displaymath", "math"}


def undressed(text: str) -> str:
    """A text without the bold, code, emoji and tags that enclose all of it."""
    text = text.strip()
    if text.isascii() and text[:1] not in _DRESSING and text[-1:] not in _DRESSING:
        return text
    for _ in range(8):
        before = text
        if text[:1] == "<":
            text = _OPENING_TAG.sub("", text, 1) if _OPENING_TAG.match(text) else text
        if text[-1:] == ">":
            tail = _CLOSING_TAG.search(text, max(0, len(text) - 200))
            text = text[: tail.start()] if tail else text
        if text and not text.isascii():
            match = _EDGE_EMOJI.match(text)
            text = text[match.end() :] if match else text
            end = len(text)
            while end and _EDGE_EMOJI.match(text, end - 1):
                end -= 1
            text = text[:end]
        for mark in _PAIRS:
            if len(text) > 2 * len(mark) and text.startswith(mark) and text.endswith(mark):
                text = text[len(mark) : -len(mark)]
                break
        text = text.strip()
        if text == before:
            break
    return text


def without_emphasis(text: str) -> str:
    """A text without bold, code and tags anywhere in it; `2**3` and fences stay."""
    if "**" in text or "`" in text:
        text = _EMPHASIS.sub("", text)
    return _INNER_TAG.sub("", text) if "<" in text else text


def without_calculations(text: str) -> str:
    """A text without GSM8K's `<<9*2=18>>`."""
    return _CALCULATION.sub("", text) if "<<" in text else text


def first_block(text: str) -> str:
    """The first line that says something, or the whole of a displayed formula or of code."""
    text = text.lstrip("\n\r \t:")
    while text[:1] in ("*", "_", "#", ">") and not text.split("\n", 1)[0].strip("*_#> :\t\r"):
        text = text.partition("\n")[2].lstrip("\n\r \t:")
    environment = _ENVIRONMENT.match(text)
    if environment:
        closing = f"\\end{{{environment[1]}}}"
        end = text.find(closing, environment.end())
        if end < 0:
            return text.split("\n", 1)[0]
        inside = text[environment.end() : end]
        is_layout = environment[1].rstrip("*") in _LAYOUTS
        whole = inside if is_layout and "\\\\" not in inside else text[: end + len(closing)]
        return " ".join(whole.replace("&", " ").split() if whole is inside else whole.split())
    for opening, closing in _BLOCKS:
        if text.startswith(opening):
            end = text.find(closing, len(opening))
            if end < 0:
                break
            inside = text[len(opening) : end]
            if opening == "```":
                inside = _FENCE_LANGUAGE.sub("", inside, 1)
            after = text[end + len(closing) :].split("\n", 1)[0]
            if after.strip(" \t.,;*_") and opening != "```":
                return f"{inside} {after}"  # `\(3\) and \(4\)`
            return " ".join(inside.split())
    return text.split("\n", 1)[0]
