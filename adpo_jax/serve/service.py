"""From a request to its choices: prompts to token ids, samples to the decoding thread.

And from a folder of new weights to the weights that it decodes with.
"""

import asyncio
import contextlib
import dataclasses
import functools
import inspect
import secrets
import sys
from collections.abc import AsyncIterator, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from absl import logging

from adpo_jax.data.control_tokens import control_token_in
from adpo_jax.data.prompts import Message, PromptFormat, prompts_of_texts
from adpo_jax.engine import scoring
from adpo_jax.engine.requests import NewTokens, Sample
from adpo_jax.engine.text_stream import end_of_prompt
from adpo_jax.environments import calls
from adpo_jax.serve.access import Client
from adpo_jax.serve.answers import Answer, Choice, Piece, TokenTexts
from adpo_jax.serve.decoding import Decoding, DecodingFailed, Pause
from adpo_jax.serve.fields import ApiError
from adpo_jax.serve.metrics import Metrics
from adpo_jax.serve.protocol import CompletionRequest, Limits
from adpo_jax.serve.tokens import TokensAnswer, TokensChoice, TokensRequest
from adpo_jax.serve.weights import WeightsRoot

# Threads for templates and tokenizers. One client keeps one of them busy at most.
TOKENIZER_THREADS = 4
# Log-probs of one answer's echoed prompts: each token has its own and those of the likeliest.
MAX_ECHOED = 1 << 17
# Tokens of a mark of thoughts and of the space behind it, where each character is one.
_LONGEST_MARK = 32


