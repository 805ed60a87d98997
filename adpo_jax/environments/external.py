"""An environment that runs in processes of its own: HTTP out with rows, records of tokens back.

Whatever it is written in, it is asked for the rollouts of a row of the data,

    POST <environment.url>
    {"row": {...}, "num_rollouts": 8, "seeds": [...], "step": 12,
     "model": {"base_url": "http://127.0.0.1:40123", "name": "policy", "api_key": "...",
               "max_prompt_length": 512, "max_model_length": 1536},
     "sampling_params": {"temperature": 1.0, "max_tokens": 1024, ...}}

and drives the run's own engine at `base_url`, by any path of `serve` (docs/serve.md). It answers

    {"rollouts": [{"prompt_token_ids": [...], "token_ids": [...], "mask": [1, 1, 0, ...],
                   "reward": 1.0, "finish_reason": "stop", "messages": [...], "metrics": {...}}]}

`mask` says which tokens the policy sampled; without one it sampled all. What it says is hostile as
far as this process is concerned: everything is checked, and the log-probs come from the engine.
"""

import asyncio
import dataclasses
import ipaddress
import json
import math
import socket
from collections.abc import Sequence
from typing import Any

from absl import logging

from adpo_jax.data.prompts import PromptFormat
from adpo_jax.environments.contract import content_of
from adpo_jax.environments.nesting import nests_deeper
from adpo_jax.environments.pool import EnvironmentFailed

# The name of its reward, as `reward/environment` in the metrics.
REWARD_NAME = "environment"
# How often a row's rollouts are asked for, where the environment fails, and the seconds between.
ATTEMPTS, PAUSES_S = 3, (1.0, 5.0)
# The status of an answer that asking again would not change.
LASTING = 422
MAX_ANSWER_BYTES = 256 << 20
# Of what an environment says in an error, so much is shown.
_SHOWN = 300
# Of a message; what is deeper cannot be handed to other processes.
_DEEPEST = 64


@dataclasses.dataclass(frozen=True)
class Record:
    """One rollout as the environment tells it.

    Attributes:
      prompt: token ids of the prompt.
      tokens: T token ids after it, what was appended among them.
      trained: T, whether the policy sampled the token.
      reward: None where it gives none.
      messages: its messages, each with a text as its role; None where they are not told.
      metrics: numbers that it tells beside the reward.
    """

    prompt: list[int]
    tokens: list[int]
    trained: list[bool]
    reward: float | None
    finish_reason: str
    messages: list[dict[str, Any]] | None
    metrics: dict[str, float]


