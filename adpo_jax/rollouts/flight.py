"""Groups in flight: samples that one iteration leaves to the next, in memory and on disk.

On disk they are arrays of numbers alone, a file for each process and checkpoint.
"""

import dataclasses
import io
import os
import zipfile
import zlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import jax
import numpy as np

from adpo_jax.engine.batching import Sample
from adpo_jax.engine.sampling import sample_keys
from adpo_jax.engine.session import Session, Turn
from adpo_jax.records import Completion, GradedGroups, Prompts
from adpo_jax.rollouts.source import SourceError

# The fields of a token that are kept in flight, with their dtypes.
_FIELDS = {
    "tokens": np.int32,
    "log_probs": np.float32,
    "full_log_probs": np.float32,
    "versions": np.int32,
}
_REASONS = ("", "stop", "length")
# What reading a file that is missing or damaged raises.
_DAMAGES = (OSError, ValueError, TypeError, LookupError, EOFError, zipfile.BadZipFile, zlib.error)


@dataclasses.dataclass(frozen=True)
class FlyingSample:
    """A sample in flight; [T] each.

    full_log_probs has no tokens where the sampler does not truncate. finish_reason is "" while the
    sample goes on.
    """

    tokens: np.ndarray
    log_probs: np.ndarray
    full_log_probs: np.ndarray
    versions: np.ndarray
    finish_reason: str = ""

    @classmethod
    def empty(cls) -> "FlyingSample":
        return cls(**{name: np.zeros(0, dtype) for name, dtype in _FIELDS.items()})

    @classmethod
    def of(cls, completion: Completion) -> "FlyingSample":
        """A sample that has ended; it has one turn, all of which is trained."""
        fields = {name: getattr(completion, name) for name in _FIELDS}
        if completion.full_log_probs is None:
            fields["full_log_probs"] = np.zeros(0, np.float32)
        return cls(**fields, finish_reason=completion.finish_reason)

    def extended(self, turn: Turn, version: int) -> "FlyingSample":
        """The sample with the tokens of a turn that weights of this version sampled."""
        full = self.full_log_probs if turn.full_log_probs is None else turn.full_log_probs
        more = {
            "tokens": turn.tokens,
            "log_probs": turn.log_probs,
            "full_log_probs": full[: 0 if turn.full_log_probs is None else None],
            "versions": np.full(len(turn.tokens), version),
        }
        fields = {
            name: np.concatenate([getattr(self, name), more[name]]).astype(dtype)
            for name, dtype in _FIELDS.items()
        }
        return FlyingSample(**fields, finish_reason=turn.finish_reason or "")

    def completion(self) -> Completion:
        full = self.full_log_probs if len(self.full_log_probs) else None
        found = Completion.sampled(
            self.tokens, self.log_probs, self.finish_reason, full_log_probs=full
        )
        return dataclasses.replace(found, versions=self.versions)


# The samples of a group in flight.
FlyingGroup = tuple[FlyingSample, ...]


def is_whole(group: Sequence[FlyingSample]) -> bool:
    return all(sample.finish_reason for sample in group)


@dataclasses.dataclass(frozen=True)
class Flight:
    """What an iteration leaves to the next.

    Attributes:
      groups: those of this process, by their numbers.
      admitted_at: the iterations done when each group was admitted, those of other processes too.
      owners: the process of each of these groups.
      next_number: of the first group that has not been admitted.
    """

    groups: dict[int, FlyingGroup] = dataclasses.field(default_factory=dict)
    admitted_at: dict[int, int] = dataclasses.field(default_factory=dict)
    owners: dict[int, int] = dataclasses.field(default_factory=dict)
    next_number: int = 0

    def without(self, chosen: list[int], left: dict[int, FlyingGroup]) -> "Flight":
        """The flight without the groups that are trained on; `left` are this process's others."""
        gone = set(chosen)
        return Flight(
            left,
            {number: at for number, at in self.admitted_at.items() if number not in gone},
            {number: owner for number, owner in self.owners.items() if number not in gone},
            self.next_number,
        )


def packed(flight: Flight) -> dict[str, np.ndarray]:
    """The flight as arrays of numbers alone."""
    samples = [sample for group in flight.groups.values() for sample in group]
    packed = {
        name: np.concatenate([np.zeros(0, dtype), *(getattr(s, name) for s in samples)])
        for name, dtype in _FIELDS.items()
    }
    for name in _FIELDS:
        packed[f"{name}_lengths"] = np.array([len(getattr(s, name)) for s in samples], np.int64)
    return packed | {
        "numbers": np.array(list(flight.groups), np.int64),
        "all_numbers": np.array(list(flight.admitted_at), np.int64),
        "admitted_at": np.array(list(flight.admitted_at.values()), np.int64),
        "owners": np.array(list(flight.owners.values()), np.int64),
        "reasons": np.array([_REASONS.index(s.finish_reason) for s in samples], np.int8),
        "next_number": np.int64(flight.next_number),
    }


def unpacked(content: dict[str, np.ndarray], n: int) -> Flight:
    """The flight that `packed` made arrays of.

    Raises:
      ValueError, KeyError: for arrays that it did not make.
    """
    columns = {}
    for name, dtype in _FIELDS.items():
        ends = np.cumsum(content[f"{name}_lengths"])
        columns[name] = np.split(content[name].astype(dtype), ends)[:-1] if len(ends) else []
    reasons = [_REASONS[reason] for reason in content["reasons"]]
    samples = [
        FlyingSample(*values, finish_reason=reason)
        for *values, reason in zip(*columns.values(), reasons, strict=True)
    ]
    numbers, everywhere, admitted_at, owners = (
        content[name].tolist() for name in ("numbers", "all_numbers", "admitted_at", "owners")
    )
    if len(samples) != len(numbers) * n:
        raise ValueError(f"{len(samples)} samples of {len(numbers)} groups of {n}")
    return Flight(
        {number: tuple(samples[i * n : (i + 1) * n]) for i, number in enumerate(numbers)},
        dict(zip(everywhere, admitted_at, strict=True)),
        dict(zip(everywhere, owners, strict=True)),
        int(content["next_number"]),
    )


