"""Conversations as token ids: messages checked, rendered by the chat template, tokenised.

Nothing of a message is dropped in silence. A template is a program that takes what it knows from a
message; so each shape of conversation is rendered once with markers in it, and a marker that does
not come out is a refusal. A conversation that ends with an assistant's message is continued.

Control tokens in texts of users are text (`control_tokens`). A prompt without them has the ids that
transformers gives it.
"""

import functools
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from adpo_jax.data import templates
from adpo_jax.data.control_tokens import Mixed, hiding_of, texts_in, with_texts

Message = dict[str, Any]

ROLES = ("system", "developer", "user", "assistant", "tool")
# They tell calls and answers of tools apart, as their order does; few templates write them.
_IDS = ("id", "type", "tool_call_id")
_REASONING = ("reasoning_content", "reasoning", "thinking")
_CACHED_SHAPES = 4096


# --- messages


def checked(messages: Any) -> list[Message]:
    """Messages as templates want them: without empty fields, content as one text.

    Raises:
      ValueError: for what is no list of messages, without its place.
    """
    if not isinstance(messages, list) or not messages:
        raise _malformed(messages)
    return [_checked_message(message, messages) for message in messages]


def _checked_message(message: Any, messages: Any) -> Message:
    if not isinstance(message, dict) or message.get("role") not in ROLES:
        raise _malformed(messages)
    # Columns of tables have every key in every row.
    message = {
        k: v for k, v in message.items() if v is not None and (k == "content" or v not in ("", []))
    }
    content = message.get("content", "" if "tool_calls" in message else None)
    if isinstance(content, list):
        content = _joined(content)
    if not isinstance(content, str):
        raise _malformed(messages)
    message["content"] = content
    if "tool_calls" in message:
        message["tool_calls"] = _checked_calls(message["tool_calls"])
    return message


def _joined(parts: list) -> str | None:
    texts = [
        part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None
        for part in parts
    ]
    return "".join(texts) if all(isinstance(text, str) for text in texts) else None


def _checked_calls(calls: Any) -> list[dict]:
    """Tool calls with arguments as objects, which templates want and clients send as JSON."""
    wanted = '"tool_calls" must be a list of {"function": {"name": text, "arguments": object}}'
    if not isinstance(calls, list):
        raise ValueError(f"{wanted}, got {str(calls)[:200]}")
    made = []
    for call in calls:
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise ValueError(f"{wanted}, got {str(call)[:200]}")
        arguments = function.get("arguments") or {}
        if isinstance(arguments, dict):  # of a table, with every tool's arguments in every call
            arguments = _without_nulls(arguments)
        if isinstance(arguments, str):
            try:
                arguments = json.loads(arguments)
            except (ValueError, RecursionError):
                arguments = None
        if not isinstance(arguments, dict):
            raise ValueError(
                f"the arguments of a tool call must be a JSON object, got {str(call)[:200]}"
            )
        call = {k: v for k, v in call.items() if v is not None}
        made.append(call | {"function": function | {"arguments": arguments}})
    return made


def _without_nulls(value: Any) -> Any:
    """A value whose objects, at any depth, have no null."""
    if isinstance(value, dict):
        return {k: _without_nulls(v) for k, v in value.items() if v is not None}
    return [_without_nulls(v) for v in value] if isinstance(value, list) else value


def _malformed(messages: Any) -> ValueError:
    return ValueError(
        "a prompt must be text or a list of messages "
        f'{{"role": {"|".join(ROLES)}, "content": text}}, got {str(messages)[:200]}'
    )


def last_asked(messages: Sequence[Message]) -> int:
    """The place of the message that a prompt template wraps: the last that is not the assistant's.

    It is the last of all where there is no other.
    """
    for place in reversed(range(len(messages))):
        if messages[place]["role"] != "assistant":
            return place
    return len(messages) - 1


