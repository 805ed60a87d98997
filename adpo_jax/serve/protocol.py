"""What a client may ask for: the bodies of /v1/completions and /v1/chat/completions.

Beyond OpenAI's own: top_k, min_p, min_tokens, ignore_eos, stop_token_ids, skip_special_tokens,
chat_template_kwargs (as in vLLM). Fields of OpenAI's and vLLM's that ask for nothing are taken.
What would change the answer and is not supported is refused, not ignored.
"""

import dataclasses
import json
from typing import Any

from adpo_jax.data.prompts import Message
from adpo_jax.engine.continuous import MAX_ALTERNATIVES
from adpo_jax.engine.sampling import SamplingParams
from adpo_jax.serve import tools as tools_lib
from adpo_jax.serve.fields import ApiError, Fields, shown

MAX_STOP_STRINGS = 16
MAX_STOP_LENGTH = 256  # characters
ROLES = ("system", "developer", "user", "assistant", "tool")
# More tokens than any model has places; what a client writes for "no limit".
ANY_NUMBER = 2**31 - 1

# Said about a request and of no consequence for the answer.
NOTES = (
    "user",
    "metadata",
    "store",
    "service_tier",
    "safety_identifier",
    "prompt_cache_key",
    "prompt_cache_retention",
    "request_id",
    "priority",
)

# Fields that may be there with these values alone, which ask for nothing.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "repetition_penalty": (1,),
    "length_penalty": (1,),
    "logit_bias": ({},),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "verbosity": ("medium",),
    "include_reasoning": (True,),
    "use_beam_search": (False,),
    "early_stopping": (False,),
    "spaces_between_special_tokens": (True,),
    "include_stop_str_in_output": (False,),
    "return_tokens_as_token_ids": (False,),
    "return_token_ids": (False,),
    "bad_words": ([],),
    "logits_processors": ([],),
}
NEUTRAL_IN_COMPLETIONS = {"suffix": ("",), "add_special_tokens": (True,)}
NEUTRAL_IN_CHATS = {
    "echo": (False,),
    "add_special_tokens": (False,),
    "add_generation_prompt": (True,),
    "continue_final_message": (False,),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "documents": ([],),
}


