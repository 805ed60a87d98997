"""Loads the data of a run: prompts for training and evaluation, demonstrations for a cold start.

These functions read the config, as those of `setup` do; the functions that they call do not.
"""

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from absl import logging
from ml_collections import ConfigDict

from adpo_jax.data import due, embedded, folders
from adpo_jax.data.control_tokens import text_token_ids
from adpo_jax.data.dataset import Dataset
from adpo_jax.data.files import load_rows
from adpo_jax.data.prompts import PromptFormat, render_prompts, tell_of_unknown_names
from adpo_jax.data.readers import shorten
from adpo_jax.data.solutions import extract_solution, text_to_imitate
from adpo_jax.records import Prompts
from adpo_jax.rewards import builtin
from adpo_jax.rewards.references import check_references
from adpo_jax.run.loading import ModelSource

# The column of the name of the validation set that a prompt belongs to.
VAL_SET = "validation_set"

_NAMED = re.compile(r"([A-Za-z0-9_.-]+)=(.*)")


def load_prompts(
    config: ConfigDict, tokenizer, source: str, *, split: str, tools: Mapping | None = None
) -> Prompts:
    """Rows of a source ("train" or "val") as tokenised prompts.

    Rewards compare an answer with the column "solution", which replaces a data column of that name.
    Data without the column of answers has no solutions, unless a reward function needs them.

    Args:
      tools: what prompts show of tools, as of `render_prompts`.
    """
    c = config.data
    hub_split = {"train": c.train_split, "val": c.val_split}[split]
    needed = _function_that_needs_solutions(config, split)
    try:
        dataset = _load_rows(
            config,
            source,
            split,
            hub_split,
            "data.answer_key",
            c.answer_key,
            needs_answer=bool(needed),
        )
    except ValueError as error:
        if "(data.answer_key) is null" in str(error) or "in data.answer_key" in str(error):
            raise ValueError(
                f"{error}. The reward function {needed} compares with it: fill it in, leave the "
                "row out, or choose a reward function that needs no solution"
            ) from error
        raise
    if split == "train":
        dataset = _first(dataset, c.train_max_samples)
    if dataset.has(c.answer_key):
        solutions = dataset.mapped(c.answer_key, extract_solution)
        _check_solutions(config, solutions, source, split)
        dataset = dataset.with_column("solution", solutions)
    prompts = _render(config, tokenizer, dataset, split, source, tools)
    if split == "train" and c.train_batch_size > len(prompts):
        logging.warning(
            "data.train_batch_size is %d, and there are %d training prompts: an iteration samples "
            "some of them more than once",
            c.train_batch_size,
            len(prompts),
        )
    return prompts


def _function_that_needs_solutions(config: ConfigDict, split: str) -> str:
    """The built-in function of a run's rewards, or of its evaluation, that needs solutions."""
    if split == "val" and config.eval.graded_by == "accuracy":
        return "good_accuracy (eval.graded_by=accuracy)"
    chosen = [dict(f) for f in config.reward_functions] or [dict(config.custom_reward_function)]
    names = [f["name"] for f in chosen if not f.get("path")]
    return next((name for name in names if "solution" in builtin.COLUMNS.get(name, ())), "")


def _check_solutions(config: ConfigDict, solutions: list, source: str, split: str) -> None:
    """Warns of, or refuses, solutions that a ready grader could never find in a completion."""
    graders = _graders(config, split)
    if "ready" not in graders:
        return
    option = {"train": "data.train_files", "val": "data.val_files"}[split]
    warnings = check_references(
        solutions,
        lambda row: f"{source}: row {row + 1}",
        column=f"{option} (data.answer_key={config.data.answer_key!r})",
        may_refuse="custom" not in graders,  # whose rows these may be
    )
    for warning in warnings:
        logging.warning("%s", warning)


def _graders(config: ConfigDict, split: str) -> set[str]:
    """Which kinds of functions compare answers: "ready" ones, "custom" ones, or both."""
    if split == "val" and config.eval.graded_by != "reward":
        return {"ready"}
    one = config.custom_reward_function
    functions = [dict(f) for f in config.reward_functions] or [{"path": one.path, "name": one.name}]
    return {
        "custom" if f.get("path") else "ready"
        for f in functions
        if f.get("path") or f.get("name") in ("good_accuracy", "exact_match")
    }


