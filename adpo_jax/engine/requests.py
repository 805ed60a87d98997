"""What goes into the batching loop and comes out: requests, their samples, new tokens.

Letters: T tokens, A alternatives, L layers with a mixture, k experts of a token.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from adpo_jax.engine.sampling import SamplingParams


@dataclasses.dataclass(eq=False)
class Request:
    """A request for completions of one prompt.

    Attributes:
      prompt: [T] int32.
      sampling: the settings of the completions; `n` is their number.
      keys: returns the key of each sample, [n or more, 2] uint32. The thread that decodes calls it
        when the first sample starts.
      num_alternatives: how many of the likeliest tokens to return beside each sampled one.
      samples: the completions.
      version: the version of the parameters that read the prompt as its samples find it now (where
        it was read in pieces, that which began); None before it is read.
      prompt_experts: [T - 1, L, k], the experts that the prompt's tokens but the last went through;
        None before it is prefilled, and unless asked for.
    """

    prompt: np.ndarray
    sampling: SamplingParams
    keys: Callable[[], np.ndarray]
    num_alternatives: int = 0
    version: int | None = None
    prompt_experts: np.ndarray | None = None
    samples: list["Sample"] = dataclasses.field(init=False)

    def __post_init__(self):
        self.samples = [Sample(self, index) for index in range(self.sampling.n)]

    @functools.cached_property
    def key_data(self) -> np.ndarray:
        """[n or more, 2] uint32."""
        return self.keys()


@dataclasses.dataclass(eq=False)
class Sample:
    """One completion: waiting, in a slot, or ended.

    Attributes:
      index: its number among the samples of its request.
      num_tokens: tokens of the completion so far.
      before: those of them that do not lie in the ring: it had them when it took its slot (of
        earlier turns, or begun), or they are in pages.
      completion: [num_tokens] int32, its tokens when it goes on or begins with some; else None.
      in_past: columns of its past row, or of its pages, that hold what it had as a turn ended.
      first: column of the ring where its tokens begin.
      version: the version of the parameters that had read the prompt when it began; None before.
      cancelled: whether its request gave up on further tokens.
      ended: whether it gets no further tokens, unless it goes on with a further turn.
    """

    request: Request
    index: int
    num_tokens: int = 0
    before: int = 0
    completion: np.ndarray | None = None
    in_past: int = 0
    first: int = 0
    version: int | None = None
    cancelled: bool = False
    ended: bool = False

    @property
    def age(self) -> int:
        """Tokens that it has in the ring."""
        return self.num_tokens - self.before


class NewTokens(NamedTuple):
    """The tokens that one step sampled of one completion.

    tokens are [T] int32, log_probs [T] float32. alternatives, where the request asks for them, are
    the ids and log-probs [T, A] of the likeliest tokens. finish_reason is "stop" or "length" at the
    end, else None. full_log_probs, where asked for, are [T] float32, tempered and not truncated;
    experts likewise are [T, L, k], as of `ResultTokens`. version is that of the parameters which
    sampled them.
    """

    sample: Sample
    tokens: np.ndarray
    log_probs: np.ndarray
    alternatives: tuple[np.ndarray, np.ndarray] | None
    finish_reason: str | None
    full_log_probs: np.ndarray | None = None
    version: int = 0
    experts: np.ndarray | None = None
