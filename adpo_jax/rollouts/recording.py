"""Recorded rollouts: files of the groups that iterations trained on, and training from them.

There is one Parquet file an iteration, `000012.parquet`, with one row a completion:

    prompt, sample      int32, place of the prompt in the iteration, of the completion in the group
    prompt_token_ids    list<int32>
    tokens, log_probs,  the fields of `records.Completion`: a list for one that has a number a
    trained, ...        token, full_log_probs where top-k, top-p or min-p truncate
    finish_reason       "stop" or "length"
    completion          the text, without special tokens
    reward              float32, the total; reward/<name> each component, NaN where it was skipped
    columns             the data columns of the prompt, as JSON

The bits of all numbers are kept, so that a replay under the same loss gives the same parameters.
Version 1 of the format had token_ids for tokens, and completions of one turn alone.
"""

import dataclasses
import itertools
import json
import os
import time
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute
import pyarrow.parquet

from adpo_jax.records import Completion, Completions, GradedGroups, Prompts, token_fields
from adpo_jax.rewards import Scores
from adpo_jax.rollouts.source import Source, SourceError

VERSION = 2
READABLE = (1, 2)


class ReplayError(SourceError):
    """A recording that is missing, damaged or of another run."""


_REWARD = "reward/"


def path_of(folder: Path, step: int) -> Path:
    """The file of iteration `step`, counted from 1."""
    return Path(folder) / f"{step:06d}.parquet"


def write(folder: Path, step: int, groups: GradedGroups) -> Path:
    """Records an iteration; returns the file.

    An old file with the same content stays. One with other content, of an iteration that was taken
    back, is renamed and never overwritten.
    """
    buffer = pa.BufferOutputStream()
    table = _table(step, groups)
    pa.parquet.write_table(table, buffer, compression="zstd", write_page_checksum=True)
    content = buffer.getvalue().to_pybytes()
    path = path_of(folder, step)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists():
        if path.read_bytes() == content:
            return path
        olds = (path.with_stem(f"{path.stem}.superseded-{i}") for i in itertools.count())
        path.rename(next(old for old in olds if not old.exists()))
    unfinished = path.with_name(f"{path.name}.tmp")
    unfinished.write_bytes(content)
    os.replace(unfinished, path)
    return path


def read(folder: Path, step: int) -> GradedGroups:
    """The recording of iteration `step`, counted from 1.

    Raises:
      ReplayError: when there is none, or its file is damaged.
    """
    path = path_of(folder, step)
    started = time.perf_counter()
    table, info = _opened(path, pa.parquet.read_table), _info(path)
    try:
        groups = _parsed(table, info)
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise ReplayError(f"{path} is no readable recording: {error!r}") from error
    return dataclasses.replace(groups, seconds=(time.perf_counter() - started, 0.0))


def _parsed(table: pa.Table, info: dict) -> GradedGroups:
    P, G = info["prompts"], info["samples"]
    flat = _completions(table, info)
    if len(flat) != P * G:
        raise ValueError(f"{len(flat)} rows, wanted {P} x {G}")
    columns = [json.loads(text) for text in table["columns"].to_pylist()[::G]]
    prompts = Prompts(
        table["prompt_token_ids"].to_pylist()[::G],
        {name: [row[name] for row in columns] for name in columns[0]},
    )
    components = {
        name.removeprefix(_REWARD): table[name].to_numpy()
        for name in table.column_names
        if name.startswith(_REWARD)
    }
    return GradedGroups(
        prompts,
        Completions([flat[i : i + G] for i in range(0, P * G, G)]),
        table["completion"].to_pylist(),
        Scores(table["reward"].to_numpy(), components, info["counts"]),
    )


def _completions(table: pa.Table, info: dict) -> list[Completion]:
    """The completions of all rows."""
    old = info["version"] == 1
    if old:
        names = ["tokens" if name == "token_ids" else name for name in table.column_names]
        table = table.rename_columns(names)
    per_token = {
        name: [np.array(row, dtype) for row in table[name].to_pylist()]
        for name, dtype in token_fields().items()
        if name in table.column_names
    }
    rows = zip(table["finish_reason"].to_pylist(), *per_token.values(), strict=True)
    if old:
        return [
            Completion.sampled(
                finish_reason=reason, version=info["step"] - 1, **dict(zip(per_token, values))
            )
            for reason, *values in rows
        ]
    found = [
        Completion(finish_reason=reason, **dict(zip(per_token, values))) for reason, *values in rows
    ]
    for completion in found:
        lengths = {len(getattr(completion, name)) for name in per_token}
        if len(lengths) > 1:
            raise ValueError(f"a completion whose fields have {sorted(lengths)} tokens")
    if "experts" in table.column_names:
        experts = table["experts"].to_pylist()
        found = [_with_experts(c, e, info.get("experts")) for c, e in zip(found, experts)]
    if "prompt_experts" in table.column_names:
        prompts = table["prompt_token_ids"].to_pylist()
        found = _with_prompt_experts(found, table["prompt_experts"].to_pylist(), prompts, info)
    return found


