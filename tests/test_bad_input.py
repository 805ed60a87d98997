"""Every mistake of a user: one clear error, exit code 2, no traceback, nothing written or lost.

The cases run through `main` in this process, with a sampler that makes completions up; a few go
through a process of their own.
"""

import copy
import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow.parquet
import pytest
from absl import flags
from fakes import FakeEngine, FakeLearner, vars_of
from ml_collections import config_flags
from parsing import parse
from safetensors.numpy import load_file, save_file

from adpo_jax import main, pretrained
from adpo_jax.config import default_config
from adpo_jax.config import keys as config_keys
from adpo_jax.data import arithmetic
from adpo_jax.environments.pool import EnvironmentFailed
from adpo_jax.policy import Policy
from adpo_jax.run import loading, setup
from adpo_jax.update import TrainState

ROOT = Path(__file__).resolve().parents[1]
ARITHMETIC = f"--config={ROOT / 'configs' / 'arithmetic.py'}"
ROWS = [{"question": f"{n} plus 1?", "answer": f"#### {n + 1}"} for n in range(3, 9)]
MODEL = "actor_rollout_ref.model"
ACTOR = "actor_rollout_ref.actor"
ROLLOUT = "actor_rollout_ref.rollout"


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    """A small model in a folder."""
    folder = tmp_path_factory.mktemp("model") / "good"
    small = arithmetic.MODEL_CONFIG | {"hidden_size": 16, "num_hidden_layers": 1, "head_dim": 8}
    policy, params = Policy.from_config(small, jax.random.key(9))
    policy.save_pretrained(folder, params, arithmetic.make_tokenizer())
    return folder


@pytest.fixture(autouse=True)
def workplace(tmp_path, monkeypatch, model):
    """A working folder with good data and a good model in it."""
    write_rows("good.jsonl", ROWS, tmp_path)
    shutil.copytree(model, tmp_path / "model")
    monkeypatch.chdir(tmp_path)


def with_a_fake_sampler(config):
    """The parts of a run in which nothing is sampled or learnt."""
    parts = setup.build(config, jax.devices()[:1])
    if config.actor_rollout_ref.model.path == arithmetic.NAME:  # its weights are not at issue
        parts = dataclasses.replace(parts, initial_params=lambda: {"layers": {"w": jnp.zeros(2)}})
    learner = StandInLearner(**vars_of(parts.learner))
    return dataclasses.replace(parts, engine=FakeEngine(), learner=learner)


class StandInLearner(FakeLearner):
    """Holds a state that is no model's."""

    def init_state(self, params):
        return TrainState(jnp.int32(0), {"layers": {"w": jnp.zeros(2)}}, {"m": jnp.zeros(2)})

    def abstract_state(self):
        return self.init_state(None)


