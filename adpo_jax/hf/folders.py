"""Hugging Face folders: found or downloaded, read, and written whole or not at all."""

import contextlib
import errno
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import huggingface_hub
import jax
import numpy as np
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    HTTPError,  # of its client: httpx or, from 2.0 on, httpx2
    LocalEntryNotFoundError,
)
from jax.experimental import multihost_utils
from safetensors import SafetensorError

from adpo_jax.hf import weights
from adpo_jax.hf.config import check_counts
from adpo_jax.hf.families import FAMILIES, WRAPPERS
from adpo_jax.hf.files import is_plain_name, read_json, size_of
from adpo_jax.hf.safetensors_files import Checkpoint, read_header
from adpo_jax.hf.tensors import FURTHER, VISION, WRAPPED_PREFIXES, layer_of
from adpo_jax.model import parameter_table
from adpo_jax.model.model_config import ModelConfig

# The files that a language model needs; a hub repository may have other formats beside them.
DOWNLOADED = [
    "config.json",
    "generation_config.json",
    "model*.safetensors",
    "model.safetensors.index.json",
    "tokenizer*",
    "vocab*",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "additional_chat_templates/*.jinja",
]
TOKENIZER_FILES = (
    "tokenizer*",
    "vocab*",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "additional_chat_templates/*.jinja",
    "*.model",
)
LARGEST_TOKENIZER_FILE = 1 << 28  # bytes; that of Gemma 3 has an eighth of it
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
# What is read of a config.json beside its `text_config`.
OUTER_KEYS = {
    "model_type",
    "architectures",
    "text_config",
    "tie_word_embeddings",
    "tokenizer_class",
    "dtype",
    "torch_dtype",
    *TOKEN_IDS,
}


def local_path(name: str | os.PathLike) -> Path:
    """The name as a path of this machine, whether or not anything is there.

    Raises:
      ValueError: for what no file can be called.
    """
    try:
        folder = Path(name).expanduser()
        folder.is_dir()  # which raises where the name is too long
    except (OSError, RuntimeError, ValueError) as error:
        raise ValueError(f"there is no folder {str(name)!r:.200}: {error}"[:500]) from None
    return folder


def find_folder(name: str | os.PathLike, patterns: Sequence[str] = tuple(DOWNLOADED)) -> Path:
    """A local folder, or the folder that a hub name is downloaded to.

    Args:
      patterns: the files to download.

    Raises:
      ValueError: when the name is neither.
    """
    folder = local_path(name)
    if folder.is_dir():
        return folder
    if folder.is_symlink() or folder.exists():
        if not folder.exists():
            raise ValueError(f"there is no folder {folder}: it is a link that leads nowhere")
        raise ValueError(f"{folder} is a file; give the folder that holds config.json")
    if str(name).startswith((".", "/", "~")) or str(name).count("/") > 1:
        raise ValueError(f"there is no folder {folder}")
    try:
        return Path(huggingface_hub.snapshot_download(str(name), allow_patterns=list(patterns)))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise ValueError(
            f"there is no folder {name!r}, and the Hugging Face hub gives no model of that name: "
            f"{str(error).strip().splitlines()[0]}"
        ) from error