def check(
    folder: Path,
    steps: Iterable[int],
    *,
    num_prompts: int,
    num_samples: int,
    max_response_length: int,
    max_prompt_length: int,
    prompt_key: str,
    vocab_size: int,
    experts: tuple[int, int] | None = None,
    rewards: Collection[str] = (),
) -> None:
    """Checks that iterations `steps` are recorded, and fit the run that will replay them.

    Args:
      prompt_key: the column of the data that has the prompts, which logged samples show.
      vocab_size: tokens that the model embeds.
      experts: the number of mixtures and of the experts of a token, where the run needs those that
        the tokens went through.
      rewards: the names of reward functions whose own rewards the run needs.

    Raises:
      ReplayError: naming what is missing or differs.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ReplayError(f"--replay: there is no folder {folder}")
    missing = [step for step in steps if not path_of(folder, step).exists()]
    if missing:
        there = sorted(path.name for path in folder.glob("*.parquet"))
        raise ReplayError(
            f"--replay: {folder} has no recording of iteration {missing[0]} "
            f"({len(missing)} of this run's are missing; there: {', '.join(there[:3]) or 'none'}"
            f"{' ...' if len(there) > 3 else ''}); set trainer.total_training_steps to what it has"
        )
    for step in steps:
        path = path_of(folder, step)
        info = _info(path)
        given = (info["prompts"], info["samples"])
        if given != (num_prompts, num_samples):
            raise ReplayError(
                f"--replay: {path} has (prompts, completions a prompt) {given}; the config's "
                "data.train_batch_size and algorithm.num_generations are "
                f"{(num_prompts, num_samples)}"
            )
        there = _opened(path, pa.parquet.read_schema).names
        if lacks := [name for name in rewards if f"{_REWARD}{name}" not in there]:
            raise ReplayError(
                f"--replay: {path} has no rewards of {', '.join(lacks)}, which "
                "algorithm.multi_objective_aggregation needs; replay with the reward functions of "
                "the recording"
            )
        if experts and info.get("experts") != list(experts):
            raise ReplayError(
                f"--replay: {path} says {info.get('experts') or 'nothing'} of (mixtures, experts "
                f"of a token), which are {list(experts)} in this model: replay its own recording, "
                "or set actor_rollout_ref.rollout.router_replay=false"
            )
        columns = list(json.loads(_opened(path, _first_columns)))
        if prompt_key not in columns:
            raise ReplayError(
                f"--replay: {path} has no column {prompt_key!r}, only {', '.join(columns)}; set "
                "data.prompt_key to the one with the prompts"
            )
        tokens = "token_ids" if info["version"] == 1 else "tokens"
        for column, limit, key in (
            ("prompt_token_ids", max_prompt_length, "data.max_prompt_length"),
            (tokens, max_response_length, "data.max_response_length"),
        ):
            values = _opened(path, pa.parquet.read_table, columns=[column])[0]
            longest = pa.compute.max(pa.compute.list_value_length(values)).as_py()
            what = "prompt" if column == "prompt_token_ids" else "completion"
            ids = pa.compute.min_max(pa.compute.list_flatten(values)).as_py()
            if unknown := [x for x in ids.values() if x is not None and not 0 <= x < vocab_size]:
                raise ReplayError(
                    f"--replay: {path} has a {what} with token {unknown[-1]}, and the model embeds "
                    f"{vocab_size} tokens: it was recorded with another model or tokenizer"
                )
            if longest > limit:
                raise ReplayError(
                    f"--replay: {path} has a {what} of {longest} tokens; raise {key}, which is "
                    f"{limit}"
                )


def _first_columns(path: Path) -> str:
    """The columns of the data of a recording's first prompt, as JSON."""
    return pa.parquet.read_table(path, columns=["columns"])["columns"][0].as_py()


class Replay(Source):
    """The groups that another run recorded, in the same order.

    Args:
      folder: the folder with the recordings of iterations 1 to `num_steps`.
      experts: as of `check`; None leaves those of a recording out.
      limits: the limits of the run, as for `check`.
    """

    def __init__(
        self,
        folder: Path,
        num_steps: int,
        *,
        experts: tuple[int, int] | None = None,
        **limits: Any,
    ):
        self._folder, self._num_steps = folder, num_steps
        self._experts, self._limits = experts, limits

    def check(self, step: int) -> None:
        """Checks that all iterations are recorded, and fit the run.

        Raises:
          ReplayError: naming what is missing or differs.
        """
        steps = range(1, self._num_steps + 1)
        check(self._folder, steps, experts=self._experts, **self._limits)

    def next(self, step: int, params) -> GradedGroups:
        groups = read(self._folder, step + 1)
        return groups if self._experts else groups.without_experts


