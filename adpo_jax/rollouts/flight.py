"""Groups in flight: samples that one iteration leaves to the next, and the arrays made of them."""

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from adpo_jax.engine.engine import Engine
from adpo_jax.engine.sampling import SamplingParams
from adpo_jax.engine.session import Turn
from adpo_jax.records import Completion, GradedGroups, token_fields

# The fields of a token that are kept in flight, with their dtypes.
_FIELDS = token_fields()
_REASONS = ("", "stop", "length")
# The arrays of `packed_experts`.
EXPERT_ARRAYS = (
    "experts",
    "experts_lengths",
    "prompt_experts",
    "prompt_experts_lengths",
    "prompt_experts_of",
)


@dataclasses.dataclass(frozen=True)
class Told:
    """What its environment has told a sample in flight.

    Attributes:
      observation: what its reset returned for the prompt; None for nothing.
      answers: of each turn that tools have answered, the answer of each call, as the model reads
        it.
      asked: whether the last turn has ended with calls that are not answered yet.
      is_lost: whether the environment's process was killed.
      reward: of the environment, once the sample has ended; None for none.
      attributes: of the environment, once the sample has ended or its environment is lost.
    """

    observation: str | None = None
    answers: tuple[tuple[str, ...], ...] = ()
    asked: bool = False
    is_lost: bool = False
    reward: float | None = None
    attributes: dict[str, Any] = dataclasses.field(default_factory=dict)

    @classmethod
    def from_json(cls, content: Any) -> "Told":
        """What `dataclasses.asdict` made JSON of.

        Raises:
          ValueError, TypeError: for anything else.
        """
        told = cls(**content)
        answers = tuple(tuple(turn) for turn in told.answers)
        texts = [text for turn in answers for text in turn]
        fits = {
            "observation": told.observation is None or isinstance(told.observation, str),
            "answers": all(isinstance(text, str) for text in texts),
            "asked": type(told.asked) is bool,
            "is_lost": type(told.is_lost) is bool,
            "reward": told.reward is None or type(told.reward) is float,
            "attributes": isinstance(told.attributes, dict),
        }
        for name in (name for name, holds in fits.items() if not holds):
            raise ValueError(f"what an environment told: {name} is of another type")
        return dataclasses.replace(told, answers=answers)