def tree_of(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


# The flags of the command line but the config, by their names in `main`.
FLAGS = {
    attribute: other
    for attribute, other in vars(main).items()
    if isinstance(other, flags.FlagHolder) and attribute != "_CONFIG"
}


def outcome(argv, monkeypatch, capsys) -> tuple[int, str]:
    """What `python -m adpo_jax.main ARGV` exits with and prints as its error."""
    values = flags.FlagValues()
    argv = ["main", *argv]
    holder = config_flags.DEFINE_config_file(
        "config", None, flag_values=values, sys_argv=argv, lock_config=True
    )
    for other in FLAGS.values():
        values[other.name] = copy.deepcopy(flags.FLAGS[other.name])
    try:
        rest = main.parse_flags(argv, values)
    except SystemExit as leaving:
        return leaving.code, capsys.readouterr().err
    monkeypatch.setattr(main, "_CONFIG", holder)
    for attribute, other in FLAGS.items():
        monkeypatch.setattr(main, attribute, SimpleNamespace(value=values[other.name].value))
    return main.main(rest, build=with_a_fake_sampler), capsys.readouterr().err


def assert_refused(argv, words, monkeypatch, capsys):
    """Exit code 2, one message with these words, no traceback, and the folder as it was.

    Returns:
      The message.
    """
    before = tree_of(Path.cwd())
    code, err = outcome(argv, monkeypatch, capsys)
    assert code == 2, err
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, err
    assert "Traceback" not in err
    for word in [words] if isinstance(words, str) else words:
        assert word in err, err
    assert tree_of(Path.cwd()) == before
    return err


# --- the config

CONFIG = {
    "an unknown key": ("algorithm.tauu=1", "did you mean algorithm.tau?"),
    "a key of no section": ("learning_rate=1", "did you mean"),
    "a key in another section": ("trainer.lr=1", "has no key trainer.lr"),
    "a key below a value": (
        "algorithm.tau.x=1",
        "has no key algorithm.tau.x; did you mean algorithm.tau?",
    ),
    "a key below an object": ("reward_model.reward_kwargs.x=1", "is set as a whole"),
    "text for an integer": ("data.train_batch_size=many", "many"),
    "text for a number": ("algorithm.tau=high", "high"),
    "text for yes or no": ("trainer.bf16=maybe", "maybe"),
    "half an integer": ("data.train_batch_size=1.5", "1.5"),
    "a text among numbers": (f"{ACTOR}.optim.betas=('0.9', '0.95')", "numbers; given '0.9' in it"),
    "half a k": (("eval.n=4", "eval.ks=(1.5,)"), "whole numbers; given 1.5 in it"),
    "texts for steps": ("trainer.profile_steps=('1', '2')", "whole numbers; given '1' in it"),
    "a set": ("reward_model.reward_kwargs={'penalty': {1, 2}}", "cannot be written to config.json"),
    "tau 0": ("algorithm.tau=0", "tau"),
    "tau below 0": ("algorithm.tau=-1", "tau"),
    "tau that is no number": ("algorithm.tau=nan", "tau"),
    "beta_reward 0": ("algorithm.beta_reward=0", "beta_reward"),
    "a group of one": ("algorithm.num_generations=1", "num_generations is at least 2"),
    "scale_rewards": ("algorithm.scale_rewards=all", "scale_rewards"),
    "adaptive_tau_alpha": ("algorithm.adaptive_tau_alpha=-2", "adaptive_tau_alpha"),
    "adaptive_tau_mode": ("algorithm.adaptive_tau_mode=guess", "adaptive_tau_mode"),
    "min_reward_std": ("algorithm.min_reward_std=-1", "min_reward_std"),
    "an unknown estimator": ("algorithm.adv_estimator=ppo", "adv_estimator is one of adpo, tpo"),
    "a batch of none": ("data.train_batch_size=0", "train_batch_size is at least 1"),
    "a batch below none": ("data.train_batch_size=-8", "train_batch_size is at least 1"),
    "mini-batches that do not divide": (f"{ACTOR}.ppo_mini_batch_size=5", "must divide"),
    "a layout": (f"{ACTOR}.layout=columns", "actor.layout is one of"),
    "a micro-batch of rows that splits groups": (
        (f"{ACTOR}.layout=rows", "trainer.per_device_train_batch_size=12"),
        "these work: [8, 16, 32",
    ),
    "no epochs over a batch": (f"{ACTOR}.ppo_epochs=0", "ppo_epochs is at least 1"),
    "a mesh of more devices": ("mesh.tensor=3", "x mesh.tensor = 1 devices"),
    "a mesh with two rests": ("mesh.data=-1", "at most one of them -1"),
    "a mesh axis of 0": ("mesh.data=0", "mesh sizes are positive"),
    "an anchor mode": ("anchor.mode=old", "anchor.mode is one of"),
    "ema_alpha": (("anchor.mode=ema", "anchor.ema_alpha=2"), "ema_alpha is in [0, 1]"),
    "kl_threshold": (("anchor.mode=kl_triggered", "anchor.kl_threshold=0"), "kl_threshold is > 0"),
    "ema_alpha without effect": ("anchor.ema_alpha=0.5", "no effect without anchor.mode=ema"),
    "filter_max_attempts without effect": (
        "algorithm.filter_max_attempts=9",
        "no effect without algorithm.filter_groups=true",
    ),
    "a reward's name without effect": (
        ("reward_functions=({'name': 'exact_match'},)", "custom_reward_function.name=letters"),
        "reward_functions takes its place",
    ),
    "system_prompt without effect": (
        ("data.apply_chat_template=false", "data.system_prompt=Hm."),
        "no effect without data.apply_chat_template=true",
    ),
    "min_lr_ratio without effect": (
        f"{ACTOR}.optim.lr_scheduler_type=constant",
        "min_lr_ratio=0.1 has no effect without a schedule that falls",
    ),
    "max_val_samples without effect": (
        ("data.val_files=", "data.max_val_samples=9"),
        "max_val_samples=9 has no effect without data.val_files",
    ),
    "eval.n without effect": (("data.val_files=", "eval.n=4"), "no effect without data.val_files"),
    "best_metric without effect": (
        ("data.val_files=", "trainer.best_metric=eval/accuracy"),
        "no effect without data.val_files",
    ),
    "eval.top_p without effect": ("eval.top_p=0.9", "no effect without samples"),
    "eval.min_p without effect": ("eval.min_p=0.1", "no effect without samples"),
    "a cold start's lr without effect": (
        ("sft.train_files=", "sft.steps=0"),
        "no effect without a cold start",
    ),
    "epochs without effect": (
        "trainer.total_epochs=3",
        "no effect without leaving trainer.total_training_steps out",
    ),
    "samples to show without effect": (
        ("trainer.log_samples_freq=0", "trainer.log_num_samples=9"),
        "no effect without trainer.log_samples_freq above 0",
    ),
    "offload without effect": ("anchor.offload=true", "no effect without an anchor.mode"),
    "kl_threshold without effect": ("anchor.kl_threshold=1", "without anchor.mode=kl_triggered"),
    "adaptive tau without effect": (
        ("algorithm.use_adaptive_tau=false", "algorithm.adaptive_tau_alpha=0.9"),
        "no effect without algorithm.use_adaptive_tau=true",
    ),
    "adaptive_tau_max without effect": (
        "algorithm.adaptive_tau_max=1.0",
        "without algorithm.adaptive_tau_mode=policy_entropy",
    ),
    "a clip under adpo": ("algorithm.clip_low=0.1", "no effect under algorithm.adv_estimator=adpo"),
    "tau under grpo": (("algorithm.adv_estimator=grpo", "algorithm.tau=1"), "no effect under"),
    "grpo with another anchor": (
        ("algorithm.adv_estimator=grpo", "anchor.mode=ema"),
        "needs anchor.mode=on_policy or sampler; given",
    ),
    "a KL penalty of 0": ("algorithm.beta_anchor_kl=0.1", "has no effect on one optimizer step"),
    "temperature 0": (f"{ROLLOUT}.temperature=0", "temperature is at least 0.001"),
    "top_p 0": (f"{ROLLOUT}.top_p=0", "top_p"),
    "top_p above 1": (f"{ROLLOUT}.top_p=1.5", "top_p"),
    "top_k": (f"{ROLLOUT}.top_k=0", "top_k"),
    "a kernel of elsewhere": (f"{ROLLOUT}.attention=pallas_gpu", "this is a cpu; use auto, or xla"),
    "min_p": (f"{ROLLOUT}.min_p=2", "min_p"),
    "the cache's dtype": (f"{ROLLOUT}.cache_dtype=float64", "cache_dtype"),
    "the decode kernel": (f"{ROLLOUT}.attention=cuda", "attention is one of auto, xla"),
    "attention that decodes nothing": (
        f"{ROLLOUT}.attention=cudnn",
        "not implemented for decoding",
    ),
    "attention of elsewhere": (f"{ACTOR}.attention=cudnn", "runs on a GPU, and this is a cpu"),
    "slots below 0": (f"{ROLLOUT}.num_slots=-1", "num_slots is at least 0"),
    "a share of the memory": (f"{ROLLOUT}.gpu_memory_utilization=-1", "gpu_memory_utilization"),
    "lr below 0": (f"{ACTOR}.optim.lr=-1", "optim.lr is at least 0"),
    "lr that is no number": (f"{ACTOR}.optim.lr=nan", "optim.lr is at least 0, given nan"),
    "infinite lr": (f"{ACTOR}.optim.lr=inf", "optim.lr"),
    "the schedule": (f"{ACTOR}.optim.lr_scheduler_type=exp", "lr_scheduler_type is one of"),
    "one beta": (f"{ACTOR}.optim.betas=(0.9,)", "betas are two numbers"),
    "a beta of 1": (f"{ACTOR}.optim.betas=(0.9, 1.0)", "betas are two numbers"),
    "min_lr_ratio": (f"{ACTOR}.optim.min_lr_ratio=2", "min_lr_ratio is in [0, 1]"),
    "weight_decay": (f"{ACTOR}.optim.weight_decay=-1", "weight_decay is at least 0"),
    "grad_clip": (f"{ACTOR}.grad_clip=-1", "grad_clip is at least 0"),
    "no steps": ("trainer.total_training_steps=0", "total_training_steps is at least 1"),
    "no epochs": ("trainer.total_epochs=0", "total_epochs is at least 1"),
    "no checkpoint kept": ("trainer.save_total_limit=0", "save_total_limit is at least 1"),
    "a seed below 0": ("trainer.seed=-1", "seed is at least 0"),
    "no failed save": ("trainer.max_save_failures=0", "max_save_failures is at least 1"),
    "a grace period": ("trainer.grace_period_s=-1", "grace_period_s is at least 0"),
    "what to do with a bad update": ("trainer.on_bad_update=ignore", "one of stop, skip"),
    "bad updates without effect": ("trainer.max_bad_updates=9", "without trainer.on_bad_update"),
    "the largest KL": ("trainer.max_anchor_kl=-1", "max_anchor_kl is at least 0"),
    "gradient checkpointing": ("trainer.gradient_checkpointing=some", "gradient_checkpointing"),
    "a recording elsewhere": ("trainer.rollout_data_dir=../x", "within the run's folder"),
    "a recording anywhere": ("trainer.rollout_data_dir=/tmp/x", "within the run's folder"),
    "a recording in the way": ("trainer.rollout_data_dir=export/x", "within the run's folder"),
    "a name that climbs": ("trainer.experiment_name=../../x", "leads out of runs/"),
    "a name that is a path": ("trainer.project_name=/tmp", "leads out of runs/"),
    "no name": ("trainer.experiment_name=", "experiment_name is the name"),
    "prompts of no tokens": ("data.max_prompt_length=0", "max_prompt_length is at least 1"),
    "answers of no tokens": ("data.max_response_length=0", "max_response_length is at least 1"),
    "overlong prompts": ("data.overlong_prompts=drop", "one of filter, truncate"),
    "a template without prompt": ("data.prompt_template=Hello", "would make every prompt the same"),
    "a hidden name": ("trainer.experiment_name=.x", "experiment_name is the name"),
    "a cold start without data": ("sft.train_files=", "names no data"),
    "a cold start's column": ("sft.completion_key=text", "sft.completion_key"),
    "reward workers": ("custom_reward_function.num_workers=-1", "num_workers"),
    "a time limit without effect": ("custom_reward_function.timeout_s=5", "num_workers above 0"),
    "samples below none": ("data.max_val_samples=-2", "max_val_samples is at least -1"),
}


KEYS = set(config_keys(default_config()))


@pytest.mark.parametrize("case", CONFIG)
def test_a_config_that_cannot_work(case, monkeypatch, capsys):
    overrides, words = CONFIG[case]
    overrides = [overrides] if isinstance(overrides, str) else overrides
    argv = [ARITHMETIC, *(f"--config.{override}" for override in overrides)]
    message = assert_refused(argv, words, monkeypatch, capsys)
    keys = [override.partition("=")[0] for override in overrides]
    known = [key if key in KEYS else key.rpartition(".")[0] for key in keys]
    names = re.findall(r"(?<![\w.])(?:--config\.)?([\w.]+\w)", message)
    assert set(names) & set(known) or not set(known) & KEYS, message  # the whole key


# --- the command line and the config file

CONFIG_FILES = {
    "missing": (None, "No such file"),
    "no program": ("def get_config(:", "SyntaxError"),
    "that fails": ("def get_config():\n    return 1 / 0", "ZeroDivisionError"),
    "with an unknown key": (
        "from adpo_jax.config import default_config\n"
        "def get_config():\n    c = default_config()\n    c.algorithm.taus = 1\n    return c",
        "taus",
    ),
    "with a value of another type": (
        "from adpo_jax.config import default_config\n"
        "def get_config():\n    c = default_config()\n    c.algorithm.tau = 'x'\n    return c",
        "tau",
    ),
}


def test_a_config_file_in_a_folder_with_a_colon_is_told_what_a_colon_means(monkeypatch, capsys):
    Path("a:b").mkdir()
    Path("a:b/mine.py").write_text("def get_config():\n    return None")
    words = "what follows the first colon is an argument to a config file"
    assert_refused(["--config=a:b/mine.py"], words, monkeypatch, capsys)


@pytest.mark.parametrize("case", CONFIG_FILES)
def test_a_config_file_that_is_none(case, monkeypatch, capsys):
    text, words = CONFIG_FILES[case]
    if text is not None:
        Path("mine.py").write_text(text)
    assert_refused(["--config=mine.py"], words, monkeypatch, capsys)


COMMAND_LINES = {
    "no config": ([], "--config is missing"),
    "a loose word": ([ARITHMETIC, "more"], "unknown arguments ['more']"),
    "an unknown flag": ([ARITHMETIC, "--wrokdir=x"], "Did you mean: workdir"),
    "a flag's text for a number": (
        [ARITHMETIC, "--host_timeout_s=abc"],
        "error: --host_timeout_s is a whole number; given 'abc'",
    ),
    "a flag's number out of bounds": (
        [ARITHMETIC, "--host_timeout_s=1"],
        "error: --host_timeout_s is integer >= 5; given '1'",
    ),
    "a config that is not there": (["--config=gsm9k"], "arithmetic, calculator, gsm8k"),
    "a config by a path of elsewhere": (["--config=x/gsm8k.py"], "did you mean --config=gsm8k?"),
    "a reward function that is a number": (
        [ARITHMETIC, "--config.reward_functions=[1,2]"],
        'error: reward_functions: wanted dicts with "name"',
    ),
    "a number that no machine counts to": (
        [ARITHMETIC, f"--config.trainer.seed={10**22}"],
        "error: trainer.seed is at most 2,147,483,647; given 10,000,000,000,000,000,000,000",
    ),
    "a batch that fills the memory": (
        [ARITHMETIC, "--config.data.train_batch_size=1999999999"],
        "error: data.train_batch_size is at most 1,000,000; given 1,999,999,999",
    ),
    "no rows": (
        [ARITHMETIC, "--config.data.train_max_samples=0"],
        "error: data.train_max_samples is -1 for all rows, or at least 1; given 0",
    ),
    "half a dict": (
        [ARITHMETIC, "--config.data.chat_template_kwargs={"],
        "error: --config.data.chat_template_kwargs is a dict, as in",
    ),
    "an address of a role that is not given": (
        [ARITHMETIC, "--trainer=h:1"],
        "error: --trainer belongs to --role=sampler: give both or neither",
    ),
    "a folder of weights without a role": (
        [ARITHMETIC, "--weights=/tmp"],
        "error: --weights belongs to --role=trainer and --role=sampler: give one of them too",
    ),
    "a sampler without a trainer": ([ARITHMETIC, "--role=sampler"], "needs --trainer=HOST:PORT"),
    "a trainer without a key": ([ARITHMETIC, "--role=trainer"], "set ADPO_JAX_RUN_KEY to the same"),
    "resume": ([ARITHMETIC, "--resume=yes"], "--resume is one of auto, never, must"),
    "nothing to resume": ([ARITHMETIC, "--resume=must"], "has no checkpoint"),
    "nothing to replay": ([ARITHMETIC, "--replay=nowhere"], "there is no folder nowhere"),
}


@pytest.mark.parametrize("case", COMMAND_LINES)
def test_a_command_line_that_cannot_work(case, monkeypatch, capsys):
    assert_refused(*COMMAND_LINES[case], monkeypatch, capsys)


# --- data


def write_rows(name: str, rows, folder=None) -> None:
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (Path(folder or ".") / name).write_text(text)


def write_sparse(name: str, size: int) -> None:
    with Path(name).open("wb") as file:
        file.truncate(size)


def truncated_parquet(name: str) -> None:
    import pyarrow as pa
    import pyarrow.parquet

    pa.parquet.write_table(pa.table({k: [r[k] for r in ROWS] for k in ROWS[0]}), name)
    Path(name).write_bytes(Path(name).read_bytes()[:-20])


LONG = [{"question": "1 " * 99, "answer": "1"}]
DATA = {
    "missing": ("x.jsonl", lambda n: None, "there is no such file"),
    "empty": ("x.jsonl", lambda n: Path(n).touch(), "there are no rows"),
    "without its prompts": (
        "x.jsonl",
        lambda n: write_rows(n, [{"q": "1", "answer": "1"}]),
        "data.prompt_key",
    ),
    "without its answers": (
        "x.jsonl",
        lambda n: write_rows(n, [{"question": "1"}]),
        "data.answer_key",
    ),
    "a broken line": ("x.jsonl", lambda n: Path(n).write_text('{"question": '), "x.jsonl:1:"),
    "a line of 100 MB": ("x.jsonl", lambda n: write_sparse(n, 10**8), "longer than 33554432"),
    "not UTF-8": ("x.jsonl", lambda n: Path(n).write_bytes(b'{"question": "\xff"}'), "not UTF-8"),
    "no objects": ("x.jsonl", lambda n: Path(n).write_text("[1, 2]\n"), "must be a JSON object"),
    "a prompt that is null": (
        "x.jsonl",
        lambda n: write_rows(n, [{"question": None, "answer": "1"}]),
        "is null",
    ),
    "a prompt that is a number": (
        "x.jsonl",
        lambda n: write_rows(n, [{"question": 3, "answer": "1"}]),
        "must be text",
    ),
    "references that nothing matches": (
        "x.jsonl",
        lambda n: write_rows(n, [row | {"answer": ["1", "2"]} for row in ROWS]),
        ["x.jsonl: row 1", "is a list of 2 values", "data.answer_key"],
    ),
    "embedded data beside a file": (
        "x.jsonl,embedded:arithmetic",
        lambda n: write_rows("x.jsonl", ROWS),
        "embedded:arithmetic comes with the package and stands alone in its option",
    ),
    "all prompts too long": (
        "x.jsonl",
        lambda n: write_rows(n, LONG),
        "data.max_prompt_length",
    ),
    "the same id twice": (
        "x.jsonl",
        lambda n: write_rows(n, [row | {"id": i % 5} for i, row in enumerate(ROWS)]),
        "rows 1 and 6 have the same id 0",
    ),
    "UTF-16": (
        "x.json",
        lambda n: Path(n).write_text(
            json.dumps({k: [row[k] for row in ROWS] for k in ROWS[0]}), encoding="utf-16"
        ),
        "x.json:1:1: byte 0xff is not UTF-8",
    ),
    "half a character": (
        "x.jsonl",
        lambda n: Path(n).write_text('{"question": "\\ud800", "answer": "1"}\n'),
        "half a surrogate pair",
    ),
    "of another kind": ("x.txt", lambda n: Path(n).write_text("a,b"), "data files end in"),
    "an empty folder": ("x", lambda n: Path(n).mkdir(), "the folder has no"),
    "Parquet cut short": ("x.parquet", truncated_parquet, "not a readable Parquet file"),
    "Parquet by name alone": (
        "x.parquet",
        lambda n: Path(n).write_text("{}"),
        "not a readable Parquet file",
    ),
}


@pytest.mark.parametrize("case", DATA)
@pytest.mark.parametrize("which", ["train", "val"])
def test_data_that_cannot_be_read(case, which, monkeypatch, capsys):
    name, make, words = DATA[case]
    make(name)
    argv = [
        ARITHMETIC,
        "--config.data.train_files=good.jsonl",
        f"--config.data.{which}_files={name}",
    ]
    assert_refused(argv, words, monkeypatch, capsys)


# --- models and tokenizers


def edit_json(name: str, **changes) -> None:
    path = Path("model") / name
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_tensors(change) -> None:
    path = Path("model/model.safetensors")
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def cut_short(path: str, size: int) -> None:
    Path(path).write_bytes(Path(path).read_bytes()[:size])


def an_index(name: str) -> None:
    Path("model/model.safetensors").rename("model.safetensors")
    index = {"weight_map": {"model.embed_tokens.weight": name}}
    Path("model/model.safetensors.index.json").write_text(json.dumps(index))


def a_pickle() -> None:
    Path("model/model.safetensors").unlink()
    Path("model/pytorch_model.bin").write_bytes(b"\x80\x04cos\nsystem\n(S'touch owned'\ntR.")


def without_tokenizer() -> None:
    for path in Path("model").glob("*token*"):
        path.unlink()


def another_tokenizer(**changes) -> None:
    def strip(tokenizer):
        tokenizer.update(changes)

    path = Path("model/tokenizer_config.json")
    content = json.loads(path.read_text())
    strip(content)
    path.write_text(json.dumps({k: v for k, v in content.items() if v is not None}))
    edit_json("generation_config.json", eos_token_id=None)


FIRST = "model.layers.0.self_attn.q_proj.weight"
MODELS = {
    "a folder that is not there": (lambda: shutil.rmtree("model"), "there is no folder"),
    "a file": (
        lambda: (shutil.rmtree("model"), Path("model").touch()),
        "give the folder that holds config.json",
    ),
    "no config.json": (lambda: Path("model/config.json").unlink(), "has no config.json"),
    "config.json that is no JSON": (
        lambda: Path("model/config.json").write_text("{"),
        "is no valid JSON",
    ),
    "an unknown architecture": (
        lambda: edit_json("config.json", architectures=["Mamba"], model_type="mamba"),
        "mamba",
    ),
    "a run": (
        lambda: Path("model/config.json").write_text('{"actor_rollout_ref": {}}'),
        "is the folder of a run, not of a model: give what adpo-jax export makes of it",
    ),
    "a run with an export": (
        lambda: (
            Path("model/config.json").write_text('{"actor_rollout_ref": {}}'),
            Path("model/export").mkdir(),
        ),
        "is the folder of a run, not of a model: give model/export",
    ),
    "no weights": (lambda: Path("model/model.safetensors").unlink(), "has neither"),
    "a tensor that is missing": (
        lambda: edit_tensors(lambda t: t.pop(FIRST)),
        ["missing tensors", FIRST],
    ),
    "a tensor too many": (
        lambda: edit_tensors(lambda t: t.update(extra=np.zeros(2, np.float32))),
        "unexpected tensors: extra",
    ),
    "a tensor of another shape": (
        lambda: edit_tensors(lambda t: t.update({FIRST: np.zeros((3, 3), np.float32)})),
        ["wrong shape", FIRST],
    ),
    "weights that are no numbers": (
        lambda: edit_tensors(lambda t: t.update({FIRST: t[FIRST] * np.nan})),
        ["NaN or infinity", FIRST],
    ),
    "quantised weights": (
        lambda: edit_tensors(lambda t: t.update({FIRST: t[FIRST].astype(np.int8)})),
        "dtype I8",
    ),
    "weights cut short": (lambda: cut_short("model/model.safetensors", 3000), "is cut short"),
    "a header cut short": (lambda: cut_short("model/model.safetensors", 20), "cut short"),
    "an index that climbs out": (
        lambda: an_index("../model.safetensors"),
        "names files outside its folder",
    ),
    "an index of what is not there": (lambda: an_index("a.safetensors"), "that are missing"),
    "a pickle": (a_pickle, "only pickled weights (pytorch_model.bin)"),
    "another size": (lambda: edit_json("config.json", hidden_size=24), "wrong shape"),
    "a size of text": (lambda: edit_json("config.json", hidden_size="big"), "hidden_size"),
    "heads that do not divide": (
        lambda: edit_json("config.json", num_key_value_heads=3),
        "num_kv_heads",
    ),
    "no tokenizer": (without_tokenizer, "no tokenizer can be read"),
    "a tokenizer that is no JSON": (
        lambda: Path("model/tokenizer.json").write_text("{"),
        "no tokenizer can be read",
    ),
    "a tokenizer without an end": (
        lambda: another_tokenizer(eos_token=None),
        "no end-of-sequence token",
    ),
    "a tokenizer larger than the model": (
        lambda: edit_json("config.json", vocab_size=20),
        "they do not belong together",
    ),
}


@pytest.mark.parametrize("case", MODELS)
def test_a_model_that_cannot_be_used(case, monkeypatch, capsys):
    make, words = MODELS[case]
    make()
    argv = [ARITHMETIC, f"--config.{MODEL}.path=./model", "--config.sft.steps=0"]
    assert_refused(argv, words, monkeypatch, capsys)


def test_the_code_of_a_tokenizer_is_run_where_the_config_asks_for_it(monkeypatch, capsys, tmp_path):
    Path("model/mine.py").write_text(
        "from transformers import PreTrainedTokenizerFast\n"
        "open('ran', 'w').close()\n"
        "class Mine(PreTrainedTokenizerFast): pass\n"
    )
    own = {"AutoTokenizer": [None, "mine.Mine"]}
    edit_json("tokenizer_config.json", auto_map=own, tokenizer_class="Mine")
    argv = [ARITHMETIC, f"--config.{MODEL}.path=./model", "--config.sft.steps=0"]
    words = "the tokenizer of model is Python code in that folder, which is not run"
    assert_refused(argv, words, monkeypatch, capsys)
    assert not Path("ran").exists()
    with pytest.raises(ValueError, match=words):
        pretrained.load("model")
    monkeypatch.setattr(
        "transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "code")
    )
    config = parse(*argv[1:], f"--config.{MODEL}.trust_remote_code=true")
    assert type(loading.find_model(config).tokenizer).__name__ == "Mine"
    assert Path("ran").exists()
    assert "may run, with your rights" in capsys.readouterr().err
    assert type(pretrained.load("model", trust_remote_code=True).tokenizer).__name__ == "Mine"


def test_code_in_a_models_folder_is_not_run(monkeypatch, capsys):
    Path("model/evil.py").write_text("open('owned', 'w')\nclass T: pass\n")
    own = {"AutoTokenizer": ["evil.T", None], "AutoConfig": "evil.T"}
    edit_json("tokenizer_config.json", auto_map=own, tokenizer_class="T")
    edit_json("config.json", auto_map=own)
    argv = [ARITHMETIC, f"--config.{MODEL}.path=./model", "--config.sft.steps=0"]
    argv += ["--config.trainer.total_training_steps=1", "--config.data.val_files="]
    monkeypatch.setattr(Policy, "save_pretrained", save_nothing)
    outcome([*argv, "--workdir=run"], monkeypatch, capsys)
    assert not Path("owned").exists()


@pytest.mark.parametrize("pad", [None, "eos"])
def test_a_tokenizer_without_a_pad_or_with_the_end_as_one_is_as_good(pad, monkeypatch, capsys):
    path = Path("model/tokenizer_config.json")
    content = json.loads(path.read_text())
    content["pad_token"] = content["eos_token"] if pad else None
    path.write_text(json.dumps({k: v for k, v in content.items() if v is not None}))
    argv = [ARITHMETIC, f"--config.{MODEL}.path=./model", "--config.sft.steps=0"]
    argv += ["--config.trainer.total_training_steps=1", "--config.data.val_files="]
    monkeypatch.setattr(Policy, "save_pretrained", save_nothing)
    assert outcome([*argv, "--workdir=run"], monkeypatch, capsys) == (0, "")


def save_nothing(self, folder, *_, **__):
    Path(folder).mkdir(exist_ok=True)


def test_weights_of_another_architecture_by_override(monkeypatch, capsys):
    argv = [ARITHMETIC, f"--config.{MODEL}.path=./model", "--config.sft.steps=0"]
    argv += [f"--config.{MODEL}.hf_config={{'num_hidden_layers': 2}}"]
    assert_refused(argv, "actor_rollout_ref.model.random_init=true", monkeypatch, capsys)


# --- reward functions

BEFORE = {
    "no file": (None, "no file"),
    "no such function": ("def g(completions, **c): ...", "it defines g"),
    "no program": ("def f(:", "SyntaxError"),
    "a column that the data does not have": (
        "def f(completions, level): ...",
        "reward function f (reward.py): it needs 'level', which is no column of the data; there "
        "are answer, ",
    ),
    "that does not import": ("import nothing_of_this_name", "nothing_of_this_name"),
    "that leaves": ("raise SystemExit(0)", "importing"),
    "no function": ("f = 3", "defines no function of that name"),
}
DURING = {
    "raises": ("raise KeyError('lost')", "KeyError: 'lost'"),
    "of another length": ("return [1.0]", "wanted a list of 256 rewards, got 1"),
    "NaN": ("return [float('nan')] * len(completions)", "the reward of sample 0 is nan"),
    "infinite": ("return [float('inf')] * len(completions)", "the reward of sample 0 is inf"),
    "text": ("return ['good'] * len(completions)", "the reward of sample 0 is 'good'"),
    "no list": ("return 1.0", "got no list"),
    "nothing": ("return None", "got no list"),
    "an empty dict": ("return {}", "empty dict"),
    "leaves": ("import sys; sys.exit(0)", "SystemExit: 0"),
}
SHORT = (
    "--config.sft.steps=0",
    "--config.data.val_files=",
    "--config.trainer.total_training_steps=1",
)


def with_reward(text: str | None, *more: str) -> list[str]:
    if text is not None:
        Path("reward.py").write_text(text)
    keys = ("path=reward.py", "name=f", *more)
    return [ARITHMETIC, *SHORT, *(f"--config.custom_reward_function.{key}" for key in keys)]


@pytest.mark.parametrize("case", BEFORE)
def test_a_reward_function_that_cannot_be_loaded(case, monkeypatch, capsys):
    text, words = BEFORE[case]
    assert_refused(with_reward(text), words, monkeypatch, capsys)


@pytest.mark.parametrize("case", DURING)
def test_a_reward_function_that_fails_in_the_middle(case, monkeypatch, capsys):
    body, words = DURING[case]
    argv = with_reward(f"def f(completions, **columns):\n    {body}\n")
    code, err = outcome([*argv, "--workdir=run"], monkeypatch, capsys)
    assert code == 2
    assert words in err
    assert "learner.py" not in err  # what is told is the traceback of the function alone
    assert Path("run/samples/reward_error_000001.jsonl").exists()
    # Nothing is lost: the function mended, the same command goes on.
    monkeypatch.setattr(Policy, "save_pretrained", save_nothing)
    argv = with_reward("def f(completions, **columns):\n    return [0.5] * len(completions)\n")
    os.utime("reward.py", (1, 1))
    assert outcome([*argv, "--workdir=run"], monkeypatch, capsys) == (0, "")


def test_a_reward_function_that_fails_later_costs_no_iteration(monkeypatch, capsys):
    argv = with_reward(
        "def f(completions, trainer_state, **columns):\n"
        "    if trainer_state.global_step == 1:\n"
        "        raise ConnectionError('judge is down')\n"
        "    return [0.5] * len(completions)\n"
    )
    argv += ["--workdir=run", "--config.trainer.total_training_steps=3"]
    code, err = outcome(argv, monkeypatch, capsys)
    assert (code, "judge is down" in err) == (2, True)
    assert sorted(os.listdir("run/checkpoints")) == ["0", "1"]


@pytest.mark.parametrize("flag", ["--workdir=", "--replay=", "--config.data.train_files="])
def test_a_name_that_no_disk_takes_is_told_in_a_sentence(flag, monkeypatch, capsys):
    argv = with_reward("def f(completions, **columns):\n    return [0.5] * len(completions)\n")
    code, err = outcome([*argv, flag + "x" * 300], monkeypatch, capsys)
    assert code == 2
    assert err.startswith("error: ")
    assert "Traceback" not in err


def test_a_home_folder_is_found_and_lengths_alone_are_no_dry_run(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    argv = with_reward("def f(completions, **columns):\n    return [0.5] * len(completions)\n")
    code, err = outcome([*argv, "--workdir=~/run", "--dry_run_lengths=9"], monkeypatch, capsys)
    assert (code, "--dry_run_lengths belongs to --dry_run" in err) == (2, True)
    monkeypatch.setattr(Policy, "save_pretrained", save_nothing)
    assert outcome([*argv, "--workdir=~/run"], monkeypatch, capsys) == (0, "")
    assert (tmp_path / "home" / "run" / "metrics.jsonl").exists()
    assert not Path("~").exists()


def test_a_signal_while_rewards_are_given_saves_the_run_and_is_no_mistake(monkeypatch, capsys):
    argv = with_reward(
        "import os, signal, time\n"
        "def f(completions, **columns):\n"
        "    if not os.path.exists('asked'):\n"
        "        open('asked', 'w').close()\n"
        "        os.kill(os.getpid(), signal.SIGTERM)\n"
        "        time.sleep(5)\n"
        "    return [0.5] * len(completions)\n"
    )
    code, err = outcome([*argv, "--workdir=run"], monkeypatch, capsys)
    assert code == 75, err
    assert Path("run/checkpoints/0").is_dir()
    monkeypatch.setattr(Policy, "save_pretrained", save_nothing)
    assert outcome([*argv, "--workdir=run"], monkeypatch, capsys) == (0, "")


def test_a_signal_that_an_evaluations_reward_swallows_is_made_up_for(monkeypatch, capsys):
    argv = with_reward(
        "import os, signal, time\n"
        "def f(completions, **columns):\n"
        "    if os.path.exists('asked'):\n"
        "        return [0.5] * len(completions)\n"
        "    open('asked', 'w').close()\n"
        "    try:\n"
        "        os.kill(os.getpid(), signal.SIGTERM)\n"
        "        time.sleep(5)\n"
        "    except BaseException:\n"
        "        return [0.25] * len(completions)\n"
    )
    argv += ["--config.data.val_files=embedded:arithmetic", "--config.data.max_val_samples=4"]
    argv += ["--config.eval.graded_by=reward", "--workdir=run"]
    code, err = outcome(argv, monkeypatch, capsys)
    assert code == 75, err
    monkeypatch.setattr(Policy, "save_pretrained", save_nothing)
    assert outcome(argv, monkeypatch, capsys) == (0, "")
    rows = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    assert [row["eval/reward"] for row in rows] == [0.5, 0.5]


def test_a_reward_function_that_hangs(monkeypatch, capsys):
    text = "import time\ndef f(completions, **columns):\n    time.sleep(1e6)\n"
    argv = with_reward(text, "num_workers=1", "timeout_s=0.3", "on_timeout=stop")
    argv += ["--config.data.train_batch_size=1", "--config.algorithm.num_generations=2"]
    monkeypatch.setattr(FakeEngine, "generate", reporting_groups(FakeEngine.generate))
    code, err = outcome([*argv, "--workdir=run"], monkeypatch, capsys)
    assert code == 2
    assert "ran past its deadline and was killed" in err


def reporting_groups(generate):
    from adpo_jax.engine import FinishedGroup

    def reporting(self, params, prompts, sampling, key, *, version, keys, on_group_done):
        out = generate(self, params, prompts, sampling, key, version=version)
        for p, completions in enumerate(out.groups):
            on_group_done(FinishedGroup(p, completions))
        return out

    return reporting


REWARD_SETTINGS = {
    "an unknown built-in": (("custom_reward_function.name=accuracy",), "no built-in"),
    "a keyword that it does not take": (
        ("reward_model.reward_kwargs={'size': 3}",),
        "takes no keyword size",
    ),
    "a setting that it refuses": (
        (
            "custom_reward_function.name=length_penalty",
            "reward_model.reward_kwargs={'max_length': -1}",
        ),
        "max_length",
    ),
    "on_timeout": (
        ("custom_reward_function.num_workers=1", "custom_reward_function.on_timeout=wait"),
        "on_timeout is one of zero, stop",
    ),
    "a time limit of nothing": (
        ("custom_reward_function.num_workers=1", "custom_reward_function.timeout_s=0"),
        "timeout",
    ),
    "two ways at once": (
        ("reward_functions=({'name': 'exact_match'},)", "custom_reward_function.path=r.py"),
        "takes the place of",
    ),
    "an entry that is no function": (
        ("reward_functions=({'weight': 1.0},)",),
        ['reward_functions: wanted dicts with "name"', "as reward_functions[0]"],
    ),
    "a misspelt field": (
        ("reward_functions=({'name': 'exact_match', 'weigth': 1.0},)",),
        "reward_functions[0] has the key 'weigth', and takes path, name, weight, kwargs; did you "
        "mean 'weight'?",
    ),
    "a weight that is text": (
        ("reward_functions=({'name': 'exact_match'}, {'name': 'good_accuracy', 'weight': '0.1'})",),
        "reward_functions[1].weight is a number; given '0.1'",
    ),
    "keywords that are none": (
        ("reward_functions=({'name': 'exact_match', 'kwargs': 'x=1'},)",),
        "reward_functions[0].kwargs is a dict; given 'x=1'",
    ),
    "an infinite weight": (
        ("reward_functions=({'name': 'exact_match', 'weight': 1e999},)",),
        "weight",
    ),
}


@pytest.mark.parametrize("case", REWARD_SETTINGS)
def test_reward_settings_that_cannot_work(case, monkeypatch, capsys):
    overrides, words = REWARD_SETTINGS[case]
    argv = [ARITHMETIC, *SHORT, *(f"--config.{override}" for override in overrides)]
    assert_refused(argv, words, monkeypatch, capsys)


# --- the run's folder


def foreign_folder():
    Path("run").mkdir()
    Path("run/thesis.tex").write_text("all my work")


def linked_folder():
    Path("elsewhere").mkdir()
    claimed()
    Path("run/checkpoints").symlink_to(Path("elsewhere").resolve())


def claimed(**changes):
    from parsing import parse

    from adpo_jax.run.folder import RunFolder

    folder = RunFolder(Path("run"))
    folder.claim(parse(*SHORT))
    folder.release()
    content = json.loads(Path("run/config.json").read_text())
    content["algorithm"] |= changes
    Path("run/config.json").write_text(json.dumps(content))


FOLDERS = {
    "of something else": (foreign_folder, "is not empty and holds no run"),
    "that is a file": (lambda: Path("run").touch(), "is a file"),
    "of another config": (lambda: claimed(tau=0.5), "algorithm.tau: 0.5 -> 0.8"),
    "with a config cut short": (
        lambda: (claimed(), cut_short("run/config.json", 50)),
        "is no valid JSON",
    ),
    "with a link out of it": (linked_folder, "is a link that leaves the run's folder"),
    "that is a link to below a file": (
        lambda: Path("run").symlink_to("good.jsonl/x"),
        "run cannot be written: File exists",
    ),
}


@pytest.mark.parametrize("case", FOLDERS)
def test_a_folder_that_cannot_be_used(case, monkeypatch, capsys):
    make, words = FOLDERS[case]
    make()
    assert_refused([ARITHMETIC, *SHORT, "--workdir=run"], words, monkeypatch, capsys)


def began(monkeypatch, capsys, *flags) -> list[str]:
    """A run of one iteration; returns its command."""
    monkeypatch.setattr(Policy, "save_pretrained", save_nothing)
    argv = [ARITHMETIC, *SHORT, "--workdir=run", *flags]
    assert outcome(argv, monkeypatch, capsys) == (0, "")
    return argv


def test_a_config_that_the_checkpoint_does_not_fit_is_not_written(monkeypatch, capsys):
    argv = began(monkeypatch, capsys)
    larger = TrainState(jnp.int32(0), {"layers": {"w": jnp.zeros(3)}}, {"m": jnp.zeros(3)})
    monkeypatch.setattr(StandInLearner, "init_state", lambda *_: larger)
    argv += ["--config.algorithm.tau=0.7", "--allow_config_change"]
    assert_refused(argv, "another model, optimizer or anchor", monkeypatch, capsys)


def test_group_filtering_cannot_begin_in_the_middle_of_a_run(monkeypatch, capsys):
    argv = began(monkeypatch, capsys)
    argv += ["--config.algorithm.filter_groups=true", "--allow_config_change"]
    assert_refused(argv, "000001.json is missing", monkeypatch, capsys)


def test_checkpoints_that_were_removed_are_missed(monkeypatch, capsys):
    argv = began(monkeypatch, capsys)
    shutil.rmtree("run/checkpoints")
    assert_refused(argv, "it has had checkpoints", monkeypatch, capsys)


def test_data_and_rewards_that_have_changed_are_refused_with_both_digests(monkeypatch, capsys):
    write_rows("grown.jsonl", ROWS)
    reward = "def f(completions, **columns):\n    return [0.5] * len(completions)\n"
    files = (*with_reward(reward)[-2:], "--config.data.train_files=grown.jsonl")
    argv = began(monkeypatch, capsys, *files, "--config.data.apply_chat_template=false")
    write_rows("grown.jsonl", [*ROWS, {"question": "1 plus 1?", "answer": "#### 2"}])
    Path("reward.py").write_text(reward.replace("0.5", "0.25"))
    words = ["contents.train_prompts: '6 prompts, sha256 ", " -> '7 prompts, sha256 "]
    words += ["contents.reward_files: 'reward.py: sha256 "]
    assert_refused(argv, words, monkeypatch, capsys)
    assert outcome([*argv, "--allow_config_change"], monkeypatch, capsys) == (0, "")


def recorded(monkeypatch, capsys) -> list[str]:
    """A recorded run; returns the command that replays it."""
    began(monkeypatch, capsys, "--config.trainer.rollout_data_dir=rollouts")
    return [ARITHMETIC, *SHORT, "--workdir=other", "--replay=run/rollouts"]


def test_a_replay_with_too_little_room_for_its_prompts(monkeypatch, capsys):
    argv = recorded(monkeypatch, capsys)
    assert outcome(argv, monkeypatch, capsys) == (0, "")
    argv = [*argv, "--workdir=third", "--config.data.max_prompt_length=3"]
    argv += ["--config.data.overlong_prompts=truncate"]
    assert_refused(argv, "raise data.max_prompt_length, which is 3", monkeypatch, capsys)


def test_a_replay_whose_prompts_are_in_another_column(monkeypatch, capsys):
    argv = recorded(monkeypatch, capsys)
    write_rows("rows.jsonl", [{"prompt": "1+1", "answer": "2"}] * 4)
    argv += ["--config.data.train_files=rows.jsonl", "--config.data.prompt_key=prompt"]
    words = ["has no column 'prompt', only question, ", "; set data.prompt_key to the one with"]
    assert_refused(argv, words, monkeypatch, capsys)


def test_a_recording_that_is_damaged_in_its_pages(monkeypatch, capsys):
    argv = recorded(monkeypatch, capsys)
    path = Path("run/rollouts/000001.parquet")
    rows = pyarrow.parquet.ParquetFile(path).metadata.row_group(0)
    columns = {rows.column(i).path_in_schema: rows.column(i) for i in range(rows.num_columns)}
    column = columns["log_probs.list.element"]
    content = bytearray(path.read_bytes())
    content[column.data_page_offset + column.total_compressed_size // 2] ^= 0x10
    path.write_bytes(content)
    code, err = outcome(argv, monkeypatch, capsys)
    assert code == 2, err
    assert "000001.parquet is no readable recording" in err


@pytest.mark.parametrize("filtered", ["true", "false"])
def test_a_run_that_is_to_end_where_it_stopped_is_evaluated_there(filtered, monkeypatch, capsys):
    evaluated = ("--config.data.val_files=embedded:arithmetic", "--config.data.max_val_samples=4")
    evaluated += (f"--config.algorithm.filter_groups={filtered}",)
    argv = began(monkeypatch, capsys, *evaluated, "--config.trainer.total_training_steps=2")
    shutil.rmtree("run/checkpoints/2")
    argv += ["--config.trainer.total_training_steps=1", "--allow_config_change"]
    assert outcome(argv, monkeypatch, capsys) == (0, "")
    rows = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    assert [(row["step"], "eval/accuracy" in row) for row in rows] == [(0, True), (1, True)]
    assert outcome(argv, monkeypatch, capsys) == (0, "")  # and not twice
    assert len(Path("run/metrics.jsonl").read_text().splitlines()) == len(rows)


def test_a_reward_function_that_fails_in_an_evaluation_leaves_the_sample(monkeypatch, capsys):
    argv = with_reward("def f(completions, **columns):\n    raise KeyError('lost')\n")
    argv += ["--config.data.val_files=embedded:arithmetic", "--config.eval.graded_by=reward"]
    argv += ["--config.data.max_val_samples=4", "--workdir=run"]
    code, err = outcome(argv, monkeypatch, capsys)
    assert code == 2, err
    sample = json.loads(Path("run/samples/reward_error_eval_000000.jsonl").read_text())
    assert sample["index"] == 0


@pytest.mark.parametrize("folder", ["/proc/adpo_jax_run", "good.jsonl/run"])
def test_a_folder_that_cannot_be_written(folder, monkeypatch, capsys):
    argv = [ARITHMETIC, *SHORT, f"--workdir={folder}"]
    assert_refused(argv, f"{folder} cannot be written: ", monkeypatch, capsys)


def test_a_folder_that_another_process_trains_in(monkeypatch, capsys):
    claimed()
    hold = (
        "import fcntl, os, time; f = os.open('run', 0); fcntl.flock(f, fcntl.LOCK_EX);"
        "print('held', flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", hold], stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"held\n"
        argv = [ARITHMETIC, *SHORT, "--workdir=run"]
        assert_refused(argv, "another process is training in run", monkeypatch, capsys)
        process.kill()


def test_a_default_folder_that_a_link_leads_away(monkeypatch, capsys):
    Path("runs/adpo_jax").mkdir(parents=True)
    Path("elsewhere").mkdir()
    Path("runs/adpo_jax/arithmetic").symlink_to(Path("elsewhere").resolve())
    assert_refused([ARITHMETIC, *SHORT], "leads out of runs/", monkeypatch, capsys)


def test_an_environment_that_fails_in_the_middle_of_a_run(monkeypatch, capsys):
    def fail(*_):
        raise EnvironmentFailed("environment: its reset failed: no such world")

    monkeypatch.setattr("adpo_jax.train.run", fail)
    code, err = outcome((ARITHMETIC,), monkeypatch, capsys)
    assert code == 2
    assert "error: environment: its reset failed: no such world" in err


# --- the same in a process of its own


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((ARITHMETIC, "--config.algorithm.tau=0"), "tau"),
        (("--config=empty.py",), "get_config"),
    ],
)
def test_a_process_exits_with_code_2_and_shows_a_traceback_only_when_asked(arguments, words):
    Path("empty.py").touch()
    for debug in ((), ("--debug",)):
        done = subprocess.run(
            [sys.executable, "-m", "adpo_jax.main", *arguments, *debug],
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 2, done.stderr
        assert words in done.stderr
        assert ("Traceback" in done.stderr) == bool(debug)
    assert not Path("runs").exists()


def test_there_are_enough_cases():
    tables = (CONFIG, CONFIG_FILES, COMMAND_LINES, DATA, MODELS, BEFORE, DURING, REWARD_SETTINGS)
    assert sum(map(len, (*tables, FOLDERS))) >= 150
