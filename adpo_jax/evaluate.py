"""Evaluates a model alone: the scores to the screen, every completion to a file.

    python -m adpo_jax.evaluate --model=runs/gsm8k/mine --config=configs/gsm8k.py \\
        [--out=FOLDER] [--config.eval.n=8 ...]

`--model` is a Hugging Face folder or hub name, a run's folder (its export, or its newest checkpoint
where it has none) or one of its checkpoints (`runs/gsm8k/mine/checkpoints/50`). Data, prompts and
`eval.*` are those of the config. Two files are written to `--out`, or to `evaluations/N` in the
run's folder (for another model in the working folder): `metrics.json` and `completions.jsonl`.
Nothing that is there is overwritten.
"""

import json
import os
import sys
from pathlib import Path

from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

from adpo_jax import loading, pretrained, setup, sharding
from adpo_jax.config_checks import check_overrides, finalized
from adpo_jax.evaluation import evaluate
from adpo_jax.exit_codes import USER_ERROR
from adpo_jax.host_memory import tune_malloc
from adpo_jax.metrics import write_jsonl
from adpo_jax.rewards import RewardError


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
    config = finalized(config)
    if not config.data.val_files:
        raise ValueError("data.val_files is empty: there is nothing to evaluate on")
    if out is not None and out.exists():
        raise ValueError(f"{out} is there already; choose another --out")
    dtype = "bfloat16" if config.trainer.bf16 else "float32"
    found = pretrained.load(
        model,
        dtype=dtype,
        mesh=sharding.make_mesh(**config.mesh),
        trust_remote_code=config.actor_rollout_ref.model.trust_remote_code,
    )
    prompts = loading.load_val_prompts(config, found.tokenizer)
    settings = setup.make_eval_settings(config, found.stop_token_ids)
    with setup.make_reward_model(config) as reward_model:
        grader = setup.make_eval_reward_model(config, reward_model)
        engine = setup.make_engine(config, found.policy)
        evaluation = evaluate(engine, found.params, prompts, found.tokenizer, settings, grader)
    folder = out or _free_folder(Path(model))
    folder.mkdir(parents=True)
    about = {"model": model, "read_from": found.source}
    (folder / "metrics.json").write_text(json.dumps(about | evaluation.metrics, indent=2) + "\n")
    write_jsonl(folder / "completions.jsonl", evaluation.records)
    print(f"every completion is in {folder / 'completions.jsonl'}", flush=True)
    return evaluation.metrics


def _free_folder(model: Path) -> Path:
    """`evaluations/N` in the run's folder, or in the working one; N is the first free number."""
    homes = [p for p in (model, *model.parents) if (p / "metrics.jsonl").exists()]
    parent = (homes or [Path(".")])[0] / "evaluations"
    taken = [int(p.name) for p in parent.glob("*") if p.name.isdigit()]
    return parent / str(max(taken, default=-1) + 1)


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


def main(argv: list[str], config: ConfigDict | None, model: str | None, out: str | None) -> int:
    """Evaluates what the command line says; returns the exit code."""
    if len(argv) > 1:
        raise app.UsageError(f"unknown arguments {argv[1:]}; keys are set as --config.key=value")
    if config is None or model is None:
        raise app.UsageError("--model and --config are needed")
    logging.set_verbosity(logging.WARNING)
    try:
        print(table(evaluate_model(config, model, Path(out) if out else None)))
    except (ValueError, RewardError) as error:
        print(f"error: {error}", file=sys.stderr)
        return USER_ERROR
    return 0


def run() -> None:
    """What `python -m adpo_jax.evaluate` does."""
    tune_malloc()
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    try:
        check_overrides(sys.argv)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(USER_ERROR)
    # Defined here, since the flags of `main` have some of these names too.
    config = config_flags.DEFINE_config_file("config", None, "a file of configs/", lock_config=True)
    model = flags.DEFINE_string("model", None, "a Hugging Face folder or name, a run, a checkpoint")
    out = flags.DEFINE_string("out", None, "the folder to write to; a new one if not given")
    app.run(lambda argv: main(argv, config.value, model.value, out.value))


if __name__ == "__main__":
    run()
