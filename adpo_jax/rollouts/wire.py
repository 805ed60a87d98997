"""What samplers send their trainer: groups as arrays.

Nothing that is read here can be more than numbers: `numpy` without pickles. Sizes, names, shapes
and dtypes are checked against what the reader expects, as those of weights are (`weights`).
"""

import dataclasses
import hashlib
import io
from collections.abc import Mapping, Sequence

import numpy as np

from adpo_jax.records import Completion, token_fields
from adpo_jax.rollouts.flight import ExpertLimits, packed_experts, unpacked_experts

_REASONS = ("stop", "length")
_OPTIONAL = "full_log_probs"


class WireError(ValueError):
    """Something that was sent is not what it must be."""


# --- groups


def packed_groups(groups: Mapping[int, Sequence[Completion]]) -> bytes:
    """Groups of completions by their numbers, as an .npz file."""
    flat = [completion for group in groups.values() for completion in group]
    fields = [n for n in token_fields() if n != _OPTIONAL or flat[0].full_log_probs is not None]
    content = {
        name: np.concatenate([np.zeros(0, token_fields()[name]), *(getattr(c, name) for c in flat)])
        for name in fields
    }
    content |= packed_experts(flat) | {
        "numbers": np.array(list(groups), np.int64),
        "lengths": np.array([len(completion) for completion in flat], np.int64),
        "reasons": np.array([_REASONS.index(c.finish_reason) for c in flat], np.int8),
    }
    buffer = io.BytesIO()
    np.savez(buffer, **content)
    return buffer.getvalue()


def read_groups(
    content: bytes,
    *,
    n: int,
    max_response_length: int,
    vocab_size: int,
    has_full_log_probs: bool,
    last_version: int,
    experts: ExpertLimits | None = None,
) -> dict[int, list[Completion]]:
    """The groups that `packed_groups` wrote.

    Args:
      n: completions of a group.
      max_response_length: tokens of a completion.
      last_version: that of the newest weights.
      experts: what the experts of tokens must be; None where they are not sent.

    Raises:
      WireError: for anything else.
    """
    try:
        with np.load(io.BytesIO(content), allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        numbers, lengths, reasons = (arrays[name] for name in ("numbers", "lengths", "reasons"))
        names = [name for name in token_fields() if name != _OPTIONAL or has_full_log_probs]
        if len(lengths) != len(numbers) * n or len(reasons) != len(lengths) or not len(numbers):
            raise WireError(f"{len(lengths)} completions of {len(numbers)} groups of {n}")
        if lengths.min() < 1 or lengths.max() > max_response_length:
            raise WireError(
                f"completions of {lengths.min()} to {lengths.max()} tokens, where 1 to "
                f"{max_response_length} are allowed"
            )
        columns = {}
        for name in names:
            values = arrays[name]
            if values.shape != (lengths.sum(),) or values.dtype != token_fields()[name]:
                raise WireError(f"{name} has the shape {values.shape} and dtype {values.dtype}")
            if values.dtype.kind == "f" and not np.isfinite(values).all():
                raise WireError(f"{name} has values that are not finite")
            columns[name] = np.split(values, np.cumsum(lengths)[:-1])
        tokens = arrays["tokens"]
        if tokens.min() < 0 or tokens.max() >= vocab_size:
            raise WireError(f"token ids outside [0, {vocab_size})")
        if numbers.ndim != 1 or numbers.dtype != np.int64 or (arrays["log_probs"] > 0).any():
            raise WireError("numbers that are none, or log-probs above 0")
        if not arrays["trained"].all() or arrays["turns"].any() or set(reasons.tolist()) - {0, 1}:
            raise WireError("completions that are not sampled in one turn")
        versions = arrays["versions"]
        if versions.min() < 0 or versions.max() > last_version:
            raise WireError(f"versions of the weights outside [0, {last_version}]")
        flat = [
            Completion(
                **{name: columns[name][i] for name in names},
                finish_reason=_REASONS[int(reasons[i])],
            )
            for i in range(len(lengths))
        ]
        if experts is not None:
            found = unpacked_experts(arrays, experts)
            if [0 if own is None else len(own) for own, _ in found] != lengths.tolist():
                raise WireError("tokens that do not say their experts")
            flat = [
                dataclasses.replace(completion, experts=own, prompt_experts=of_prompt)
                for completion, (own, of_prompt) in zip(flat, found, strict=True)
            ]
    except WireError:
        raise
    except Exception as error:  # whatever a stranger's file makes numpy and zip raise
        raise WireError(f"no file of groups: {str(error)[:200]}") from None
    return {int(number): flat[i * n : (i + 1) * n] for i, number in enumerate(numbers)}


# --- digests


def digest_of(content: bytes | np.ndarray) -> str:
    """The digest that goes with weights."""
    return hashlib.blake2b(content, digest_size=16).hexdigest()
