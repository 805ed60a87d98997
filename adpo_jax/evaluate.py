"""Evaluates a model: prints its scores and writes every completion to a file.

    python -m adpo_jax.evaluate --model=runs/gsm8k/mine [--out=FOLDER] [--config.eval.n=8 ...]
    python -m adpo_jax.evaluate --model=Qwen/Qwen3-0.6B --config=gsm8k

`--model` is a Hugging Face folder or hub name, a run's folder (its export, or its newest checkpoint
if that is newer) or one of its checkpoints (`runs/gsm8k/mine/checkpoints/50`). Data, prompts and
`eval.*` are those of `--config`; without it, those of the run. The config.json of a model that is
no run's is changed by `actor_rollout_ref.model.override_config`, as in training. Two files,
`metrics.json` and `completions.jsonl`, are written to `--out`, or to `evaluations/N` in the run's
folder (for any other model in the working folder). No file is overwritten.
"""

import contextlib
import functools
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

from adpo_jax.log.printable import say, say_error
from adpo_jax.run import config_files
from adpo_jax.run.command_line import begin, load_config, parse_flags, unless_interrupted
from adpo_jax.run.exit_codes import USER_ERROR


def evaluate_model(config: ConfigDict, model: str, out: Path | None = None) -> dict[str, float]:
    """Scores a model on `data.val_files` and writes every completion.

    Args:
      config: any config of `configs/`.
      model, out: as on the command line.

    Returns:
      The metrics, see `evaluation.evaluate`.

    Raises:
      ValueError: for a config, model or data that cannot work, or results that are there already.
    """
    # The imports come after the flags, so that --help is quick.
    from adpo_jax import pretrained
    from adpo_jax.log.metrics import write_jsonl
    from adpo_jax.log.progress import telling
    from adpo_jax.rollouts.evaluation import evaluate
    from adpo_jax.run import datasets, loading, setup
    from adpo_jax.run.config_checks import finalized
    from adpo_jax.run.environments import (
        check_environments,
        make_completer,
        make_environments,
        shown_tools,
    )

    config = ConfigDict(config).copy_and_resolve_references()
    config.trainer.best_metric = ""  # it chooses among checkpoints, and none is made here
    config = finalized(config)
    if not config.data.val_files:
        raise ValueError("data.val_files is empty: there is nothing to evaluate on")
    if out is not None and out.exists():
        raise ValueError(f"{out} is there already; choose another --out")
    dtype = "bfloat16" if config.trainer.bf16 else "float32"
    with telling(f"reading {model}"):
        found = pretrained.load(
            model,
            dtype=dtype,
            mesh=setup.make_mesh(config),
            trust_remote_code=config.actor_rollout_ref.model.trust_remote_code,
            override_config=_override_config(config, model),
            for_prompts=False,  # they are as the config says
        )
    environments = make_environments(config, found.tokenizer, found.stop_token_ids)
    graded_by_reward = config.eval.graded_by == "reward"
    with contextlib.ExitStack() as to_close:
        if environments is not None:
            to_close.enter_context(environments)
        prompts = datasets.load_val_prompts(config, found.tokenizer, shown_tools(environments))
        check_environments(config, environments, {"data.val_files": prompts})
        settings = setup.make_eval_settings(config, found.stop_token_ids)
        reward_model = setup.make_reward_model(config, environments) if graded_by_reward else None
        if reward_model is not None:
            to_close.enter_context(reward_model)
            setup.check_rewards(config, reward_model, None, prompts)
        grader = setup.make_eval_reward_model(config, reward_model)
        policy = found.policy.for_length(loading.longest_sequence(config))
        engine = setup.make_engine(config, policy)
        answering = telling(f"answering {len(prompts):,} prompts")
        completer = make_completer(engine, found.tokenizer, settings.reading, environments)
        with _new_folder(out, config_files.user_path(model)) as folder, answering:
            evaluation = evaluate(
                engine,
                found.params,
                prompts,
                found.tokenizer,
                settings,
                grader,
                completer=completer,
            )
            about = {"model": model, "read_from": found.source} | evaluation.metrics
            (folder / "metrics.json").write_text(json.dumps(about, indent=2) + "\n")
            write_jsonl(folder / "completions.jsonl", evaluation.records)
    say(f"every completion is in {folder / 'completions.jsonl'}", sys.stdout)
    return evaluation.metrics


def _override_config(config: ConfigDict, model: str) -> dict[str, Any]:
    """Keys of a model's config.json with other values; a run has those that it trained with."""
    if config_files.run_of(model) is not None:
        return {}
    return config.actor_rollout_ref.model.override_config.to_dict()


