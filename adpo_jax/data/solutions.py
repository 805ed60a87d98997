"""Solutions and completions as text, from what the answers of a data set are written as."""

import re
from typing import Any

_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")


def extract_solution(answer: Any) -> Any:
    """The solution that completions are compared with, from a data set's answer.

    GSM8K's worked answers end in `#### 1,234`, whose solution is that number without its commas;
    those within brackets stay, as in the point `(3,100)`. Other text is stripped, a number becomes
    text, and anything else (a dict of test cases, say) stays as it is. A list of one chat message,
    TRL's completion, is that message's text.
    """
    if message := _message_text(answer):
        answer = message
    if isinstance(answer, float) and answer.is_integer():
        return str(int(answer))
    if isinstance(answer, bool | int | float):
        return str(answer)
    if not isinstance(answer, str):
        return answer
    _, hashes, result = answer.rpartition("####")
    result = result.strip()
    # Only the last line counts, since elsewhere four hashes are a heading of the worked solution.
    if hashes and result and "\n" not in result:
        return _THOUSANDS.sub(_unless_in_brackets, result)
    return answer.strip()


def _unless_in_brackets(comma: re.Match[str]) -> str:
    before = comma.string[: comma.start()]
    inside = any(before.count(a) > before.count(b) for a, b in ("()", "[]", "{}"))
    return "," if inside else ""


def text_to_imitate(value: Any) -> str | None:
    """The text of a completion: of text, of a number, or of one message of the assistant.

    The message stands alone or in a list, and has nothing but its role and text. None for anything
    else, whose text would say less than it does.
    """
    if isinstance(value, str | int | float):
        return str(value)
    message = value[0] if isinstance(value, list) and len(value) == 1 else value
    if not isinstance(message, dict) or message.get("role") != "assistant":
        return None
    # Columns of tables have every key in every row.
    if any(v not in (None, "", []) for k, v in message.items() if k not in ("role", "content")):
        return None
    content = _joined_parts(message.get("content"))
    return content if isinstance(content, str) else None


def _message_text(value: Any) -> str | None:
    """The text of a list of one chat message; None for anything else."""
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], dict):
        content = _joined_parts(value[0].get("content"))
        if "role" in value[0] and isinstance(content, str):
            return content
    return None


def _joined_parts(content: Any) -> Any:
    """A message's content with its text parts joined; what has other parts stays as it is.

    Such parts are {"type": "text", "text": ...}; a table of several kinds of parts may fill in
    further keys with null.
    """
    if not isinstance(content, list) or not content:
        return content
    for part in content:
        if not isinstance(part, dict) or part.get("type") != "text":
            return content
        if not isinstance(part.get("text"), str):
            return content
    return "".join(part["text"] for part in content)