def load_val_prompts(config: ConfigDict, tokenizer, tools: Mapping | None = None) -> Prompts | None:
    """The prompts to evaluate on; None where the config names none.

    Of several named sets each prompt has its set's name in the column `VAL_SET`.

    Args:
      tools: what prompts show of tools, as of `render_prompts`.
    """
    if not config.data.val_files:
        return None
    _refuse_training_files(config)
    category, parts = config.eval.category_key, []
    for name, source in named_sources(config.data.val_files).items():
        prompts = load_prompts(config, tokenizer, source, split="val", tools=tools)
        if category and category not in prompts.columns:
            raise ValueError(
                f"eval.category_key is {category!r}; data.val_files has the columns "
                f"{sorted(prompts.columns)}"
            )
        limits = (config.data.val_max_samples, config.data.max_val_samples)
        limit = next((limit for limit in limits if limit > 0), len(prompts))
        prompts = prompts.select(range(min(limit, len(prompts))))
        if name:
            column = {VAL_SET: [name] * len(prompts)}
            prompts = dataclasses.replace(prompts, columns=prompts.columns | column)
        parts.append(prompts)
    names = dict.fromkeys(name for part in parts for name in part.columns)
    return Prompts.concatenate(
        [
            dataclasses.replace(
                part, columns={n: part.columns.get(n, [None] * len(part)) for n in names}
            )
            for part in parts
        ]
    )


def _refuse_training_files(config: ConfigDict) -> None:
    """Refuses to evaluate on training rows because a folder does not say which are which.

    A file that is itself named for both is what the user wants.

    Raises:
      ValueError: naming the folder and a file of it.
    """
    evaluated = [
        s for both in named_sources(config.data.val_files).values() for s in both.split(",")
    ]
    training = {"data.train_files": config.data.train_files}
    training |= {"sft.train_files": config.sft.train_files} if config.sft.steps else {}
    for option, sources in training.items():
        trained = [source.strip() for source in sources.split(",")]
        for one, others in ((trained, evaluated), (evaluated, trained)):
            unsplit = {
                f: source for source in one for f, source in folders.unsplit_files(source).items()
            }
            for other in others:
                shared = unsplit.keys() & {
                    *folders.unsplit_files(other),
                    Path(other).expanduser().resolve(),
                }
                if shared:
                    file = min(shared)
                    raise ValueError(
                        f"{option} and data.val_files would both read {file}: no name in the "
                        f"folder {unsplit[file]} says its split. Name the files of each, or give "
                        "them names with train and test"
                    )


def named_sources(val_files: str) -> dict[str, str]:
    """The sources of each named validation set; those of one without a name under "".

    In "a=one.jsonl,two.jsonl,b=three.jsonl" the set a has two files.

    Raises:
      ValueError: where some sets have a name and others have none, or one has no files.
    """
    found: dict[str, list[str]] = {}
    name = ""
    if not val_files:
        return {}
    for source in val_files.split(","):
        match = _NAMED.fullmatch(source.strip())
        if match and not Path(source.strip()).exists():
            name, source = match.groups()
        found.setdefault(name, []).append(source.strip())
    if len(found) > 1 and "" in found:
        raise ValueError(
            f"data.val_files: {found[''][0]!r} has no name and {name!r} has one; name all of the "
            "sets (name=file) or none"
        )
    empty = [name for name, sources in found.items() if not all(sources)]
    if empty:
        raise ValueError(f"data.val_files: the set {empty[0]!r} has an empty name of a file")
    return {name: ",".join(sources) for name, sources in found.items()}


@dataclasses.dataclass(frozen=True)
class Demonstrations:
    """Prompts and the completions to imitate, as token ids."""

    prompts: list[list[int]]
    completions: list[list[int]]


