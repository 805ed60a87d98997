"""Functions that a model may call: requests' `tools` in, the calls that a model wrote out.

Two forms of calls are known, and the chat template tells which one a model writes:

    tags   <tool_call>{"name": ..., "arguments": {...}}</tool_call>   Hermes, Qwen
    json   {"name": ..., "parameters": {...}}, the whole text         Llama 3.1

Whatever a model writes that is no call of a function it was given stays text.
"""

import json
import re
import uuid
from typing import Any, Literal, NamedTuple

from adpo_jax.serve.fields import ApiError, Fields, shown

MAX_TOOLS = 128
OPEN, CLOSE = "<tool_call>", "</tool_call>"
# Llama 3.1 writes it before a call; as a special token it is mostly left out of the text.
PYTHON_TAG = "<|python_tag|>"

Form = Literal["tags", "json"]

_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")


# --- what clients send


def parse_tools(fields: Fields) -> list[dict[str, Any]]:
    """The tools that are offered to the model; none where `tool_choice` is "none".

    Raises:
      ApiError: for tools of another form than OpenAI's, or a choice that cannot be enforced.
    """
    tools = fields.checked(
        "tools",
        [],
        f"a list of up to {MAX_TOOLS} tools",
        lambda value: isinstance(value, list) and len(value) <= MAX_TOOLS,
    )
    for number, tool in enumerate(tools):
        _check_tool(tool, f"tools[{number}]")
    choice = fields.take("tool_choice", "auto")
    if choice not in ("auto", "none"):
        raise ApiError(
            'tool_choice must be "auto" or "none": this server cannot make a model call a '
            f"function; given {shown(choice)}",
            param="tool_choice",
            code="unsupported_parameter",
        )
    return tools if choice == "auto" else []


def _check_tool(tool: Any, where: str) -> None:
    function = tool.get("function") if isinstance(tool, dict) else None
    if not isinstance(function, dict) or tool.get("type") != "function":
        raise ApiError(
            f'{where} must be {{"type": "function", "function": {{...}}}}; given {shown(tool)}',
            param="tools",
        )
    checked_name(function.get("name"), f"{where}.function.name", "tools")
    if not isinstance(function.get("parameters", {}), dict):
        raise ApiError(f"{where}.function.parameters must be an object", param="tools")
    if not isinstance(function.get("description") or "", str):
        raise ApiError(f"{where}.function.description must be text", param="tools")
    if function.get("strict"):
        raise ApiError(
            f"{where}.function.strict must be false: this server cannot hold a model to a schema",
            param="tools",
            code="unsupported_parameter",
        )


def parse_calls(calls: Any, where: str) -> list[dict[str, Any]]:
    """The calls of an earlier assistant message, their arguments as objects for the template.

    Raises:
      ApiError: for calls of another form than OpenAI's.
    """
    if not isinstance(calls, list) or len(calls) > MAX_TOOLS:
        raise ApiError(
            f"{where}.tool_calls must be a list of up to {MAX_TOOLS} calls", param="messages"
        )
    return [_parse_call(call, f"{where}.tool_calls[{i}]") for i, call in enumerate(calls)]


def _parse_call(call: Any, where: str) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or call.get("type", "function") != "function":
        raise ApiError(
            f'{where} must be {{"type": "function", "function": {{...}}}}', param="messages"
        )
    name = checked_name(function.get("name"), f"{where}.function.name")
    arguments = _object(function.get("arguments") or "{}")
    if arguments is None:
        raise ApiError(
            f"{where}.function.arguments must be a JSON object as text", param="messages"
        )
    made = {"type": "function", "function": {"name": name, "arguments": arguments}}
    if call.get("id") is not None:
        made["id"] = checked_name(call["id"], f"{where}.id")
    return made


def checked_name(value: Any, where: str, param: str = "messages") -> str:
    """A name or an id.

    Raises:
      ApiError: for anything but 1 to 64 letters, digits and the signs _ . -
    """
    if not isinstance(value, str) or not _NAME.fullmatch(value):
        raise ApiError(
            f"{where} must be 1 to 64 of the letters, digits and _ . -; given {shown(value)}",
            param=param,
        )
    return value


def _object(text: Any) -> dict[str, Any] | None:
    """A JSON object that may come as text; None for anything else."""
    if isinstance(text, str):
        try:
            text = _DECODER.decode(text)
        except (ValueError, RecursionError):
            return None
    return text if isinstance(text, dict) else None


def _no_constant(name: str):
    raise ValueError(f"{name} is no JSON")


