"""Rollouts ahead of the update, on the same devices: samples go on from one iteration to the next.

An iteration ends when `pacing` has its groups. Samples that have not ended keep their tokens, the
log-probs that the sampler drew them with and the version of the weights of each token, and go on
under the new weights in the next iteration. Their keys and values are made again by prefill, so
that no token attends to what older weights computed.

What is in flight is saved with every checkpoint, as tokens and not as memory of a device. With the
same seed a resumed run ends with the same bits, since every iteration prefills anew.

Several processes share the groups in flight. Each decodes its own, and an iteration ends for all at
once.

Source of the idea: "partial rollouts", Kimi Team 2025, arXiv 2501.12599, section 2.6.2.
"""

import contextlib
import dataclasses
import io
import os
import time
import zipfile
import zlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import jax
import numpy as np

from adpo_jax.devices import distributed
from adpo_jax.engine.batching import Sample
from adpo_jax.engine.sampling import sample_keys
from adpo_jax.engine.session import Session, Turn
from adpo_jax.records import Completion, Completions, GradedGroups, Prompts
from adpo_jax.rewards import RewardError
from adpo_jax.rollouts.pacing import WINDOW, Pacing, shared_out
from adpo_jax.rollouts.sampler import Sampler
from adpo_jax.rollouts.source import Source, SourceError

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
class _Sample:
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
    def empty(cls) -> "_Sample":
        return cls(**{name: np.zeros(0, dtype) for name, dtype in _FIELDS.items()})

    def extended(self, turn: Turn, version: int) -> "_Sample":
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
        return _Sample(**fields, finish_reason=turn.finish_reason or "")

    def completion(self) -> Completion:
        full = self.full_log_probs if len(self.full_log_probs) else None
        found = Completion.sampled(
            self.tokens, self.log_probs, self.finish_reason, full_log_probs=full
        )
        return dataclasses.replace(found, versions=self.versions)


# The samples of a group in flight.
_Group = tuple[_Sample, ...]


def _is_whole(group: Sequence[_Sample]) -> bool:
    return all(sample.finish_reason for sample in group)


@dataclasses.dataclass(frozen=True)
class _Flight:
    """What an iteration leaves to the next.

    Attributes:
      groups: those of this process, by their numbers.
      admitted_at: the iterations done when each group was admitted, those of other processes too.
      owners: the process of each of these groups.
      next_number: of the first group that has not been admitted.
    """

    groups: dict[int, _Group] = dataclasses.field(default_factory=dict)
    admitted_at: dict[int, int] = dataclasses.field(default_factory=dict)
    owners: dict[int, int] = dataclasses.field(default_factory=dict)
    next_number: int = 0

    def without(self, chosen: list[int], left: dict[int, _Group]) -> "_Flight":
        """The flight without the groups that are trained on; `left` are this process's others."""
        gone = set(chosen)
        return _Flight(
            left,
            {number: at for number, at in self.admitted_at.items() if number not in gone},
            {number: owner for number, owner in self.owners.items() if number not in gone},
            self.next_number,
        )


class _Decoding:
    """The decoding of an iteration: the groups of this process, in a session."""

    def __init__(self, session: Session, step: int, groups: dict[int, _Group]):
        self._session, self._step = session, step
        self._samples = {number: list(group) for number, group in groups.items()}
        # Of the session's samples: the group's number, and the sample's number in it.
        self._places: dict[Sample, tuple[int, int]] = {}

    def submit(self, number: int, prompt: list[int], keys: np.ndarray):
        """Has the samples of a group decoded that have not ended."""
        group = self._samples[number]
        going_on = [i for i, sample in enumerate(group) if not sample.finish_reason]
        if going_on:
            begun = [group[i].tokens for i in going_on]
            request = self._session.submit(prompt, begun, keys=keys[going_on])
            places = ((number, i) for i in going_on)
            self._places |= dict(zip(request.samples, places, strict=True))

    def until_chosen(self, pacing: Pacing, admitted_at: dict[int, int]) -> list[int]:
        """Decodes until the iteration has its groups, and returns their numbers."""
        while True:
            whole = [number for number, group in self._samples.items() if _is_whole(group)]
            whole = [number for part in distributed.all_gather(whole) for number in part]
            chosen = pacing.chosen(self._step, admitted_at, whole)
            if chosen is not None:
                return chosen
            with distributed.fail_together():
                self._decode_window()

    def _decode_window(self):
        session = self._session
        until = session.stats["steps"] + (WINDOW if jax.process_count() > 1 else 1)
        while session.num_decoding and session.stats["steps"] < until:
            for turn in session.step():
                self._take(turn)
                session.end(turn.sample)

    def _take(self, turn: Turn):
        number, i = self._places[turn.sample]
        self._samples[number][i] = self._samples[number][i].extended(turn, self._step)

    def left(self) -> dict[int, _Group]:
        """Ends the session; the groups with the tokens that they have."""
        for turn in self._session.leave():
            self._take(turn)
        return {number: tuple(group) for number, group in self._samples.items()}


