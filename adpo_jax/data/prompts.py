"""Rows of a data set as tokenised prompts: template, system prompt, chat template, length limit."""

import dataclasses
import difflib
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

from absl import logging

from adpo_jax.data import conversations as conversations_lib
from adpo_jax.data.control_tokens import Mixed, control_token_in, text_token_ids, texts_in
from adpo_jax.data.conversations import Conversations, Message
from adpo_jax.data.dataset import Dataset
from adpo_jax.data.readers import Row, refuse_half_characters

# A word in braces, with what stands before it in LaTeX.
_WORD_IN_BRACES = re.compile(r"(\\[A-Za-z]+(?:\{\w*\})*|[\^_])?\{([A-Za-z_]\w*)\}")

# Arguments of apply_chat_template that the user may not give.
_RESERVED = {
    "conversation",
    "tokenize",
    "add_generation_prompt",
    "continue_final_message",
    "return_dict",
    "return_tensors",
}


@dataclasses.dataclass(frozen=True)
class PromptFormat:
    """How text becomes a prompt; the fields are keys of `data` in the config."""

    prompt_template: str = "{prompt}"
    system_prompt: str = ""
    apply_chat_template: bool = True
    chat_template_kwargs: dict = dataclasses.field(default_factory=dict)
    allow_control_tokens: bool = False


def prompts_of_texts(
    texts: Sequence[str | list[Message]],
    tokenizer: Any,
    prompt_format: PromptFormat,
    *,
    max_length: int,
) -> list[list[int]]:
    """Token ids of texts or lists of messages.

    Args:
      max_length: the most tokens of a prompt.

    Raises:
      ValueError: for a prompt that is empty, too long or cannot be rendered.
    """
    try:
        rendered = render_prompts(
            Dataset({"prompt": list(texts)}),
            tokenizer,
            prompt_key="prompt",
            max_prompt_length=max_length,
            **dataclasses.asdict(prompt_format),
        )
    except ValueError as error:  # these are no rows of anybody's data
        raise ValueError(re.sub(r"^row (?=\d+: )", "prompt ", str(error))) from error
    if rendered.num_overlong:
        raise ValueError(
            f"{rendered.num_overlong} of {len(texts)} prompts are longer than {max_length} "
            "tokens; shorten them or raise the limit"
        )
    return rendered.token_ids


class RenderedPrompts(NamedTuple):
    """The result of `render_prompts`."""

    dataset: Dataset  # the rows that were kept
    token_ids: list[list[int]]  # their prompts
    num_overlong: int  # how many were filtered, or truncated


def render_prompts(
    dataset: Dataset,
    tokenizer: Any,
    *,
    prompt_key: str,
    prompt_template: str = "{prompt}",
    system_prompt: str = "",
    apply_chat_template: bool = True,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    max_prompt_length: int,
    overlong: str = "filter",
    numbers: Sequence[int] | None = None,
    allow_control_tokens: bool = False,
    source: str = "",
    tools: Mapping[str, list] | None = None,
    observations: Sequence[str | None] | None = None,
) -> RenderedPrompts:
    """Tokenises every prompt of a data set.

    Args:
      dataset: its prompts are text, or lists of messages {"role": ..., "content": text}. A list
        that ends with a message of the assistant is continued.
      tokenizer: a Hugging Face tokenizer.
      prompt_key: the column of prompts.
      prompt_template: `{prompt}` and `{any column}` in it are replaced, and nothing else: other
        braces stay, as do those after a LaTeX command, so that `\\boxed{answer}` does not print the
        answer. With chat messages it wraps the last that is not the assistant's.
      system_prompt: a system message before each prompt, "" for none.
      apply_chat_template: use the tokenizer's chat template where it has one; otherwise the prompt
        is plain text, the system prompt before it with an empty line between.
      chat_template_kwargs: further arguments of the chat template, e.g. {"enable_thinking": False}.
      max_prompt_length: tokens.
      overlong: "filter" leaves longer prompts out; "truncate" keeps their last `max_prompt_length`
        tokens (the end holds the question and the generation prompt; the system prompt goes first).
      numbers: the numbers of the rows in errors; None counts from 0.
      allow_control_tokens: what the data has of control tokens (`<|im_end|>`) is taken for them;
        otherwise it is text. Those of the templates and the system prompt are always meant.
      source: the name of the data, for errors.
      tools: the schemas of the tools that the chat template shows, by the value of the column
        "environment"; under "" for all rows.
      observations: a text for each row that is appended to its last message of the user; None for
        none.

    Returns:
      The kept rows, a list of token ids for each, and how many prompts were too long.

    Raises:
      ValueError: a template that uses no column, a prompt that cannot be rendered (with its row,
        counted from 0), nothing left.
    """
    if overlong not in ("filter", "truncate"):
        raise ValueError(f"overlong prompts: filter or truncate, got {overlong!r}")
    if max_prompt_length < 1:
        raise ValueError(f"max_prompt_length must be at least 1 token, got {max_prompt_length}")
    template = _Template(prompt_template, {"prompt", *dataset.columns})
    numbers = range(len(dataset)) if numbers is None else numbers

    def where(index: int) -> str:
        row = f"row {numbers[index] + 1}"
        return f"{source}: {row}" if source else row

    conversations = [
        _conversation(dataset.row(index), where(index), prompt_key, template, system_prompt)
        for index in range(len(dataset))
    ]
    for index, text in enumerate(observations or ()):
        if text is not None:
            conversations[index] = _observed(conversations[index], text)
    if apply_chat_template and getattr(tokenizer, "chat_template", None):
        kwargs = dict(chat_template_kwargs or {})
        token_ids = _chat_token_ids(
            tokenizer, dataset, conversations, where, kwargs, tools, allow_control_tokens
        )
    else:
        token_ids = _plain_token_ids(tokenizer, conversations, where, allow_control_tokens)
    for index, ids in enumerate(token_ids):
        if not ids:
            raise ValueError(f"{where(index)}: the prompt is empty: it has no tokens")

    if source and not allow_control_tokens:
        _tell_of_control_tokens(dataset, tokenizer, prompt_key, where)
    if overlong == "truncate":
        kept = [ids[-max_prompt_length:] for ids in token_ids]
        num_overlong = sum(len(ids) > max_prompt_length for ids in token_ids)
        return RenderedPrompts(dataset, kept, num_overlong)
    return _filtered(dataset, token_ids, max_prompt_length)