def _table(step: int, groups: GradedGroups) -> pa.Table:
    prompts, completions, scores = groups.prompts, groups.completions.flat, groups.scores
    P, G = groups.rewards.shape
    ends = np.cumsum([0, *map(len, completions)], dtype=np.int32)

    def ragged(name: str, dtype: np.dtype) -> pa.Array:
        values = np.concatenate([getattr(completion, name) for completion in completions])
        return pa.ListArray.from_arrays(ends, pa.array(values, pa.from_numpy_dtype(dtype)))

    data = [
        json.dumps({name: values[p] for name, values in prompts.columns.items()}, default=str)
        for p in range(P)
    ]
    columns = {
        "prompt": np.repeat(np.arange(P, dtype=np.int32), G),
        "sample": np.tile(np.arange(G, dtype=np.int32), P),
        "prompt_token_ids": pa.array(
            [ids for ids in prompts.token_ids for _ in range(G)], pa.list_(pa.int32())
        ),
        **{
            name: ragged(name, dtype)
            for name, dtype in token_fields().items()
            if getattr(completions[0], name) is not None
        },
        **_experts_column(completions),
        **_prompt_experts_column(groups.completions.groups),
        "finish_reason": [completion.finish_reason for completion in completions],
        # Text of a model may hold lone surrogates, which UTF-8 has no bytes for.
        "completion": [text.encode(errors="replace").decode() for text in groups.texts],
        "reward": np.asarray(scores.total, np.float32),
        **{_REWARD + name: values for name, values in scores.components.items()},
        "columns": [text for text in data for _ in range(G)],
    }
    info = {
        "version": VERSION,
        "step": step,
        "prompts": P,
        "samples": G,
        "counts": scores.counts,
    }
    if experts_shape := groups.sequences.experts_shape:
        info["experts"] = list(experts_shape)
    return pa.table(columns).replace_schema_metadata({"adpo_jax": json.dumps(info)})


def _experts_column(completions: list[Completion]) -> dict[str, pa.Array]:
    """The experts that tokens went through, one list a completion; {} where they are not known."""
    if all(completion.experts is None for completion in completions):
        return {}
    values = [None if c.experts is None else c.experts.ravel() for c in completions]
    return {"experts": pa.array(values, pa.list_(pa.uint16()))}


def _prompt_experts_column(groups: list[list[Completion]]) -> dict[str, pa.Array]:
    """The experts of prompts, in the row of the first completion of each; {} if not known."""
    firsts = [group[0].prompt_experts for group in groups]
    if all(experts is None for experts in firsts):
        return {}
    values = [
        None if experts is None or g else experts.ravel()
        for group, experts in zip(groups, firsts)
        for g in range(len(group))
    ]
    return {"prompt_experts": pa.array(values, pa.list_(pa.uint16()))}


def _with_experts(completion: Completion, values: list | None, shape: list | None) -> Completion:
    """A completion with the experts of a recording."""
    if values is None:
        return completion
    experts = _experts_of(len(completion), values, shape, "a completion")
    return dataclasses.replace(completion, experts=experts)


def _with_prompt_experts(
    found: list[Completion], values: list, prompts: list[list[int]], info: dict
) -> list[Completion]:
    """Completions with the experts of their prompts, which the first of each prompt has."""
    G, arrays = info["samples"], {}
    if type(G) is not int or G < 1:
        raise ValueError("experts of prompts, without the number of samples of a prompt")
    for i, of_row in enumerate(values):
        if of_row is not None:
            length = len(prompts[i]) - 1
            arrays[i // G] = _experts_of(length, of_row, info.get("experts"), "a prompt")
    return [dataclasses.replace(c, prompt_experts=arrays.get(i // G)) for i, c in enumerate(found)]


def _experts_of(length: int, values: list, shape: list | None, whose: str) -> np.ndarray:
    """[length, L, k] uint16."""
    if not (isinstance(shape, list) and len(shape) == 2 and all(type(n) is int for n in shape)):
        raise ValueError("experts, without the number of layers and of experts of a token")
    if len(values) != length * shape[0] * shape[1]:
        raise ValueError(f"{whose} whose experts are not those of all its tokens")
    return np.array(values, np.uint16).reshape(length, *shape)


def _opened(path: Path, reader, **options):
    if reader is pa.parquet.read_table:
        options["page_checksum_verification"] = True
    try:
        return reader(path, **options)
    except (OSError, pa.ArrowException) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ReplayError(f"{path} is no readable recording: {reason}") from error


def _info(path: Path) -> dict:
    metadata = _opened(path, pa.parquet.read_schema).metadata or {}
    if b"adpo_jax" not in metadata:
        raise ReplayError(f"{path} is a Parquet file, but no recording of a run")
    try:
        info = json.loads(metadata[b"adpo_jax"])
    except ValueError as error:
        raise ReplayError(f"{path} is no readable recording: {error}") from error
    if info.get("version") not in READABLE:
        wanted = " or ".join(map(str, READABLE))
        raise ReplayError(f"{path} has version {info.get('version')}, wanted {wanted}")
    return info
