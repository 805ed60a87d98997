"""One call of `Engine.generate`: its sizes, and the records made of its samples.

All requests of a call share their settings, and all are there from the start. So the batch begins
with the sizes that suit the whole call. Its ring grows as samples get long, and its slots may
become fewer once no samples wait.

Letters: P prompts, n samples of a prompt, T tokens.
"""

import array
import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from adpo_jax.engine.batching import DecodeLoop, Settings
from adpo_jax.engine.decode_state import Sizes
from adpo_jax.engine.kv_cache import PageSizes
from adpo_jax.engine.requests import NewTokens, Request, Sample
from adpo_jax.engine.sampling import SamplingParams
from adpo_jax.engine.schedule import Schedule
from adpo_jax.engine.sizes import largest_below, smallest_holding
from adpo_jax.engine.text_stream import REPLACEMENT
from adpo_jax.records import Completion

# A ring with room for so many steps is not grown yet, since a step reads all of its columns.
LEAST_STEPS = 8


class FinishedGroup(NamedTuple):
    """The completions of one prompt."""

    prompt_index: int
    completions: list[Completion]


@dataclasses.dataclass(frozen=True)
class CallSizing:
    """The sizes that a call goes through; see `batching.Sizing`.

    Attributes:
      first: the sizes that the call begins with; its columns are not read.
      slot_sizes: the batch sizes that it shrinks through, rising; the last one is that of `first`.
      column_sizes: the lengths that the ring grows through, rising.
      steps: the most decode steps of a dispatch.
    """

    first: Sizes
    slot_sizes: Sequence[int]
    column_sizes: Sequence[int]
    steps: int

    @property
    def most_columns(self) -> int:
        return self.column_sizes[-1]

    @property
    def pages(self) -> PageSizes | None:
        return self.first.pages

    def room(self, now: Sizes | None, schedule: Schedule, most_in_ring: int) -> Sizes:
        if now is not None:
            return now
        return self.first._replace(columns=columns_for(self.column_sizes, 0, self.steps))

    def fitted(self, now: Sizes, schedule: Schedule, most_in_ring: int) -> Sizes:
        columns, slots = columns_for(self.column_sizes, most_in_ring, self.steps), now.slots
        if not schedule.num_waiting:
            slots = smallest_holding(self.slot_sizes, schedule.needed_slots)
        return fitted_to(now, slots, columns, schedule, self.first.width)

    def smaller(self, live: int) -> int:
        return largest_below(self.slot_sizes, live)


def fitted_to(now: Sizes, slots: int, columns: int, schedule: Schedule, width: int) -> Sizes:
    """The sizes of a batch that shrinks to so many slots; if it does not, its ring may grow.

    Args:
      columns: those that the ring needs.
      width: the most samples of a row where the batch shrinks.
    """
    if slots >= now.slots:
        return now._replace(columns=max(now.columns, columns))
    rows = min(now.rows, slots)
    width = schedule.narrow_width(slots, rows, width)
    return Sizes(slots, columns, rows, width, now.prefix, pages=now.pages)


def columns_for(column_sizes: Sequence[int], in_ring: int, steps: int) -> int:
    """Columns for so many tokens in the ring and the fewest steps that are worth a dispatch.

    Args:
      column_sizes: the lengths that there may be, rising.
      steps: the most decode steps of a dispatch.
    """
    steps = min(LEAST_STEPS, steps, column_sizes[0])
    return smallest_holding(column_sizes, min(in_ring + steps, column_sizes[-1]))


def shared_settings(sampling: SamplingParams) -> Settings:
    """Settings that give all samples the same; see `batching.Settings`."""
    chosen = sampling.knobs(), sampling.method
    return lambda _: chosen


class Growing:
    """The tokens of one sample so far; they take no more memory than there are tokens."""

    def __init__(self):
        self.tokens = array.array("i")
        self.log_probs, self.full_log_probs = array.array("f"), array.array("f")
        self.experts: list[np.ndarray] = []

    def take(self, new: NewTokens, count: int):
        """Takes the first of the new tokens."""
        self.tokens.frombytes(new.tokens[:count].tobytes())
        self.log_probs.frombytes(new.log_probs[:count].tobytes())
        if new.full_log_probs is not None:
            self.full_log_probs.frombytes(new.full_log_probs[:count].tobytes())
        if new.experts is not None:
            self.experts.append(np.array(new.experts[:count]))


