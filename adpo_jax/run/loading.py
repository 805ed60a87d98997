"""Finds and loads what a run starts from: model folder, tokenizer, prompts and demonstrations.

These functions read the config, as those of `setup` do; the functions that they call do not.
"""

import dataclasses
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
from absl import logging
from jax.sharding import Mesh
from ml_collections import ConfigDict

from adpo_jax.data import arithmetic, files
from adpo_jax.data.conversations import text_token_ids
from adpo_jax.data.prompts import render_prompts
from adpo_jax.hf import folders
from adpo_jax.model.lora import Lora, parse_targets
from adpo_jax.policy import adapters
from adpo_jax.policy.policy import Policy
from adpo_jax.records import Prompts


@dataclasses.dataclass(frozen=True)
class ModelSource:
    """Where the policy comes from.

    Attributes:
      folder: a folder with config.json, tokenizer and weights; None for the embedded model.
      hf_config: its config.json, with the overrides of model.hf_config.
      tokenizer: a Hugging Face tokenizer.
      stop_token_ids: the tokens that end a completion.
      random_init: whether to start from random weights.
      generation_config: the folder's generation_config.json; empty for none.
      lora: the adapters to train; None where the weights themselves are trained.
      adapter: a folder of adapters to start from; None for new ones.
    """

    folder: Path | None
    hf_config: dict
    tokenizer: object
    stop_token_ids: tuple[int, ...]
    random_init: bool
    lora: Lora | None
    adapter: Path | None
    generation_config: dict = dataclasses.field(default_factory=dict)


def find_model(config: ConfigDict) -> ModelSource:
    """The model that `actor_rollout_ref.model` names; its weights are not read yet.

    Raises:
      ValueError: when there is no such folder, it has no tokenizer, or its parts do not fit.
    """
    model = config.actor_rollout_ref.model
    overrides = model.hf_config.to_dict()
    adapted = _find_lora(model)
    if model.path == arithmetic.NAME:
        tokenizer = arithmetic.make_tokenizer()
        stop = (tokenizer.eos_token_id,)
        hf_config = arithmetic.MODEL_CONFIG | overrides
        return ModelSource(None, hf_config, tokenizer, stop, True, *adapted)
    if overrides and not model.random_init:
        raise ValueError(
            f"model.hf_config changes the architecture ({sorted(overrides)}), so the weights in "
            f"{model.path} no longer fit; set model.random_init=true or leave hf_config empty"
        )
    folder, hf_config, generation = folders.load_folder_config(
        model.path, with_code=model.trust_remote_code
    )
    tokenizer = _load_tokenizer(folder, model.trust_remote_code)
    stop = _stop_token_ids(folder, tokenizer, generation)
    return ModelSource(
        folder, hf_config | overrides, tokenizer, stop, model.random_init, *adapted, generation
    )


def _find_lora(model: ConfigDict) -> tuple[Lora | None, Path | None]:
    if model.lora_adapter_path:
        folder, lora = adapters.find(model.lora_adapter_path)
        return lora, folder
    if not model.lora_rank:
        return None, None
    return Lora(model.lora_rank, model.lora_alpha, parse_targets(model.lora_target_modules)), None


def find_architecture(config: ConfigDict) -> ModelSource:
    """The model's config.json alone, without tokenizer and weights.

    Raises:
      ValueError: when there is none.
    """
    model = config.actor_rollout_ref.model
    if model.path == arithmetic.NAME:
        return find_model(config)
    hf_config = folders.find_config(model.path) | model.hf_config.to_dict()
    return ModelSource(None, hf_config, (), (0,), True, *_find_lora(model))


def _load_tokenizer(folder: Path, trust_remote_code: bool):
    from transformers import AutoTokenizer

    if not any(any(folder.glob(name)) for name in ("tokenizer*", "vocab*", "*.model")):
        raise ValueError(f"no tokenizer can be read from {folder}: it has no tokenizer.json")
    if trust_remote_code:
        print(
            f"WARNING: model.trust_remote_code: Python code in {folder} may run, with your rights",
            file=sys.stderr,
            flush=True,
        )
    elif _is_code_of_its_own(folder):
        raise ValueError(
            f"the tokenizer of {folder} is Python code in that folder, which is not run; read it, "
            "then set actor_rollout_ref.model.trust_remote_code=true"
        )
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # tokenizers raises bare exceptions
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(f"no tokenizer can be read from {folder}: {reason}") from error