class GroupDecoding:
    """Groups that are decoded in a session, whose weights have one version."""

    def __init__(self, session: Session, version: int):
        self._session, self._version = session, version
        self._samples: dict[int, list[FlyingSample]] = {}
        # Of the session's samples: the group's number, and the sample's number in it.
        self._places: dict[Sample, tuple[int, int]] = {}

    def submit(self, number: int, prompt: list[int], keys: np.ndarray, group: FlyingGroup) -> None:
        """Has the samples of a group decoded that have not ended."""
        assert number not in self._samples
        self._samples[number] = list(group)
        going_on = [i for i, sample in enumerate(group) if not sample.finish_reason]
        if going_on:
            begun = [group[i].tokens for i in going_on]
            request = self._session.submit(prompt, begun, keys=keys[going_on])
            places = ((number, i) for i in going_on)
            self._places |= dict(zip(request.samples, places, strict=True))

    def whole(self) -> list[int]:
        """The numbers of the groups whose samples have all ended."""
        return [number for number, group in self._samples.items() if is_whole(group)]

    def group(self, number: int) -> FlyingGroup:
        """A group as it is now."""
        return tuple(self._samples[number])

    def take(self, number: int) -> FlyingGroup:
        """A whole group, which is forgotten here."""
        return tuple(self._samples.pop(number))

    def decode(self, steps: int) -> None:
        """Decodes so many steps, or until nothing is left to decode."""
        session = self._session
        until = session.stats["steps"] + steps
        while session.num_decoding and session.stats["steps"] < until:
            for turn in session.step():
                self._take(turn)
                session.end(turn.sample)

    def _take(self, turn: Turn):
        number, i = self._places[turn.sample]
        if number in self._samples:
            self._samples[number][i] = self._samples[number][i].extended(turn, self._version)

    def left(self) -> dict[int, FlyingGroup]:
        """Ends the session; the groups with the tokens that they have."""
        for turn in self._session.leave():
            self._take(turn)
        return {number: tuple(group) for number, group in self._samples.items()}


@dataclasses.dataclass(frozen=True)
class Numbering:
    """What belongs to the number of a group, which counts the prompts in their order.

    Attributes:
      prompts_of: number of a batch, from 0 -> its prompts.
      batch_size: prompts of a batch.
      n: samples of a group.
    """

    prompts_of: Callable[[int], Prompts]
    batch_size: int
    seed: int
    n: int

    def prompts(self, numbers: Iterable[int]) -> Prompts:
        """The prompts of groups, in this order."""
        P = self.batch_size
        found = {batch: self.prompts_of(batch) for batch in {n // P: None for n in numbers}}
        return Prompts.concatenate([found[n // P].select([n % P]) for n in numbers])

    def keys(self, number: int) -> np.ndarray:
        """[n, 2] uint32, the keys of a group's samples, whatever iteration samples from them."""
        batch, row = divmod(number, self.batch_size)
        key = jax.random.fold_in(jax.random.key(self.seed), batch)
        return np.asarray(sample_keys(key, np.array([row], np.uint32), self.n))[0]


def age_metrics(groups: GradedGroups, step: int) -> dict[str, float]:
    """How old the tokens are that the iteration after `step` iterations trains on."""
    lags = step - np.concatenate([c.versions for c in groups.completions.flat])
    shares = np.bincount(lags, minlength=1) / len(lags)
    return {
        "ahead/staleness_mean": float(lags.mean()),
        "ahead/staleness_max": float(lags.max()),
    } | {f"ahead/lag_{lag}_frac": float(share) for lag, share in enumerate(shares)}


class FlightFiles:
    """What iterations left in flight, in a folder.

    Args:
      n: samples of a group.
      owner: whose files they are, a part of their names; None for this process among so many.
    """

    def __init__(self, folder: Path, n: int, owner: str | None = None):
        self._folder, self._n = folder, n
        self._owner = owner or f"{jax.process_index()}.of{jax.process_count()}"

    def save(self, step: int, flight: Flight, *, oldest: int = 0) -> None:
        """Saves what iteration `step` left in flight on this process; files before `oldest` go."""
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._path(step)
        unfinished = path.with_name(f"{path.name}.tmp")
        with unfinished.open("wb") as file:
            np.savez(file, **packed(flight))
        os.replace(unfinished, path)
        for other in self._folder.glob("*.npz"):
            number, _, owner = other.name.removesuffix(".npz").partition(".")
            if owner == self._owner and int(number) < oldest:
                other.unlink()

    def load(self, step: int) -> Flight:
        """What iteration `step` left in flight.

        Raises:
          SourceError: where it is missing or damaged.
        """
        path = self._path(step)
        try:
            with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as content:
                return unpacked(dict(content), self._n)
        except _DAMAGES as error:
            reason = "missing" if isinstance(error, FileNotFoundError) else "damaged"
            raise SourceError(
                f"actor_rollout_ref.rollout.max_staleness: {path} is {reason}, in which "
                f"iteration {step} left its samples in flight. A run that began without it, on "
                "another number of processes, or with its samplers elsewhere (--role), goes on as "
                "it was; set it so, or start again in another folder"
            ) from error

    def _path(self, step: int) -> Path:
        return self._folder / f"{step:06d}.{self._owner}.npz"