def find_config(name: str | os.PathLike) -> dict[str, Any]:
    """The config.json of a local folder or a hub name; no other file of the hub is downloaded.

    Raises:
      ValueError: when there is none.
    """
    folder = local_path(name)
    if folder.is_dir() or folder.exists() or str(name).count("/") != 1:
        return _read_config(find_folder(name))
    try:
        return read_json(Path(huggingface_hub.hf_hub_download(str(name), "config.json")))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise ValueError(
            f"there is no folder {name!r}, and the Hugging Face hub gives no config.json of that "
            f"name: {str(error).strip().splitlines()[0]}"
        ) from error


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model: one alone, or those that an index names.

    Raises:
      ValueError: for pickles only, nothing at all, or an index with entries that are missing or
        lie outside the folder.
    """
    single = folder / "model.safetensors"
    index_path = folder / "model.safetensors.index.json"
    if single.exists():
        return [single]
    if index_path.exists():
        weight_map = read_json(index_path).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise ValueError(f"{index_path} has no weight_map")
        if not all(isinstance(name, str) for name in weight_map.values()):
            raise ValueError(f"{index_path} has a weight_map to what are no names of files")
        names = sorted(set(weight_map.values()))
        outside = [name[:80] for name in names if not is_plain_name(name)]
        if outside:
            raise ValueError(f"{index_path} names files outside its folder: {outside[:8]}")
        absent = [name for name in names if not (folder / name).exists()]
        if absent:
            raise ValueError(f"{index_path} names files that are missing: {absent[:8]}")
        return [folder / name for name in names]
    pickles = sorted(path.name for pattern in PICKLES for path in folder.glob(pattern))
    if pickles:
        raise ValueError(
            f"{folder} has only pickled weights ({pickles[0]}), which may run any code when read. "
            "Convert them: load the model with transformers in a place you trust and "
            "save_pretrained it, which writes safetensors."
        )
    raise ValueError(f"{folder} has neither model.safetensors nor model.safetensors.index.json")


def dtypes(folder: Path) -> set[str]:
    """The dtypes of a folder's tensors, by the names of safetensors ("F32", "BF16").

    Those that are float32 in every folder are left out.
    """
    always = tuple(f".{row.hf_name}" for row in parameter_table.LAYER if row.is_float32)
    headers = (read_header(path) for path in weight_files(folder))
    return {
        entry["dtype"]
        for header in headers
        for name, entry in header.items()
        if not name.endswith(always)
    }


def load_params(config: ModelConfig, abstract_params, folder: Path, model_type: str):
    """The parameters of a folder, in the shardings of `abstract_params`.

    Args:
      model_type: the model_type in config.json as it lies on disk.
    """
    checkpoint = Checkpoint(weight_files(folder))
    if model_type in WRAPPERS:
        checkpoint.rename(WRAPPED_PREFIXES, drop=VISION)
    text_types = WRAPPERS[model_type].text_types if model_type in WRAPPERS else (model_type,)
    if any(FAMILIES[kind].further_layers for kind in text_types):
        checkpoint.forget(
            lambda name: name.startswith(FURTHER) or layer_of(name) >= config.num_layers
        )
    return weights.load(config, abstract_params, checkpoint)


def save_folder(
    folder: str | os.PathLike,
    params,
    *,
    config: ModelConfig,
    config_json: dict[str, Any],
    generation_config: dict[str, Any],
    tokenizer,
    dtype,
    max_shard_size: int,
    overwrite: bool,
    lora_scale: float = 1.0,
) -> None:
    """Writes a folder that `transformers.AutoModelForCausalLM.from_pretrained` reads.

    Adapters are merged into their weights. On several processes all of them must call this, and
    process 0 writes.

    Raises:
      ValueError: for a folder that is not empty, unless `overwrite`.
    """
    dtype = np.dtype(dtype)
    exported = FAMILIES[config_json["model_type"]].exported | {
        "auto_map": None,  # names Python files, which are not copied
        "dtype": dtype.name,
        "torch_dtype": dtype.name,  # the same for transformers 4, and for engines built on it
    }
    config_json = overridden(config_json, exported)
    token_ids = {k: config_json[k] for k in TOKEN_IDS if config_json.get(k) is not None}
    generation_config = generation_config or {"_from_model_config": True, **token_ids}
    with new_folder(folder, overwrite=overwrite) as temporary:
        weights.save(
            config,
            params,
            temporary,
            dtype=dtype,
            max_shard_size=max_shard_size,
            lora_scale=lora_scale,
        )
        if jax.process_index() == 0:
            write_json(temporary / "config.json", config_json)
            write_json(temporary / "generation_config.json", generation_config)
            if tokenizer is not None:
                _save_tokenizer(temporary, tokenizer)


def _save_tokenizer(folder: Path, tokenizer) -> None:
    """The files that the tokenizer was read from, or its own writing where it has changed.

    transformers 5 writes another form than that of most published files, which transformers 4 and
    engines built on it cannot read. But it reads some files otherwise beside a config.json with
    another `model_type` (those of Qwen3.5 say Qwen2Tokenizer, which it mends for
    some types alone), and then its own writing is taken too.
    """
    name = str(getattr(tokenizer, "name_or_path", None) or "")
    source = Path(name)
    if not (name and source.is_dir() and _is_as_read(tokenizer, source)):
        tokenizer.save_pretrained(folder)
        return
    for path in tokenizer_files(source):
        target = folder / path.relative_to(source)
        target.parent.mkdir(exist_ok=True)
        shutil.copyfile(path, target)
    if not _is_as_read(tokenizer, folder):
        for path in tokenizer_files(folder):
            path.unlink()
        tokenizer.save_pretrained(folder)


def _is_as_read(tokenizer, source: Path) -> bool:
    """Whether the tokenizer is what the files of a folder still make."""
    from transformers import AutoTokenizer

    if not type(tokenizer).__module__.startswith("transformers.") or not tokenizer_files(source):
        return False  # the code of a folder is not run again for this
    try:
        read = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
        return _state(read) == _state(tokenizer)
    except Exception:  # tokenizers raises bare exceptions
        return False


def _state(tokenizer) -> tuple:
    """All that tells tokenizers of a folder apart, without what a call of them leaves behind."""
    # Every call of a tokenizer sets both anew.
    tokenizer.backend_tokenizer.no_padding()
    tokenizer.backend_tokenizer.no_truncation()
    state = tokenizer.backend_tokenizer.to_str()
    sides = tokenizer.padding_side, tokenizer.truncation_side, tokenizer.model_max_length
    return state, sides, tokenizer.special_tokens_map, tokenizer.chat_template


_NOT_EMPTY = "{} is not empty; give another folder, or overwrite=True"


@contextlib.contextmanager
def new_folder(folder: str | os.PathLike, *, overwrite: bool) -> Iterator[Path]:
    """A temporary folder that becomes `folder` at the end, whole or not at all.

    On several processes all of them must enter it, and process 0 writes. Of a link, the folder that
    it leads to is written.

    Raises:
      ValueError: for a folder that is not empty, at the beginning or at the end, unless
        `overwrite`.
      OSError: where the disk fails, also inside of a library that has another error for it.
    """
    folder = Path(folder).expanduser().resolve()
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file")
    if not overwrite and folder.is_dir() and any(folder.iterdir()):
        raise ValueError(_NOT_EMPTY.format(folder))
    with _renamed_when_done(folder, overwrite=overwrite) as temporary, _disk_errors_of(folder):
        yield temporary
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(f"saved {folder}")


def push_folder(folder: str | os.PathLike, name: str, *, private: bool = True) -> str:
    """Uploads a model's folder to the hub, into a repository that is made if it is missing.

    The token is the hub client's: the environment variable HF_TOKEN, or that of `hf auth login`.

    Args:
      name: user/model.
      private: whether a repository that is made is private.

    Returns:
      The model's address.

    Raises:
      ValueError: when the hub refuses, or cannot be reached.
    """
    api = huggingface_hub.HfApi()
    try:
        api.create_repo(name, private=private, exist_ok=True)
        api.upload_folder(folder_path=folder, repo_id=name)
    except (HTTPError, HFValidationError, OSError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{folder} was not uploaded to {name!r}: {reason}") from error
    return f"https://huggingface.co/{name}"


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


@contextlib.contextmanager
def _disk_errors_of(folder: Path) -> Iterator[None]:
    """Makes an OSError of what safetensors and tokenizers raise when they cannot write.

    Those raise an error of their own, or a bare Exception, with the system's number in its text.
    """
    try:
        yield
    except Exception as error:
        number = re.search(r"\(os error (\d+)\)", str(error))
        if isinstance(error, SafetensorError) and not number:
            raise OSError(f"{folder} cannot be written: {error}") from error
        if number and (isinstance(error, SafetensorError) or type(error) is Exception):
            code = int(number[1])
            raise OSError(code, os.strerror(code), str(folder)) from error
        raise


@contextlib.contextmanager
def _renamed_when_done(folder: Path, *, overwrite: bool) -> Iterator[Path]:
    """A temporary sibling of `folder` that takes its place at the end, or vanishes on an error.

    Raises:
      ValueError: where the place is taken by then, unless `overwrite`.
    """
    temporary = folder.with_name(f".{folder.name}.writing-{os.getpid()}")
    replaced = folder.with_name(f".{folder.name}.replaced-{os.getpid()}")
    if jax.process_index() != 0:
        yield temporary
        return
    # A container that was killed while writing comes back with the same process id.
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        if overwrite and folder.exists():
            folder.rename(replaced)
        try:
            temporary.rename(folder)  # also in place of an empty one
        except BaseException as error:
            if replaced.exists():
                replaced.rename(folder)
            taken = getattr(error, "errno", None) in (errno.ENOTEMPTY, errno.EEXIST)
            if taken and not overwrite:
                raise ValueError(_NOT_EMPTY.format(folder)) from error
            raise
        shutil.rmtree(replaced, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def load_folder_config(
    name: str | os.PathLike,
    *,
    with_code: bool = False,
    override: Mapping[str, Any] | None = None,
) -> tuple[Path, dict[str, Any], dict[str, Any]]:
    """The folder of a model, its config.json and its generation_config.json (empty if absent).

    Args:
      with_code: download Python files too.
      override: as for `overridden`.
    """
    folder = find_folder(name, [*DOWNLOADED, "*.py"] if with_code else DOWNLOADED)
    _refuse_unreadable(folder)
    generation_path = folder / "generation_config.json"
    generation = read_json(generation_path) if generation_path.exists() else {}
    config_json = _read_config(folder)
    check_counts(config_json, str(folder / "config.json"))
    return folder, overridden(config_json, override), generation


def _read_config(folder: Path) -> dict[str, Any]:
    """The config.json of a model's folder.

    Raises:
      ValueError: when there is none, or the folder is a run's.
    """
    content = read_json(folder / "config.json")
    if "actor_rollout_ref" in content and "model_type" not in content:
        export = folder / "export"
        cure = f"give {export}" if export.is_dir() else "give what adpo-jax export makes of it"
        raise ValueError(
            f"{folder} is the folder of a run, not of a model: {cure}, or in Python use "
            "pretrained.load, which reads a run"
        )
    return content


def overridden(
    config_json: Mapping[str, Any],
    override: Mapping[str, Any] | None,
    *,
    keep_nulls: bool = False,
) -> dict[str, Any]:
    """The content of a config.json with other values for some keys.

    A dict goes into the dict of that key, as in {"rope_parameters": {"factor": 4.0}}. Where the
    language model has a `text_config`, the keys are those of it, but for `OUTER_KEYS`.

    Args:
      keep_nulls: None stands for a null; else it leaves the key out, so that the model has the
        default of its family.
    """
    override = dict(override or {})
    if override.get("model_type", config_json.get("model_type")) not in [*WRAPPERS]:
        return _merged(config_json, override, keep_nulls)
    outer, inner = {}, {}
    for key, value in override.items():
        (outer if key in OUTER_KEYS else inner)[key] = value
    if not keep_nulls:  # what is left out may lie on either side
        nulls = {key: None for key, value in override.items() if value is None}
        outer, inner = outer | nulls, inner | nulls
    result = _merged(config_json, outer, keep_nulls)
    text = result.get("text_config")
    if inner and (text is None or isinstance(text, Mapping)):
        result["text_config"] = _merged(text or {}, inner, keep_nulls)
    return result


def _merged(
    content: Mapping[str, Any], override: Mapping[str, Any], keep_nulls: bool
) -> dict[str, Any]:
    result = dict(content)
    for key, value in override.items():
        if value is None and not keep_nulls:
            result.pop(key, None)
        elif isinstance(value, Mapping) and isinstance(result.get(key), Mapping):
            result[key] = _merged(result[key], value, keep_nulls)
        else:
            result[key] = value
    return result


def _refuse_unreadable(folder: Path) -> None:
    """Refuses files that other libraries would read without looking: a pipe would hang them."""
    for path in tokenizer_files(folder):
        try:
            size = size_of(path)
        except FileNotFoundError:
            raise ValueError(f"{path} is a link that leads nowhere") from None
        if size > LARGEST_TOKENIZER_FILE:
            raise ValueError(
                f"{path} has {size:,} bytes; at most {LARGEST_TOKENIZER_FILE:,} are read"
            )


def tokenizer_files(folder: Path) -> list[Path]:
    """The files of a folder that belong to its tokenizer."""
    try:
        paths = [path for pattern in TOKENIZER_FILES for path in folder.glob(pattern)]
        return sorted(path for path in paths if not path.is_dir())
    except OSError as error:
        raise ValueError(f"{folder} cannot be read: {error.strerror}") from None