def _continued(messages: list[Message]) -> tuple[list[Message], bool]:
    """The messages without `prefix`, and whether the last of them is to be continued.

    Raises:
      ValueError: for a `prefix` elsewhere, or an end that cannot be continued.
    """
    *before, last = messages
    if any(message.get("prefix") for message in before) or (
        last.get("prefix") and last["role"] != "assistant"
    ):
        raise ValueError('"prefix" belongs to the last message alone, and to one of the assistant')
    messages = [{k: v for k, v in m.items() if k != "prefix"} for m in messages]
    last = messages[-1]
    if last["role"] != "assistant":
        return messages, False
    if "tool_calls" in last:
        raise ValueError(
            "the conversation ends with tool calls, which cannot be continued; add a message with "
            'the role "tool"'
        )
    if last["content"]:
        return messages, True
    if last.keys() - {"role", "content"}:
        raise ValueError(
            "the last message of the assistant has no content that could be continued, but "
            f"{sorted(last.keys() - {'role', 'content'})}"
        )
    if len(messages) == 1:
        raise ValueError("the only message is an empty one of the assistant")
    return messages[:-1], False  # it says no more than that the assistant is next


# --- rendering


class Conversations:
    """Conversations through a tokenizer's chat template.

    Args:
      kwargs: further arguments of the template, which are the operator's.
      allow_control_tokens: take control tokens in texts for what they are.
    """

    def __init__(self, tokenizer: Any, kwargs: Mapping[str, Any], *, allow_control_tokens: bool):
        self._tokenizer, self._kwargs = tokenizer, dict(kwargs)
        self._allow = allow_control_tokens
        self._source = str(tokenizer.get_chat_template(tools=self._kwargs.get("tools")))
        self._known: dict[str, int] = {}

    def token_ids(
        self, conversations: Sequence[list[Message]], where: Callable[[int], str]
    ) -> list[list[int]]:
        """Token ids of conversations, each ready for the assistant's next token.

        Args:
          conversations: messages of `checked`.
          where: the place of a conversation, for errors.

        Raises:
          ValueError: for a conversation that the template refuses, or takes a part of.
        """
        rendered = [self._rendered(c, where(place)) for place, c in enumerate(conversations)]
        hiding = hiding_of(self._tokenizer)
        texts = [hiding.with_meant(text, table) if table else text for text, table in rendered]
        ids = self._tokenizer(texts, add_special_tokens=False)["input_ids"]
        tokenize = functools.partial(hiding.token_ids, add_special_tokens=False)
        for place, (text, table) in enumerate(rendered):
            if table and hiding.hides(text):
                ids[place] = _at(where(place), tokenize, text, table)
        return ids

    def _rendered(self, messages: list[Message], where: str) -> tuple[str, list[str]]:
        """The text of a conversation with placeholders, and what they stand for."""
        messages, goes_on = _at(where, _continued, messages)
        table: list[str] = []
        if not self._allow:
            messages = self._hidden(messages, table)
        messages = [
            {k: str(v) if isinstance(v, Mixed) else v for k, v in message.items()}
            for message in messages
        ]
        messages = self._mapped(messages, goes_on, where)
        kwargs = dict(self._kwargs)
        if kwargs.get("tools") and not self._allow:  # descriptions are by whoever made the tools
            hide = hiding_of(self._tokenizer).hide
            texts = [hide(text, table) for text in texts_in(kwargs["tools"])]
            kwargs["tools"] = with_texts(kwargs["tools"], iter(texts))
        try:
            return self._render(messages, goes_on, kwargs), table
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error.__cause__

    def _hidden(self, messages: list[Message], table: list[str]) -> list[Message]:
        hiding = hiding_of(self._tokenizer)
        bodies = [[v for k, v in message.items() if k != "role"] for message in messages]
        texts = list(texts_in(bodies))
        # Some templates write nothing between two texts, and cut the spaces at their ends.
        if not any(map(hiding.found, texts)) and not hiding.found("".join(map(str.strip, texts))):
            return messages
        texts = [hiding.hide(text, table) for text in texts]
        bodies = with_texts(bodies, iter(hiding.hide_seams(texts, table)))
        return [
            {"role": m["role"]} | dict(zip((k for k in m if k != "role"), body))
            for m, body in zip(messages, bodies)
        ]

    def _render(self, messages: list[Message], goes_on: bool, kwargs: Mapping[str, Any]) -> str:
        """The template's text.

        Raises:
          ValueError: for whatever goes wrong in the template, which is a program of its folder.
        """
        try:
            return templates.chat_texts(
                self._tokenizer,
                [messages],
                add_generation_prompt=not goes_on,
                continue_final_message=goes_on,
                **kwargs,
            )[0]
        except Exception as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
            cure = ""
            if any(message["role"] == "system" for message in messages):
                cure = (
                    ". Some have no system role (set data.system_prompt to ''); "
                    "data.apply_chat_template=False does without it"
                )
            raise ValueError(
                f"the tokenizer's chat template refuses these prompts: {reason}{cure}"
            ) from error

    # --- whether the template takes all of a message

    def _mapped(self, messages: list[Message], goes_on: bool, where: str) -> list[Message]:
        """The messages in a form that the template takes whole.

        Raises:
          ValueError: naming what it leaves out, where there is no such form.
        """
        shape = json.dumps(_marked(messages)[0])
        if shape not in self._known:
            if len(self._known) >= _CACHED_SHAPES:
                self._known.clear()
            self._known[shape] = self._form_for(messages, goes_on, where)
        return _FORMS[self._known[shape]](messages)

    def _form_for(self, messages: list[Message], goes_on: bool, where: str) -> int:
        lost: list[str] = []
        for number, form in enumerate(_FORMS):
            tried = form(messages)
            if number and tried == messages:
                continue
            missing = self._left_out(tried, goes_on)
            if missing is not None and not missing:
                return number
            lost = lost or missing or []
        if not lost:
            return 0  # the template refuses the markers; what it says of the texts counts
        raise ValueError(
            f"{where}: the chat template leaves out {lost[0]}. Remove it, write it into the "
            "content of a message, or use a model whose template has a place for it"
        )

    def _left_out(self, messages: list[Message], goes_on: bool) -> list[str] | None:
        """What does not come out of the template, in words; None where it refuses everything."""
        marked, markers = _marked(messages)
        try:
            text = self._render(marked, goes_on, self._kwargs)
        except ValueError:
            return None
        lost = [what for marker, what in markers.items() if marker not in text]
        lost += [
            f'"{key}" of the role {message["role"]} (message {number})'
            for number, message in enumerate(messages)
            for key, value in message.items()
            if isinstance(value, bool | int | float) and key not in self._source
        ]
        # A template that knows reasoning leaves that of earlier turns out by its own rule.
        return [
            what
            for what in lost
            if not any(f'"{r}"' in what and r in self._source for r in _REASONING)
        ]


