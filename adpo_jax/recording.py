"""Recorded rollouts: what an iteration trained on, and training from it without a sampler.

One Parquet file an iteration, `000012.parquet`, a row a completion:

    prompt, sample      int32, place of the prompt in the iteration, of the completion in the group
    prompt_token_ids    list<int32>
    token_ids           list<int32>, the stop token included
    log_probs           list<float32>, nats, under the distribution that was sampled from
    full_log_probs      list<float32>, not truncated; where top-k, top-p or min-p truncate
    finish_reason       "stop" or "length"
    completion          the text, without special tokens
    reward              float32, the total; reward/<name> each component, NaN where it was skipped
    columns             the data columns of the prompt, as JSON

The bits of all numbers are kept, so that a replay under the same loss gives the same parameters.
"""

import json
import os
import time
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute
import pyarrow.parquet

from adpo_jax.engine import RolloutOutput
from adpo_jax.rewards import Scores
from adpo_jax.rollout import GradedRollout, Prompts

VERSION = 1


class ReplayError(ValueError):
    """A recording that is missing, damaged or of another run."""


_REWARD = "reward/"


def path_of(folder: Path, step: int) -> Path:
    """The file of iteration `step`, counted from 1."""
    return Path(folder) / f"{step:06d}.parquet"


def write(folder: Path, step: int, prompts: Prompts, graded: GradedRollout) -> Path:
    """Records an iteration; returns the file.

    A file that is there with the same content stays; one with another content, from an iteration
    that was taken back, is renamed, never overwritten.
    """
    buffer = pa.BufferOutputStream()
    table = _table(step, prompts, graded)
    pa.parquet.write_table(table, buffer, compression="zstd", write_page_checksum=True)
    content = buffer.getvalue().to_pybytes()
    path = path_of(folder, step)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists():
        if path.read_bytes() == content:
            return path
        number = len(list(path.parent.glob(f"{path.stem}.superseded-*")))
        path.rename(path.with_name(f"{path.stem}.superseded-{number}{path.suffix}"))
    unfinished = path.with_name(f"{path.name}.tmp")
    unfinished.write_bytes(content)
    os.replace(unfinished, path)
    return path


def read(folder: Path, step: int) -> tuple[Prompts, GradedRollout]:
    """The recording of iteration `step`, counted from 1.

    Raises:
      ReplayError: when there is none, or its file is damaged.
    """
    path = path_of(folder, step)
    started = time.perf_counter()
    table, info = _opened(path, pa.parquet.read_table), _info(path)
    try:
        prompts, out, scores = _parsed(table, info)
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise ReplayError(f"{path} is no readable recording: {error!r}") from error
    seconds = (time.perf_counter() - started, 0.0)
    return prompts, GradedRollout(out, table["completion"].to_pylist(), scores, seconds)


def _parsed(table: pa.Table, info: dict) -> tuple[Prompts, RolloutOutput, Scores]:
    P, G, T = info["prompts"], info["samples"], info["max_tokens"]
    rows = table.to_pydict()
    lengths = np.array([len(ids) for ids in rows["token_ids"]], np.int32).reshape(P, G)
    mask = (np.arange(T) < lengths[..., None]).astype(np.int32)

    def padded(name: str, dtype) -> np.ndarray:
        values = np.zeros((P * G, T), dtype)
        for row, found in enumerate(rows[name]):
            values[row, : len(found)] = found
        return values.reshape(P, G, T)

    has_full = "full_log_probs" in rows
    out = RolloutOutput(
        tokens=padded("token_ids", np.int32),
        mask=mask,
        lengths=lengths,
        log_probs=padded("log_probs", np.float32),
        finish_reason=np.array(rows["finish_reason"]).reshape(P, G),
        full_log_probs=padded("full_log_probs", np.float32) if has_full else None,
        stats={},
    )
    columns = [json.loads(text) for text in rows["columns"][::G]]
    names = columns[0].keys()
    prompts = Prompts(
        rows["prompt_token_ids"][::G], {name: [row[name] for row in columns] for name in names}
    )
    components = {
        name.removeprefix(_REWARD): table[name].to_numpy()
        for name in table.column_names
        if name.startswith(_REWARD)
    }
    return prompts, out, Scores(table["reward"].to_numpy(), components, info["counts"])


def check(
    folder: Path,
    steps: Iterable[int],
    *,
    num_prompts: int,
    num_samples: int,
    max_tokens: int,
    max_prompt_length: int,
) -> None:
    """Checks that iterations `steps` are recorded, and fit the run that they are to be replayed in.

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
        given = (info["prompts"], info["samples"], info["max_tokens"])
        if given != (num_prompts, num_samples, max_tokens):
            raise ReplayError(
                f"--replay: {path} has (prompts, completions a prompt, tokens) "
                f"{given}; the config's data.train_batch_size, algorithm.num_generations and "
                f"data.max_response_length are {(num_prompts, num_samples, max_tokens)}"
            )
        prompts = _opened(path, pa.parquet.read_table, columns=["prompt_token_ids"])[0]
        longest = pa.compute.max(pa.compute.list_value_length(prompts)).as_py()
        if longest > max_prompt_length:
            raise ReplayError(
                f"--replay: {path} has a prompt of {longest} tokens; raise data.max_prompt_length, "
                f"which is {max_prompt_length}"
            )


def _table(step: int, prompts: Prompts, graded: GradedRollout) -> pa.Table:
    out = graded.out
    P, G, T = out.tokens.shape
    lengths = out.lengths.reshape(-1).tolist()

    def cut(values: np.ndarray, kind: pa.DataType) -> pa.Array:
        rows = [row[:length] for row, length in zip(values.reshape(P * G, T), lengths)]
        return pa.array(rows, pa.list_(kind))

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
        "token_ids": cut(out.tokens, pa.int32()),
        "log_probs": cut(out.log_probs, pa.float32()),
        "finish_reason": out.finish_reason.reshape(-1).tolist(),
        # What a model wrote may hold lone surrogates, which UTF-8 has no bytes for.
        "completion": [text.encode(errors="replace").decode() for text in graded.completions],
        "reward": np.asarray(graded.scores.total, np.float32),
        **{_REWARD + name: values for name, values in graded.scores.components.items()},
        "columns": [text for text in data for _ in range(G)],
    }
    if out.full_log_probs is not None:
        columns["full_log_probs"] = cut(out.full_log_probs, pa.float32())
    info = {
        "version": VERSION,
        "step": step,
        "prompts": P,
        "samples": G,
        "max_tokens": T,
        "counts": graded.scores.counts,
    }
    return pa.table(columns).replace_schema_metadata({"adpo_jax": json.dumps(info)})


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
    if info["version"] != VERSION:
        raise ReplayError(f"{path} has version {info['version']}, wanted {VERSION}")
    return info