@dataclasses.dataclass(frozen=True)
class FlyingSample:
    """A sample in flight; [T] each, as in `records.Completion`.

    full_log_probs has no tokens where the sampler does not truncate. finish_reason is "" while the
    sample goes on. `told` is None without an environment. experts [T, L, k] and prompt_experts
    [P - 1, L, k] are None unless they are asked for, and while there are none; those of a prompt
    are of the weights that read it first.
    """

    tokens: np.ndarray
    log_probs: np.ndarray
    trained: np.ndarray
    versions: np.ndarray
    turns: np.ndarray
    full_log_probs: np.ndarray
    finish_reason: str = ""
    told: Told | None = None
    experts: np.ndarray | None = None
    prompt_experts: np.ndarray | None = None

    @classmethod
    def empty(cls, told: Told | None = None) -> "FlyingSample":
        return cls(**{name: np.zeros(0, dtype) for name, dtype in _FIELDS.items()}, told=told)

    @classmethod
    def of(cls, completion: Completion) -> "FlyingSample":
        """A sample that has ended."""
        fields = {name: getattr(completion, name) for name in _FIELDS}
        if completion.full_log_probs is None:
            fields["full_log_probs"] = np.zeros(0, np.float32)
        return cls(
            **fields,
            finish_reason=completion.finish_reason,
            experts=completion.experts,
            prompt_experts=completion.prompt_experts,
        )

    def sampled(self, turn: Turn, version: int, number: int = 0) -> "FlyingSample":
        """The sample with further tokens of a turn, which weights of this version sampled.

        Args:
          number: of the turn, from 0.
        """
        more = {"tokens": turn.tokens, "log_probs": turn.log_probs, "trained": True}
        found = self._extended(
            more | {"versions": version, "turns": number, "full_log_probs": turn.full_log_probs}
        )
        if turn.experts is None:
            return found
        before = [] if self.experts is None else [self.experts]
        of_prompt = self.prompt_experts
        if of_prompt is None:
            of_prompt = turn.sample.request.prompt_experts
        experts = np.concatenate([*before, turn.experts])
        return dataclasses.replace(found, experts=experts, prompt_experts=of_prompt)

    def answered(self, ids: Sequence[int], version: int, number: int) -> "FlyingSample":
        """The sample with tokens that tools answered a turn with; nobody trains on them."""
        zeros = np.zeros(len(ids))
        full = zeros if len(self.full_log_probs) else None
        more = {"tokens": ids, "log_probs": zeros, "trained": False, "full_log_probs": full}
        return self._extended(more | {"versions": version, "turns": number})

    def _extended(self, more: dict[str, Any]) -> "FlyingSample":
        count = len(more["tokens"])
        fields = {}
        for name, dtype in _FIELDS.items():
            value, old = more[name], getattr(self, name)
            if value is not None:
                new = np.broadcast_to(np.asarray(value, dtype), count)
                old = np.concatenate([old, new]).astype(dtype)
            fields[name] = old
        return dataclasses.replace(self, **fields)

    def ended(self, finish_reason: str) -> "FlyingSample":
        """The sample with this reason; "" for one that goes on."""
        return dataclasses.replace(self, finish_reason=finish_reason)

    def turn_tokens(self, number: int) -> np.ndarray:
        """The tokens of a turn that were sampled."""
        return self.tokens[self.trained & (self.turns == number)]

    def completion(self) -> Completion:
        fields = {name: getattr(self, name) for name in _FIELDS}
        if not len(self.full_log_probs):
            fields["full_log_probs"] = None
        return Completion(
            **fields,
            finish_reason=self.finish_reason,
            experts=self.experts,
            prompt_experts=self.prompt_experts,
        )


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

    def admitting(
        self, owners: Mapping[int, int], step: int, groups: Mapping[int, FlyingGroup]
    ) -> "Flight":
        """The flight with groups that start after `step` iterations.

        Args:
          owners: the process of each new group, by the numbers that follow.
          groups: those of them that are this process's.
        """
        return Flight(
            groups=self.groups | groups,
            admitted_at=self.admitted_at | dict.fromkeys(owners, step),
            owners=self.owners | owners,
            next_number=self.next_number + len(owners),
        )

    def without(self, numbers: Iterable[int]) -> "Flight":
        """The flight without these groups."""
        gone = set(numbers)
        left = (
            {number: value for number, value in values.items() if number not in gone}
            for values in (self.groups, self.admitted_at, self.owners)
        )
        return Flight(*left, self.next_number)


def packed(flight: Flight) -> dict[str, np.ndarray]:
    """The flight as arrays of numbers alone; what environments told is the bytes of JSON."""
    samples = [sample for group in flight.groups.values() for sample in group]
    packed = {
        name: np.concatenate([np.zeros(0, dtype), *(getattr(s, name) for s in samples)])
        for name, dtype in _FIELDS.items()
    }
    for name in _FIELDS:
        packed[f"{name}_lengths"] = np.array([len(getattr(s, name)) for s in samples], np.int64)
    return (
        packed
        | packed_experts(samples)
        | {
            "numbers": np.array(list(flight.groups), np.int64),
            "all_numbers": np.array(list(flight.admitted_at), np.int64),
            "admitted_at": np.array(list(flight.admitted_at.values()), np.int64),
            "owners": np.array(list(flight.owners.values()), np.int64),
            "reasons": np.array([_REASONS.index(s.finish_reason) for s in samples], np.int8),
            "next_number": np.int64(flight.next_number),
            "told": _as_bytes([s.told and dataclasses.asdict(s.told) for s in samples]),
        }
    )


