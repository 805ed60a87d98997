"""The answers to clients: choices as their tokens come, and bodies and chunks of JSON."""

import functools
import time
import uuid
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from adpo_jax.engine.requests import NewTokens
from adpo_jax.engine.scoring import ScoredPrompt
from adpo_jax.engine.text_stream import REPLACEMENT, TextStream
from adpo_jax.environments.calls import CallParser
from adpo_jax.serve.protocol import CompletionRequest

LEAST_LOG_PROB = -9999.0  # JSON has no -inf


class Piece(NamedTuple):
    """A piece of an answer: text, one entry a token where log-probs are wanted, calls of tools."""

    text: str
    scored: list[dict[str, Any]]
    calls: list[dict[str, Any]]


NOTHING = Piece("", [], [])


def _byte_alphabet() -> dict[str, int]:
    """The characters that byte-level BPE writes bytes with."""
    shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [byte for byte in range(256) if byte not in shown]
    return {chr(byte): byte for byte in shown} | {chr(256 + i): b for i, b in enumerate(rest)}


_BYTES = _byte_alphabet() | {f"<0x{byte:02X}>": byte for byte in range(256)}


class TokenTexts:
    """The text of single tokens, special ones too, as it is within a text; each is decoded once.

    Args:
      tokenizer: of transformers.
    """

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer
        self._known: dict[int, tuple[str, list[int] | None]] = {}

    @functools.cached_property
    def _before(self) -> tuple[list[int], str]:
        """Some tokens and their text; the start of a text may lack the space of its first token."""
        ids = self._tokenizer("a", add_special_tokens=False)["input_ids"]
        return ids, self._tokenizer.decode(ids)

    def _read(self, token: int) -> tuple[str, list[int] | None]:
        """The text and the bytes of a token; None where these are not known."""
        ids, before = self._before
        text = self._tokenizer.decode([*ids, token])
        whole = text.startswith(before)
        text = text.removeprefix(before) if whole else self._tokenizer.decode([token])
        if REPLACEMENT not in text:
            return text, list(text.encode("utf-8", errors="replace"))
        # These bytes are no text, and become some together with those of other tokens.
        piece = str(self._tokenizer.convert_ids_to_tokens(token))
        made = [_BYTES.get(part) for part in ([piece] if piece in _BYTES else piece)]
        return text, None if None in made else made

    def entry(self, token: int, log_prob: float | None) -> dict[str, Any]:
        """A token with its log-prob, as /v1/chat/completions has it."""
        if token not in self._known:
            self._known[token] = self._read(token)
        text, made = self._known[token]
        if log_prob is not None:
            log_prob = max(log_prob, LEAST_LOG_PROB)
        return {"token": text, "logprob": log_prob, "bytes": made}

    def scored(self, token: int, log_prob: float, ids, log_probs) -> dict[str, Any]:
        """An entry with the likeliest tokens at its place."""
        top = [self.entry(int(i), float(value)) for i, value in zip(ids, log_probs)]
        return self.entry(int(token), float(log_prob)) | {"top_logprobs": top}

    def of_prompt(self, prompt: Sequence[int], scored: ScoredPrompt) -> list[dict[str, Any]]:
        """The entries of a prompt; its first token has no log-prob."""
        ids, values = scored.alternatives
        rest = zip(prompt[1:], scored.log_probs, ids, values)
        return [
            self.entry(prompt[0], None) | {"top_logprobs": None},
            *(self.scored(*entry) for entry in rest),
        ]


class WeightVersions:
    """Which weights sampled a completion.

    Attributes:
      segments: [[version, number of the first token that it sampled], ...]. The first one is that
        which read the prompt.
    """

    def __init__(self, present: int):
        self.segments = [[present, 0]]
        self._known = False

    def note(self, new: NewTokens, before: int) -> None:
        """Takes note of further tokens, after so many earlier ones."""
        first = new.sample.version
        if not self._known and first is not None:
            self.segments, self._known = [[first, 0]], True
        if new.version != self.segments[-1][0]:
            self.segments.append([new.version, before])


