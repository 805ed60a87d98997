"""Groups in flight as arrays of numbers, in which they are saved and sent, and back."""

import dataclasses
import json
from collections.abc import Mapping, Sequence

import numpy as np

from adpo_jax.records import Completion
from adpo_jax.rollouts.flight import (
    FIELDS,
    ExpertLimits,
    Flight,
    FlyingSample,
    Limits,
    OtherLimits,
    Told,
)

_REASONS = ("", "stop", "length")
# The arrays of `packed_experts`.
EXPERT_ARRAYS = (
    "experts",
    "experts_lengths",
    "prompt_experts",
    "prompt_experts_lengths",
    "prompt_experts_of",
)


def packed(flight: Flight) -> dict[str, np.ndarray]:
    """The flight as arrays of numbers alone; what environments told is the bytes of JSON."""
    samples = [sample for group in flight.groups.values() for sample in group]
    columns = {
        name: np.concatenate([np.zeros(0, dtype), *(getattr(s, name) for s in samples)])
        for name, dtype in FIELDS.items()
    }
    for name in FIELDS:
        columns[f"{name}_lengths"] = np.array([len(getattr(s, name)) for s in samples], np.int64)
    told = json.dumps([s.told and dataclasses.asdict(s.told) for s in samples])
    return {
        **columns,
        **packed_experts(samples),
        "numbers": np.array(list(flight.groups), np.int64),
        "all_numbers": np.array(list(flight.admitted_at), np.int64),
        "admitted_at": np.array(list(flight.admitted_at.values()), np.int64),
        "owners": np.array(list(flight.owners.values()), np.int64),
        "reasons": np.array([_REASONS.index(s.finish_reason) for s in samples], np.int8),
        "next_number": np.int64(flight.next_number),
        "told": np.frombuffer(told.encode(), np.uint8),
    }


def packed_experts(samples: Sequence[FlyingSample | Completion]) -> dict[str, np.ndarray]:
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
    content: Mapping[str, np.ndarray], limits: ExpertLimits
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


def unpacked(content: dict[str, np.ndarray], limits: Limits) -> Flight:
    """The flight that `packed` made arrays of.

    Raises:
      OtherLimits: for those of a run with other limits.
      ValueError, KeyError: for arrays that it did not make.
    """
    n, samples = limits.n, _unpacked_samples(content, limits)
    numbers, everywhere, admitted_at, owners = (
        content[name].tolist() for name in ("numbers", "all_numbers", "admitted_at", "owners")
    )
    if len(samples) != len(numbers) * n:
        if numbers and samples and len(samples) % len(numbers) == 0:
            given = len(samples) // len(numbers)
            raise OtherLimits(f"a group has {given} samples in place of {n}")
        raise ValueError(f"{len(samples)} samples of {len(numbers)} groups")
    if not set(numbers) <= set(everywhere) or min(everywhere, default=0) < 0:
        raise ValueError("groups that were never admitted")
    for i in range(0, len(samples), n):
        if len({sample.told is None for sample in samples[i : i + n]}) > 1:
            raise ValueError("a group of which some samples have an environment, and some none")
    for sample in samples:
        limits.check(sample)
    return Flight(
        {number: tuple(samples[i * n : (i + 1) * n]) for i, number in enumerate(numbers)},
        dict(zip(everywhere, admitted_at, strict=True)),
        dict(zip(everywhere, owners, strict=True)),
        int(content["next_number"]),
    )


def _unpacked_samples(content: dict[str, np.ndarray], limits: Limits) -> list[FlyingSample]:
    """The samples of all groups, group after group."""
    columns = {}
    for name, dtype in FIELDS.items():
        ends = np.cumsum(content[f"{name}_lengths"])
        columns[name] = np.split(content[name].astype(dtype), ends)[:-1] if len(ends) else []
    reasons = [_REASONS[reason] for reason in content["reasons"]]
    told = json.loads(content["told"].tobytes())
    told = [None if x is None else Told.from_json(x) for x in told]
    samples = [
        FlyingSample(*values, finish_reason=reason, told=heard)
        for *values, reason, heard in zip(*columns.values(), reasons, told, strict=True)
    ]
    if limits.experts is None or "experts" not in content:
        return samples
    found = zip(samples, unpacked_experts(content, limits.experts), strict=True)
    return [
        dataclasses.replace(sample, experts=experts, prompt_experts=of_prompt)
        for sample, (experts, of_prompt) in found
    ]