def tokens_to_stop_string(
    detokenize: Callable[[list[int]], str],
    sampling: SamplingParams,
    old: array.array,
    new: np.ndarray,
    num_before: int,
) -> int | None:
    """How many new tokens it takes to complete the first stop string; None if there is none.

    A completion ends at the same token however its tokens are spread over the calls.

    Args:
      old, new: the tokens in which a stop string may begin, without one, and those that follow.
      num_before: tokens of the completion before the new ones.
    """
    old, new = old.tolist(), new.tolist()
    first = max(1, sampling.min_tokens - num_before)

    def contains(text: str) -> bool:
        return any(stop in text for stop in sampling.stop)

    if first > len(new):
        return None
    text = detokenize(old + new)
    if not contains(text) and not (REPLACEMENT in text and _may_hide(text, detokenize(old))):
        return None
    counts = range(first, len(new) + 1)
    return next((count for count in counts if contains(detokenize(old + new[:count]))), None)


def _may_hide(text: str, before: str) -> bool:
    """Whether the first of the new tokens alone may have characters that the text of all lacks.

    A tokenizer with tokens of single bytes writes a whole run of them as `REPLACEMENT` where its
    end is no character, the characters at its beginning too.

    Args:
      text, before: the text of all tokens, and of those before the new ones.
    """
    parting = next((i for i, (a, b) in enumerate(zip(text, before)) if a != b), len(before))
    return REPLACEMENT in text[parting:]


class Generation:
    """One call of `generate` under way; it makes completions of the tokens of its samples.

    Args:
      loop: the loop in which the requests are queued already.
      requests: one a prompt, all with the same settings.
      version: iterations done by the weights that are sampled from.
      detokenize: token ids -> text; needed where the settings have stop strings.
      on_tokens: called with (prompt, sample, its new tokens [T]) after every dispatch.
      on_completion: called with (prompt, sample, its completion) when a sample has ended.
    """

    def __init__(
        self,
        loop: DecodeLoop,
        requests: Sequence[Request],
        *,
        version: int = 0,
        detokenize: Callable[[list[int]], str] | None = None,
        on_tokens: Callable[[int, int, np.ndarray], None] | None = None,
        on_completion: Callable[[int, int, Completion], None] | None = None,
    ):
        self._loop, self._version = loop, version
        self._sampling = requests[0].sampling
        self._detokenize = detokenize
        self._on_tokens, self._on_completion = on_tokens, on_completion
        self._index = {request: index for index, request in enumerate(requests)}
        self._growing: dict[Sample, Growing] = {}
        # The ended completions of each prompt whose group has not ended yet.
        self._ended: dict[Request, dict[int, Completion]] = {}
        self._num_left = len(requests)

    @property
    def done(self) -> bool:
        """Whether all groups have been handed over."""
        return not self._num_left

    def advance(self) -> list[FinishedGroup]:
        """Runs one dispatch, and returns the groups that ended with it."""
        groups = [self._take(new) for new in self._loop.step()]
        finished = [group for group in groups if group is not None]
        self._num_left -= len(finished)
        return finished

    def _take(self, new: NewTokens) -> FinishedGroup | None:
        """Takes the new tokens of a sample; returns its group if that has ended with them."""
        sample, count, finish_reason = new.sample, len(new.tokens), new.finish_reason
        growing = self._growing.get(sample)
        if growing is None:
            growing = self._growing[sample] = Growing()
        if self._sampling.stop:
            old = growing.tokens
            at_string = tokens_to_stop_string(
                self._detokenize, self._sampling, old, new.tokens, len(old)
            )
            if at_string is not None:
                if finish_reason is None:
                    self._loop.cancel(sample)
                count, finish_reason = at_string, "stop"
        growing.take(new, count)
        request = sample.request
        if self._on_tokens is not None:
            self._on_tokens(self._index[request], sample.index, new.tokens[:count])
        return None if finish_reason is None else self._finish(sample, finish_reason)

    def _finish(self, sample: Sample, finish_reason: str) -> FinishedGroup | None:
        """Makes the record of an ended sample; returns its group if that has ended too."""
        growing, request = self._growing.pop(sample), sample.request
        ended = self._ended.setdefault(request, {})
        ended[sample.index] = Completion.sampled(
            growing.tokens,
            growing.log_probs,
            finish_reason,
            full_log_probs=growing.full_log_probs if self._sampling.full_log_probs else None,
            experts=np.concatenate(growing.experts) if growing.experts else None,
            prompt_experts=request.prompt_experts,
            version=self._version,
        )
        if self._on_completion is not None:
            self._on_completion(self._index[request], sample.index, ended[sample.index])
        if len(ended) < len(request.samples):
            return None
        del self._ended[request]
        return FinishedGroup(self._index[request], [ended[i] for i in range(len(ended))])