@dataclasses.dataclass(frozen=True)
class Limits:
    """What one request may ask for.

    Attributes:
      max_prompt_length, max_response_length: tokens.
      max_prompt_characters: the longest text that is tokenised; None for 16 times the tokens.
      max_choices: completions of a request, over all its prompts.
      max_log_probs: log-probs of all tokens of these, the likeliest beside each included.
      max_model_length: tokens of a prompt and its completion together; None for the sum of the
        limits of both.
    """

    max_prompt_length: int
    max_response_length: int
    max_prompt_characters: int | None = None
    max_choices: int = 128
    max_log_probs: int = 1 << 20
    max_model_length: int | None = None

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt and completion together."""
        return self.max_model_length or self.max_prompt_length + self.max_response_length

    def check_log_probs(self, request: "CompletionRequest", field: str) -> None:
        """Refuses an answer whose log-probs would take much memory and long to write down.

        Args:
          field: what asks for the likeliest tokens.

        Raises:
          ApiError: for more log-probs than the limit.
        """
        if not request.logprobs or not request.samples:
            return
        tokens = len(request.prompts) * request.sampling.n * request.sampling.max_tokens
        count = tokens * (1 + request.top_logprobs)
        if count > self.max_log_probs:
            raise ApiError(
                f"n x prompts x max_tokens x (1 + {field}) is {count} log-probs; this server gives "
                f"up to {self.max_log_probs} in an answer: ask for fewer at once",
                param=field,
            )

    def check_characters(self, count: int, field: str) -> None:
        """Refuses a text too long to be worth the tokenizer's time.

        Raises:
          ApiError: for more characters than the limit.
        """
        most = self.max_prompt_characters
        most = 16 * self.max_prompt_length if most is None else most
        if count > most:
            raise ApiError(
                f"the prompt has {count} characters; this server takes up to {most}, and up to "
                f"{self.max_prompt_length} tokens: shorten the prompt",
                param=field,
                code="context_length_exceeded",
            )


@dataclasses.dataclass(frozen=True)
class CompletionRequest:
    """A request whose fields are known to be good.

    Attributes:
      prompts: texts or lists of token ids; of a chat, one list of messages.
      sampling: without the model's stop tokens.
      samples: whether anything is sampled; a request with `max_tokens` 0 asks about its prompt.
      echo: whether the answer begins with the prompt.
      seed: None for any.
      logprobs: whether log-probs are wanted.
      top_logprobs: likeliest tokens beside each one.
      skip_special_tokens: whether the text leaves special tokens out.
      tools: functions that the model may call, as OpenAI has them.
      parallel_tool_calls: whether it may call more than one.
    """

    chat: bool
    prompts: list[str | list[int] | list[Message]]
    sampling: SamplingParams
    samples: bool
    echo: bool
    seed: int | None
    logprobs: bool
    top_logprobs: int
    stream: bool
    include_usage: bool
    skip_special_tokens: bool
    chat_template_kwargs: dict[str, Any]
    tools: list[dict[str, Any]]
    parallel_tool_calls: bool

    @property
    def prompt_field(self) -> str:
        """The field that has the prompt."""
        return "messages" if self.chat else "prompt"

    @property
    def prompt_alternatives(self) -> int | None:
        """Likeliest tokens beside each token of the prompt; None where it is not scored."""
        return self.top_logprobs if self.echo and self.logprobs else None


def parse(body: dict[str, Any], *, chat: bool, model: str, limits: Limits) -> CompletionRequest:
    """A request from its body.

    Raises:
      ApiError: for anything in it that cannot be done.
    """
    fields = Fields(body)
    check_model(fields, model)
    prompts = [_messages(fields)] if chat else _prompts(fields)
    sampling, samples = sampling_of(fields, limits, may_be_empty=not chat)
    if len(prompts) * sampling.n > limits.max_choices:
        raise ApiError(
            f"n x prompts is at most {limits.max_choices}; given {sampling.n} x {len(prompts)}",
            param="n",
        )
    logprobs, top_logprobs = _logprobs(fields, chat)
    request = CompletionRequest(
        chat=chat,
        prompts=prompts,
        sampling=sampling,
        samples=samples,
        echo=not chat and fields.boolean("echo"),
        seed=fields.integer("seed", None, -(2**63), 2**63 - 1),
        logprobs=logprobs,
        top_logprobs=top_logprobs,
        stream=fields.boolean("stream"),
        include_usage=wants_usage(fields),
        skip_special_tokens=fields.boolean("skip_special_tokens", True),
        chat_template_kwargs=_template_kwargs(fields) if chat else {},
        tools=tools_lib.parse_tools(fields) if chat else [],
        parallel_tool_calls=fields.boolean("parallel_tool_calls", True),
    )
    if chat and prompts[0][-1]["role"] == "assistant" and prompts[0][-1]["content"]:
        _check_continuation(fields)
    _refuse_the_rest(fields, sampling.n, chat=chat)
    limits.check_log_probs(request, "top_logprobs" if chat else "logprobs")
    if chat:
        values = [value for message in prompts[0] for value in message.values()]
        values += [*request.chat_template_kwargs.values(), *request.tools]
        limits.check_characters(sum(len(str(value)) for value in values), "messages")
    else:
        for prompt in prompts:
            if isinstance(prompt, str):
                limits.check_characters(len(prompt), "prompt")
    return request


def check_model(fields: Fields, model: str) -> None:
    """Takes the name of the model.

    Raises:
      ApiError: where it is another one.
    """
    asked_for = fields.checked("model", model, "a string", lambda value: type(value) is str)
    if asked_for != model:
        raise ApiError(
            f"the model {shown(asked_for)} is not served here; this is {model!r}",
            status=404,
            param="model",
            code="model_not_found",
        )


def sampling_of(
    fields: Fields, limits: Limits, *, may_be_empty: bool
) -> tuple[SamplingParams, bool]:
    """The settings of the samples, and whether there are any.

    What is asked for above the room is cut to it, and the completion ends with "length".

    Args:
      may_be_empty: whether `max_tokens` may be 0, and is small where it is left out.
    """
    most = limits.max_response_length
    default, least = (min(16, most), 0) if may_be_empty else (most, 1)
    asked = fields.integer("max_tokens", default, least, ANY_NUMBER)
    asked = fields.integer("max_completion_tokens", asked, least, ANY_NUMBER)
    max_tokens = max(min(asked, most), 1)
    min_tokens = fields.integer("min_tokens", 0, 0, asked)
    temperature = fields.number("temperature", 1.0, 0, 100)
    top_k = fields.integer("top_k", -1, -1, 2**31 - 1)
    top_p = fields.number("top_p", 1.0, 0, 1)
    stop = fields.checked("stop", (), _STOP, _is_stop)
    ids = fields.checked("stop_token_ids", (), "up to 16 token ids", _is_token_ids)
    sampling = SamplingParams(
        n=fields.integer("n", 1, 1, limits.max_choices),
        temperature=temperature,
        top_k=top_k or -1,
        # The likeliest token alone, where OpenAI's own servers take 0 too.
        top_p=max(top_p, 1e-6),
        min_p=fields.number("min_p", 0.0, 0, 1),
        max_tokens=max_tokens,
        min_tokens=min(min_tokens, max_tokens),
        stop=(stop,) if isinstance(stop, str) else tuple(stop),
        stop_token_ids=tuple(ids),
        ignore_eos=fields.boolean("ignore_eos"),
    )
    return sampling, asked > 0


_STOP = f"a string or up to {MAX_STOP_STRINGS}, of 1 to {MAX_STOP_LENGTH} characters each"


def _is_stop(value: Any) -> bool:
    strings = [value] if isinstance(value, str) else value
    return (
        isinstance(strings, list)
        and len(strings) <= MAX_STOP_STRINGS
        and all(isinstance(s, str) and 1 <= len(s) <= MAX_STOP_LENGTH for s in strings)
    )


def _is_token_ids(value: Any) -> bool:
    ids = isinstance(value, list) and len(value) <= 16
    return ids and all(type(i) is int and 0 <= i < 2**31 for i in value)


def _logprobs(fields: Fields, chat: bool) -> tuple[bool, int]:
    """Whether log-probs are wanted, and how many of the likeliest beside each."""
    if chat:
        logprobs = fields.boolean("logprobs")
        top = fields.integer("top_logprobs", 0, 0, MAX_ALTERNATIVES)
        if top and not logprobs:
            raise ApiError("top_logprobs needs logprobs to be true", param="top_logprobs")
        return logprobs, top
    top = fields.integer("logprobs", None, 0, MAX_ALTERNATIVES)
    return top is not None, top or 0


def wants_usage(fields: Fields) -> bool:
    """Whether a stream ends with the numbers of tokens."""
    options = fields.checked("stream_options", {}, "an object", lambda value: type(value) is dict)
    options = Fields(options)
    include_usage = options.boolean("include_usage")
    options.boolean("include_obfuscation")  # padding against eavesdroppers, which is never added
    options.without_effect("continuous_usage_stats", False)
    options.finish()
    return include_usage


def _template_kwargs(fields: Fields) -> dict[str, Any]:
    def holds(value):
        scalars = (str, bool, int, float)
        return type(value) is dict and all(type(v) in scalars for v in value.values())

    wanted = "an object of texts, numbers, true and false"
    return fields.checked("chat_template_kwargs", {}, wanted, holds)


def _refuse_the_rest(fields: Fields, n: int, *, chat: bool) -> None:
    for name in NOTES:
        fields.take(name)
    fields.without_effect("best_of", 1, n)
    for name, values in (NEUTRAL | (NEUTRAL_IN_CHATS if chat else NEUTRAL_IN_COMPLETIONS)).items():
        fields.without_effect(name, *values)
    fields.finish()


def _check_continuation(fields: Fields) -> None:
    """Refuses to begin a message behind one of the assistant's, which is continued."""
    for name, wanted in (("continue_final_message", True), ("add_generation_prompt", False)):
        if fields.boolean(name, wanted) != wanted:
            raise ApiError(
                f"the last message is the assistant's, and this server continues it: leave {name} "
                f"out, or send {json.dumps(wanted)}",
                param=name,
                code="unsupported_parameter",
            )