class Choice:
    """One completion under way.

    Args:
      version: the present version of the weights; where nothing is sampled, `prompt_version`.
      decode: token ids -> text.
      parser: parts text and calls of tools; None where there are no tools.
      prompt: what the answer begins with; None for nothing.
      before: tokens that the text follows; see `TextStream`.
      prompt_version: the version of the weights that scored the prompt; None where none did.

    Attributes:
      index: its number among the choices of the request.
      finish_reason: "stop", "length" or "tool_calls" at the end, None before.
      versions: which weights sampled it.
      prompt_version: as it was given.
    """

    def __init__(
        self,
        index: int,
        request: CompletionRequest,
        version: int,
        decode: Callable[[list[int]], str],
        token_texts: TokenTexts,
        parser: CallParser | None = None,
        prompt: Piece | None = None,
        before: Sequence[int] = (),
        prompt_version: int | None = None,
    ):
        self.index, self.finish_reason = index, None if request.samples else "length"
        self.prompt, self.versions = prompt, WeightVersions(version)
        self.prompt_version = prompt_version
        self._request, self._token_texts, self._parser = request, token_texts, parser
        sampling = request.sampling
        self._stream = TextStream(decode, sampling.stop, sampling.min_tokens, before)
        self._pieces: list[Piece] = [] if prompt is None else [prompt]

    @property
    def num_tokens(self) -> int:
        """Tokens that were sampled."""
        return self._stream.num_tokens

    def push(self, new: NewTokens) -> Piece:
        """Takes new tokens; returns what is certain now."""
        before = self.num_tokens
        self.versions.note(new, before)
        text = self._stream.push(new.tokens)
        scored = []
        if self._request.logprobs:
            scored = [self._entry(new, i) for i in range(self.num_tokens - before)]
        if self._stream.stopped:
            self.finish_reason = "stop"
        elif new.finish_reason:
            text += self._stream.finish()
            self.finish_reason = "stop" if self._stream.stopped else new.finish_reason
        calls = []
        if self._parser is not None:
            text, calls = self._parser.push(text, last=self.finish_reason is not None)
            if self._parser.complete or (self._parser.num_calls and self.finish_reason == "stop"):
                self.finish_reason = "tool_calls"
        piece = Piece(text, scored, calls)
        self._pieces.append(piece)
        return piece

    def _entry(self, new: NewTokens, i: int) -> dict[str, Any]:
        ids, log_probs = ((), ()) if new.alternatives is None else (x[i] for x in new.alternatives)
        return self._token_texts.scored(new.tokens[i], new.log_probs[i], ids, log_probs)

    def whole(self) -> Piece:
        """All of it so far."""
        return Piece(
            "".join(piece.text for piece in self._pieces),
            [entry for piece in self._pieces for entry in piece.scored],
            [call for piece in self._pieces for call in piece.calls],
        )


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
        self._num_calls: dict[int, int] = {}  # calls of each choice so far

    def body(self, choices: list[Choice]) -> dict[str, Any]:
        """The answer as a whole."""
        made = []
        for choice in choices:
            piece = choice.whole()
            said = {}
            if self._chat:
                message = {"role": "assistant", "content": piece.text}
                if piece.calls:
                    message |= {"content": piece.text or None, "tool_calls": piece.calls}
                said["message"] = message
            made.append(self._choice(choice, piece) | said)
        return self._head | {"choices": made, "usage": self._usage(choices)}

    def opening(self, choice: Choice) -> dict[str, Any] | None:
        """The first chunk of a choice, where there is one."""
        if self._chat:
            return self._chunk(choice, {"role": "assistant", "content": ""})
        if choice.prompt is None and not choice.finish_reason:
            return None
        return self._chunk(choice, {}, choice.prompt or NOTHING)

    def chunk(self, choice: Choice, piece: Piece) -> dict[str, Any] | None:
        """A piece of a choice; None for a piece of nothing."""
        if not any(piece) and not choice.finish_reason:
            return None
        delta: dict[str, Any] = {"content": piece.text} if piece.text else {}
        if piece.calls:
            first = self._num_calls.get(choice.index, 0)
            self._num_calls[choice.index] = first + len(piece.calls)
            delta["tool_calls"] = [
                {"index": first + i} | call for i, call in enumerate(piece.calls)
            ]
        return self._chunk(choice, delta, piece)

    def usage_chunk(self, choices: list[Choice]) -> dict[str, Any] | None:
        """The chunk that ends a stream whose client wants to know."""
        if not self._include_usage:
            return None
        return self._chunk_head() | {"choices": [], "usage": self._usage(choices)}

    def _chunk_head(self) -> dict[str, Any]:
        kind = "chat.completion.chunk" if self._chat else "text_completion"
        return self._head | {"object": kind}

    def _chunk(
        self, choice: Choice, delta: dict[str, Any], piece: Piece = NOTHING
    ) -> dict[str, Any]:
        made = self._choice(choice, piece) | ({"delta": delta} if self._chat else {})
        usage = {"usage": None} if self._include_usage else {}
        return self._chunk_head() | {"choices": [made]} | usage

    def _choice(self, choice: Choice, piece: Piece) -> dict[str, Any]:
        made: dict[str, Any] = {"index": choice.index, "finish_reason": choice.finish_reason}
        if choice.finish_reason:
            made["weight_versions"] = choice.versions.segments
            if choice.prompt_version is not None:
                made["prompt_weight_version"] = choice.prompt_version
        if self._chat:
            logprobs = {"content": piece.scored, "refusal": None} if piece.scored else None
            return made | {"logprobs": logprobs}
        logprobs = self._columns(choice.index, piece.scored) if self._logprobs else None
        return made | {"text": piece.text, "logprobs": logprobs}

    def _columns(self, index: int, scored: list[dict[str, Any]]) -> dict[str, list]:
        """Log-probs as /v1/completions has them."""
        offsets, at = [], self._offsets.get(index, 0)
        for entry in scored:
            offsets.append(at)
            at += len(entry["token"])
        self._offsets[index] = at
        return {
            "tokens": [entry["token"] for entry in scored],
            "token_logprobs": [entry["logprob"] for entry in scored],
            "top_logprobs": [_by_text(entry["top_logprobs"]) for entry in scored],
            "text_offset": offsets,
        }

    def _usage(self, choices: list[Choice]) -> dict[str, int]:
        return usage(self._num_prompt_tokens, choices)


def usage(num_prompt_tokens: int, choices) -> dict[str, int]:
    """The numbers of tokens of an answer."""
    completion = sum(choice.num_tokens for choice in choices)
    return {
        "prompt_tokens": num_prompt_tokens,
        "completion_tokens": completion,
        "total_tokens": num_prompt_tokens + completion,
    }


def _by_text(top: list[dict[str, Any]] | None) -> dict[str, float] | None:
    """Log-probs by the tokens' texts; the likeliest of those with the same text."""
    if top is None:
        return None
    made: dict[str, float] = {}
    for entry in top:
        made.setdefault(entry["token"], entry["logprob"])
    return made