class External:
    """An environment behind an address.

    Args:
      url: where it is asked for rollouts.
      serve_host: the address of this machine at which it finds the run's engine.
      timeout_s: seconds for the rollouts of a row.
      max_prompt_length: tokens.
      prompt_format: how the engine makes a prompt of messages, for an environment that sends such.

    Raises:
      ValueError: for an address that is none, or a package that is missing.
    """

    rewards = (REWARD_NAME,)

    def __init__(
        self,
        url: str,
        serve_host: str,
        timeout_s: float,
        *,
        max_prompt_length: int,
        prompt_format: PromptFormat | None = None,
    ):
        import httpx

        try:
            parsed = httpx.URL(url)
        except (httpx.InvalidURL, TypeError) as error:
            raise ValueError(f"environment.url: {url[:200]!r} is no address: {error}") from None
        if parsed.scheme not in ("http", "https") or not parsed.host:
            raise ValueError(
                f"environment.url is an address such as http://127.0.0.1:9000/rollouts; given "
                f"{url[:200]!r}"
            )
        self.url, self.serve_host, self.timeout_s = url, serve_host, timeout_s
        self.max_prompt_length = max_prompt_length
        self.prompt_format = prompt_format or PromptFormat()
        # Without what may be a password in it.
        self.shown = str(parsed.copy_with(userinfo=b""))

    def check(self) -> None:
        """Checks that somebody answers there, and finds this run's engine at an address of ours.

        Raises:
          ValueError: where nobody does, or `serve_host` is no address to be found at.
        """
        import httpx

        try:
            httpx.get(self.url, timeout=10.0, trust_env=False)
        except httpx.HTTPError as error:
            raise ValueError(
                f"environment.url: nobody answers at {self.shown} ({_reason(error)}); start the "
                "environment before the run"
            ) from None
        _check_own_address(self.serve_host)

    def close(self) -> None:
        """There is nothing to end: the processes are not ours."""

    def __enter__(self) -> "External":
        return self

    def __exit__(self, *exc_info):
        self.close()

    def client(self):
        """An HTTP client for any number of rows at once, to be used in one event loop."""
        import httpx

        # A rollout may take its whole time without a byte.
        timeout = httpx.Timeout(self.timeout_s, connect=10.0, pool=None)
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=64)
        return httpx.AsyncClient(timeout=timeout, limits=limits, trust_env=False)

    async def rollouts(
        self, client, body: dict[str, Any], *, vocab_size: int, max_response_length: int
    ) -> list[Record]:
        """The rollouts of a row.

        Args:
          body: the request, as in the head of this file.
          max_response_length: tokens; longer completions are cut.

        Raises:
          EnvironmentFailed: where it fails `ATTEMPTS` times, or answers with what is no record.
        """
        for attempt in range(ATTEMPTS):
            try:
                async with asyncio.timeout(self.timeout_s):
                    answer = await self._asked(client, body)
            except _Unanswered as error:
                reason = str(error)
            except TimeoutError:
                reason = (
                    f"its rollouts took longer than environment.rollout_timeout_s, "
                    f"{self.timeout_s:g} s"
                )
            else:
                limits = {
                    "vocab_size": vocab_size,
                    "max_prompt_length": self.max_prompt_length,
                    "max_response_length": max_response_length,
                }
                return self._records(answer, body["num_rollouts"], limits)
            if attempt + 1 < ATTEMPTS:
                told = "the environment at %s: %s; asked again"
                logging.log_every_n_seconds(logging.WARNING, told, 5, self.shown, reason)
                await asyncio.sleep(PAUSES_S[attempt])
        raise EnvironmentFailed(
            f"the environment at {self.shown} failed {ATTEMPTS} times for the same row: {reason}"
        )

    async def _asked(self, client, body: dict[str, Any]) -> dict[str, Any]:
        """One answer, as JSON; raises `_Unanswered` for none, or one that tells of an error."""
        import httpx

        content = json.dumps(body, default=str).encode(errors="replace")
        headers = {"Content-Type": "application/json"}
        made = bytearray()
        try:
            async with client.stream(
                "POST", self.url, content=content, headers=headers
            ) as response:
                async for part in response.aiter_bytes():
                    made += part
                    if len(made) > MAX_ANSWER_BYTES:
                        raise _Unanswered(f"it answered with more than {MAX_ANSWER_BYTES} bytes")
                status = response.status_code
        except httpx.HTTPError as error:
            raise _Unanswered(_reason(error)) from None
        if status != 200:
            said = bytes(made[:_SHOWN]).decode(errors="replace")
            if status == LASTING:
                raise EnvironmentFailed(f"the environment at {self.shown} says: {said!r}")
            raise _Unanswered(f"it answered with the status {status}: {said!r}")
        try:
            # Beside the event loop, which serves the engine.
            answer = await asyncio.to_thread(json.loads, bytes(made))
        except (ValueError, RecursionError) as error:
            raise _Unanswered(f"its answer is no JSON: {str(error)[:_SHOWN]}") from None
        rollouts = answer.get("rollouts") if isinstance(answer, dict) else None
        for rollout in rollouts if isinstance(rollouts, list) else ():
            if isinstance(rollout, dict) and rollout.get("error"):
                raise _Unanswered(f"a rollout failed: {str(rollout['error'])[:_SHOWN]!r}")
        return answer

    def _records(self, answer: Any, count: int, limits: dict[str, int]) -> list[Record]:
        rollouts = answer.get("rollouts") if isinstance(answer, dict) else None
        if not isinstance(rollouts, list) or len(rollouts) != count:
            given = f"{len(rollouts)} of them" if isinstance(rollouts, list) else "none"
            raise EnvironmentFailed(
                f'the environment at {self.shown} must answer with {{"rollouts": [...]}}, '
                f"{count} for the num_rollouts it was asked for; given {given}"
            )
        try:
            return [parse_record(rollout, **limits) for rollout in rollouts]
        except ValueError as error:
            raise EnvironmentFailed(f"the environment at {self.shown}: {error}") from None


