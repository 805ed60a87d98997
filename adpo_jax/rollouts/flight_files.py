"""What iterations left in flight, on disk: arrays of numbers alone, a file for each checkpoint.

Each process that decodes groups has files of its own.
"""

import io
import os
import zipfile
import zlib
from collections.abc import Callable, Collection
from pathlib import Path

import jax
import numpy as np

from adpo_jax.rollouts.flight import Flight, Limits, OtherLimits
from adpo_jax.rollouts.flight_arrays import packed, unpacked
from adpo_jax.rollouts.numbering import DIGEST_SIZE
from adpo_jax.rollouts.source import SourceError, is_left_over

# What reading a file that is missing or damaged raises.
_DAMAGES = (
    OSError,
    ValueError,
    TypeError,
    LookupError,
    EOFError,
    RecursionError,
    zipfile.BadZipFile,
    zlib.error,
)


class FlightFiles:
    """What iterations left in flight, in a folder.

    Args:
      limits: what the samples in them must keep to.
      digests_of: numbers of groups -> digests of their prompts, as of `Numbering.digests`; they are
        kept with the samples. None to keep and compare none.
      owner: whose files they are, a part of their names; None for this process among so many.
    """

    def __init__(
        self,
        folder: Path,
        limits: Limits,
        digests_of: Callable[[list[int]], np.ndarray] | None = None,
        owner: str | None = None,
    ):
        self._folder, self._limits, self._digests_of = folder, limits, digests_of
        self._owner = owner or f"{jax.process_index()}.of{jax.process_count()}"

    def save(self, step: int, flight: Flight, *, kept: Collection[int] = ()) -> None:
        """Saves what iteration `step` left in flight on this process; what is left over goes."""
        arrays = packed(flight)
        if self._digests_of is not None:
            arrays["prompts"] = self._digests_of(list(flight.groups))
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._path(step)
        unfinished = path.with_name(f"{path.name}.tmp")
        with unfinished.open("wb") as file:
            np.savez(file, **arrays)
        os.replace(unfinished, path)
        for other in self._folder.glob("*.npz"):
            number, _, owner = other.name.removesuffix(".npz").partition(".")
            mine = owner == self._owner and number.isdecimal()
            if mine and is_left_over(int(number), kept):
                other.unlink()

    def load(self, step: int) -> Flight:
        """What iteration `step` left in flight.

        Raises:
          SourceError: where it is missing or damaged, or of other limits or prompts.
        """
        path = self._path(step)
        try:
            with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as content:
                arrays = dict(content)
            flight = unpacked(arrays, self._limits)
            kept = arrays.get("prompts")  # earlier versions kept no digests
            if kept is not None and kept.shape != (len(flight.groups), DIGEST_SIZE):
                raise ValueError(f"digests of prompts of the shape {kept.shape}")
        except OtherLimits as error:
            raise SourceError(
                f"actor_rollout_ref.rollout.max_staleness: {path} has samples in flight that this "
                f"run cannot go on with: {error}. Set algorithm.num_generations, "
                "data.max_response_length, the tokenizer, the environments and, of "
                "actor_rollout_ref.rollout, router_replay, top_k, top_p and min_p as they were, or "
                "start again in another folder"
            ) from error
        except _DAMAGES as error:
            is_missing = isinstance(error, FileNotFoundError)
            reason = "missing" if is_missing else f"damaged ({error!r:.200})"
            raise SourceError(
                f"actor_rollout_ref.rollout.max_staleness: {path} is {reason}, in which "
                f"iteration {step} left its samples in flight. A run that began without it, on "
                "another number of processes, or with its samplers elsewhere (--role), goes on as "
                "it was; set it so, or start again in another folder"
            ) from error
        others = []
        if kept is not None and self._digests_of is not None:
            differ = (kept != self._digests_of(list(flight.groups))).any(axis=1)
            others = [n for n, differs in zip(flight.groups, differ, strict=True) if differs]
        if others:
            raise SourceError(
                f"actor_rollout_ref.rollout.max_staleness: {path} has samples in flight of other "
                f"prompts than this run has (of groups {others[:5]}). Set trainer.seed, "
                "data.shuffle, data.train_batch_size, the data files and the tokenizer as they "
                "were, or start again in another folder"
            )
        return flight

    def _path(self, step: int) -> Path:
        return self._folder / f"{step:06d}.{self._owner}.npz"