@dataclasses.dataclass(frozen=True)
class Language:
    """What requests need to know of a model beside its parameters.

    Attributes:
      vocab_size: token ids are below this.
      stop_token_ids: the tokens that end a completion.
      prompt_format: how messages and text become a prompt.
    """

    tokenizer: Any
    vocab_size: int
    stop_token_ids: tuple[int, ...]
    prompt_format: PromptFormat


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A prompt that is ready to be sampled from.

    Attributes:
      tokens: its ids.
      echo: what the answer begins with; None for nothing.
      scored: the log-probs of the tokens; None where nobody wants them.
    """

    tokens: list[int]
    echo: Piece | None = None
    scored: scoring.ScoredPrompt | None = None


class Service:
    """Answers requests with one model.

    Args:
      language: what is known of the model here.
      decoding: what samples from it.
      weights_root: where new weights may lie; None for no new weights.
      returns: further fields of `SamplingParams`, by which every completion has more beside its
        tokens.
    """

    def __init__(
        self,
        language: Language,
        decoding: Decoding,
        limits: Limits,
        metrics: Metrics,
        weights_root: WeightsRoot | None = None,
        returns: Mapping[str, bool] | None = None,
    ):
        self.language, self.decoding, self.limits = language, decoding, limits
        self.metrics, self.weights_root = metrics, weights_root
        self._returns = dict(returns or {})
        self._updating = False
        self._token_texts = TokenTexts(self.language.tokenizer)
        self._tokenizing = ThreadPoolExecutor(TOKENIZER_THREADS, "tokenizing")
        # One thread: what is scored shares the device with what decodes.
        self._scoring = ThreadPoolExecutor(1, "scoring")

    def close(self) -> None:
        """Ends the threads; nothing is answered any more."""
        self.decoding.stop()
        for threads in (self._tokenizing, self._scoring):
            threads.shutdown()

    async def prepared(self, request: CompletionRequest, client: Client) -> list[Prompt]:
        """The prompts as token ids, and scored where the request asks for that.

        The work is done in threads beside the event loop and the decoding thread, so that others'
        tokens go out meanwhile.

        Raises:
          ApiError: for prompts that are empty, too long, or that the chat template refuses.
        """
        async with client.turn:
            prompts = await self._in(self._tokenizing, self._tokenize, request)
            if request.prompt_alternatives is not None:
                return await self._scored(request, prompts)
        return prompts

    async def _in(self, threads: ThreadPoolExecutor, function: Callable, *args) -> Any:
        """The result of a function in a thread."""
        work = asyncio.get_running_loop().run_in_executor(threads, function, *args)
        try:
            return await asyncio.shield(work)
        except asyncio.CancelledError:
            # The client has gone, but its turn ends with the work.
            await asyncio.wait([work])
            raise

    # --- prompts as token ids

    def _tokenize(self, request: CompletionRequest) -> list[Prompt]:
        try:
            tokens = [self._tokens(request, prompt) for prompt in request.prompts]
        except (ValueError, TypeError, RecursionError) as error:
            raise ApiError(str(error)[:500], param=request.prompt_field) from None
        longest = max(len(prompt) for prompt in tokens)
        if longest > self.limits.max_prompt_length:
            raise ApiError(
                f"the prompt has {longest} tokens; this server takes up to "
                f"{self.limits.max_prompt_length}",
                param=request.prompt_field,
                code="context_length_exceeded",
            )
        self._check_ids(tokens, request.prompt_field)
        if not request.echo:
            return [Prompt(prompt) for prompt in tokens]
        return [
            Prompt(ids, Piece(self._text_of(given, request), [], []))
            for ids, given in zip(tokens, request.prompts)
        ]

    def _tokens(self, request: CompletionRequest, prompt) -> list[int]:
        if request.chat:
            return self._chat_prompt(request, prompt)
        if isinstance(prompt, str):
            return self._rendered(prompt, PromptFormat(apply_chat_template=False))
        if not prompt:
            raise ValueError("the prompt is empty: it has no tokens")
        return prompt

    def _check_ids(self, prompts: list[list[int]], field: str) -> None:
        V = self.language.vocab_size
        for prompt in prompts:
            if not all(0 <= token < V for token in prompt):
                raise ApiError(f"the prompt has token ids outside [0, {V})", param=field)

    def _text_of(self, prompt: str | list[int], request: CompletionRequest) -> str:
        """A prompt as it is echoed: text as it was sent, token ids as their text."""
        return prompt if isinstance(prompt, str) else self._decoder(request)(prompt)

    def _chat_prompt(self, request: CompletionRequest, messages: list[Message]) -> list[int]:
        if not self.language.tokenizer.chat_template:
            raise ValueError("this model has no chat template; use /v1/completions")
        # A template of the client's own, above all, would be a program of the client's own.
        own = inspect.signature(self.language.tokenizer.apply_chat_template).parameters
        taken = sorted(own.keys() & request.chat_template_kwargs.keys())
        if taken:
            raise ValueError(f"chat_template_kwargs cannot set {', '.join(taken)}")
        found = control_token_in(self.language.tokenizer, request.chat_template_kwargs)
        if found and not self.language.prompt_format.allow_control_tokens:
            raise ValueError(f"chat_template_kwargs cannot hold the control token {found!r}")
        kwargs = self.language.prompt_format.chat_template_kwargs | request.chat_template_kwargs
        if request.tools:
            self.tool_form(request)
            kwargs |= {"tools": request.tools}
        return self._rendered(messages, PromptFormat(chat_template_kwargs=kwargs))

    def _rendered(self, prompt: str | list[Message], prompt_format: PromptFormat) -> list[int]:
        prompt_format = dataclasses.replace(
            prompt_format, allow_control_tokens=self.language.prompt_format.allow_control_tokens
        )
        try:
            prompts = prompts_of_texts(
                [prompt], self.language.tokenizer, prompt_format, max_length=sys.maxsize
            )
        except ValueError as error:
            raise ValueError(str(error).removeprefix("prompt 1: ")) from error
        return prompts[0]

    def tool_form(self, request: CompletionRequest) -> calls.Form:
        """The form in which this model writes calls of tools.

        Raises:
          ApiError: where its chat template has no place for tools, or teaches another form.
        """
        template = self.language.tokenizer.get_chat_template(tools=request.tools)
        form = calls.form_of(template)
        if form is None:
            raise ApiError(
                "this model's chat template has no tools, or has calls in a form that this server "
                "does not know: leave tools out",
                param="tools",
                code="unsupported_parameter",
            )
        return form

    # --- scored prompts

    async def _scored(self, request: CompletionRequest, prompts: list[Prompt]) -> list[Prompt]:
        """The prompts with the log-probs of their tokens, all under the same weights."""
        alternatives = request.prompt_alternatives
        count = sum(len(prompt.tokens) for prompt in prompts) * (1 + alternatives)
        if count > MAX_ECHOED:
            by, field = "echo with logprobs", "logprobs"
            if not request.echo:
                by = field = "prompt_logprobs"
            raise ApiError(
                f"{by} asks for {count} log-probs (tokens x (1 + {field})); this server gives up "
                f"to {MAX_ECHOED} in an answer: send fewer prompts at once",
                param=field,
            )
        batches, size = [[]], 0
        for prompt in prompts:
            if size >= scoring.CALL_TOKENS:
                batches, size = [*batches, []], 0
            batches[-1].append(prompt)
            size += len(prompt.tokens)
        made = []
        try:
            async with self.decoding.scoring():
                # Others' prompts have their turn between the batches.
                for batch in batches:
                    made += await self._in(self._scoring, self._score, batch, alternatives)
        except DecodingFailed:
            raise failed() from None
        return made

    def _score(self, prompts: list[Prompt], top_logprobs: int) -> list[Prompt]:
        arrays = [np.array(prompt.tokens, np.int32) for prompt in prompts]
        scorer, made = self.decoding.batch.scorer, []
        for prompt, scored in zip(prompts, scorer.score(arrays, top_logprobs)):
            echo = prompt.echo
            if echo is not None:
                echo = echo._replace(scored=self._token_texts.of_prompt(prompt.tokens, scored))
            made.append(dataclasses.replace(prompt, echo=echo, scored=scored))
        return made

    # --- weights

    async def update_weights(self, folder: str, version: int | None) -> int:
        """Goes on with the weights of a folder, and returns their version.

        Args:
          folder: a folder inside the root that was allowed.
          version: their number; None for one more than the present one.

        Raises:
          ApiError: for weights that cannot be used, after which the present ones stay.
        """
        if self._updating:
            raise ApiError("another update of the weights is under way", status=409)
        present = self.decoding.batch.version
        version = present + 1 if version is None else version
        if version == present:
            raise ApiError(f"version {version} is the present one", param="version")
        self._updating = True
        try:
            try:
                params = await asyncio.to_thread(self.weights_root.read, folder)
            except ValueError as error:
                raise ApiError(str(error)[:500], param="weight_dir") from None
            except Exception:
                # Whatever a folder holds, the server goes on with what it has.
                logging.exception("new weights were not read")
                raise ApiError(
                    "weight_dir: the folder cannot be read", param="weight_dir"
                ) from None
            await self.decoding.exchange(params, version)
        except DecodingFailed:
            raise failed() from None
        finally:
            self._updating = False
        return version

    async def pause(self, how: Pause) -> None:
        """See `Decoding.pause`."""
        try:
            await self.decoding.pause(how)
        except DecodingFailed:
            raise failed() from None

    # --- completions

    def answer(self, request: CompletionRequest, model: str, prompts: list[Prompt]):
        """The form of the answer to a request."""
        if isinstance(request, TokensRequest):
            (prompt,) = prompts
            return TokensAnswer(request, model, prompt.tokens, prompt.scored, self._token_texts)
        return Answer(request, model, sum(len(prompt.tokens) for prompt in prompts))

    @contextlib.asynccontextmanager
    async def choices(
        self, request: CompletionRequest, prompts: list[Prompt], client: Client, arrived: float
    ):
        """The choices of a request, and their new tokens as they come.

        Yields ([choices], async iterator of (choice, its new piece)). Whatever has not ended when
        the context does is cancelled.

        Args:
          arrived: when the request came, by `time.perf_counter`.

        Raises:
          ApiError: for prompts that cannot be sampled from, or when decoding has failed.
        """
        queue: asyncio.Queue[NewTokens | DecodingFailed] = asyncio.Queue()
        choices: list[Choice | TokensChoice] = []
        choice_of: dict[Sample, Choice | TokensChoice] = {}
        self.metrics.began(sum(len(prompt.tokens) for prompt in prompts))
        try:
            for prompt in prompts:
                made = [
                    self._choice(len(choices) + i, request, prompt)
                    for i in range(request.sampling.n)
                ]
                choices += made
                if request.samples:
                    samples = self._submit(request, prompt, queue, client)
                    choice_of |= zip(samples, made)
            timings = {sample: self.metrics.timing(arrived) for sample in choice_of}
            yield choices, self._news(queue, choice_of, timings)
        finally:
            for sample in choice_of:
                self.decoding.cancel(sample)

    def _choice(self, index: int, request: CompletionRequest, prompt: Prompt):
        version = self.decoding.batch.version
        if isinstance(request, TokensRequest):
            decode = self._decoder(request)
            before = end_of_prompt(decode, prompt.tokens)
            return TokensChoice(index, request, version, decode, before)
        parser, continued = None, _continued(request)
        if request.tools:
            form, parallel = self.tool_form(request), request.parallel_tool_calls
            rendered = self.language.tokenizer.decode(prompt.tokens[-_LONGEST_MARK:])
            thought = calls.begun_thought(form, rendered, continued)
            parser = calls.CallParser(form, request.tools, parallel, thought)
        decode, scored_by = self._decoder(request), None
        if prompt.scored is not None:
            scored_by = prompt.scored.version
            version = version if request.samples else scored_by
        follows = continued or not request.chat
        before = end_of_prompt(decode, prompt.tokens) if follows else []
        beside = parser, prompt.echo, before, scored_by
        return Choice(index, request, version, decode, self._token_texts, *beside)

    def _submit(
        self, request: CompletionRequest, prompt: Prompt, queue: asyncio.Queue, client: Client
    ) -> list[Sample]:
        ids = request.sampling.stop_token_ids  # these end a completion that ignores the model's own
        if not request.sampling.ignore_eos:
            ids = (*self.language.stop_token_ids, *ids)
        room = self.limits.longest - len(prompt.tokens)
        sampling = dataclasses.replace(
            request.sampling,
            stop_token_ids=ids,
            ignore_eos=False,
            max_tokens=min(request.sampling.max_tokens, room),
            min_tokens=min(request.sampling.min_tokens, room),
            **self._returns,
        )
        seed = secrets.randbits(32) if request.seed is None else request.seed
        try:
            return self.decoding.submit(
                prompt.tokens,
                sampling,
                seed=seed,
                num_alternatives=request.top_logprobs,
                queue=queue,
                client=client.key,
            )
        except ValueError as error:
            raise ApiError(str(error), param=request.prompt_field) from None
        except DecodingFailed:
            raise failed() from None

    async def _news(self, queue, choice_of, timings) -> AsyncIterator[tuple[Any, Any]]:
        left = len(choice_of)
        while left:
            new = await queue.get()
            if isinstance(new, DecodingFailed):
                raise failed()
            choice, timing = choice_of[new.sample], timings[new.sample]
            if choice.finish_reason:
                continue  # sampled beyond a stop string
            before = choice.num_tokens
            piece = choice.push(new)
            timing.tokens(choice.num_tokens - before)
            if choice.finish_reason:
                left -= 1
                timing.ended(choice.finish_reason)
                self.decoding.cancel(new.sample)
            yield choice, piece

    def _decoder(self, request: CompletionRequest) -> Callable[[list[int]], str]:
        tokenizer, skip = self.language.tokenizer, request.skip_special_tokens
        if not request.tools:
            return lambda tokens: tokenizer.decode(tokens, skip_special_tokens=skip)
        left_out = set(self._ends)
        if skip:
            marks = calls.marks_of(self.tool_form(request))
            left_out |= {i for i, token in self._special_tokens.items() if token not in marks}
        return lambda tokens: tokenizer.decode([i for i in tokens if i not in left_out])

    @functools.cached_property
    def _ends(self) -> set[int]:
        """The tokens that end, begin or pad a text, which no call holds."""
        named = (f"{name}_token_id" for name in ("eos", "bos", "pad"))
        ids = {getattr(self.language.tokenizer, name, None) for name in named}
        return {*ids, *self.language.stop_token_ids} - {None}

    @functools.cached_property
    def _special_tokens(self) -> dict[int, str]:
        tokenizer = self.language.tokenizer
        added = tokenizer.added_tokens_decoder.items()
        named = zip(tokenizer.all_special_ids, tokenizer.all_special_tokens)
        return dict(named) | {i: token.content for i, token in added if token.special}


def _continued(request: CompletionRequest) -> str:
    """The message of the assistant that a chat goes on with; "" for none."""
    last = request.prompts[0][-1] if request.chat else {}
    return last["content"] if last.get("role") == "assistant" else ""


def failed() -> ApiError:
    return ApiError("the server has failed and is going down", status=500, kind="server_error")