def packed_experts(
    samples: Sequence[FlyingSample | Completion],
) -> dict[str, np.ndarray]:
    """The experts of samples as arrays; {} where none has any.

    Those of prompts are written once for samples that share an array.
    """
    shapes = {s.experts.shape[1:] for s in samples if s.experts is not None}
    if not shapes:
        return {}
    (shape,) = shapes
    nothing = np.zeros((0, *shape), np.uint16)
    own = [nothing if s.experts is None else s.experts for s in samples]
    prompts = {id(s.prompt_experts): s.prompt_experts for s in samples}
    places = {name: place for place, name in enumerate(prompts)}
    of_prompts = [nothing if x is None else x for x in prompts.values()]
    return {
        "experts": np.concatenate([nothing, *own]).astype(np.uint16),
        "experts_lengths": np.array(list(map(len, own)), np.int64),
        "prompt_experts": np.concatenate([nothing, *of_prompts]).astype(np.uint16),
        "prompt_experts_lengths": np.array(list(map(len, of_prompts)), np.int64),
        "prompt_experts_of": np.array([places[id(s.prompt_experts)] for s in samples], np.int64),
    }


def unpacked_experts(
    content: Mapping[str, np.ndarray], limits: "ExpertLimits"
) -> list[tuple[np.ndarray | None, np.ndarray | None]]:
    """For each sample the experts of its tokens and of its prompt, as `packed_experts` had them.

    Raises:
      ValueError, LookupError: for arrays that it did not make, or experts that there are not.
    """

    def parts(name: str) -> list[np.ndarray | None]:
        values, lengths = content[name], content[f"{name}_lengths"]
        if values.dtype != np.uint16 or values.shape != (lengths.sum(), *limits.shape):
            raise ValueError(f"{name} has the shape {values.shape} and dtype {values.dtype}")
        if lengths.min(initial=0) < 0 or values.max(initial=0) >= limits.num_experts:
            raise ValueError(f"{name} says more experts than there are")
        values = np.split(values.astype(limits.dtype), np.cumsum(lengths))[:-1]
        return [part if len(part) else None for part in values]

    own, of_prompts = parts("experts"), parts("prompt_experts")
    places = content["prompt_experts_of"]
    if places.shape != (len(own),) or places.min(initial=0) < 0:
        raise ValueError("prompt_experts_of does not say a prompt of each sample")
    return [(experts, of_prompts[place]) for experts, place in zip(own, places.tolist())]


def _as_bytes(content: Any) -> np.ndarray:
    """[B] uint8, the bytes of JSON."""
    return np.frombuffer(json.dumps(content).encode(), np.uint8)


@dataclasses.dataclass(frozen=True)
class ExpertLimits:
    """What the experts of samples must be.

    Attributes:
      shape: (L, k), the layers and the experts of a token.
      num_experts: numbers are below it.
      dtype: of the arrays in completions.
    """

    shape: tuple[int, int]
    num_experts: int
    dtype: Any

    @classmethod
    def of(cls, engine: Engine, sampling: SamplingParams) -> "ExpertLimits | None":
        """Those of what an engine samples; None where nobody asks for experts."""
        if not sampling.routed_experts:
            return None
        verbs, mixture = engine.verbs, engine.policy.config.mixture
        return cls(verbs.experts_shape, mixture.num_experts, verbs.experts_dtype)


