"""What clients send of functions that a model may call: `tools`, and the calls of earlier messages.

The calls that a model writes are parsed by `environments.calls`.
"""

import re
from typing import Any

from adpo_jax.environments.calls import json_object
from adpo_jax.serve.fields import MAX_DEPTH, ApiError, Fields, is_deeper, shown

MAX_TOOLS = 128

_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")


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
    tools = [_parse_tool(tool, f"tools[{number}]") for number, tool in enumerate(tools)]
    choice = fields.take("tool_choice", "auto")
    if choice not in ("auto", "none"):
        raise ApiError(
            'tool_choice must be "auto" or "none": this server cannot make a model call a '
            f"function; given {shown(choice)}",
            param="tool_choice",
            code="unsupported_parameter",
        )
    return tools if choice == "auto" else []


def given(value: Any) -> Any:
    """An object without its fields that are null, which are as good as absent."""
    if not isinstance(value, dict):
        return value
    return {name: content for name, content in value.items() if content is not None}


def _parse_tool(tool: Any, where: str) -> dict[str, Any]:
    told = given(tool)
    function = given(told.get("function")) if isinstance(told, dict) else None
    if not isinstance(function, dict) or told.get("type") != "function":
        raise ApiError(
            f'{where} must be {{"type": "function", "function": {{...}}}}; given {shown(tool)}',
            param="tools",
        )
    checked_name(function.get("name"), f"{where}.function.name", "tools")
    if not isinstance(function.get("parameters", {}), dict):
        raise ApiError(f"{where}.function.parameters must be an object", param="tools")
    if not isinstance(function.get("description", ""), str):
        raise ApiError(f"{where}.function.description must be text", param="tools")
    if function.get("strict"):
        raise ApiError(
            f"{where}.function.strict must be false: this server cannot hold a model to a schema",
            param="tools",
            code="unsupported_parameter",
        )
    return told | {"function": function}


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
    call = given(call)
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or call.get("type", "function") != "function":
        raise ApiError(
            f'{where} must be {{"type": "function", "function": {{...}}}}', param="messages"
        )
    name = checked_name(function.get("name"), f"{where}.function.name")
    arguments = json_object(function.get("arguments") or "{}")
    if arguments is None or is_deeper(arguments, MAX_DEPTH):
        raise ApiError(
            f"{where}.function.arguments must be a JSON object as text, of up to {MAX_DEPTH} "
            "levels",
            param="messages",
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