def _is_code_of_its_own(folder: Path) -> bool:
    """Whether the tokenizer's class is in the folder and not in transformers.

    transformers might read such a folder as another tokenizer.
    """
    import transformers

    path = folder / "tokenizer_config.json"
    settings = folders.read_json(path) if path.exists() else {}
    name = settings.get("tokenizer_class")
    its_own = "AutoTokenizer" in (settings.get("auto_map") or ())
    return its_own and bool(name) and not hasattr(transformers, name)


def _stop_token_ids(folder: Path, tokenizer, generation: dict) -> tuple[int, ...]:
    """The tokenizer's end-of-sequence token and those of generation_config.json."""
    eos = generation.get("eos_token_id")
    ids = {tokenizer.eos_token_id, *(eos if isinstance(eos, list) else [eos])} - {None}
    if not ids:
        raise ValueError(
            f"the tokenizer of {folder} has no end-of-sequence token, so no completion would end; "
            "set eos_token in its tokenizer_config.json"
        )
    return tuple(sorted(ids))


def make_policy(config: ConfigDict, source: ModelSource, mesh: Mesh) -> Policy:
    """The policy, without parameters.

    Raises:
      ValueError: for an architecture that is not supported, or a tokenizer of another model.
    """
    policy = Policy.abstract_from_config(source.hf_config, **_policy_kwargs(config, source, mesh))
    if len(source.tokenizer) > policy.config.vocab_size:
        raise ValueError(
            f"the tokenizer has {len(source.tokenizer)} tokens, the model embeds "
            f"{policy.config.vocab_size}: they do not belong together"
        )
    attention = config.actor_rollout_ref.actor.attention
    return dataclasses.replace(policy, lora=source.lora, attention=attention)


def initial_params(config: ConfigDict, source: ModelSource, mesh: Mesh):
    """The parameters that a fresh run starts from.

    Raises:
      ValueError: for weights that do not fit the architecture.
    """
    kwargs = _policy_kwargs(config, source, mesh)
    key = jax.random.key(config.trainer.seed)
    if source.random_init:
        policy, params = Policy.from_config(source.hf_config, key, **kwargs)
    else:
        policy, params = Policy.from_pretrained(source.folder, **kwargs)
    if source.adapter:
        return adapters.load(policy, params, source.adapter)[1]
    if source.lora:
        return policy.with_adapters(params, source.lora, key)[1]
    return params


def _policy_kwargs(config: ConfigDict, source: ModelSource, mesh: Mesh) -> dict:
    dtype = jnp.bfloat16 if config.trainer.bf16 else jnp.float32
    return {
        "dtype": dtype,
        # Frozen weights never change, so they need not be wider than the computation.
        "param_dtype": dtype if source.lora else jnp.float32,
        "mesh": mesh,
        "gradient_checkpointing": config.trainer.gradient_checkpointing,
    }


def load_prompts(config: ConfigDict, tokenizer, source: str, *, split: str) -> Prompts:
    """Rows of a source ("train" or "val") as tokenised prompts.

    Rewards compare an answer with the column "solution", which replaces a data column of that name.
    """
    c = config.data
    hub_split = {"train": c.train_split, "val": c.val_split}[split]
    dataset = _load_rows(config, source, split, hub_split, "data.answer_key", c.answer_key)
    _check_ids(dataset, source)
    solutions = [files.extract_solution(answer) for answer in dataset.columns[c.answer_key]]
    return _render(config, tokenizer, dataset.with_column("solution", solutions), split, source)


def _check_ids(dataset: files.Dataset, source: str) -> None:
    """Refuses rows with the same `id`: a file was appended to itself, or two files overlap."""
    places: dict = {}
    for row, value in enumerate(dataset.columns.get("id", [])):
        if value is not None and places.setdefault(str(value), row) != row:
            raise ValueError(
                f"{source}: rows {places[str(value)] + 1} and {row + 1} have the same id "
                f"{value!r}; remove one, or rename the column if it is no id"
            )


