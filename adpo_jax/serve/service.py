"""From a request to its choices: prompts to token ids, samples to the decoding thread."""

import asyncio
import contextlib
import dataclasses
import inspect
import secrets
import sys
from collections.abc import AsyncIterator

from adpo_jax.data.conversations import control_token_in
from adpo_jax.data.prompts import Message
from adpo_jax.engine.continuous import NewTokens, Sample
from adpo_jax.pretrained import Pretrained, PromptFormat
from adpo_jax.serve.answers import Choice
from adpo_jax.serve.decoding import Decoding, DecodingFailed
from adpo_jax.serve.fields import ApiError
from adpo_jax.serve.protocol import CompletionRequest, Limits


class Service:
    """Answers requests with one model.

    Args:
      model: its parameters are not used here.
      decoding: what samples from them.
    """

    def __init__(self, model: Pretrained, decoding: Decoding, limits: Limits):
        self.model, self.decoding, self.limits = model, decoding, limits

    async def tokenized(self, request: CompletionRequest) -> list[list[int]]:
        """The prompts as token ids.

        Raises:
          ApiError: for prompts that are empty, too long, or that the chat template refuses.
        """
        # A long text takes the tokenizer a while; others' tokens go out meanwhile.
        try:
            prompts = await asyncio.to_thread(self._tokenize, request)
        except (ValueError, TypeError, RecursionError) as error:
            raise ApiError(str(error)[:500], param=_prompt_field(request)) from None
        longest = max(len(prompt) for prompt in prompts)
        if longest > self.limits.max_prompt_length:
            raise ApiError(
                f"the prompt has {longest} tokens; this server takes up to "
                f"{self.limits.max_prompt_length}",
                param=_prompt_field(request),
                code="context_length_exceeded",
            )
        return prompts

    def _tokenize(self, request: CompletionRequest) -> list[list[int]]:
        if request.chat:
            return [self._chat_prompt(request)]
        return [
            prompt if isinstance(prompt, list) else self._text_prompt(prompt)
            for prompt in request.prompts
        ]

    def _chat_prompt(self, request: CompletionRequest) -> list[int]:
        if not self.model.tokenizer.chat_template:
            raise ValueError("this model has no chat template; use /v1/completions")
        # A template of the client's own, above all, would be a program of the client's own.
        own = inspect.signature(self.model.tokenizer.apply_chat_template).parameters
        taken = sorted(own.keys() & request.chat_template_kwargs.keys())
        if taken:
            raise ValueError(f"chat_template_kwargs cannot set {', '.join(taken)}")
        found = control_token_in(self.model.tokenizer, request.chat_template_kwargs)
        if found and not self.model.prompt_format.allow_control_tokens:
            raise ValueError(f"chat_template_kwargs cannot hold the control token {found!r}")
        kwargs = self.model.prompt_format.chat_template_kwargs | request.chat_template_kwargs
        return self._rendered(request.prompts[0], PromptFormat(chat_template_kwargs=kwargs))

    def _text_prompt(self, text: str) -> list[int]:
        return self._rendered(text, PromptFormat(apply_chat_template=False))

    def _rendered(self, prompt: str | list[Message], prompt_format: PromptFormat) -> list[int]:
        prompt_format = dataclasses.replace(
            prompt_format, allow_control_tokens=self.model.prompt_format.allow_control_tokens
        )
        try:
            prompts = self.model.prompts(
                [prompt], max_length=sys.maxsize, prompt_format=prompt_format
            )
        except ValueError as error:
            raise ValueError(str(error).removeprefix("row 0: ")) from error
        return prompts[0]

    @contextlib.asynccontextmanager
    async def choices(self, request: CompletionRequest, prompts: list[list[int]]):
        """The choices of a request, and their new tokens as they come.

        Yields ([choices], async iterator of (choice, new text, new log-probs)). Whatever has not
        ended when the context does is cancelled.

        Raises:
          ApiError: for prompts that cannot be sampled from, or when decoding has failed.
        """
        queue: asyncio.Queue[NewTokens | DecodingFailed] = asyncio.Queue()
        choice_of: dict[Sample, Choice] = {}
        try:
            for prompt in prompts:
                for sample in self._submit(request, prompt, queue):
                    choice = Choice(len(choice_of), request, self._decode)
                    choice_of[sample] = choice
            yield list(choice_of.values()), self._news(queue, choice_of)
        finally:
            for sample in choice_of:
                self.decoding.cancel(sample)

    def _submit(self, request: CompletionRequest, prompt: list[int], queue) -> list[Sample]:
        ids = (*self.model.stop_token_ids, *request.sampling.stop_token_ids)
        sampling = dataclasses.replace(request.sampling, stop_token_ids=ids)
        seed = secrets.randbits(32) if request.seed is None else request.seed
        try:
            return self.decoding.submit(
                prompt, sampling, seed=seed, num_alternatives=request.top_logprobs, queue=queue
            )
        except ValueError as error:
            raise ApiError(str(error), param=_prompt_field(request)) from None
        except DecodingFailed:
            raise _failed() from None

    async def _news(self, queue, choice_of) -> AsyncIterator[tuple[Choice, str, list[dict]]]:
        left = len(choice_of)
        while left:
            new = await queue.get()
            if isinstance(new, DecodingFailed):
                raise _failed()
            choice = choice_of[new.sample]
            if choice.finish_reason:
                continue  # sampled beyond a stop string
            text, scored = choice.push(new)
            if choice.finish_reason:
                left -= 1
                self.decoding.cancel(new.sample)
            yield choice, text, scored

    def _decode(self, tokens: list[int]) -> str:
        return self.model.tokenizer.decode(tokens, skip_special_tokens=True)


def _failed() -> ApiError:
    return ApiError("the server has failed and is going down", status=500, kind="server_error")


def _prompt_field(request: CompletionRequest) -> str:
    return "messages" if request.chat else "prompt"