_DECODER = json.JSONDecoder(parse_constant=_no_constant)


# --- what models write


def form_of(template: str) -> Form | None:
    """The form of calls that a chat template teaches; None for none that is known."""
    if "tools" not in template:
        return None
    if OPEN in template:
        return "tags"
    return "json" if re.search(r"""parameters\\?":\s*dictionary""", template) else None


class Found(NamedTuple):
    """What a piece of text came to: text for people, and calls in OpenAI's form."""

    text: str
    calls: list[dict[str, Any]]


class CallParser:
    """Takes a model's text as it comes, and parts it into text and calls.

    Args:
      form: the form in which this model writes calls.
      tools: the functions that it was given.
      parallel: whether it may call more than one; further calls are left out.

    Attributes:
      num_calls: calls found so far.
    """

    def __init__(self, form: Form, tools: list[dict[str, Any]], parallel: bool = True):
        self._take = self._take_tagged if form == "tags" else self._take_json
        self._names = {tool["function"]["name"] for tool in tools}
        self._parallel = parallel
        self._held, self._space, self._inside = "", "", False
        self._is_text = False  # of the form json: the text has begun as text
        self.num_calls = 0

    @property
    def complete(self) -> bool:
        """Whether no further call is wanted."""
        return self.num_calls > 0 and not self._parallel

    def push(self, text: str, *, last: bool = False) -> Found:
        """Takes further text; what may become a call is held back until it is one, or the last."""
        self._held += text
        return self._take(last)

    def _take_tagged(self, last: bool) -> Found:
        said, calls = "", []
        while not self.complete:
            mark = CLOSE if self._inside else OPEN
            at = self._held.find(mark)
            if at < 0 and not (self._inside and last):
                break
            if at < 0:  # the end came before the closing mark
                at, mark = len(self._held), ""
            before, self._held = self._held[:at], self._held[at + len(mark) :]
            if not self._inside:
                # Space around calls is no text for people.
                said += before.rstrip()
                self._space, self._inside = before[len(before.rstrip()) :], True
                continue
            self._inside = False
            call = self._call(_object(before.strip()))
            if call is None:
                said += self._space + OPEN + before + mark
            else:
                calls.append(call)
        return Found(said + self._certain(last), calls)

    def _certain(self, last: bool) -> str:
        """The held text that is neither in a call nor the beginning of one."""
        if self.complete:
            self._held = ""
        if self._inside or (last and self.num_calls and not self._held.strip()):
            return ""
        if last:
            text, self._held = self._held, ""
            return text
        beginning = next((n for n in range(len(OPEN), 0, -1) if self._held.endswith(OPEN[:n])), 0)
        text = self._held[: len(self._held) - beginning].rstrip()
        self._held = self._held[len(text) :]
        return text

    def _take_json(self, last: bool) -> Found:
        text = self._held.lstrip()
        if not self._is_text and text and not last:
            self._is_text = not _may_be_json(text)
        if self._is_text or last:
            text, self._held = self._held, ""
            calls = [] if self._is_text else self._json_calls(text)
            return Found("" if calls else text, calls)
        return Found("", [])

    def _json_calls(self, text: str) -> list[dict[str, Any]]:
        """The calls that a whole text is made of, a semicolon between; none if it is not."""
        rest, calls = text.strip().removeprefix(PYTHON_TAG).strip(), []
        while rest:
            try:
                value, end = _DECODER.raw_decode(rest)
            except (ValueError, RecursionError):
                value = None
            call = self._call(value)
            if call is None:
                self.num_calls = 0
                return []
            calls.append(call)
            rest = rest[end:].strip().removeprefix(";").strip()
        return calls if self._parallel else calls[:1]

    def _call(self, value: Any) -> dict[str, Any] | None:
        """A call in OpenAI's form; None if this is no call of a function that was given."""
        name = value.get("name") if isinstance(value, dict) else None
        if not isinstance(name, str) or name not in self._names:
            return None
        arguments = value.get("arguments", value.get("parameters", {}))
        arguments = _object(arguments)
        if arguments is None:
            return None
        self.num_calls += 1
        function = {"name": name, "arguments": json.dumps(arguments, ensure_ascii=False)}
        return {"id": f"call_{uuid.uuid4().hex[:24]}", "type": "function", "function": function}


def _may_be_json(text: str) -> bool:
    """Whether a text that has begun so may be a call."""
    return text.startswith(("{", PYTHON_TAG)) or PYTHON_TAG.startswith(text)
