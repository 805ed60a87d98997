"""Prompts into prefix rows: read in pieces between dispatches, or prefilled, some at once.

Letters: T tokens.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import numpy as np

from adpo_jax.engine import kv_cache
from adpo_jax.engine.decode_state import DecodeState, Prefixes
from adpo_jax.engine.reading import Reader
from adpo_jax.engine.requests import Request
from adpo_jax.engine.schedule import Schedule
from adpo_jax.engine.sizes import length_bucket, power_of_two, prefill_rows, up_to_multiple
from adpo_jax.engine.verbs import Verbs


class _Prompt(NamedTuple):
    """A prompt to prefill, and those who have it."""

    tokens: np.ndarray  # [T] int32
    rows: list[int]  # prefix rows
    requests: list[Request]  # of each row


class PromptRows:
    """Puts the prompts of a batch into its prefix rows.

    Args:
      reader: reads the prompts that are read in pieces.
      num_shards: devices that prefix rows are split over.
      most_prefilled: as of `DecodeLoop`.
      stats: counts, of which it adds to "prefill_calls" and "prefill_tokens".
    """

    def __init__(
        self,
        verbs: Verbs,
        reader: Reader,
        num_shards: int,
        most_prefilled: Callable[[int, int], int] | None,
        stats: dict[str, int],
    ):
        self._verbs, self._reader, self._num_shards = verbs, reader, num_shards
        self._most_prefilled, self._stats = most_prefilled, stats
        # Prompts whose experts the device may still have to find, with their rows there.
        self._experts: list[tuple[Request, int, jax.Array]] = []

    def read(self, params, schedule: Schedule, version: int):
        """Reads a piece of the first long prompt in the queue, if there is any.

        A prompt that has been read starts before the next one is read.
        """
        reader = self._reader
        unread = [request for request in schedule.queued if not reader.is_ready(request)]
        if not unread:
            return
        schedule.overtake(reader.is_ready)
        if not any(reader.in_pieces(r) and reader.is_ready(r) for r in schedule.queued):
            self._count(reader.go_on(params, unread[0], version))

    def fill(
        self, params, state: DecodeState, admitted: Mapping[int, Request], version: int
    ) -> DecodeState:
        """The state with prompts in their prefix rows, each prefilled once.

        Prompts of like length go together.

        Args:
          admitted: the request of each prefix row to fill.
          version: the number of the parameters.
        """
        longest = kv_cache.num_columns(state.prefix.kv)
        prompts: dict[bytes, _Prompt] = {}
        for row, request in admitted.items():
            in_pieces = self._reader.in_pieces(request)
            request.version = self._reader.version(request) if in_pieces else version
            if in_pieces:
                prefixes = self._reader.prefixes(request, _columns(request.prompt, longest))
                state = self._copied(state, prefixes, 0, [row])
            else:
                new = _Prompt(request.prompt, [], [])
                prompt = prompts.setdefault(request.prompt.tobytes(), new)
                prompt.rows.append(row)
                prompt.requests.append(request)
        left = sorted(prompts.values(), key=lambda prompt: len(prompt.tokens))
        while left:
            length = _columns(left[-1].tokens, longest)
            most = self._most_at_once(length, len(left))
            batch, left = left[-most:], left[:-most]
            state = self._prefilled(params, state, batch, most, length)
        return state

    def _most_at_once(self, length: int, wanted: int) -> int:
        """The prompts of a length that go into the next prefill."""
        most_rows = self._verbs.layout.most_new_rows
        most = prefill_rows(length, self._num_shards, most_rows)
        if self._most_prefilled is None:
            return most
        return self._most_prefilled(length, min(most, power_of_two(wanted)))

    def _prefilled(
        self, params, state: DecodeState, batch: list[_Prompt], most: int, length: int
    ) -> DecodeState:
        """The state with prompts that are prefilled in one call of at most `most` rows."""
        # Rows beyond the batch repeat its last prompt and go into the same prefix row.
        count = min(self._whole(len(batch)), most)
        padded = batch + batch[-1:] * (count - len(batch))
        tokens, lengths = np.zeros((count, length), np.int32), np.zeros(count, np.int32)
        for i, prompt in enumerate(padded):
            lengths[i] = len(prompt.tokens) - 1
            tokens[i, : lengths[i]] = prompt.tokens[:-1]
        requests = [(request, i) for i, prompt in enumerate(batch) for request in prompt.requests]
        asked = any(request.sampling.prompt_experts for request, _ in requests)
        prefixes = self._verbs.prefill(params, tokens, lengths, asked)
        if asked:
            self._experts += [(request, i, prefixes.experts) for request, i in requests]
        prefixes = prefixes._replace(experts=None)
        targets = np.array([prompt.rows[0] for prompt in padded], np.int32)
        state = self._verbs.insert(state, prefixes, targets)
        for i, prompt in enumerate(batch):
            if prompt.rows[1:]:
                state = self._copied(state, prefixes, i, prompt.rows[1:])
        self._count(int(lengths[: len(batch)].sum()))
        return state

    def _copied(
        self, state: DecodeState, prefixes: Prefixes, index: int, rows: list[int]
    ) -> DecodeState:
        """The state with one of the prefilled prompts in further prefix rows."""
        count = self._whole(len(rows))
        targets = np.array(rows + rows[-1:] * (count - len(rows)), np.int32)
        repeated = self._verbs.rows_of(prefixes, np.full(count, index, np.int32))
        return self._verbs.insert(state, repeated, targets)

    def _whole(self, count: int) -> int:
        """The rows of a call for so many prompts: few sizes, split evenly over the devices."""
        return up_to_multiple(power_of_two(count), self._num_shards)

    def _count(self, num_tokens: int):
        self._stats["prefill_calls"] += 1
        self._stats["prefill_tokens"] += num_tokens

    def take_experts(self):
        """Notes the experts of the prompts that were prefilled, now that they are there."""
        held = jax.device_get({id(experts): experts for _, _, experts in self._experts})
        for request, row, experts in self._experts:
            of_row = held[id(experts)][row, : len(request.prompt) - 1]
            if request.prompt_experts is None:
                request.prompt_experts = np.array(of_row)
        self._experts = []


def _columns(prompt: np.ndarray, longest: int) -> int:
    """The columns that a prompt is padded to, at most those of a prefix row."""
    return min(length_bucket(len(prompt) - 1, longest), longest)
