"""Calls of tools in what a model wrote. The chat template tells which form a model writes:

    tags     <tool_call>{"name": ..., "arguments": {...}}</tool_call>         Hermes, Qwen, SmolLM3
             <tool_call><function=name><parameter=key>...</tool_call>         Qwen3-Coder, in XML
    json     {"name": ..., "parameters": {...}}, the whole text               Llama 3, generic
    gemma    <start_function_call>call:name{key:value}<end_function_call>     FunctionGemma
    gemma4   <|tool_call>call:name{key:value}<tool_call|>                     Gemma 4

A call that is only drafted in a thought is none: thoughts are parted off first, as vLLM and SGLang
do with their parsers of reasoning.

A text of a model is hostile: it is parsed here, and neither evaluated nor trusted. `calls_in` reads
a whole turn, and says of a malformed call what is wrong in words for the model. `CallParser` takes
a text as it comes, and leaves as text whatever is no call of a tool that there is. XML does not say
of an argument whether it is text, so the tool's schema does.
"""

import itertools
import json
import math
import re
import uuid
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from adpo_jax.environments.nesting import nests_deeper

OPEN, CLOSE = "<tool_call>", "</tool_call>"
# Llama 3.1 writes it before a call; as a special token it is mostly left out of the text.
PYTHON_TAG = "<|python_tag|>"

Form = Literal["tags", "json", "gemma", "gemma4"]

# The marks around a call, and of the forms of Gemma those around a text.
_MARKS = {
    "tags": (OPEN, CLOSE),
    "gemma": ("<start_function_call>", "<end_function_call>"),
    "gemma4": ("<|tool_call>", "<tool_call|>"),
}
# The marks around a thought.
_THOUGHTS = {"gemma4": ("<|channel>", "<channel|>")}
_THOUGHT = "<think>", "</think>"
_XML_CALL = re.compile(rf"{OPEN}\s*<function=")
_MAY_BE_XML_CALL = re.compile(rf"{OPEN}\s*(?:<function=|<?[a-z]*\Z)")
_QUOTES = {"gemma": "<escape>", "gemma4": '<|"|>'}

_FENCE = "```"
_FENCE_LABELS = ("", "json", "tool_code", "tool_call")
_LONGEST_NAME = 256  # of a function and of a parameter, in XML
_DEEPEST = 32  # values inside values; deeper ones could not be handed to the tool's process
_MOST_CALLS = 64  # of a turn
_MOST_SCHEMAS = 64  # of an argument


class Call(NamedTuple):
    """A call of a tool that a model wrote.

    Attributes:
      name: the tool; "" where that cannot be read.
      arguments: by name.
      error: why it cannot be carried out, in words for the model; "" where it can.
    """

    name: str
    arguments: dict[str, Any]
    error: str = ""


def form_of(template: str) -> Form | None:
    """The form of calls that a chat template teaches; None for none that is known."""
    if "tools" not in template:
        return None
    for form in ("gemma4", "gemma", "tags"):
        if _MARKS[form][0] in template:
            return form
    return "json" if re.search(r"""parameters\\?":\s*dictionary""", template) else None


def marks_of(form: Form) -> tuple[str, ...]:
    """The marks by which calls and thoughts are known; a tokenizer may have them as special."""
    marks = *_MARKS.get(form, (PYTHON_TAG,)), *_THOUGHTS.get(form, _THOUGHT)
    return marks + ((_QUOTES[form],) if form in _QUOTES else ())


def begun_thought(form: Form, prompt: str, continued: str = "") -> str:
    """The mark with which a prompt has begun a thought that the model goes on with; "" for none.

    Args:
      prompt: its end at least.
      continued: the message of the assistant that it ends with; "" where the model begins one.
    """
    opening, closing = _THOUGHTS.get(form, _THOUGHT)
    begun = continued.rfind(opening) > continued.rfind(closing)
    return opening if begun or prompt.rstrip().endswith(opening) else ""