def _chat_token_ids(
    tokenizer, dataset: Dataset, conversations, where, kwargs, tools, allow_control_tokens: bool
) -> list[list[int]]:
    """The token ids of each conversation under the tokenizer's chat template."""
    reserved = sorted(_RESERVED & kwargs.keys())
    if reserved:
        raise ValueError(f"data.chat_template_kwargs cannot set {', '.join(reserved)}")
    token_ids: list[list[int]] = [[]] * len(dataset)
    for shown, rows in _rows_by_tools(dataset, tools, where):
        of_rows = kwargs if shown is None else kwargs | {"tools": shown}
        renderer = Conversations(tokenizer, of_rows, allow_control_tokens=allow_control_tokens)
        found = renderer.token_ids(
            [conversations[row] for row in rows], lambda place, rows=rows: where(rows[place])
        )
        for row, ids in zip(rows, found):
            token_ids[row] = ids
    return token_ids


def _filtered(dataset: Dataset, token_ids: list[list[int]], most: int) -> RenderedPrompts:
    """The rows whose prompts have at most so many tokens."""
    lengths = [len(ids) for ids in token_ids]
    fitting = [index for index, length in enumerate(lengths) if length <= most]
    if not fitting:
        raise ValueError(
            f"all {len(lengths)} prompts are longer than max_prompt_length={most}: "
            f"{min(lengths)} to {max(lengths)} tokens. Raise data.max_prompt_length to "
            f"{max(lengths)}, or truncate them"
        )
    kept, num_overlong = [token_ids[i] for i in fitting], len(lengths) - len(fitting)
    return RenderedPrompts(dataset.select(fitting), kept, num_overlong)


def _observed(messages: list[Message], text: str) -> list[Message]:
    """The messages with a text appended to the last one of the user."""
    places = [place for place, message in enumerate(messages) if message["role"] == "user"]
    place = places[-1] if places else conversations_lib.last_asked(messages)
    content = Mixed.joined("", [messages[place]["content"], text])
    return [*messages[:place], messages[place] | {"content": content}, *messages[place + 1 :]]


def _rows_by_tools(
    dataset: Dataset, tools: Mapping[str, list] | None, where
) -> list[tuple[list | None, list[int]]]:
    """(the schemas that a prompt shows, the rows that show them); None for no tools."""
    if not tools or "" in tools:
        return [((tools or {}).get(""), list(range(len(dataset))))]
    if "environment" not in dataset.columns:
        raise ValueError(
            "the data has no column 'environment', which says for each row which of the "
            f"environments it is for: {', '.join(tools)}"
        )
    names = [str(name) for name in dataset.columns["environment"]]
    for row, name in enumerate(names):
        if name not in tools:
            raise ValueError(
                f"{where(row)} has the environment {name!r}, and environment.name has "
                f"{', '.join(tools)}"
            )
    return [
        (shown, [row for row, name in enumerate(names) if name == wanted])
        for wanted, shown in tools.items()
        if wanted in names
    ]


def names_in_template(text: str, names: set[str]) -> list[str]:
    """The columns that a prompt template fills in, each as often as it does so."""
    return _Template(text, names).filled_in


