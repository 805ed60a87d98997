"""Messages of a completion, for people to read.

They may be of an environment elsewhere, whose messages are OpenAI's: the content is left out or
null where a message only calls a tool, and may be a list of parts.
"""

import json
from collections.abc import Mapping
from typing import Any


def turns_of(record: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(who, what) of each message of a sample in several turns; none of one in a single turn."""
    messages = record.get("turns")
    return [
        (str(message.get("name") or message.get("role") or "")[:100], _said(message))
        for message in (messages if isinstance(messages, list) else [])
        if isinstance(message, dict)
    ]


def _said(message: dict[str, Any]) -> str:
    """The text of a message, and those of its calls that the text does not have."""
    text = text_of(message.get("content"))
    calls = message.get("tool_calls")
    for call in calls if isinstance(calls, list) else ():
        function = call.get("function") if isinstance(call, dict) else None
        if isinstance(function, dict):
            name, given = str(function.get("name", "")), function.get("arguments", {})
            arguments = given if isinstance(given, str) else json.dumps(given, default=str)
            if name not in text or arguments not in text:
                text += f"{text and ' '}[{name}({arguments})]"
    return text


def text_of(content: Any) -> str:
    """The content of a message as text; parts that are no text are named."""
    if content is None:
        return ""
    if not isinstance(content, list):
        return str(content)
    parts = [part if isinstance(part, dict) else {"text": part} for part in content]
    return "".join(
        str(part["text"] if "text" in part else f"[{part.get('type')}]") for part in parts
    )