def load_demonstrations(
    config: ConfigDict, source: ModelSource, tools: Mapping | None = None
) -> Demonstrations:
    """The demonstrations that the cold start imitates; each completion ends with a stop token.

    Args:
      tools: what prompts show of tools, as of `render_prompts`.

    Raises:
      ValueError: for data that cannot be read, a completion that is no text, or completions that
        are all too long.
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
    dataset = _first(dataset, c.train_max_samples)
    for row, value in enumerate(dataset.column(c.completion_key), 1):
        if text_to_imitate(value) is None:
            raise ValueError(
                f"{c.train_files}: row {row}: the completion in column {c.completion_key!r} "
                "(sft.completion_key) must be text or one message of the assistant with nothing "
                f"but text, got {shorten(value)}; write calls of tools, reasoning and further "
                "turns into one text, as the model is to write them"
            )
    prompts = _render(config, source.tokenizer, dataset, "cold start", c.train_files, tools)
    completion_column = Dataset(prompts.columns).column(c.completion_key)
    texts = [text_to_imitate(value) for value in completion_column]
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
    chosen = prompts.select(fitting)
    return Demonstrations(chosen.token_ids, [completions[row] for row in fitting])


def _first(dataset: Dataset, count: int) -> Dataset:
    """The first so many rows; all for a number below 1."""
    return dataset.select(range(count)) if 0 < count < len(dataset) else dataset


def _load_rows(
    config,
    source: str,
    split: str,
    hub_split: str,
    option: str,
    answer_key: str,
    needs_answer: bool = True,
) -> Dataset:
    """Rows of an embedded data set, of files or of the hub, which have the needed columns."""
    prompt_key = config.data.prompt_key
    if not embedded.is_embedded(source):
        dataset = load_rows(
            source.split(","),
            prompt_key=prompt_key,
            answer_key=answer_key,
            split=hub_split,
            answer_option=option,
            needs_answer=needs_answer,
            cache_dir=config.data.cache_dir,
        )
        return dataset.with_column(prompt_key, dataset.column(prompt_key))
    columns = embedded.rows(source, split)
    wanted = {"data.prompt_key": prompt_key} | ({option: answer_key} if needs_answer else {})
    for name, key in wanted.items():
        if key not in columns:
            raise ValueError(f"{source} has the columns {sorted(columns)}; {name} is {key!r}")
    return Dataset(columns)


def prompt_format(config: ConfigDict) -> PromptFormat:
    """How text becomes a prompt."""
    c = config.data
    return PromptFormat(
        c.prompt_template,
        c.system_prompt,
        c.apply_chat_template,
        c.chat_template_kwargs.to_dict(),
        c.allow_control_tokens,
    )


def prompt_options(config: ConfigDict, tools: Mapping | None = None) -> dict:
    """The keyword arguments of `render_prompts` that the config says."""
    c = config.data
    options = {
        "prompt_key": c.prompt_key,
        "prompt_template": c.prompt_template,
        "system_prompt": c.system_prompt,
        "apply_chat_template": c.apply_chat_template,
        "chat_template_kwargs": c.chat_template_kwargs.to_dict(),
        "max_prompt_length": c.max_prompt_length,
        "overlong": c.overlong_prompts,
        "allow_control_tokens": c.allow_control_tokens,
    }
    return options | ({"tools": dict(tools)} if tools else {})


def _render(
    config: ConfigDict,
    tokenizer,
    dataset: Dataset,
    what: str,
    source: str,
    tools: Mapping | None = None,
) -> Prompts:
    c, options = config.data, prompt_options(config, tools)
    tell_of_unknown_names(c.prompt_template, {"prompt", *dataset.columns}, source)
    if dataset.digest:
        overlong = due.overlong_rows(dataset, tokenizer, options, c.cache_dir, source)
        num_overlong, kept, rows = len(overlong), dataset, np.arange(len(dataset))
        if num_overlong and c.overlong_prompts == "filter":
            rows = np.delete(rows, overlong)
            kept = dataset.select(rows)
        token_ids = due.DuePrompts(kept, rows, tokenizer, options, source)
    else:
        kept, token_ids, num_overlong = render_prompts(dataset, tokenizer, source=source, **options)
    if num_overlong:
        logging.warning(
            "%s: %d of %d prompts are longer than data.max_prompt_length (%d tokens): %s",
            what,
            num_overlong,
            len(dataset),
            c.max_prompt_length,
            {"filter": "left out", "truncate": "cut at the front"}[c.overlong_prompts],
        )
    return Prompts(token_ids, kept.columns, kept.digest)