def _at(where: str, function: Callable, *args) -> Any:
    """The result of a function; its refusals name the place."""
    try:
        return function(*args)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def _marked(messages: list[Message]) -> tuple[list[Message], dict[str, str]]:
    """Messages of the same shape with markers for texts, and what each marker stands for."""
    markers: dict[str, str] = {}

    def mark(value: Any, what: str) -> Any:
        if isinstance(value, str):
            if not value:
                return value
            marker = f"mark{len(markers):04d}k"
            markers[marker] = what
            return marker
        if isinstance(value, Mapping):
            return {k: v if k in _IDS else mark(v, what) for k, v in value.items()}
        if isinstance(value, list | tuple):
            return [mark(item, what) for item in value]
        if isinstance(value, int | float) and not isinstance(value, bool):
            return 7
        return value

    marked, called = [], set()
    for number, message in enumerate(messages):
        called |= {call["function"]["name"] for call in message.get("tool_calls", ())}
        role, made = message["role"], {"role": message["role"]}
        for key, value in message.items():
            # The name of the function that answers was in the call.
            if key in _IDS or (key == "name" and role == "tool" and value in called):
                made[key] = "call00007"
            elif key != "role":
                what = "a message" if key == "content" else f'"{key}"'
                made[key] = mark(value, f"{what} of the role {role} (message {number})")
        marked.append(made)
    return marked, markers


def _as_they_are(messages: list[Message]) -> list[Message]:
    return messages


def _developer_as_system(messages: list[Message]) -> list[Message]:
    return [m | {"role": "system"} if m["role"] == "developer" else m for m in messages]


def _one_system_message(messages: list[Message]) -> list[Message]:
    """As above, with the system messages at the front joined into one."""
    messages = _developer_as_system(messages)
    front = 0
    while front < len(messages) and messages[front]["role"] == "system":
        front += 1
    if front < 2 or any(m.keys() - {"role", "content"} for m in messages[:front]):
        return messages
    content = "\n\n".join(message["content"] for message in messages[:front])
    return [{"role": "system", "content": content}, *messages[front:]]


_FORMS = (_as_they_are, _developer_as_system, _one_system_message)