@contextlib.contextmanager
def _new_folder(out: Path | None, model: Path) -> Iterator[Path]:
    """Makes a folder for this evaluation, before hours of sampling that could be lost.

    It is removed again if nothing was written to it.
    """
    try:
        folder = _make_folder(out, model)
    except OSError as error:
        raise ValueError(f"{error.filename} cannot be made: {error.strerror}") from error
    try:
        yield folder
    except BaseException:
        with contextlib.suppress(OSError):  # a folder with files in it stays
            folder.rmdir()
        raise


def _make_folder(out: Path | None, model: Path) -> Path:
    """`out`, or `evaluations/N` in the run's folder or the working one, N the first free number."""
    if out is not None:
        out.mkdir(parents=True)
        return out
    parent = (config_files.run_of(str(model)) or Path(".")) / "evaluations"
    parent.mkdir(exist_ok=True)
    taken = [int(p.name) for p in parent.glob("*") if p.name.isdigit()]
    number = max(taken, default=-1) + 1
    while True:
        try:
            (parent / str(number)).mkdir()
            return parent / str(number)
        except FileExistsError:  # another evaluation was quicker
            number += 1


def table(metrics: dict[str, float]) -> str:
    """The metrics as lines: name, value, 95% interval where there is one."""
    lines = []
    for name, value in metrics.items():
        if name.endswith(("_low", "_high")):
            continue
        interval = ""
        if f"{name}_low" in metrics:
            interval = f"  [{metrics[f'{name}_low']:.3f}, {metrics[f'{name}_high']:.3f}]"
        lines.append(f"{name:<32}{value:8.3f}{interval}")
    return "\n".join(lines)


def main(argv: list[str], config: flags.FlagHolder, model: str | None, out: str | None) -> int:
    """Evaluates what the command line says; returns the exit code."""
    from adpo_jax.rewards import RewardError

    logging.set_verbosity(logging.WARNING)
    try:
        if len(argv) > 1:
            raise ValueError(f"unknown arguments {argv[1:]}; keys are set as --config.key=value")
        if model is None:
            raise ValueError("--model is missing, for example --model=runs/adpo_jax/arithmetic")
        content = load_config(config)
        if content is None:
            raise ValueError(
                f"--config is missing, for example --config=gsm8k: {model} is no run, whose data "
                "and settings could be taken"
            )
        folder = config_files.user_path(out) if out else None
        say(table(evaluate_model(content, model, folder)), sys.stdout)
    except (OSError, ValueError, RewardError) as error:
        say_error(error)
        return USER_ERROR
    return 0


def settings_of_model(argv: list[str]) -> list[str]:
    """The arguments that stand for `--config` where it is not given: the config of the run.

    Whoever names a model does not consent to code that its folder names, so none is run.

    Raises:
      ValueError: where the run's settings need such code.
    """
    run = config_files.run_of(config_files.given(argv, "model") or "")
    if run is None:
        return []
    saved = config_files.get_config(str(run / "config.json"))
    settings = [
        f"--config={run}",
        "--config.actor_rollout_ref.model.trust_remote_code=false",
    ]
    path = saved.environment.path
    given_path = config_files.given(argv, "config.environment.path")
    if path and not path.startswith("embedded:") and given_path is None:
        raise ValueError(
            f"{run} evaluates in an environment, which is Python code, {path}: give "
            f"--config={run} if you trust it"
        )
    if saved.environment.url and config_files.given(argv, "config.environment.url") is None:
        raise ValueError(
            f"{run} evaluates in an environment at an address of its own: give --config={run} if "
            "you trust it, or --config.environment.url and the address"
        )
    graded_by = config_files.given(argv, "config.eval.graded_by") or saved.eval.graded_by
    if graded_by != "reward":  # the run's reward functions, and their secrets, are not needed
        functions = ["--config.reward_functions=()"] if saved.reward_functions else []
        settings += ["--config.custom_reward_function.path=", *functions]
        return [*settings, "--config.reward_model.reward_kwargs={}"]
    own = [saved.custom_reward_function.path, *(f.get("path") for f in saved.reward_functions)]
    if any(own):
        raise ValueError(
            f"{run} grades its evaluation by Python code, {', '.join(filter(None, own))}: give "
            f"--config={run} if you trust it, or --config.eval.graded_by=accuracy"
        )
    return settings


def run() -> None:
    """Runs `python -m adpo_jax.evaluate`."""
    begin()
    # The flags are defined here, since `main` has flags of the same names.
    about = (
        "a Python file, a config that comes with the package, or a run's folder; by default the "
        "run that --model names"
    )
    config = config_flags.DEFINE_config_file("config", None, about, lock_config=True)
    model = flags.DEFINE_string("model", None, "a Hugging Face folder or name, a run, a checkpoint")
    out = flags.DEFINE_string("out", None, "the folder to write to; a new one if not given")
    parser = functools.partial(
        parse_flags, about=__doc__, own=(config, model, out), default_config=settings_of_model
    )
    app.run(lambda argv: main(argv, config, model.value, out.value), flags_parser=parser)


if __name__ == "__main__":
    sys.exit(unless_interrupted(run))
