"""Makes the environments of the config, and checks that they can work with the data."""

from collections.abc import Sequence

from absl import logging
from ml_collections import ConfigDict

from adpo_jax.data.dataset import Dataset
from adpo_jax.data.prompts import render_prompts
from adpo_jax.engine.engine import Engine
from adpo_jax.environments.contract import COLUMN, Spec
from adpo_jax.environments.environments import Environments
from adpo_jax.environments.external import External
from adpo_jax.environments.pool import EnvironmentPool
from adpo_jax.environments.rendering import TurnTemplate
from adpo_jax.records import Prompts
from adpo_jax.rewards.binding import OFFERED_IN_TURNS
from adpo_jax.rollouts.completing import Completer, OneTurn, Reading
from adpo_jax.rollouts.in_turns import InTurns
from adpo_jax.rollouts.rows import reset_row, rows_of
from adpo_jax.run import datasets
from adpo_jax.run.extras import need_serve
from adpo_jax.run.whole_keys import section, whole_keys

# What a completion in turns is made with.
AnyEnvironments = Environments | External


def make_environments(
    config: ConfigDict, tokenizer, stop_token_ids: Sequence[int]
) -> AnyEnvironments | None:
    """The environments of the config, with a process started; None where it names none.

    Raises:
      ValueError: a file, class, tool or chat template that cannot work, or an address at which
        nobody answers.
    """
    c = config.environment
    if c.path and c.url:
        raise ValueError(
            "environment.path and environment.url are both set: an environment lives in this run's "
            "processes or in its own, so leave one of them empty"
        )
    if c.url:
        return _make_external(config)
    if not c.path:
        return None
    tools = tuple(c.tools.split(",")) if isinstance(c.tools, str) else tuple(c.tools)
    if not c.name and not tools:
        raise ValueError(
            "environment.path names a file and nothing in it: set environment.name to a class, or "
            'environment.tools to functions, e.g. ("search",)'
        )
    if not config.data.apply_chat_template:
        raise ValueError(
            "environment.path needs data.apply_chat_template=true: the chat template tells the "
            "model of its tools, and writes what they answer"
        )
    with whole_keys(section("environment", ("num_workers", "timeout_s"))):
        pool = EnvironmentPool(Spec(c.path, c.name, tools), c.num_workers, c.timeout_s)
    try:
        described, _ = pool.describe()
        template = TurnTemplate(
            tokenizer,
            config.data.chat_template_kwargs.to_dict(),
            next(iter(described.values())).tools,
            stop_token_ids,
            c.max_tool_tokens,
        )
    except BaseException:
        pool.close()
        raise
    if template.patch:
        logging.warning(
            "the chat template drops parts of earlier turns; what tools answer is rendered with "
            "the patch for %s, which keeps them",
            template.patch,
        )
    shown = {name: found.tools for name, found in described.items()}
    options = datasets.prompt_options(config, shown) | {"overlong": "truncate"}

    def prompt_ids(columns: dict[str, list], said: Sequence[str | None]) -> list[list[int]]:
        rendered = render_prompts(Dataset(columns), tokenizer, observations=said, **options)
        if rendered.num_overlong:
            logging.log_first_n(
                logging.WARNING,
                "with what reset returned, prompts are longer than data.max_prompt_length (%d "
                "tokens) and are cut at the front",
                1,
                config.data.max_prompt_length,
            )
        return rendered.token_ids

    return Environments(
        pool, described, template, prompt_ids, c.max_turns, overlap_steps=c.overlap_steps
    )


def _make_external(config: ConfigDict) -> External:
    """The environment behind the address of the config."""
    c = config.environment
    need_serve("environment.url")
    if not c.rollout_timeout_s > 0:
        raise ValueError(f"environment.rollout_timeout_s is above 0; given {c.rollout_timeout_s:g}")
    made = External(
        c.url,
        c.serve_host,
        c.rollout_timeout_s,
        max_prompt_length=config.data.max_prompt_length,
        prompt_format=datasets.prompt_format(config),
    )
    made.check()
    return made


def shown_tools(environments: AnyEnvironments | None) -> dict[str, list] | None:
    """What prompts show of tools, as `render_prompts` takes it; None where we know of none."""
    if environments is None or isinstance(environments, External):
        return None
    return {name: found.tools for name, found in environments.described.items()}


def check_environments(
    config: ConfigDict, environments: AnyEnvironments | None, data: dict[str, Prompts | None]
) -> None:
    """Checks that the environments can work with the data, by a reset of each.

    Args:
      data: the prompts under the key that names their files.

    Raises:
      ValueError: a column that is missing or has a name that is taken, or a reset that fails.
    """
    if environments is None:
        return
    tried: set[str | None] = set()
    for key, prompts in data.items():
        if prompts is None:
            continue
        taken = [name for name in OFFERED_IN_TURNS if name in prompts.columns]
        if taken:
            raise ValueError(
                f"{key} has the column {taken[0]!r}, which reward functions are given by the "
                "training loop under this name: rename the column"
            )
        if isinstance(environments, External):
            continue  # what it needs of a row is its own affair
        several = "" not in environments.described
        names = list(map(str, prompts.columns[COLUMN])) if several else [""]
        for name in dict.fromkeys(names):
            if name not in environments.described:
                raise ValueError(
                    f"{key} has a row with the environment {name!r}, and environment.name has "
                    f"{', '.join(environments.described)}"
                )
            (row,) = rows_of(prompts.select([names.index(name)]))
            own = name if several else None
            given = reset_row(row, config.data.prompt_key, own)
            missing = [n for n in environments.described[name].reset_needs if n not in given]
            if missing:
                raise ValueError(
                    f"reset of {environments.described[name].class_name} needs {missing[0]!r}, "
                    f"which is no column of {key}; there are {', '.join(sorted(given))}. Give the "
                    "parameter a default, or rename it"
                )
            if own not in tried:
                environments.pool.try_reset(own, given)
                tried.add(own)


def make_completer(
    engine: Engine, tokenizer, reading: Reading, environments: AnyEnvironments | None
) -> Completer:
    """What completes prompts: a turn of the engine, or turns with environments."""
    if environments is None:
        return OneTurn(engine, tokenizer, reading)
    if isinstance(environments, External):
        from adpo_jax.rollouts.externally import Externally  # needs what [serve] installs

        return Externally(engine, tokenizer, reading, environments)
    return InTurns(engine, tokenizer, reading, environments)
