"""The answers to clients: choices as their tokens come, and bodies and chunks of JSON."""

import time
import uuid
from collections.abc import Callable
from typing import Any

from adpo_jax.engine.continuous import NewTokens
from adpo_jax.engine.text_stream import REPLACEMENT, TextStream
from adpo_jax.serve.protocol import CompletionRequest

LEAST_LOG_PROB = -9999.0  # JSON has no -inf


class Choice:
    """One completion under way.

    Attributes:
      index: its number among the choices of the request.
      finish_reason: "stop" or "length" at the end, None before.
    """

    def __init__(self, index: int, request: CompletionRequest, decode: Callable[[list[int]], str]):
        self.index, self.finish_reason = index, None
        self._request, self._decode = request, decode
        sampling = request.sampling
        self._text = TextStream(decode, sampling.stop, sampling.min_tokens)
        self._scored: list[dict] = []  # one entry a token

    @property
    def num_tokens(self) -> int:
        return self._text.num_tokens

    def push(self, new: NewTokens) -> tuple[str, list[dict]]:
        """Takes new tokens; returns new text and the log-probs that belong to it."""
        before = self.num_tokens
        text = self._text.push(new.tokens)
        scored = []
        if self._request.logprobs:
            scored = [self._entry(new, i) for i in range(self.num_tokens - before)]
        if self._text.stopped:
            self.finish_reason = "stop"
        elif new.finish_reason:
            text += self._text.finish()
            self.finish_reason = "stop" if self._text.stopped else new.finish_reason
        self._scored += scored
        return text, scored

    def _entry(self, new: NewTokens, i: int) -> dict:
        entry = self._token(int(new.tokens[i]), float(new.log_probs[i]))
        ids, log_probs = ([], []) if new.alternatives is None else new.alternatives
        top = zip(ids[i], log_probs[i]) if len(ids) else ()
        entry["top_logprobs"] = [self._token(int(id_), float(value)) for id_, value in top]
        return entry

    def _token(self, token: int, log_prob: float) -> dict:
        text = self._decode([token])
        whole = REPLACEMENT not in text
        return {
            "token": text,
            "logprob": max(log_prob, LEAST_LOG_PROB),
            "bytes": list(text.encode("utf-8", errors="replace")) if whole else None,
        }

    def whole(self) -> tuple[str, list[dict]]:
        """All text and all log-probs."""
        return self._text.text, self._scored


class Answer:
    """The JSON of one request's answer.

    Args:
      model: the name of the model.
      num_prompt_tokens: tokens of all prompts, each counted once.
    """

    def __init__(self, request: CompletionRequest, model: str, num_prompt_tokens: int):
        self._chat, self._logprobs = request.chat, request.logprobs
        self._include_usage = request.include_usage
        self._num_prompt_tokens = num_prompt_tokens
        kind = "chat.completion" if request.chat else "text_completion"
        prefix = "chatcmpl-" if request.chat else "cmpl-"
        self._head = {
            "id": prefix + uuid.uuid4().hex,
            "object": kind,
            "created": int(time.time()),
            "model": model,
        }
        self._offsets: dict[int, int] = {}  # characters of each choice so far

    def body(self, choices: list[Choice]) -> dict[str, Any]:
        """The answer as a whole."""
        made = []
        for choice in choices:
            text, scored = choice.whole()
            said = {"message": {"role": "assistant", "content": text}} if self._chat else {}
            made.append(self._choice(choice, text, scored) | said)
        return self._head | {"choices": made, "usage": self._usage(choices)}

    def opening(self, choice: Choice) -> dict[str, Any] | None:
        """The first chunk of a choice, where there is one."""
        return self._chunk(choice, {"role": "assistant", "content": ""}) if self._chat else None

    def chunk(self, choice: Choice, text: str, scored: list[dict]) -> dict[str, Any] | None:
        """A piece of a choice; None for a piece of nothing."""
        if not text and not scored and not choice.finish_reason:
            return None
        return self._chunk(choice, {"content": text} if text else {}, text, scored)

    def usage_chunk(self, choices: list[Choice]) -> dict[str, Any] | None:
        """The chunk that ends a stream whose client wants to know."""
        if not self._include_usage:
            return None
        return self._chunk_head() | {"choices": [], "usage": self._usage(choices)}

    def _chunk_head(self) -> dict[str, Any]:
        kind = "chat.completion.chunk" if self._chat else "text_completion"
        return self._head | {"object": kind}

    def _chunk(self, choice: Choice, delta: dict, text: str = "", scored=()) -> dict[str, Any]:
        made = self._choice(choice, text, list(scored)) | ({"delta": delta} if self._chat else {})
        usage = {"usage": None} if self._include_usage else {}
        return self._chunk_head() | {"choices": [made]} | usage

    def _choice(self, choice: Choice, text: str, scored: list[dict]) -> dict[str, Any]:
        made: dict[str, Any] = {"index": choice.index, "finish_reason": choice.finish_reason}
        if self._chat:
            logprobs = {"content": scored, "refusal": None} if scored else None
            return made | {"logprobs": logprobs}
        logprobs = self._columns(choice.index, scored) if self._logprobs else None
        return made | {"text": text, "logprobs": logprobs}

    def _columns(self, index: int, scored: list[dict]) -> dict[str, list]:
        """Log-probs as /v1/completions has them."""
        offsets, at = [], self._offsets.get(index, 0)
        for entry in scored:
            offsets.append(at)
            at += len(entry["token"])
        self._offsets[index] = at
        return {
            "tokens": [entry["token"] for entry in scored],
            "token_logprobs": [entry["logprob"] for entry in scored],
            "top_logprobs": [
                {top["token"]: top["logprob"] for top in entry["top_logprobs"]} for entry in scored
            ],
            "text_offset": offsets,
        }

    def _usage(self, choices: list[Choice]) -> dict[str, int]:
        completion = sum(choice.num_tokens for choice in choices)
        return {
            "prompt_tokens": self._num_prompt_tokens,
            "completion_tokens": completion,
            "total_tokens": self._num_prompt_tokens + completion,
        }