def load_val_prompts(config: ConfigDict, tokenizer) -> Prompts | None:
    """The prompts to evaluate on; None where the config names none."""
    if not config.data.val_files:
        return None
    prompts = load_prompts(config, tokenizer, config.data.val_files, split="val")
    category = config.eval.category_key
    if category and category not in prompts.columns:
        raise ValueError(
            f"eval.category_key is {category!r}; data.val_files has the columns "
            f"{sorted(prompts.columns)}"
        )
    limit = config.data.max_val_samples or len(prompts)
    return prompts.select(range(min(limit, len(prompts))))


@dataclasses.dataclass(frozen=True)
class Demonstrations:
    """Prompts and the completions to imitate, as token ids."""

    prompts: list[list[int]]
    completions: list[list[int]]


def load_demonstrations(config: ConfigDict, source: ModelSource) -> Demonstrations:
    """The demonstrations that the cold start imitates; each completion ends with a stop token.

    Raises:
      ValueError: for data that cannot be read, or completions that are all too long.
    """
    c, limit = config.sft, config.data.max_response_length
    dataset = _load_rows(
        config,
        c.train_files,
        "demonstrations",
        config.data.train_split,
        "sft.completion_key",
        c.completion_key,
    )
    prompts = _render(config, source.tokenizer, dataset, "cold start", c.train_files)
    texts = [str(text) for text in prompts.columns[c.completion_key]]
    token_ids = text_token_ids(
        source.tokenizer,
        texts,
        allow_control_tokens=config.data.allow_control_tokens,
        add_special_tokens=False,
    )
    eos = source.tokenizer.eos_token_id
    end = source.stop_token_ids[0] if eos is None else eos
    completions = [[*ids, end] for ids in token_ids]
    fitting = [row for row, ids in enumerate(completions) if len(ids) <= limit]
    if len(fitting) < len(completions):
        logging.warning(
            "cold start: %d of %d completions are longer than data.max_response_length (%d "
            "tokens): left out",
            len(completions) - len(fitting),
            len(completions),
            limit,
        )
    if not fitting:
        raise ValueError(
            f"sft.train_files: all {len(completions)} completions are longer than "
            f"data.max_response_length ({limit} tokens)"
        )
    return Demonstrations(
        [prompts.token_ids[row] for row in fitting], [completions[row] for row in fitting]
    )


def _load_rows(config, source: str, split: str, hub_split: str, option: str, answer_key: str):
    """Rows of the embedded task, of files or of the hub, which have the two needed columns."""
    prompt_key = config.data.prompt_key
    if source != arithmetic.NAME:
        return files.load_rows(
            source.split(","),
            prompt_key=prompt_key,
            answer_key=answer_key,
            split=hub_split,
            answer_option=option,
        )
    columns = arithmetic.rows(split)
    for name, key in (("data.prompt_key", prompt_key), (option, answer_key)):
        if key not in columns:
            raise ValueError(f"{source} has the columns {sorted(columns)}; {name} is {key!r}")
    return files.Dataset(columns)


def _render(
    config: ConfigDict, tokenizer, dataset: files.Dataset, what: str, source: str
) -> Prompts:
    c = config.data
    rendered = render_prompts(
        dataset,
        tokenizer,
        prompt_key=c.prompt_key,
        prompt_template=c.prompt_template,
        system_prompt=c.system_prompt,
        apply_chat_template=c.apply_chat_template,
        chat_template_kwargs=c.chat_template_kwargs.to_dict(),
        max_prompt_length=c.max_prompt_length,
        overlong=c.overlong_prompts,
        allow_control_tokens=c.allow_control_tokens,
        source=source,
    )
    if rendered.num_overlong:
        logging.warning(
            "%s: %d of %d prompts are longer than data.max_prompt_length (%d tokens): %s",
            what,
            rendered.num_overlong,
            len(dataset),
            c.max_prompt_length,
            {"filter": "left out", "truncate": "cut at the front"}[c.overlong_prompts],
        )
    return Prompts(rendered.token_ids, rendered.dataset.columns)