def _prompts(fields: Fields) -> list[str | list[int]]:
    """The prompt of a completion: text, texts, token ids, or lists of them."""
    prompt = fields.take("prompt")
    wanted = "prompt must be text, a list of texts, token ids, or a list of lists of token ids"
    if isinstance(prompt, str):
        return [prompt]
    if not isinstance(prompt, list) or not prompt:
        raise ApiError(f"{wanted}; given {shown(prompt)}", param="prompt")
    if all(type(i) is int for i in prompt):
        return [prompt]
    if all(isinstance(text, str) for text in prompt):
        return prompt
    if all(isinstance(ids, list) and all(type(i) is int for i in ids) for ids in prompt):
        return prompt
    raise ApiError(f"{wanted}; given {shown(prompt)}", param="prompt")


def _messages(fields: Fields) -> list[Message]:
    messages = fields.take("messages")
    if not isinstance(messages, list) or not messages:
        raise ApiError(
            f"messages must be a list of at least one message; given {shown(messages)}",
            param="messages",
        )
    checked = [_message(message, number) for number, message in enumerate(messages)]
    # What the chat template has no place for is refused where it is rendered, and not dropped here.
    return [tools_lib.given(told) | message for told, message in zip(messages, checked)]


def _message(message: Any, number: int) -> Message:
    where = f"messages[{number}]"
    if not isinstance(message, dict) or message.get("role") not in ROLES:
        raise ApiError(f"{where} must be an object with a role of {list(ROLES)}", param="messages")
    role, content = message["role"], message.get("content")
    made: Message = {"role": role}
    if role == "assistant" and message.get("tool_calls"):
        made["tool_calls"] = tools_lib.parse_calls(message["tool_calls"], where)
        content = "" if content is None else content
    if isinstance(content, list):
        content = "".join(_text_part(part, where) for part in content)
    if not isinstance(content, str):
        raise ApiError(f"{where}.content must be text or a list of text parts", param="messages")
    made["content"] = content
    for name in ("name", "tool_call_id"):
        if message.get(name) is not None:
            made[name] = tools_lib.checked_name(message[name], f"{where}.{name}")
    return made


def _text_part(part: Any, where: str) -> str:
    is_text = isinstance(part, dict) and part.get("type") == "text"
    if not is_text or not isinstance(part.get("text"), str):
        raise ApiError(f"{where}.content holds a part that is no text", param="messages")
    return part["text"]