@dataclasses.dataclass(frozen=True)
class _Part:
    """What a process brings to an iteration.

    Attributes:
      numbers: of its groups that are trained on.
      graded: these groups; None for none.
      seconds: of sampling.
      sampled: tokens sampled by all of its samples.
      slot_steps: steps times slots.
      carried: tokens of the groups that it has left in flight.
      in_flight: their number.
    """

    numbers: list[int]
    graded: GradedGroups | None
    seconds: float
    sampled: int
    slot_steps: int
    carried: int
    in_flight: int


class Ahead(Source):
    """Groups that are sampled ahead of the update.

    Args:
      sampler: its engine, settings and rewards are used.
      prompts_of: number of a batch, from 0 -> its prompts.
      folder: the folder that `save` writes in.
      batch_size: prompts of a batch, over all processes.
      num_steps: iterations of the whole run.
      max_staleness, ahead: as of `Pacing`, over all processes.
    """

    saves_on_every_process = True

    def __init__(
        self,
        sampler: Sampler,
        prompts_of: Callable[[int], Prompts],
        folder: Path,
        *,
        batch_size: int,
        num_steps: int,
        max_staleness: int,
        ahead: int,
    ):
        self._sampler, self._prompts_of, self._folder = sampler, prompts_of, folder
        self._pacing = Pacing(batch_size, max_staleness, ahead, num_groups=num_steps * batch_size)
        self._flights: dict[int, _Flight] = {0: _Flight()}  # by iterations done

    def next(self, step: int, params) -> GradedGroups:
        """The groups of the iteration after `step` iterations, the same on every process.

        Raises:
          RewardError: when a reward function fails on any process.
          SourceError: when what iteration `step` left in flight was not kept.
        """
        before = self._flight(step)
        there = self._admitted(step, before)
        sampler, began = self._sampler, time.perf_counter()
        with jax.profiler.TraceAnnotation("rollout"), contextlib.ExitStack() as stack:
            with distributed.fail_together():
                session = sampler.engine.session(
                    params, sampler.sampling, jax.random.key(sampler.seed), version=step
                )
                decoding = _Decoding(stack.enter_context(session), step, there.groups)
                prompts = self._prompts(there.groups).token_ids if there.groups else []
                for number, prompt in zip(there.groups, prompts, strict=True):
                    decoding.submit(number, prompt, self._keys(number))
            chosen = decoding.until_chosen(self._pacing, there.admitted_at)
            groups, stats = decoding.left(), dict(session.stats)
        seconds = time.perf_counter() - began
        taken = [number for number in chosen if number in groups]
        try:
            with distributed.fail_together():
                graded = self._graded(step, taken, groups, stats)
        except RewardError as error:
            sampler.keep_sample(step, error)
            raise
        left = {n: group for n, group in groups.items() if n not in set(chosen)}
        mine = _Part(
            numbers=taken,
            graded=graded,
            seconds=seconds,
            sampled=sum(int(np.sum(s.versions == step)) for g in groups.values() for s in g),
            slot_steps=stats["slot_steps"],
            carried=sum(len(sample.tokens) for group in left.values() for sample in group),
            in_flight=len(left),
        )
        self._flights = {step: before, step + 1: there.without(chosen, left)}
        return _joined(distributed.all_gather(mine), step)

    def _graded(
        self, step: int, numbers: list[int], groups: dict[int, _Group], stats: dict[str, int]
    ) -> GradedGroups | None:
        """Those of the groups that are trained on; None for none."""
        if not numbers:
            return None
        completions = [[sample.completion() for sample in groups[n]] for n in numbers]
        return self._sampler.graded(step, self._prompts(numbers), Completions(completions, stats))

    def _admitted(self, step: int, before: _Flight) -> _Flight:
        """The flight with the groups that start now."""
        new = self._pacing.admitted(before.next_number, len(before.admitted_at))
        owners = before.owners | shared_out(new, before.owners.values(), jax.process_count())
        started = (_Sample.empty(),) * self._sampler.sampling.n
        mine = {n: started for n in new if owners[n] == jax.process_index()}
        return _Flight(
            groups=before.groups | mine,
            admitted_at=before.admitted_at | dict.fromkeys(new, step),
            owners=owners,
            next_number=before.next_number + len(new),
        )

    def _prompts(self, numbers: Iterable[int]) -> Prompts:
        """The prompts of groups, in this order."""
        P = self._pacing.batch_size
        found = {batch: self._prompts_of(batch) for batch in {n // P: None for n in numbers}}
        return Prompts.concatenate([found[n // P].select([n % P]) for n in numbers])

    def _keys(self, number: int) -> np.ndarray:
        """[G, 2] uint32, the keys of a group's samples, whatever iteration samples from them."""
        batch, row = divmod(number, self._pacing.batch_size)
        key = jax.random.fold_in(jax.random.key(self._sampler.seed), batch)
        return np.asarray(sample_keys(key, np.array([row], np.uint32), self._sampler.sampling.n))[0]

    # --- what is in flight, on disk

    def save(self, step: int, *, oldest: int = 0) -> None:
        """Saves what iteration `step` left in flight on this process."""
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._path(step)
        unfinished = path.with_name(f"{path.name}.tmp")
        with unfinished.open("wb") as file:
            np.savez(file, **_packed(self._flight(step)))
        os.replace(unfinished, path)
        for other in self._folder.glob("*.npz"):
            number, process, *_ = other.name.split(".")
            if process == str(jax.process_index()) and int(number) < oldest:
                other.unlink()

    def check(self, step: int) -> None:
        """Checks that what iteration `step` left in flight was kept.

        Raises:
          SourceError: when it was not.
        """
        self._flight(max(step, 0))

    def restore(self, step: int) -> None:
        """Takes up what iteration `step` left in flight; errors as of `check`."""
        self.check(step)

    def _path(self, step: int) -> Path:
        return self._folder / f"{step:06d}.{jax.process_index()}.of{jax.process_count()}.npz"

    def _flight(self, step: int) -> _Flight:
        if step not in self._flights:
            path = self._path(step)
            try:
                with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as content:
                    flight = _unpacked(dict(content), self._sampler.sampling.n)
            except _DAMAGES as error:
                reason = "missing" if isinstance(error, FileNotFoundError) else "damaged"
                raise SourceError(
                    f"actor_rollout_ref.rollout.max_staleness: {path} is {reason}, in which "
                    f"iteration {step} left its samples in flight. A run that began without it, or "
                    "on another number of processes, goes on as it was; set it so, or start again "
                    "in another folder"
                ) from error
            self._flights = {step: flight}
        return self._flights[step]


def _packed(flight: _Flight) -> dict[str, np.ndarray]:
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


def _unpacked(content: dict[str, np.ndarray], n: int) -> _Flight:
    """The flight that `_packed` made arrays of.

    Raises:
      ValueError, KeyError: for arrays that it did not make.
    """
    columns = {}
    for name, dtype in _FIELDS.items():
        ends = np.cumsum(content[f"{name}_lengths"])
        columns[name] = np.split(content[name].astype(dtype), ends)[:-1] if len(ends) else []
    reasons = [_REASONS[reason] for reason in content["reasons"]]
    samples = [
        _Sample(*values, finish_reason=reason)
        for *values, reason in zip(*columns.values(), reasons, strict=True)
    ]
    numbers, everywhere, admitted_at, owners = (
        content[name].tolist() for name in ("numbers", "all_numbers", "admitted_at", "owners")
    )
    if len(samples) != len(numbers) * n:
        raise ValueError(f"{len(samples)} samples of {len(numbers)} groups of {n}")
    return _Flight(
        {number: tuple(samples[i * n : (i + 1) * n]) for i, number in enumerate(numbers)},
        dict(zip(everywhere, admitted_at, strict=True)),
        dict(zip(everywhere, owners, strict=True)),
        int(content["next_number"]),
    )


def _joined(parts: list[_Part], step: int) -> GradedGroups:
    """The groups of all processes in the order of their numbers, and the metrics of the flight."""
    graded = [part.graded for part in parts if part.graded is not None]
    numbers = [number for part in parts for number in part.numbers]
    together = GradedGroups.concatenate(graded)
    groups = together.select(np.argsort(numbers))
    lags = step - np.concatenate([c.versions for c in groups.completions.flat])
    sampled, slot_steps = (
        sum(getattr(p, name) for p in parts) for name in ("sampled", "slot_steps")
    )
    seconds = max(part.seconds for part in parts)
    metrics = {
        "ahead/staleness_mean": float(lags.mean()),
        "ahead/staleness_max": float(lags.max()),
        "ahead/in_flight": float(sum(part.in_flight for part in parts)),
        "ahead/carried_tokens": float(sum(part.carried for part in parts)),
        "ahead/idle_frac": 1.0 - sampled / max(slot_steps, 1),
        "rollout/tokens_per_s": sampled / max(seconds, 1e-9),
    }
    shares = np.bincount(lags, minlength=1) / len(lags)
    metrics |= {f"ahead/lag_{lag}_frac": float(share) for lag, share in enumerate(shares)}
    return dataclasses.replace(groups, seconds=(seconds, together.seconds[1]), metrics=metrics)