def _check_own_address(host: str) -> None:
    """Checks that this machine can listen at an address which others can be told."""
    cure = "set it to the address of this machine, or its name, by which the environment finds it"
    try:
        (family, kind, _, _, address), *_ = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)
        with socket.socket(family, kind) as made:
            made.bind(address)
            made.listen()
    except (OSError, ValueError) as error:  # ValueError: for a name that no host can have
        raise ValueError(
            f"environment.serve_host is {host!r:.200}, at which this machine cannot listen "
            f"({_reason(error)}); {cure}"
        ) from None
    if ipaddress.ip_address(address[0]).is_unspecified:
        raise ValueError(
            f"environment.serve_host is {host!r}, which stands for all addresses of this machine "
            f"and leads an environment on another one nowhere; {cure}"
        )


class _Unanswered(Exception):
    """An attempt that gave no rollouts, and may be made again."""


def _reason(error: Exception) -> str:
    return str(error)[:_SHOWN] or type(error).__name__


def parse_record(
    rollout: Any, *, vocab_size: int, max_prompt_length: int, max_response_length: int
) -> Record:
    """A rollout as it was sent. A completion that is too long is cut, and ends with "length".

    Raises:
      ValueError: saying which field is not what it must be.
    """
    if not isinstance(rollout, dict):
        raise ValueError(f"a rollout is an object; given {type(rollout).__name__}")
    prompt = _token_ids(rollout, "prompt_token_ids", vocab_size)
    tokens = _token_ids(rollout, "token_ids", vocab_size)
    if len(prompt) > max_prompt_length:
        raise ValueError(
            f"a rollout has prompt_token_ids of {len(prompt)} tokens; raise "
            f"data.max_prompt_length, which is {max_prompt_length}"
        )
    mask = rollout.get("mask")
    mask = [1] * len(tokens) if mask is None else mask
    if not isinstance(mask, list) or len(mask) != len(tokens) or set(map(repr, mask)) - _BITS:
        raise ValueError("the mask of a rollout is a list of 0 and 1, one for each of token_ids")
    reward = rollout.get("reward")
    if reward is not None and not _is_number(reward):
        raise ValueError(
            f"the reward of a rollout is a finite number or null; given {reward!r:.80}"
        )
    reason = rollout.get("finish_reason") or "stop"
    if reason not in ("stop", "length", "tool_calls"):
        raise ValueError(f'finish_reason is "stop" or "length"; given {reason!r:.80}')
    messages = _messages(rollout.get("messages"))
    metrics = rollout.get("metrics") or {}
    if not isinstance(metrics, dict) or not all(map(_is_number, metrics.values())):
        raise ValueError("the metrics of a rollout are finite numbers by name")
    is_cut = len(tokens) > max_response_length
    return Record(
        prompt,
        tokens[:max_response_length],
        [bool(bit) for bit in mask[:max_response_length]],
        None if reward is None else float(reward),
        "length" if is_cut or reason == "length" else "stop",
        messages,
        {str(name): float(value) for name, value in metrics.items()},
    )


_BITS = {"0", "1", "True", "False"}


def _messages(told: Any) -> list[dict[str, Any]] | None:
    """The messages of a rollout, with a content in each, a text unless it has parts that are none.

    OpenAI's may do without: those that only call a tool. A field that nests too deeply is left out.
    """
    if told is None:
        return None
    if not isinstance(told, list) or not all(
        isinstance(message, dict) and isinstance(message.get("role"), str) for message in told
    ):
        raise ValueError('the messages of a rollout are a list of objects, each with a text "role"')
    made = []
    for message in told:
        message = {k: v for k, v in message.items() if not nests_deeper(v, _DEEPEST)}
        content = message.get("content")
        is_text = isinstance(content, list) and all(
            isinstance(part, dict) and part.get("type") == "text" for part in content
        )
        if content is None or is_text:
            content = content_of(content) if content else ""
        made.append(message | {"content": content})
    return made


def _token_ids(rollout: dict, field: str, vocab_size: int) -> list[int]:
    ids: Sequence[int] | Any = rollout.get(field)
    if not isinstance(ids, list) or not ids or not all(type(i) is int for i in ids):
        raise ValueError(f"{field} of a rollout is a list of token ids, at least one")
    if min(ids) < 0 or max(ids) >= vocab_size:
        raise ValueError(f"{field} of a rollout has ids outside [0, {vocab_size})")
    return ids


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < 1e30 and math.isfinite(value)
