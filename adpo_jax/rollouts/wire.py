"""What samplers send their trainer: groups as arrays.

Nothing that is read here can be more than numbers, and no more bytes than were sent: arrays of
known names, stored as they are, whose headers are read before anything else. Sizes, shapes and
dtypes are checked against what the reader expects, as those of weights are (`weights`).
"""

import dataclasses
import hashlib
import io
import math
import struct
import zipfile
from collections.abc import Mapping, Sequence

import numpy as np

from adpo_jax.records import Completion, token_fields
from adpo_jax.rollouts.flight import ExpertLimits
from adpo_jax.rollouts.flight_arrays import EXPERT_ARRAYS, packed_experts, unpacked_experts

_REASONS = ("stop", "length")
_OPTIONAL = "full_log_probs"
_SHAPES = ("numbers", "lengths", "reasons")
# Groups of a file; a sampler sends one. A completion takes some kB here, however short it is.
_MOST_GROUPS = 1024
_MOST_DIRECTORY = 1 << 16
# Python writes larger files in another form (zip64), which is not read.
_MOST_BYTES = zipfile.ZIP64_LIMIT - (1 << 20)


class WireError(ValueError):
    """Something that was sent is not what it must be."""


# --- groups


def most_bytes(
    *,
    n: int,
    max_prompt_length: int,
    max_response_length: int,
    has_full_log_probs: bool,
    experts: ExpertLimits | None,
) -> int:
    """Bytes of the largest group that `packed_groups` may have to write.

    Raises:
      ValueError: where that is more than can be sent.
    """
    dtypes = token_fields()
    names = [name for name in dtypes if name != _OPTIONAL or has_full_log_probs]
    of_token, of_prompt = sum(dtypes[name].itemsize for name in names), 0
    if experts is not None:
        of_experts = math.prod(experts.shape) * np.dtype(np.uint16).itemsize
        of_token, of_prompt = of_token + of_experts, max_prompt_length * of_experts
    # Beside the tokens a file has a few numbers of each completion, and its directory.
    size = n * (max_response_length * of_token + of_prompt + 64) + _MOST_DIRECTORY
    if size > _MOST_BYTES:
        raise ValueError(
            f"a sampler sends a group as a whole, and one of rollout.n {n} completions of up to "
            f"data.max_response_length {max_response_length} tokens may take {size / 2**30:.1f} "
            f"GiB, {of_token:,} bytes a token; up to 2 GiB can be sent: lower either, or leave "
            "router_replay off"
        )
    return size


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
    names = [name for name in token_fields() if name != _OPTIONAL or has_full_log_probs]
    wanted = {*names, *_SHAPES, *(() if experts is None else EXPERT_ARRAYS)}
    try:
        arrays = _arrays(content, wanted)
        numbers, lengths, reasons = (arrays[name] for name in _SHAPES)
        if len(numbers) > _MOST_GROUPS:
            raise WireError(f"{len(numbers)} groups, where up to {_MOST_GROUPS} come at once")
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
            if len(arrays["prompt_experts_lengths"]) > len(lengths):
                raise WireError("experts of more prompts than there are completions")
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


def _arrays(content: bytes, names: set[str]) -> dict[str, np.ndarray]:
    """The arrays of an .npz file that has these and no others, none of them compressed.

    Raises:
      WireError: for other names, for compressed members, and for sizes that are not true.
    """
    # A directory becomes objects many times its bytes.
    if _directory_size(content) > _MOST_DIRECTORY:
        raise WireError("no file of groups: its directory is too large")
    with zipfile.ZipFile(io.BytesIO(content)) as file:
        members = {member.filename: member for member in file.infolist()}
        if sorted(m.filename for m in file.infolist()) != sorted(f"{n}.npy" for n in names):
            raise WireError(f"arrays {list(members)!r:.200}, where {sorted(names)} are wanted")
        if any(m.compress_type != zipfile.ZIP_STORED for m in members.values()):
            raise WireError("arrays that are compressed; they are sent as they are")
        # Members may lie over one another, and so be more than the bytes that came.
        size = sum(member.file_size for member in members.values())
        if size > len(content) or any(m.compress_size != m.file_size for m in members.values()):
            raise WireError(f"arrays of {size} bytes in a file of {len(content)}")
        return {name: _array(file, members[f"{name}.npy"]) for name in names}


def _directory_size(content: bytes) -> int:
    """Bytes of a zip file's directory, as its last record tells."""
    tells, further = content[-22:], content[-42:-38]
    if not tells.startswith(b"PK\x05\x06") or further == b"PK\x06\x07":
        raise ValueError("it does not end as a zip file without a comment")
    return struct.unpack_from("<I", tells, 12)[0]


def _array(file: zipfile.ZipFile, member: zipfile.ZipInfo) -> np.ndarray:
    """The array of a member, which is read only if its header tells its size."""
    headers = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }
    with file.open(member) as stream:
        shape, by_columns, dtype = headers[np.lib.format.read_magic(stream)](stream)
        if dtype.hasobject:
            raise ValueError(f"{member.filename} has more than numbers")
        size = math.prod(shape) * dtype.itemsize
        if min(shape, default=0) < 0 or size != member.file_size - stream.tell():
            raise WireError(f"{member.filename} has another size than its header tells")
        values = np.frombuffer(bytearray(stream.read()), dtype)
        return values.reshape(shape, order="F" if by_columns else "C")


# --- digests


def digest_of(content: bytes | np.ndarray) -> str:
    """The digest that goes with weights."""
    return hashlib.blake2b(content, digest_size=16).hexdigest()
