"""Rows of a data set as tokenised prompts: template, system prompt, chat template, length limit."""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from adpo_jax.data import templates
from adpo_jax.data.files import Dataset, Row

# Arguments of apply_chat_template that the user may not give.
_RESERVED = {"conversation", "tokenize", "add_generation_prompt", "return_dict", "return_tensors"}

_ROLES = ("system", "developer", "user", "assistant", "tool")

Message = dict[str, Any]


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
) -> RenderedPrompts:
    """Tokenises every prompt of a data set.

    Args:
      dataset: its prompts are text, or lists of messages {"role": ..., "content": text}.
      tokenizer: a Hugging Face tokenizer.
      prompt_key: the column of prompts.
      prompt_template: `{prompt}` and `{any column}` in it are replaced, and nothing else: other
        braces stay, as do those after a LaTeX command, so that `\\boxed{answer}` does not print the
        answer. With chat messages it wraps the last of them.
      system_prompt: a system message before each prompt, "" for none.
      apply_chat_template: use the tokenizer's chat template where it has one; otherwise the prompt
        is plain text, the system prompt before it with an empty line between.
      chat_template_kwargs: further arguments of the chat template, e.g. {"enable_thinking": False}.
      max_prompt_length: tokens.
      overlong: "filter" leaves longer prompts out; "truncate" keeps their last `max_prompt_length`
        tokens (the end holds the question and the generation prompt; the system prompt goes first).

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
    conversations = [
        _conversation(dataset.row(index), index, prompt_key, template, system_prompt)
        for index in range(len(dataset))
    ]
    if apply_chat_template and getattr(tokenizer, "chat_template", None):
        token_ids = _chat_token_ids(tokenizer, conversations, dict(chat_template_kwargs or {}))
    else:
        token_ids = _plain_token_ids(tokenizer, conversations)
    for index, ids in enumerate(token_ids):
        if not ids:
            raise ValueError(f"the prompt of row {index} is empty: it has no tokens")

    lengths = [len(ids) for ids in token_ids]
    fitting = [index for index, length in enumerate(lengths) if length <= max_prompt_length]
    num_overlong = len(lengths) - len(fitting)
    if overlong == "truncate":
        kept = [ids[-max_prompt_length:] for ids in token_ids]
        return RenderedPrompts(dataset, kept, num_overlong)
    if not fitting:
        raise ValueError(
            f"all {len(lengths)} prompts are longer than max_prompt_length={max_prompt_length}: "
            f"{min(lengths)} to {max(lengths)} tokens. Raise data.max_prompt_length to "
            f"{max(lengths)}, or truncate them"
        )
    return RenderedPrompts(dataset.select(fitting), [token_ids[i] for i in fitting], num_overlong)


class _Template:
    """Literal replacement of `{name}`: no format specifications, no attributes, in one pass."""

    def __init__(self, text: str, names: set[str]):
        alternatives = "|".join(re.escape(name) for name in sorted(names))
        pattern = re.compile(rf"(\\[A-Za-z]+)?\{{({alternatives})\}}")
        self.names = {match[2] for match in pattern.finditer(text) if not match[1]}
        if not self.names:
            known = ", ".join(f"{{{name}}}" for name in sorted(names))
            raise ValueError(
                f"the prompt template {text!r} would make every prompt the same: it must contain "
                f"{{prompt}} or another of {known}"
            )
        self._text, self._pattern = text, pattern

    def fill(self, values: Row) -> str:
        return self._pattern.sub(
            lambda match: match[0] if match[1] else str(values[match[2]]), self._text
        )


def _conversation(
    row: Row, index: int, prompt_key: str, template: _Template, system_prompt: str
) -> list[Message]:
    prompt = row[prompt_key]
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    _check_messages(messages, index)
    values = row | {"prompt": messages[-1]["content"]}
    missing = sorted(name for name in template.names if values[name] is None)
    if missing:
        raise ValueError(
            f"row {index}: the prompt template uses the column {missing[0]!r}, which is null there"
        )
    messages = [*messages[:-1], messages[-1] | {"content": template.fill(values)}]
    if not system_prompt:
        return messages
    if messages[0]["role"] == "system":
        raise ValueError(
            f"row {index} brings a system message of its own; set data.system_prompt to '' "
            "to use those of the data"
        )
    return [{"role": "system", "content": system_prompt}, *messages]


def _check_messages(messages: Any, index: int) -> None:
    well_formed = isinstance(messages, list) and messages
    for message in messages if well_formed else ():
        well_formed = (
            well_formed
            and isinstance(message, dict)
            and message.get("role") in _ROLES
            and isinstance(message.get("content"), str)
        )
    if not well_formed:
        raise ValueError(
            f"row {index}: a prompt must be text or a list of messages "
            f'{{"role": {"|".join(_ROLES)}, "content": text}}, got {str(messages)[:200]}'
        )


def _chat_token_ids(
    tokenizer: Any, conversations: list[list[Message]], kwargs: dict[str, Any]
) -> list[list[int]]:
    reserved = sorted(_RESERVED & kwargs.keys())
    if reserved:
        raise ValueError(f"data.chat_template_kwargs cannot set {', '.join(reserved)}")
    try:
        texts = templates.chat_texts(tokenizer, conversations, add_generation_prompt=True, **kwargs)
    except templates.TemplateError as error:
        raise ValueError(
            f"the tokenizer's chat template refuses these prompts: {error}. Some have no system "
            "role (set data.system_prompt to ''); data.apply_chat_template=False does without it"
        ) from error
    return tokenizer(texts, add_special_tokens=False)["input_ids"]


def _plain_token_ids(tokenizer: Any, conversations: list[list[Message]]) -> list[list[int]]:
    texts = ["\n\n".join(message["content"] for message in messages) for messages in conversations]
    token_ids = tokenizer(texts)["input_ids"]
    # Some tokenizers close every text with an end-of-sequence token; a prompt goes on.
    eos = tokenizer.eos_token_id
    return [
        ids[:-1] if ids[-1:] == [eos] and not text.endswith(tokenizer.eos_token) else ids
        for text, ids in zip(texts, token_ids)
    ]
