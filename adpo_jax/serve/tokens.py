"""Tokens in, tokens out: /inference/v1/generate, by which environments drive a model.

The paths and fields are those of vLLM's endpoint of this name, which the package `renderers` calls.
Nothing is tokenised, and tokens become text only where stop strings are looked for.
"""

import base64
import dataclasses
import time
import uuid
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from adpo_jax.engine.continuous import MAX_ALTERNATIVES
from adpo_jax.engine.requests import NewTokens
from adpo_jax.engine.scoring import ScoredPrompt
from adpo_jax.engine.text_stream import TextStream
from adpo_jax.serve.answers import LEAST_LOG_PROB, TokenTexts, WeightVersions, usage
from adpo_jax.serve.fields import ApiError, Fields, shown
from adpo_jax.serve.protocol import (
    NEUTRAL,
    CompletionRequest,
    Limits,
    check_model,
    sampling_of,
    wants_usage,
)

# Fields of the request that are of no consequence for the answer.
NOTES = ("cache_salt", "priority")
# Those of its sampling_params, which say what becomes of text that is not made here.
SAMPLING_NOTES = (
    "detokenize",
    "output_kind",
    "routed_experts_prompt_start",
    "spaces_between_special_tokens",
)
NEUTRAL_BESIDE = {
    "features": (),
    "content_parts": ([],),
    "return_token_ids": (False,),
    "kv_transfer_params": (),
}
NEUTRAL_IN_SAMPLING = {
    "allowed_token_ids": (),
    "extra_args": ({},),
    "flat_logprobs": (False,),
    "logprob_token_ids": (),
    "structured_outputs": (),
    "truncate_prompt_tokens": (),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokensRequest(CompletionRequest):
    """A request for completions of token ids.

    Attributes:
      request_id: the client's own, or one that is made up.
      prompt_logprobs: likeliest tokens beside each token of the prompt; None where no log-probs of
        the prompt are wanted.
    """

    request_id: str
    prompt_logprobs: int | None

    @property
    def prompt_field(self) -> str:
        return "token_ids"

    @property
    def prompt_alternatives(self) -> int | None:
        return self.prompt_logprobs


def parse_tokens(body: dict[str, Any], *, model: str, limits: Limits) -> TokensRequest:
    """A request from its body.

    Raises:
      ApiError: for anything in it that cannot be done.
    """
    fields = Fields(body)
    check_model(fields, model)
    token_ids = fields.take("token_ids")
    if not isinstance(token_ids, list) or not all(type(i) is int for i in token_ids):
        raise ApiError(
            f"token_ids must be a list of ids; given {shown(token_ids)}", param="token_ids"
        )
    settings = Fields(
        fields.checked("sampling_params", {}, "an object", lambda value: type(value) is dict)
    )
    sampling, _ = sampling_of(settings, limits, may_be_empty=False)
    top = settings.integer("logprobs", None, 0, MAX_ALTERNATIVES)
    made = TokensRequest(
        chat=False,
        prompts=[token_ids],
        sampling=sampling,
        samples=True,
        echo=False,
        seed=settings.integer("seed", None, -(2**63), 2**63 - 1),
        logprobs=top is not None,
        top_logprobs=top or 0,
        stream=fields.boolean("stream"),
        include_usage=wants_usage(fields),
        skip_special_tokens=settings.boolean("skip_special_tokens", True),
        chat_template_kwargs={},
        tools=[],
        parallel_tool_calls=True,
        request_id=fields.checked(
            "request_id", uuid.uuid4().hex, "text of 1 to 200 characters", _is_request_id
        ),
        prompt_logprobs=settings.integer("prompt_logprobs", None, 0, MAX_ALTERNATIVES),
    )
    for name in SAMPLING_NOTES:
        settings.take(name)
    for name, values in (NEUTRAL | NEUTRAL_IN_SAMPLING).items():
        settings.without_effect(name, *values)
    settings.finish()
    for name in NOTES:
        fields.take(name)
    for name, values in NEUTRAL_BESIDE.items():
        fields.without_effect(name, *values)
    fields.finish()
    limits.check_log_probs(made, "logprobs")
    return made


def _is_request_id(value: Any) -> bool:
    return isinstance(value, str) and 1 <= len(value) <= 200


class TokensPiece(NamedTuple):
    """Some tokens of a completion, and one entry for each where log-probs are wanted.

    experts, where the server gives them, are [T, L, k]: those that each token was sampled through.
    first is the number of the first token in the completion.
    """

    tokens: list[int]
    scored: list[dict[str, Any]]
    experts: np.ndarray | None = None
    first: int = 0


class TokensChoice:
    """One completion under way, as tokens; see `answers.Choice`.

    Args:
      decode: token ids -> text, for stop strings.
      version: the present version of the weights.
      before: the `end_of_prompt` that the completion follows.
    """

    def __init__(
        self,
        index: int,
        request: TokensRequest,
        version: int,
        decode: Callable[[list[int]], str],
        before: list[int],
    ):
        self.index, self.finish_reason = index, None
        self.versions = WeightVersions(version)
        self._logprobs = request.logprobs
        stop, least = request.sampling.stop, request.sampling.min_tokens
        self._stream = TextStream(decode, stop, least, before) if stop else None
        self._pieces: list[TokensPiece] = []
        self.num_tokens = 0

    def push(self, new: NewTokens) -> TokensPiece:
        """Takes new tokens."""
        self.versions.note(new, self.num_tokens)
        tokens = new.tokens.tolist()
        self.finish_reason = new.finish_reason
        if self._stream is not None:
            self._stream.push(tokens)
            if new.finish_reason and not self._stream.stopped:
                self._stream.finish()
            tokens = tokens[: self._stream.num_tokens - self.num_tokens]
            if self._stream.stopped:
                self.finish_reason = "stop"
        scored = [_entry(new, i) for i in range(len(tokens))] if self._logprobs else []
        experts = None if new.experts is None else np.array(new.experts[: len(tokens)])
        piece = TokensPiece(tokens, scored, experts, self.num_tokens)
        self.num_tokens += len(tokens)
        self._pieces.append(piece)
        return piece

    def whole(self) -> TokensPiece:
        """All of it so far."""
        experts = [piece.experts for piece in self._pieces if piece.experts is not None]
        return TokensPiece(
            [token for piece in self._pieces for token in piece.tokens],
            [entry for piece in self._pieces for entry in piece.scored],
            np.concatenate(experts) if experts else None,
        )


def _as_base64(experts: np.ndarray, start: int) -> dict[str, Any]:
    """Experts [T, L, k] in the form that vLLM and `renderers` have; row i is of place start + i."""
    data = base64.b64encode(np.ascontiguousarray(experts).tobytes()).decode()
    shape = list(experts.shape)
    return {"data": data, "shape": shape, "start": start, "dtype": str(experts.dtype)}


def _entry(new: NewTokens, i: int) -> dict[str, Any]:
    top = []
    if new.alternatives is not None:
        ids, log_probs = (x[i].tolist() for x in new.alternatives)
        top = [_named(*pair) for pair in zip(ids, log_probs)]
    return _named(int(new.tokens[i]), float(new.log_probs[i])) | {"top_logprobs": top}


def _named(token: int, log_prob: float) -> dict[str, Any]:
    log_prob = max(log_prob, LEAST_LOG_PROB)  # JSON has no -inf
    return {"token": f"token_id:{token}", "logprob": log_prob, "bytes": None}


class TokensAnswer:
    """The JSON of one answer; see `answers.Answer`.

    Args:
      prompt: the ids of the prompt.
      scored: the log-probs of the prompt; None where they are not wanted.
      token_texts: the text of single tokens.
    """

    def __init__(
        self,
        request: TokensRequest,
        model: str,
        prompt: list[int],
        scored: ScoredPrompt | None,
        token_texts: TokenTexts,
    ):
        self._logprobs, self._include_usage = request.logprobs, request.include_usage
        self._prompt, self._scored, self._token_texts = prompt, scored, token_texts
        self._head = {
            "request_id": request.request_id,
            "created": int(time.time()),
            "model": model,
        }

    def body(self, choices: list[TokensChoice]) -> dict[str, Any]:
        """The answer as a whole."""
        made = [self._choice(choice, choice.whole()) for choice in choices]
        beside = {"choices": made, "usage": usage(len(self._prompt), choices)}
        return self._head | beside | self._of_prompt()

    def opening(self, choice: TokensChoice) -> dict[str, Any] | None:
        """The first chunk of a choice; the first one of all has the log-probs of the prompt."""
        if self._scored is None or choice.index:
            return None
        return self._head | {"choices": []} | self._of_prompt()

    def chunk(self, choice: TokensChoice, piece: TokensPiece) -> dict[str, Any] | None:
        """A piece of a choice; None for a piece of nothing."""
        if not piece.tokens and not choice.finish_reason:
            return None
        return self._head | {"choices": [self._choice(choice, piece)]}

    def usage_chunk(self, choices: list[TokensChoice]) -> dict[str, Any] | None:
        """The chunk that ends a stream whose client wants to know."""
        if not self._include_usage:
            return None
        return self._head | {"choices": [], "usage": usage(len(self._prompt), choices)}

    def _choice(self, choice: TokensChoice, piece: TokensPiece) -> dict[str, Any]:
        made = {
            "index": choice.index,
            "token_ids": piece.tokens,
            "logprobs": {"content": piece.scored} if self._logprobs else None,
            "finish_reason": choice.finish_reason,
            "weight_versions": choice.versions.segments,
        }
        if piece.experts is None:
            return made
        # A token is sampled where the one before it was read.
        start = len(self._prompt) - 1 + piece.first
        return made | {"routed_experts": _as_base64(piece.experts, start)}

    def _of_prompt(self) -> dict[str, Any]:
        """For each token of the prompt, the log-probs by token id; None for the first token."""
        if self._scored is None:
            return {"prompt_logprobs": None}
        made: list[dict[str, Any] | None] = [None]
        scored = self._scored
        places = zip(self._prompt[1:], scored.log_probs, *scored.alternatives)
        for token, log_prob, ids, values in places:
            entry = {str(token): self._prompt_entry(token, log_prob, None)}
            for rank, (other, value) in enumerate(zip(ids.tolist(), values), start=1):
                entry[str(other)] = self._prompt_entry(other, value, rank)
            made.append(entry)
        return {"prompt_logprobs": made, "prompt_weight_version": scored.version}

    def _prompt_entry(self, token: int, log_prob, rank: int | None) -> dict[str, Any]:
        """A token with its log-prob; its rank is known for the likeliest ones."""
        entry = self._token_texts.entry(token, float(log_prob))
        return {"logprob": entry["logprob"], "rank": rank, "decoded_token": entry["token"]}
