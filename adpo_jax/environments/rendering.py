"""What tools answer, as the token ids that are appended to a completion.

What a model wrote is never decoded and tokenised again. The ids of an answer are those of the text
by which the chat template's rendering of a short conversation grows when the answer is appended to
it. This is right for a template that writes earlier turns the same whatever follows, which is
checked over several turns before a run. Some well-known templates do not, and are patched by name.

Control tokens in an answer are text, as those of users are.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from adpo_jax.data import templates
from adpo_jax.data.control_tokens import hiding_of
from adpo_jax.environments import calls

# Templates that do not keep earlier turns: the name, and what is replaced by what, as text.
PATCHES: dict[str, tuple[tuple[str, str], ...]] = {
    # Qwen3 writes an empty thought before a last turn, and takes it out when a tool answers.
    "qwen3": (
        (
            "{%- if loop.last or (not loop.last and reasoning_content) %}",
            "{%- if reasoning_content %}",
        ),
    ),
}

_CHARACTERS = 64  # of the longest tokens; more of an answer is not even tokenised
_ROUNDS = 3  # turns of the conversation that a template is checked with
_THOUGHT = "<think>\nfirst\n</think>\n\n"


class TurnTemplate:
    """The chat template of a tokenizer, as far as tools are concerned.

    Args:
      kwargs: further arguments of the template.
      tools: schemas of tools as examples, at least one.
      stop_token_ids: the tokens that end a turn.
      max_tool_tokens: tokens of an answer; longer ones are cut.

    Attributes:
      form: the form in which the model writes calls.
      patch: the name of the patch under which the template keeps earlier turns; "" for none.
      thought: the mark with which it begins a thought for the model to go on with; "" for none.

    Raises:
      ValueError: a template without a place for tools, with calls in a form that is not known, or
        one that does not keep earlier turns.
    """

    def __init__(
        self,
        tokenizer: Any,
        kwargs: Mapping[str, Any],
        tools: Sequence[Mapping],
        stop_token_ids: Sequence[int],
        max_tool_tokens: int,
    ):
        if not getattr(tokenizer, "chat_template", None):
            raise ValueError(
                "environments need a tokenizer with a chat template that has tools; this one has "
                "no chat template"
            )
        self._tokenizer, self._kwargs, self._tools = tokenizer, dict(kwargs), list(tools)
        self._ends = {tokenizer.decode([i]): i for i in stop_token_ids}
        self._max_tool_tokens = max_tool_tokens
        source = str(tokenizer.get_chat_template(tools=self._tools))
        form = calls.form_of(source)
        self._template: str | None = None  # the tokenizer's own
        self.patch = ""
        self._check_place_for_tools()
        if form is None:
            raise ValueError(
                "the chat template has tools, but teaches a form of calls that is not known here; "
                "known are those of Hermes and Qwen, Llama 3, FunctionGemma and Gemma 4"
            )
        self.form = form
        (prompt,) = self._texts([[{"role": "user", "content": "u"}]], goes_on=True)
        self.thought = calls.begun_thought(form, prompt)
        changed = self._turn_that_changes()
        for name, replacements in PATCHES.items() if changed else ():
            if all(old in source for old, _ in replacements):
                self._template, self.patch = source, name
                for old, new in replacements:
                    self._template = self._template.replace(old, new)
                if not self._turn_that_changes():
                    break
        else:
            if changed:
                raise ValueError(
                    "the chat template writes earlier turns in another way once a tool has "
                    f"answered, so what the model has written could not stay: {changed}. Use a "
                    "template that keeps them, by tokenizer_config.json or chat_template.jinja"
                )

    def answer_ids(self, answers: Sequence[Sequence[tuple[str, str]]]) -> list[list[int]]:
        """The ids that are appended to completions whose turns have ended with calls.

        Args:
          answers: for each completion the name of the tool and its answer of every call, `cut`.
        """
        hiding = hiding_of(self._tokenizer)
        tables: list[list[str]] = [[] for _ in answers]
        messages = [
            [(name, hiding.hide(text, table)) for name, text in told]
            for told, table in zip(answers, tables)
        ]
        befores = self._texts([_told(told, []) for told in messages])
        afters = self._texts([_told(told, told) for told in messages], goes_on=True)
        return [
            self._difference_ids(before, after, table)
            for before, after, table in zip(befores, afters, tables)
        ]

    def cut(self, text: str) -> str:
        """An answer of at most `max_tool_tokens` tokens, and a mark where it was longer."""
        # What has no bytes in UTF-8, as half of a surrogate pair, is no text for a tokenizer.
        text = text.encode(errors="replace").decode()
        most = self._max_tool_tokens
        head = text[: most * _CHARACTERS]
        found = self._tokenizer(head, add_special_tokens=False)
        ids = found["input_ids"]
        if len(ids) <= most and len(head) == len(text):
            return text
        if len(ids) > most:
            if getattr(found, "is_fast", False):
                head = head[: found.token_to_chars(most - 1).end]
            else:
                head = self._tokenizer.decode(ids[:most])
        return f"{head}... (cut at {most} tokens)"

    def _difference_ids(self, before: str, after: str, table: list[str]) -> list[int]:
        before, end = self._ended(before)
        assert after.startswith(before)
        # The end of the turn comes first, so that what follows is tokenised as it is behind it.
        text = end + after[len(before) :]
        hiding = hiding_of(self._tokenizer)
        if table and hiding.hides(text):
            ids = hiding.token_ids(text, table, add_special_tokens=False)
        else:
            ids = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        assert ids[0] == self._ends[end]
        return ids[1:]

    def _ended(self, text: str) -> tuple[str, str]:
        """The text up to its last end of a turn, and the token that ends it."""
        places = {text.rfind(end) + len(end): end for end in self._ends if end in text}
        if not places:
            raise ValueError(
                "the chat template ends a turn that calls a tool with none of the tokens that end "
                f"a completion, {', '.join(map(repr, self._ends))}"
            )
        last = max(places)
        return text[:last], places[last]

    def _texts(self, conversations: Sequence[list[dict]], *, goes_on: bool = False) -> list[str]:
        options = {"tools": self._tools, "add_generation_prompt": goes_on} | self._kwargs
        if self._template is None:
            return templates.chat_texts(self._tokenizer, conversations, **options)
        options |= {"documents": None} | self._tokenizer.special_tokens_map
        return templates.render(self._template, conversations, **options)

    def _check_place_for_tools(self) -> None:
        told = [("mark0001k", "mark0002k")]
        name = self._tools[0]["function"]["name"]
        try:
            (text,) = self._texts([_told(told, told)], goes_on=True)
        except Exception as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
            raise ValueError(f"the chat template has no place for tools: {reason}") from error
        for mark, what in (
            ("mark0001k", "the calls of the assistant"),
            ("mark0002k", "what a tool answers"),
            (name, "the tools"),
        ):
            if mark not in text:
                raise ValueError(
                    f"the chat template has no place for tools: it leaves out {what}. Use a model "
                    "whose template has them"
                )

    def _turn_that_changes(self) -> str:
        """How a rendering of a conversation differs from the beginning of a longer one; "" if not.

        Source of the idea: `is_chat_template_prefix_preserving` of TRL 1.16.
        """
        for said in ("", _THOUGHT):
            messages, befores, grown = [{"role": "user", "content": "u"}], [], []
            for turn in range(_ROUNDS):
                told = [(f"mark{turn:04d}k", f"mark{turn + 10:04d}k")] * (1 + turn % 2)
                calling = _told(told, told)[1:]
                calling[0]["content"] = said
                befores.append([*messages, calling[0]])
                messages = [*messages, *calling]
                grown.append(messages)
            befores = [self._ended(text)[0] for text in self._texts(befores)]
            afters = self._texts(grown, goes_on=True)
            (alone,) = self._texts([_told(told, [])])
            (answered,) = self._texts([_told(told, told)], goes_on=True)
            if not afters[-1].endswith(answered[len(self._ended(alone)[0]) :]):
                return "an answer is written in another way where other turns stand before it"
            for place, before in enumerate(befores):
                for after in afters[place:]:
                    if not after.startswith(before):
                        at = next(i for i, (a, b) in enumerate(zip(before, after)) if a != b)
                        was, becomes = before[at : at + 40], after[at : at + 40]
                        return f"turn {place + 1} says {was!r}, and then {becomes!r}"
        return ""


def _told(told: Sequence[tuple[str, str]], answers: Sequence[tuple[str, str]]) -> list[dict]:
    """A short conversation in which tools are called, with answers where there are such."""
    ids = [f"call{number:05d}" for number in range(len(told))]
    made = [
        {"type": "function", "id": i, "function": {"name": name or "tool", "arguments": {}}}
        for i, (name, _) in zip(ids, told)
    ]
    return [
        {"role": "user", "content": "u"},
        {"role": "assistant", "content": "", "tool_calls": made},
        *(
            {"role": "tool", "name": name or "tool", "tool_call_id": i, "content": text}
            for i, (name, text) in zip(ids, answers)
        ),
    ]