@dataclasses.dataclass(frozen=True)
class Limits:
    """What samples in flight must keep to.

    Attributes:
      n: samples of a group.
      max_tokens: of a sample.
      vocab_size: token ids are below this.
      converses: whether samples converse with environments.
      experts: of tokens and prompts, where samples say them; None where they do not.
    """

    n: int
    max_tokens: int
    vocab_size: int
    converses: bool = False
    experts: ExpertLimits | None = None

    def check(self, sample: FlyingSample) -> None:
        """Checks a sample that was read.

        Raises:
          ValueError: for one that does not keep to them.
        """
        lengths = {len(getattr(sample, name)) for name in _FIELDS if name != "full_log_probs"}
        tokens, count = sample.tokens, len(sample.tokens)
        # One that goes on has room for a token, unless its last turn has ended with calls.
        is_full = bool(sample.finish_reason or (sample.told and sample.told.asked))
        num_experts = 0 if sample.experts is None else len(sample.experts)
        is_told = sample.told is not None
        rules = [
            (lengths == {count}, f"fields of {sorted(lengths)} tokens"),
            (len(sample.full_log_probs) in (0, count), f"full_log_probs of other than {count}"),
            (count < self.max_tokens + is_full, f"{count} tokens of at most {self.max_tokens}"),
            (
                0 <= tokens.min(initial=0) <= tokens.max(initial=0) < self.vocab_size,
                f"token ids outside [0, {self.vocab_size})",
            ),
            (self.experts is None or num_experts == count, f"experts of {num_experts} tokens"),
            (
                is_told == self.converses or not count,
                "environments" if is_told else "no environment",
            ),
        ]
        for what in (what for holds, what in rules if not holds):
            raise ValueError(f"a sample has {what}")


def unpacked(content: dict[str, np.ndarray], limits: Limits) -> Flight:
    """The flight that `packed` made arrays of.

    Raises:
      ValueError, KeyError: for arrays that it did not make.
    """
    n = limits.n
    columns = {}
    for name, dtype in _FIELDS.items():
        ends = np.cumsum(content[f"{name}_lengths"])
        columns[name] = np.split(content[name].astype(dtype), ends)[:-1] if len(ends) else []
    reasons = [_REASONS[reason] for reason in content["reasons"]]
    found = json.loads(content["told"].tobytes())
    told = [None if x is None else Told.from_json(x) for x in found]
    samples = [
        FlyingSample(*values, finish_reason=reason, told=heard)
        for *values, reason, heard in zip(*columns.values(), reasons, told, strict=True)
    ]
    if limits.experts is not None and "experts" in content:
        samples = [
            dataclasses.replace(sample, experts=experts, prompt_experts=of_prompt)
            for sample, (experts, of_prompt) in zip(
                samples, unpacked_experts(content, limits.experts), strict=True
            )
        ]
    numbers, everywhere, admitted_at, owners = (
        content[name].tolist() for name in ("numbers", "all_numbers", "admitted_at", "owners")
    )
    if len(samples) != len(numbers) * n:
        raise ValueError(f"{len(samples)} samples of {len(numbers)} groups of {n}")
    if not set(numbers) <= set(everywhere) or min(everywhere, default=0) < 0:
        raise ValueError("groups that were never admitted")
    for sample in samples:
        limits.check(sample)
    for i in range(0, len(samples), n):
        if len({sample.told is None for sample in samples[i : i + n]}) > 1:
            raise ValueError("a group of which some samples have an environment, and some none")
    return Flight(
        {number: tuple(samples[i * n : (i + 1) * n]) for i, number in enumerate(numbers)},
        dict(zip(everywhere, admitted_at, strict=True)),
        dict(zip(everywhere, owners, strict=True)),
        int(content["next_number"]),
    )


def age_metrics(groups: GradedGroups, step: int) -> dict[str, float]:
    """How old the tokens are that the iteration after `step` iterations trains on."""
    lags = step - np.concatenate([c.versions[c.trained] for c in groups.completions.flat])
    if not len(lags):
        lags = np.zeros(1, int)
    shares = np.bincount(lags, minlength=1) / len(lags)
    return {
        "ahead/staleness_mean": float(lags.mean()),
        "ahead/staleness_max": float(lags.max()),
    } | {f"ahead/lag_{lag}_frac": float(share) for lag, share in enumerate(shares)}