def parameters_of(tools: Sequence[Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    """The schema of each tool's arguments by the tool's name; `tools` in OpenAI's form."""
    functions = [tool["function"] for tool in tools]
    return {function["name"]: _mapping(function.get("parameters")) for function in functions}


def calls_in(form: Form, text: str, tools: Mapping[str, Mapping[str, Any]]) -> list[Call]:
    """The calls in a whole turn, in their order, malformed ones among them; none for plain text.

    Args:
      text: the turn, behind `begun_thought`.
      tools: the tools that there are, as of `parameters_of`.
    """
    text = _behind_thoughts(form, text)
    bodies = _bodies(form, text) if form in _MARKS else _json_bodies(text)
    calls = [
        body if isinstance(body, Call) else _checked(_read(form, body, tools), tools)
        for body in bodies[:_MOST_CALLS]
    ]
    if len(bodies) > _MOST_CALLS:
        calls.append(Call("", {}, f"a turn has {_MOST_CALLS} calls at most; the rest was left out"))
    return calls


def _behind_thoughts(form: Form, text: str) -> str:
    """What follows the thoughts of a turn that stand before its first call.

    A thought that is not closed goes on to the end, or to a call in XML, which Qwen3.5 may begin
    without closing its thought.
    """
    opening, closing = _THOUGHTS.get(form, _THOUGHT)
    begins_call = _MARKS[form][0] if form in _MARKS else "{"
    at = 0
    while (start := text.find(opening, at)) >= 0 and text.find(begins_call, at, start) < 0:
        end = text.find(closing, start)
        if end < 0:
            call = _XML_CALL.search(text, start)
            return text[call.start() :] if call and form == "tags" else ""
        at = end + len(closing)
    return text[at:]


def _bodies(form: Form, text: str) -> list[str | Call]:
    """What stands between the marks; up to the end of the text where the last is not closed.

    A call that breaks off within that is given as a malformed one.
    """
    opening, closing = _MARKS[form]
    made = []
    for part in text.split(opening)[1:]:
        body, mark, _ = part.partition(closing)
        broken = Call("", {}, "this call breaks off: it has no </function>")
        made.append(broken if _breaks_off(form, body, mark) else body.strip())
    return made


def _breaks_off(form: Form, body: str, mark: str) -> bool:
    """Whether a call in XML ends within an argument, where no closing mark follows it."""
    return form == "tags" and not mark and _is_xml(body) and "</function>" not in body


def _is_xml(body: str) -> bool:
    """Whether the body of a call is XML, and not JSON that may quote some."""
    return body.lstrip().startswith("<function=")


def _json_bodies(text: str) -> list[Any]:
    """The JSON values of a text that consists of such; what begins like a call and is none, whole.

    Calls may stand in a list or in a block of code, with semicolons between.
    """
    text = _unfenced(text).strip()
    marked = text.startswith(PYTHON_TAG)
    rest, found = text.removeprefix(PYTHON_TAG).strip(), []
    if not rest.startswith(("{", "[")) or not (marked or '"name"' in rest):
        return []
    while rest:
        try:
            value, end = _DECODER.raw_decode(rest)
        except (ValueError, RecursionError):
            return [*found, rest]
        found += value if isinstance(value, list) else [value]
        rest = rest[end:].strip().lstrip(";").strip()
    return found


def _unfenced(text: str) -> str:
    """What the first block of code holds that may be calls; the text itself where there is none."""
    at = text.find(_FENCE)
    while at >= 0:
        start = at + len(_FENCE)
        first, newline, _ = text[start : start + 32].partition("\n")
        end = text.find(_FENCE, start)
        if end < 0:
            break
        if newline and first.strip() in _FENCE_LABELS:
            return text[start + len(first) : end]
        at = text.find(_FENCE, end + len(_FENCE))
    return text


def _read(form: Form, body: Any, tools: Mapping[str, Mapping[str, Any]]) -> tuple[Any, Any] | None:
    """The name and the arguments in the body of a call, not checked yet; None for neither."""
    if form in _QUOTES:
        return _gemma_call(body, _QUOTES[form])
    if form == "tags" and _is_xml(body) and (xml := next(_xml_elements("function", body), None)):
        name, inside = xml
        root = tools.get(name, {})
        schemas = _mapping(root.get("properties"))
        arguments = _xml_elements("parameter", inside)
        return name, {
            key: _xml_value(text, _types_of(schemas.get(key), root)) for key, text in arguments
        }
    value = json_object(body)
    if value is None:
        return None
    return value.get("name"), value.get("arguments", value.get("parameters", {}))


def _checked(read: tuple[Any, Any] | None, names: Collection[str]) -> Call:
    if read is None:
        return Call("", {}, 'this call is no JSON object with "name" and "arguments"')
    name, arguments = read
    if not isinstance(name, str) or name not in names:
        return Call("", {}, f"there is no tool {_shown(name)}; there are {', '.join(names)}")
    arguments = json_object(arguments)
    if arguments is None:
        return Call(name, {}, f"the arguments of {name} are no JSON object")
    if nests_deeper(arguments, _DEEPEST):
        return Call(name, {}, f"the arguments of {name} nest deeper than {_DEEPEST} levels")
    return Call(name, arguments)


def _shown(name: Any) -> str:
    text = json.dumps(name, default=str)[:80]
    return text if isinstance(name, str) else f"of the name {text}"


def json_object(text: Any) -> dict[str, Any] | None:
    """A JSON object that may come as text; None for anything else."""
    if isinstance(text, str):
        try:
            text = _DECODER.decode(text)
        except (ValueError, RecursionError):
            return None
    return text if isinstance(text, dict) else None


def _no_constant(name: str):
    raise ValueError(f"{name} is no JSON")


def _finite(text: str) -> float:
    if math.isfinite(number := float(text)):
        return number
    raise ValueError(f"{text} is no finite number")


_DECODER = json.JSONDecoder(parse_constant=_no_constant, parse_float=_finite)


def _xml_elements(tag: str, text: str) -> Iterator[tuple[str, str]]:
    """The name and the inside of each `<tag=name>...</tag>`; the last one may not be closed.

    The time is linear in the text, whatever it says.
    """
    opening, closing = f"<{tag}=", f"</{tag}>"
    at = text.find(opening)
    while at >= 0:
        start = at + len(opening)
        end = text.find(">", start, start + _LONGEST_NAME)
        name = text[start : max(end, start)]
        if not name or any(c.isspace() for c in name):
            at = text.find(opening, start)
            continue
        stop = text.find(closing, end + 1)
        yield name, text[end + 1 : stop if stop >= 0 else len(text)]
        at = text.find(opening, stop + len(closing)) if stop >= 0 else -1


def _xml_value(text: str, types: set[str]) -> Any:
    """An argument between XML marks, of one of the types that its schema declares.

    What may be text stays as it stands, without the line breaks at the marks, unless it is JSON of
    another type that it may have. Where no type is declared it is JSON if it can be, else text.
    """
    text = text.removeprefix("\n").removesuffix("\n")
    value = _json_or_text(text)
    if not types and isinstance(value, str):
        return text
    if "string" in types and not types & _TYPES_OF_JSON.get(type(value), set()):
        return text
    if "boolean" in types and text.strip() in ("True", "False"):  # as Python writes them
        return text.strip() == "True"
    return value


_TYPES_OF_JSON = {
    bool: {"boolean"},
    int: {"integer", "number"},
    float: {"number"},
    type(None): {"null"},
    dict: {"object"},
    list: {"array"},
}


def _types_of(schema: Any, root: Mapping[str, Any]) -> set[str]:
    """The types that a JSON schema declares; none where it declares none that is known.

    Args:
      root: the schema that references start from. They may lead in a circle, so that no more than
        `_MOST_SCHEMAS` are looked at.
    """
    found, schemas = set(), [schema]
    for schema in itertools.islice(schemas, _MOST_SCHEMAS):  # which grows meanwhile
        schema = _mapping(schema)
        types, values = schema.get("type"), _list(schema.get("enum"))
        found |= {kind for kind in _list(types) or [types] if isinstance(kind, str)}
        values = [*values, schema["const"]] if "const" in schema else values
        for value in values if types is None else ():
            found |= _TYPES_OF_JSON.get(type(value), {"string"})
        for name in ("anyOf", "oneOf", "allOf"):
            schemas += _list(schema.get(name))
        if isinstance(reference := schema.get("$ref"), str):
            schemas.append(_referred(reference, root))
    return found


def _referred(reference: str, root: Mapping[str, Any]) -> Any:
    """What a reference as `#/$defs/name` leads to; None for nothing."""
    start, *names = reference.split("/")
    found: Any = root if start == "#" else None
    for name in names:
        found = _mapping(found).get(name)
    return found


def _list(value: Any) -> list:
    return value if isinstance(value, list) else []


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _json_or_text(text: str) -> Any:
    try:
        return _DECODER.decode(text.strip())
    except (ValueError, RecursionError):
        return text


# --- Gemma's form, in which texts stand between marks and names without any


def _gemma_call(body: str, quote: str) -> tuple[str, Any] | None:
    match = re.match(r"call:([A-Za-z0-9_.-]{1,64})(?=\{)", body)
    if not match:
        return None
    try:
        value, end = _gemma_value(body, match.end(), quote, 0)
    except (ValueError, IndexError):
        return match[1], None
    return match[1], None if body[end:].strip() else value


def _gemma_value(text: str, at: int, quote: str, depth: int) -> tuple[Any, int]:
    """The value that begins at a place, and the place behind it; ValueError for none."""
    if depth > _DEEPEST:
        raise ValueError
    if text.startswith(quote, at):
        end = text.index(quote, at + len(quote))
        return text[at + len(quote) : end], end + len(quote)
    if text[at] in "{[":
        close, made = ("}", {}) if text[at] == "{" else ("]", [])
        at += 1
        while text[at] != close:
            if isinstance(made, dict):
                key, at = _gemma_key(text, at, quote)
                made[key], at = _gemma_value(text, at, quote, depth + 1)
            else:
                value, at = _gemma_value(text, at, quote, depth + 1)
                made.append(value)
            at += text[at] == ","
        return made, at + 1
    match = re.compile(r"[^,}\]{\[]+").match(text, at)
    if not match:
        raise ValueError
    return _json_or_text(match[0].strip()), match.end()


def _gemma_key(text: str, at: int, quote: str) -> tuple[str, int]:
    if text.startswith(quote, at):
        key, at = _gemma_value(text, at, quote, 0)
    else:
        end = text.index(":", at)
        key, at = text[at:end].strip(), end
    if text[at] != ":":
        raise ValueError
    return key, at + 1


# --- texts that come bit by bit


class Found(NamedTuple):
    """What a piece of text came to: text for people, and calls in OpenAI's form."""

    text: str
    calls: list[dict[str, Any]]


class CallParser:
    """Takes a model's text as it comes, and parts it into text and calls.

    Args:
      form: the form in which this model writes calls.
      tools: the functions that it was given, in OpenAI's form.
      parallel: whether it may call more than one; further calls are left out.
      thought: the `begun_thought` of the prompt.

    Attributes:
      num_calls: calls found so far.
    """

    def __init__(
        self, form: Form, tools: list[dict[str, Any]], parallel: bool = True, thought: str = ""
    ):
        self._form = form
        # Thoughts stand before the first call, and calls that are drafted in them are text.
        self._may_think, self._thinks = True, bool(thought)
        self._take = self._take_tagged if form in _MARKS else self._take_json
        self._tools = parameters_of(tools)
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
        said = self._thoughts(last)
        found = Found("", []) if self._thinks else self._take(last)
        return Found(said + found.text, found.calls)

    def _thoughts(self, last: bool) -> str:
        """The thoughts that the held text begins with, and what stands before each of them."""
        opening, closing = _THOUGHTS.get(self._form, _THOUGHT)
        said = ""
        while self._thinks or self._may_think:
            mark = closing if self._thinks else opening
            at = self._held.find(mark)
            if at < 0 or not (self._thinks or self._may_begin_thought(at)):
                break
            at += len(mark)
            said, self._held = said + self._held[:at], self._held[at:]
            self._thinks = not self._thinks
        if not self._thinks:
            return said
        # What may be a call in XML is one if the thought is never closed: see `_behind_thoughts`.
        pattern = _XML_CALL if last else _MAY_BE_XML_CALL
        call = pattern.search(self._held) if self._form == "tags" else None
        if call:
            at, self._thinks = call.start(), not last
        else:
            at = len(self._held)
            at -= 0 if last else max(map(self._beginning, (closing, OPEN)))
        said, self._held = said + self._held[:at], self._held[at:]
        return said

    def _may_begin_thought(self, at: int) -> bool:
        """Whether a mark of a thought at this place is one, and not within or behind a call."""
        before = self._held[:at]
        if self._form in _MARKS:
            self._may_think = _MARKS[self._form][0] not in before
        else:
            self._may_think = not self._is_text and not before.strip()
        return self._may_think

    def _take_tagged(self, last: bool) -> Found:
        said, calls = "", []
        opening, closing = _MARKS[self._form]
        while not self.complete:
            mark = closing if self._inside else opening
            at = self._held.find(mark)
            if at < 0 and not (self._inside and last):
                break
            if at < 0:  # the end came before the closing mark
                at, mark = len(self._held), ""
            before, self._held = self._held[:at], self._held[at + len(mark) :]
            if not self._inside:
                self._may_think = False
                # Space around calls is no text for people.
                said += before.rstrip()
                self._space, self._inside = before[len(before.rstrip()) :], True
                continue
            self._inside = False
            cut = _breaks_off(self._form, before, mark)
            call = None if cut else self._call(before.strip())
            if call is None:
                said += self._space + opening + before + mark
            else:
                calls.append(call)
        return Found(said + self._certain(opening, last), calls)

    def _certain(self, opening: str, last: bool) -> str:
        """The held text that is neither in a call nor the beginning of one."""
        if self.complete:
            self._held = ""
        if self._inside or (last and self.num_calls and not self._held.strip()):
            return ""
        if last:
            text, self._held = self._held, ""
            return text
        marks = [opening]
        if self._may_think:
            marks.append(_THOUGHTS.get(self._form, _THOUGHT)[0])
        text = self._held[: len(self._held) - max(map(self._beginning, marks))].rstrip()
        self._held = self._held[len(text) :]
        return text

    def _beginning(self, mark: str) -> int:
        """The number of characters at the end of the held text that may begin a mark."""
        return next((n for n in range(len(mark), 0, -1) if self._held.endswith(mark[:n])), 0)

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
            for each in value if isinstance(value, list) and value else [value]:
                call = self._call(each)
                if call is None:
                    self.num_calls = 0
                    return []
                calls.append(call)
            rest = rest[end:].strip().removeprefix(";").strip()
        return calls if self._parallel else calls[:1]

    def _call(self, body: Any) -> dict[str, Any] | None:
        """A call in OpenAI's form; None if this is no call of a function that was given."""
        call = _checked(_read(self._form, body, self._tools), self._tools)
        if call.error:
            return None
        self.num_calls += 1
        arguments = json.dumps(call.arguments, ensure_ascii=False)
        # No client could send half a character back.
        arguments = arguments.encode(errors="replace").decode()
        function = {"name": call.name, "arguments": arguments}
        return {"id": f"call_{uuid.uuid4().hex[:24]}", "type": "function", "function": function}


def _may_be_json(text: str) -> bool:
    """Whether a text that has begun so may be calls, or a thought before them."""
    begun = any(mark.startswith(text) for mark in (PYTHON_TAG, _THOUGHT[0]))
    return begun or bool(re.match(r"\{|\[\s*(\{|$)", text)) or text.startswith(PYTHON_TAG)
