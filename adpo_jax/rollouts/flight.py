"""Groups in flight: the samples that one iteration leaves to the next."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from adpo_jax.engine.engine import Engine
from adpo_jax.engine.sampling import SamplingParams
from adpo_jax.engine.session import Turn
from adpo_jax.records import Completion, GradedGroups, token_fields

# The fields of a token that are kept in flight, with their dtypes.
FIELDS = token_fields()


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
        return cls(**{name: np.zeros(0, dtype) for name, dtype in FIELDS.items()}, told=told)

    @classmethod
    def of(cls, completion: Completion) -> "FlyingSample":
        """A sample that has ended."""
        fields = {name: getattr(completion, name) for name in FIELDS}
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
        for name, dtype in FIELDS.items():
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
        fields = {name: getattr(self, name) for name in FIELDS}
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


class OtherLimits(ValueError):
    """Samples that are whole and were made under other limits than those of the run."""


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
      full_log_probs: whether the sampler truncates, so that tokens have these; None for either.
    """

    n: int
    max_tokens: int
    vocab_size: int
    converses: bool = False
    experts: ExpertLimits | None = None
    full_log_probs: bool | None = None

    def check(self, sample: FlyingSample) -> None:
        """Checks a sample that was read.

        Raises:
          OtherLimits: for one that another run may have made.
          ValueError: for one that no run makes.
        """
        lengths = {len(getattr(sample, name)) for name in FIELDS if name != "full_log_probs"}
        tokens, count = sample.tokens, len(sample.tokens)
        # One that goes on has room for a token, unless its last turn has ended with calls.
        is_full = bool(sample.finish_reason or (sample.told and sample.told.asked))
        num_experts = 0 if sample.experts is None else len(sample.experts)
        num_full = len(sample.full_log_probs)
        is_told = sample.told is not None
        of_all_runs = [
            (lengths == {count}, f"fields of {sorted(lengths)} tokens"),
            (num_full in (0, count), f"full_log_probs of other than {count}"),
            (tokens.min(initial=0) >= 0, "token ids below 0"),
            (num_experts in (0, count), f"experts of {num_experts} tokens"),
        ]
        of_this_run = [
            (count < self.max_tokens + is_full, f"{count} tokens of at most {self.max_tokens}"),
            (
                tokens.max(initial=0) < self.vocab_size,
                f"token ids outside [0, {self.vocab_size})",
            ),
            (
                self.full_log_probs in (None, bool(num_full)) or not count,
                f"log-probs of a sampler that {'truncates' if num_full else 'does not truncate'}",
            ),
            (self.experts is None or num_experts == count, "no experts"),
            (
                is_told == self.converses or not count,
                "an environment" if is_told else "no environment",
            ),
        ]
        for kind, rules in ((ValueError, of_all_runs), (OtherLimits, of_this_run)):
            for what in (what for holds, what in rules if not holds):
                raise kind(f"a sample has {what}")


# The metrics of `age_metrics` begin so.
_AGES = ("ahead/staleness_", "ahead/lag_")


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


def with_ages_anew(groups: GradedGroups, step: int) -> GradedGroups:
    """Groups of which fewer tokens are trained on than when their source told their ages."""
    others = {k: v for k, v in groups.metrics.items() if not k.startswith(_AGES)}
    if len(others) == len(groups.metrics):
        return groups  # their source tells none
    return dataclasses.replace(groups, metrics=others | age_metrics(groups, step))