def tell_of_unknown_names(template: str, names: Collection[str], source: str) -> None:
    """Warns of each `{word}` in a prompt template that is no column; such braces may be meant.

    Those of LaTeX, as in `\\frac{a}{b}` and `x^{n}`, are not looked at.

    Args:
      names: the columns, and "prompt".
      source: the name of the data.
    """
    found = [match[2] for match in _WORD_IN_BRACES.finditer(template) if not match[1]]
    for word in dict.fromkeys(found):
        if word not in names:
            near = difflib.get_close_matches(word, names, n=1) or sorted(names)
            logging.warning(
                "%s: data.prompt_template has {%s}, which is no column and stays in every prompt "
                "as it is; if a column is meant, write %s",
                source,
                word,
                " or ".join(f"{{{name}}}" for name in near),
            )


def _tell_of_control_tokens(dataset: Dataset, tokenizer: Any, prompt_key: str, where) -> None:
    for index, prompt in enumerate(dataset.column(prompt_key)):
        found = control_token_in(tokenizer, prompt)
        if found:
            logging.warning(
                "%s has the control token %r in its prompt, which is taken as text, there and in "
                "the rows after it; data.allow_control_tokens=true takes it for what it is",
                where(index),
                found,
            )
            return


class _Template:
    """Literal replacement of `{name}`: no format specifications, no attributes, in one pass."""

    def __init__(self, text: str, names: set[str]):
        # The index that a table was written with has no name: `{}` is text.
        alternatives = "|".join(re.escape(name) for name in sorted(names - {""}))
        pattern = re.compile(rf"(\\[A-Za-z]+)?\{{({alternatives})\}}")
        self.filled_in = [match[2] for match in pattern.finditer(text) if not match[1]]
        self.names = set(self.filled_in)
        if not self.names:
            known = ", ".join(f"{{{name}}}" for name in sorted(names))
            raise ValueError(
                f"data.prompt_template {text!r} would make every prompt the same: it must contain "
                f"{{prompt}} or another of {known}"
            )
        self._text, self._pattern = text, pattern

    def fill(self, values: Row) -> Mixed:
        """The template with values in it, which are the data's; the rest is the operator's."""
        parts, start = [], 0
        for match in self._pattern.finditer(self._text):
            if not match[1]:
                parts.append((self._text[start : match.start()], True))
                parts.append((str(values[match[2]]), False))
                start = match.end()
        return Mixed([*parts, (self._text[start:], True)])


def _conversation(
    row: Row, where: str, prompt_key: str, template: _Template, system_prompt: str
) -> list[Message]:
    prompt = row[prompt_key]
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    try:
        messages = conversations_lib.checked(messages)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    asked = conversations_lib.last_asked(messages)
    values = row | {"prompt": messages[asked]["content"]}
    missing = sorted(name for name in template.names if values[name] is None)
    if missing:
        raise ValueError(
            f"{where}: data.prompt_template uses the column {missing[0]!r}, which is null there"
        )
    messages[asked] = messages[asked] | {"content": template.fill(values)}
    for text in texts_in([system_prompt, *messages]):
        refuse_half_characters(text, where)
    if not system_prompt:
        return messages
    if messages[0]["role"] in ("system", "developer"):
        raise ValueError(
            f"{where} brings a system message of its own; set data.system_prompt to '' "
            "to use those of the data"
        )
    return [{"role": "system", "content": Mixed([(system_prompt, True)])}, *messages]


def checked_messages(messages: Any, number: int) -> list[Message]:
    """Messages as templates want them (`conversations.checked`).

    Raises:
      ValueError: for what is no list of messages, naming the row.
    """
    try:
        return conversations_lib.checked(messages)
    except ValueError as error:
        raise ValueError(f"row {number + 1}: {error}") from None


def _plain_token_ids(
    tokenizer: Any, conversations: list[list[Message]], where, allow_control_tokens: bool
) -> list[list[int]]:
    for index, messages in enumerate(conversations):
        keys = {key for message in messages for key in message}
        marked = [message for message in messages if message.get("prefix")]
        if not marked or (marked == messages[-1:] and messages[-1]["role"] == "assistant"):
            keys.discard("prefix")  # nothing follows the last message anyway
        others = sorted(keys - {"role", "content"})
        if others:
            raise ValueError(
                f"{where(index)}: without a chat template there is no place for {others[0]!r} of a "
                "message; remove it, or write it into the content"
            )
    texts = [Mixed.joined("\n\n", [m["content"] for m in messages]) for messages in conversations]
    token_ids = text_token_ids(
        tokenizer, texts, allow_control_tokens=allow_control_tokens, add_special_tokens=True
    )
    # Some tokenizers close every text with an end-of-sequence token; a prompt goes on.
    eos = tokenizer.eos_token_id
    return [
        ids[:-1]
        if ids[-1:] == [eos] and not _ends_with(text, tokenizer.eos_token, allow_control_tokens)
        else ids
        for text, ids in zip(texts, token_ids)
    ]


def _ends_with(text: Mixed, token: str, allow_control_tokens: bool) -> bool:
    """Whether a token at the end of the text was meant."""
    start = len(text) - len(token)
    meant = any(first <= start and last == len(text) for first, last in text.trusted)
    return text.endswith(token) and (allow_control_tokens or meant)
