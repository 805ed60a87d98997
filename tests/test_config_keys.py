"""Every key of the config does what its name says: set on the command line, it changes the run.

The keys of `algorithm` are walked in test_config.py, where they change the loss.
"""

import contextlib
import dataclasses
import functools
import io
import json
import runpy
import tempfile
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fakes import FakeEngine, FakeLearner, vars_of
from parsing import parse

import adpo_jax
from adpo_jax.config import declarations, default_config, keys
from adpo_jax.data import arithmetic
from adpo_jax.devices import compilation_cache, sharding
from adpo_jax.devices.compilation_cache import use as use_cache
from adpo_jax.engine.sampling import SamplingParams
from adpo_jax.environments.external import External
from adpo_jax.model import decoder
from adpo_jax.model.attention_kernels import per_device
from adpo_jax.model.lora import Lora
from adpo_jax.model.model_config import Mixture
from adpo_jax.policy import Policy, adapters
from adpo_jax.records import Completion, Completions, GradedGroups, Prompts
from adpo_jax.rewards import Scores
from adpo_jax.rollouts.ahead import Ahead
from adpo_jax.run import config_checks, datasets, loading, preparation, setup
from adpo_jax.run import environments as run_environments
from adpo_jax.run.batch_plan import batch_plan
from adpo_jax.update import anchor, optimizer, sft


@pytest.fixture(autouse=True)
def files(tmp_path, monkeypatch, checkpoint):
    """Data files, a reward file and a checkpoint folder in the working folder."""
    rows = [
        {"question": f"{'why ' * n}{n}?", "answer": f"#### {n}", "other": f"o{n}", "text": "yes"}
        for n in range(3, 9)
    ]
    forged = [row | {"question": "Me<eos>you"} for row in rows]
    for name, part in {"a.jsonl": rows, "b.jsonl": rows[::-1], "c.jsonl": forged}.items():
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in part))
    (tmp_path / "folder").mkdir()
    for split, part in {"train": rows[:3], "test": rows[3:]}.items():
        lines = "".join(json.dumps(row) + "\n" for row in part)
        (tmp_path / "folder" / f"{split}.jsonl").write_text(lines)
    (tmp_path / "rewards.py").write_text("def good_accuracy(completions, **columns): ...\n")
    (tmp_path / "one").symlink_to(checkpoint)
    (tmp_path / "two").symlink_to(checkpoint)
    (tmp_path / "adapter").symlink_to(checkpoint.with_name("adapter"))
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """A small model in a folder."""
    folder = tmp_path_factory.mktemp("model") / "one"
    policy, params = Policy.from_config(
        arithmetic.MODEL_CONFIG | {"hidden_size": 32, "num_hidden_layers": 1}, jax.random.key(9)
    )
    policy.save_pretrained(folder, params, arithmetic.make_tokenizer())
    adapted = policy.with_adapters(params, Lora(2, 4.0), jax.random.key(1))
    adapters.save(folder.with_name("adapter"), *adapted, base_model=str(folder))
    return folder


def learner(config):
    model = Policy.abstract_from_config(arithmetic.MODEL_CONFIG)
    made = setup.make_learner(config, model, batch_plan(config, num_shards=1), num_steps=10)
    told = made.anchor, made.plan, made.seed, made.temperature
    return *told, made.offload_optimizer, made.max_anchor_kl


def rewards(config):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(setup, "RewardModel", lambda functions, **kwargs: (functions, kwargs))
        return setup.make_reward_model(config)


def prompts(config):
    tokenizer = arithmetic.make_tokenizer()
    if config.data.apply_chat_template:
        tokenizer.chat_template = (
            "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}{% endfor %}{{ tone }}"
        )
    try:
        train = datasets.load_prompts(config, tokenizer, config.data.train_files, split="train")
        return train, datasets.load_val_prompts(config, tokenizer)
    finally:
        tokenizer.chat_template = None


def optimized(make):
    """Parameters after three steps of an optimizer on constant gradients."""

    def probe(config):
        adamw = make(config)
        params = {"embed": jnp.array([0.5, -2.0]), "final_norm": jnp.ones(2)}
        state = adamw.init(params)
        for step in range(3):
            grads = jax.tree.map(lambda p, s=step: 30.0 * jnp.cos(p + s), params)
            updates, state = adamw.update(grads, state, params)
            params = jax.tree.map(jnp.add, params, updates)
        return jax.tree.map(np.asarray, params)

    return probe


def trust(config):
    """Whether code of the model's folder may be run."""
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            loading, "_load_tokenizer", lambda *given: seen.append(given[-1]) or make_tokenizer()
        )
        loading.find_model(config)
    return seen


def policy(config):
    mesh, source = sharding.make_mesh(**config.mesh), loading.find_model(config)
    params = loading.initial_params(config, source, mesh)
    model = loading.make_policy(config, source, mesh)
    return model, float(jnp.sum(params["embed"].astype(jnp.float32)))


def fixed(config):
    return loading.find_fixed(config, loading.find_model(config), one_device_mesh())


def engine(config):
    model = loading.make_policy(config, loading.find_model(config), one_device_mesh())
    made = setup.make_engine(config, model)
    # The machine's free memory is another at each look.
    made.plan = dataclasses.replace(made.plan, most_tokens=None)
    return {k: repr(v) for k, v in vars(made).items() if k not in ("verbs", "policy")} | {
        "layout": repr(made.verbs.layout),
        "attention": getattr(made.verbs, "attention", None),
    }


def rollout_mesh(config):
    model = loading.make_policy(config, loading.find_model(config), make_mesh())
    return dict(setup.make_engine(config, model).policy.mesh.shape)


def sampling(config):
    return setup.make_sampling(config, loading.find_model(config))


def evaluation(config):
    reward_model = setup.make_reward_model(config)
    own = setup.make_eval_reward_model(config, reward_model) is reward_model
    return setup.make_eval_settings(config, (1,)), own


def traced(config):
    """The iterations, of five, in which a trace begins or ends."""
    events = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax.profiler, "start_trace", lambda folder: events.append("begins"))
        patch.setattr(jax.profiler, "stop_trace", lambda: events.append("ends"))
        profiler = setup.make_profiler(config, Path(), num_steps=5)
        for step in range(1, 6):
            profiler.begin(step)
            events.append(step)
            profiler.end(step)
    return events


def trained(config):
    """Whether a completion that was cut off is trained on."""
    cut = Completions([[Completion.sampled([40], [-1.0], "length")]])
    groups = GradedGroups(Prompts([[1]], {}), cut, ["a"], Scores.unknown(1, []))
    return bool(adpo_jax.train.trained_on(config, groups, 0).completions.flat[0].trained.any())


def tracked(config):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(setup.trackers, "start", lambda name, workdir, *names: (name, *names))
        return setup.make_trackers(config, Path())


def demonstrations(config):
    return datasets.load_demonstrations(config, loading.find_model(config))


def run_length(config):
    return [setup.num_iterations(c, num_prompts=100) for c in (config, without_total(config))]


def without_total(config):
    config = config.copy_and_resolve_references()
    with config.unlocked():
        config.trainer.total_training_steps = None
    return config


def start(config):
    return sorted(loading.find_model(config).tokenizer.get_vocab()), policy(config)


def settings(make):
    """What a part was made with."""
    return lambda config: {k: v for k, v in vars(make(config)).items() if k.lstrip("_") in WATCHED}


WATCHED = ("best_metric", "max_failures", "grace_s", "action", "limit")
saving = settings(lambda config: setup.make_checkpoints(config, Path(tempfile.mkdtemp())))
guard = settings(lambda c: setup.make_guard(c, config_checks.make_algorithm(c)))


def cache(config):
    """What JAX's compilation cache is set to."""
    seen = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
        patch.setattr(compilation_cache.jax.config, "update", seen.__setitem__)
        use_cache(config.trainer.compilation_cache_dir)
    return seen


def data_cache(config):
    """What lies in the cache folder after loading a file that counts as large."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("adpo_jax.data.files.LARGE_BYTES", 0)
        tokenizer = arithmetic.make_tokenizer()
        datasets.load_prompts(config, tokenizer, config.data.train_files, split="train")
    return sorted(p.name for p in Path("cache").glob("*"))


def first_batch(config):
    """The numbers of the prompts of the first iteration, of 300."""
    none = dict.fromkeys(("engine", "tokenizer", "reward_model", "environments"))
    none["sampling"] = types.SimpleNamespace(stop_token_ids=(), n=2)
    prompts = Prompts([[n] for n in range(300)], {})
    parts = types.SimpleNamespace(train_prompts=prompts, num_steps=1, **none)
    return preparation._sampled(config, parts, None).prompts_of(0).token_ids


def pacing(config):
    """How far ahead of the update groups are sampled."""
    none = dict.fromkeys(("tokenizer", "reward_model", "environments", "train_prompts"))
    none["sampling"] = SamplingParams(n=2, max_tokens=4)
    model = types.SimpleNamespace(config=types.SimpleNamespace(vocab_size=9))
    none["engine"] = types.SimpleNamespace(policy=model)
    parts = types.SimpleNamespace(num_steps=3, **none)
    source = preparation._sampled(config, parts, types.SimpleNamespace(in_flight=None))
    return source._in_flight._pacing if isinstance(source, Ahead) else None


def balance(config):
    """The weight of the auxiliary loss of a mixture's routers."""
    model = loading.make_policy(config, loading.find_model(config), one_device_mesh())
    mixture = dataclasses.replace(model.config, mixture=Mixture(2, 1, 8))
    model = dataclasses.replace(model, config=mixture)
    plan = batch_plan(config, num_shards=1)
    return setup.make_learner(config, model, plan, num_steps=1).router_aux_loss_coef


def mesh(config):
    """What the mesh is made of."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(setup.sharding, "make_mesh", lambda **sizes: sizes)
        return setup.make_mesh(config)


def environment(config):
    """What environments are made of; no process is started."""
    seen = []

    def pool(*args):
        seen.append(args)
        described = {"": types.SimpleNamespace(tools=[])}
        return types.SimpleNamespace(describe=lambda: (described, None))

    def template(*args):
        seen.append(args[-1])
        return types.SimpleNamespace(patch=None)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(External, "check", lambda _: None)
        if config.environment.url:
            return vars(run_environments._make_external(config))
        patch.setattr(run_environments, "EnvironmentPool", pool)
        patch.setattr(run_environments, "TurnTemplate", template)
        made = run_environments.make_environments(config, None, ())
        return seen, made and (made.max_turns, made.overlap_steps)


def evaluated_before(config):
    """Whether an evaluation is due before the first iteration."""
    parts = types.SimpleNamespace(num_steps=5, val_prompts=[1])
    run = types.SimpleNamespace(config=config, parts=parts)
    return adpo_jax.train._is_evaluation_due(run, 0, {})


def road(config):
    """The folder, the samples drawn for and the lines printed by a run without a model's work."""
    seen = []

    def build(config):
        parts = setup.build(config, jax.devices()[:1])
        learner = FakeLearner(**vars_of(parts.learner))
        return dataclasses.replace(parts, engine=FakeEngine(), learner=learner)

    def make_sft_step(*_, **options):
        def step(state, batch):
            seen.append((jax.tree.leaves(batch)[0].shape, options))
            return state.replace(step=state.step + 1), {"sft/loss": 1.0, "update/skipped": 0.0}

        return step

    folder, out = Path(tempfile.mkdtemp()) / "run", io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out):
        patch.setattr(sft, "make_sft_step", make_sft_step)
        adpo_jax.train(config, folder, build=build)
    files = sorted(str(p.relative_to(folder)) for p in folder.glob("[cs]*/*"))
    first = (folder / "samples").glob("train*")
    prompts = [json.loads(p.read_text().splitlines()[0])["prompt"] for p in sorted(first)]
    return files, prompts, seen, out.getvalue().count("\n  [")


def one_device_mesh(**_):
    return make_mesh(devices=jax.devices()[:1])


make_mesh = sharding.make_mesh
make_tokenizer = arithmetic.make_tokenizer
WORKERS = "--config.custom_reward_function.num_workers=1"
ROOM = "--config.data.max_prompt_length=64"
FROM_FILE = "--config.data.train_files=a.jsonl"
NO_VAL = "--config.data.val_files="
ACTOR, ROLLOUT, MODEL = (f"actor_rollout_ref.{part}" for part in ("actor", "rollout", "model"))
adamw = optimized(lambda config: setup.make_optimizer(config, 100)[0])
cold_adamw = optimized(setup.make_cold_start_optimizer)
TIGHT = (FROM_FILE, NO_VAL, "--config.data.apply_chat_template=false")
ELSEWHERE = "--config.environment.url=http://127.0.0.1:9/x"
TOOLS = ("--config.environment.path=tools.py", "--config.environment.tools=('a',)")
SMALL = f"--config.{MODEL}.hf_config={{'hidden_size': 16, 'num_hidden_layers': 1, 'head_dim': 8}}"
FEW = ("--config.data.train_max_samples=64", "--config.data.max_val_samples=4")
TAUGHT = ("--config.algorithm.adv_estimator=opd", "--config.teacher.path=one")
FEW_SHOWN = "--config.sft.train_max_samples=64"
SHORT = (
    SMALL,
    *FEW,
    FEW_SHOWN,
    "--config.sft.steps=2",
    "--config.sft.lr_warmup_steps=0",
    "--config.trainer.total_training_steps=4",
    "--config.trainer.save_freq=1",
    "--config.trainer.test_freq=1",
    "--config.trainer.log_samples_freq=1",
)

# key -> (value, what it changes, other overrides that it needs)
WALK = {
    "algorithm.filter_groups": ("true", road, *SHORT),
    "algorithm.filter_max_attempts": ("2", road, "--config.algorithm.filter_groups=true", *SHORT),
    "anchor.mode": ("ema", learner),
    "anchor.ema_alpha": ("0.5", learner, "--config.anchor.mode=ema"),
    "anchor.kl_threshold": ("0.5", learner, "--config.anchor.mode=kl_triggered"),
    "custom_reward_function.path": (
        "rewards.py",
        rewards,
        "--config.custom_reward_function.name=good_accuracy",
    ),
    "custom_reward_function.name": ("exact_match", rewards),
    "custom_reward_function.num_workers": ("1", rewards),
    "custom_reward_function.timeout_s": ("3.0", rewards, WORKERS),
    "custom_reward_function.on_timeout": ("stop", rewards, WORKERS),
    "reward_model.reward_kwargs": ("{'ngram_size': 3}", rewards),
    "reward_functions": ("({'name': 'exact_match'},)", rewards),
    "data.train_files": ("b.jsonl", prompts, FROM_FILE, ROOM),
    "data.val_files": ("b.jsonl", prompts, FROM_FILE, ROOM),
    "data.train_split": ("test", prompts, "--config.data.train_files=folder", NO_VAL, ROOM),
    "data.val_split": ("train", prompts, FROM_FILE, "--config.data.val_files=folder", ROOM),
    "data.prompt_key": ("other", prompts, FROM_FILE, "--config.data.val_files=a.jsonl"),
    "data.answer_key": ("other", prompts, FROM_FILE, "--config.data.val_files=a.jsonl"),
    "data.prompt_template": ("Q: {prompt}", prompts, ROOM, *FEW),
    "data.system_prompt": ("Be brief.", prompts, ROOM, *FEW),
    "data.apply_chat_template": ("false", prompts, ROOM, *FEW),
    "data.chat_template_kwargs": ("{'tone': 'kindly'}", prompts, ROOM, *FEW),
    "data.allow_control_tokens": ("true", prompts, "--config.data.train_files=c.jsonl", NO_VAL),
    "data.max_prompt_length": ("14", prompts, *TIGHT),
    "data.overlong_prompts": ("truncate", prompts, "--config.data.max_prompt_length=14", *TIGHT),
    "data.max_response_length": ("7", sampling),
    "data.mask_truncated_completions": ("true", trained),
    "data.skip_special_tokens": ("true", lambda config: setup.make_reading(config, (1,))),
    "data.train_batch_size": ("16", learner),
    "data.max_val_samples": ("2", prompts, ROOM, *FEW),
    "data.val_max_samples": ("2", prompts, ROOM, *FEW),
    "data.train_max_samples": ("2", prompts, ROOM, *FEW),
    "data.shuffle": ("false", first_batch),
    "data.cache_dir": ("cache", data_cache, FROM_FILE),
    f"{MODEL}.path": ("one", start, f"--config.{MODEL}.random_init=true"),
    f"{MODEL}.hf_config": ("{'hidden_size': 16}", policy),
    f"{MODEL}.override_config": (
        "{'rms_norm_eps': 1e-5}",
        policy,
        f"--config.{MODEL}.path=one",
    ),
    f"{MODEL}.random_init": ("true", policy, f"--config.{MODEL}.path=one"),
    f"{MODEL}.trust_remote_code": ("true", trust, f"--config.{MODEL}.path=one"),
    f"{MODEL}.lora_rank": ("3", policy),
    f"{MODEL}.lora_alpha": ("8.0", policy, f"--config.{MODEL}.lora_rank=3"),
    f"{MODEL}.lora_target_modules": ("q_proj,v_proj", policy, f"--config.{MODEL}.lora_rank=3"),
    f"{MODEL}.lora_adapter_path": ("adapter", policy, f"--config.{MODEL}.path=one"),
    f"{ACTOR}.optim.lr": ("0.1", adamw),
    f"{ACTOR}.optim.weight_decay": ("0.5", adamw),
    f"{ACTOR}.optim.lr_warmup_steps": ("4", adamw),
    f"{ACTOR}.optim.lr_scheduler_type": ("linear", adamw),
    f"{ACTOR}.optim.min_lr_ratio": ("0.9", adamw),
    f"{ACTOR}.optim.betas": ("(0.5, 0.6)", adamw),
    f"{ACTOR}.grad_clip": ("0.0", adamw),
    f"{ACTOR}.ppo_mini_batch_size": ("8", learner),
    f"{ACTOR}.layout": ("rows", learner),
    f"{ACTOR}.optimizer_offload": ("true", learner),
    f"{ACTOR}.optim.mu_dtype": ("bfloat16", adamw),
    "anchor.offload": ("true", learner, "--config.anchor.mode=ema"),
    f"{ACTOR}.ppo_epochs": ("2", learner),
    f"{ACTOR}.attention": (
        "pallas_tpu_interpret",
        policy,
        f"--config.{MODEL}.hf_config={{'head_dim': 128}}",
    ),
    f"{ROLLOUT}.temperature": ("0.7", lambda config: (sampling(config), learner(config)[3])),
    f"{ROLLOUT}.top_p": ("0.9", sampling),
    f"{ROLLOUT}.top_k": ("5", sampling),
    f"{ROLLOUT}.min_p": ("0.1", sampling),
    f"{ROLLOUT}.tensor_model_parallel_size": ("2", rollout_mesh),
    f"{ROLLOUT}.num_slots": ("24", engine),
    f"{ROLLOUT}.cache_dtype": ("bfloat16", engine),
    f"{ROLLOUT}.attention": (
        "pallas_tpu_interpret",
        engine,
        f"--config.{MODEL}.hf_config={{'head_dim': 128}}",
    ),
    f"{ROLLOUT}.free_cache_engine": ("false", engine),
    f"{ROLLOUT}.gpu_memory_utilization": ("0.003", engine, f"--config.{ROLLOUT}.num_slots=256"),
    f"{ROLLOUT}.expected_response_length": (
        "64",
        engine,
        "--config.data.max_response_length=2048",
    ),
    f"{ROLLOUT}.prefill_chunk_size": ("64", engine),
    f"{ROLLOUT}.max_staleness": ("2", pacing),
    f"{ROLLOUT}.router_replay": ("true", sampling),
    f"{ACTOR}.router_aux_loss_coef": ("0.1", balance),
    f"{ROLLOUT}.ahead": ("3", pacing, f"--config.{ROLLOUT}.max_staleness=1"),
    "actor_rollout_ref.ref.path": (
        "one",
        fixed,
        "--config.algorithm.beta_reference_kl=0.1",
    ),
    "actor_rollout_ref.ref.override_config": (
        "{'rms_norm_eps': 1e-5}",
        fixed,
        "--config.algorithm.beta_reference_kl=0.1",
        "--config.actor_rollout_ref.ref.path=one",
    ),
    "teacher.path": ("two", fixed, *TAUGHT),
    "teacher.override_config": ("{'rms_norm_eps': 1e-5}", fixed, *TAUGHT),
    "eval.n": ("3", evaluation),
    "eval.ks": ("(2,)", evaluation, "--config.eval.n=3"),
    "eval.temperature": ("0.7", evaluation, "--config.eval.n=3"),
    "eval.top_p": ("0.9", evaluation, "--config.eval.n=3"),
    "eval.top_k": ("5", evaluation, "--config.eval.n=3"),
    "eval.min_p": ("0.1", evaluation, "--config.eval.n=3"),
    "eval.max_tokens": ("9", evaluation),
    "eval.graded_by": ("reward", evaluation),
    "eval.category_key": ("kind", evaluation),
    "sft.steps": ("3", road, *SHORT),
    "sft.batch_size": ("8", road, *SHORT),
    "sft.save_freq": ("1", road, *SHORT, "--config.trainer.save_freq=0"),
    "sft.train_files": ("a.jsonl", demonstrations, FEW_SHOWN, "--config.sft.completion_key=answer"),
    "sft.completion_key": ("answer", demonstrations, FEW_SHOWN),
    "sft.train_max_samples": ("2", demonstrations, FEW_SHOWN),
    "sft.lr": ("0.1", cold_adamw),
    "sft.lr_warmup_steps": ("3", cold_adamw),
    "sft.weight_decay": ("0.5", cold_adamw),
    "sft.betas": ("(0.5, 0.6)", cold_adamw),
    "mesh.data": ("2", policy),
    "mesh.fsdp": (
        "4",
        policy,
        "--config.mesh.data=2",
        "--config.mesh.tensor=-1",
        "--config.mesh.fsdp=2",
    ),
    "mesh.tensor": ("2", policy),
    "mesh.sequence": ("2", policy),
    "actor_rollout_ref.actor.sequence_exchange": ("ring", policy, "--config.mesh.sequence=2"),
    "mesh.expert": ("2", mesh),
    "mesh.dcn_data": ("1", mesh),
    "environment.path": ("others.py", environment, *TOOLS),
    "environment.name": ("Calculator", environment, *TOOLS),
    "environment.tools": ("('b',)", environment, *TOOLS),
    "environment.max_turns": ("3", environment, *TOOLS),
    "environment.max_tool_tokens": ("9", environment, *TOOLS),
    "environment.overlap_steps": ("7", environment, *TOOLS, f"--config.{ROLLOUT}.max_staleness=1"),
    "environment.timeout_s": ("3.0", environment, *TOOLS),
    "environment.num_workers": ("2", environment, *TOOLS),
    "environment.url": ("http://127.0.0.1:9/x", environment, *TOOLS),
    "environment.serve_host": ("::1", environment, ELSEWHERE),
    "environment.rollout_timeout_s": ("5.0", environment, ELSEWHERE),
    "trainer.project_name": ("other", preparation.default_workdir),
    "trainer.experiment_name": ("other", preparation.default_workdir),
    "trainer.total_epochs": ("3", run_length),
    "trainer.total_training_steps": ("7", run_length),
    "trainer.per_device_train_batch_size": ("8", learner),
    "trainer.gradient_checkpointing": ("true", policy),
    "trainer.scan_layers": ("False", policy),
    "trainer.bf16": ("true", policy),
    "trainer.seed": ("5", road, *SHORT),
    "trainer.save_freq": ("2", road, *SHORT),
    "trainer.save_total_limit": ("1", road, *SHORT),
    "trainer.best_metric": ("eval/accuracy", saving),
    "trainer.max_save_failures": ("7", saving),
    "trainer.grace_period_s": ("7.0", settings(setup.make_interruption)),
    "trainer.on_bad_update": ("skip", guard),
    "trainer.max_bad_updates": (
        "7",
        guard,
        "--config.trainer.on_bad_update=skip",
    ),
    "trainer.max_anchor_kl": ("0.5", learner, "--config.anchor.mode=fixed"),
    "trainer.rollout_data_dir": ("collected", road, *SHORT),
    "trainer.compilation_cache_dir": ("", cache),
    "trainer.val_before_train": ("false", evaluated_before),
    "trainer.test_freq": ("2", road, *SHORT),
    "trainer.logger": ("('wandb',)", tracked),
    "trainer.profile_steps": ("(2, 3)", traced),
    "trainer.log_samples_freq": ("2", road, *SHORT),
    "trainer.log_num_samples": ("1", road, *SHORT),
}


def unchanged(probe, *context, file):
    """What a probe finds without a key, which is the same each time."""
    found = repr(probe(parse(*context, name=file)))
    assert repr(probe(parse(*context, name=file))) == found
    return found


@functools.cache
def unchanged_anywhere(probe, *context, file):
    """`unchanged` of what takes long and says nothing of the folder that it lies in."""
    return unchanged(probe, *context, file=file)


@pytest.mark.parametrize("key", WALK)
def test_each_key_on_the_command_line_changes_the_run(key):
    value, probe, *context = WALK[key]
    # The one whose length is given in epochs.
    file = "gsm8k" if key == "trainer.total_epochs" else "arithmetic"
    find = unchanged_anywhere if probe in (road, policy) else unchanged
    before = find(probe, *context, file=file)
    assert repr(probe(parse(*context, f"--config.{key}={value}", name=file))) != before


def test_minus_one_is_verls_word_for_never_evaluating_and_never_saving():
    never = [f"--config.{key}=-1" for key in ("trainer.test_freq", "trainer.save_freq")]
    files, prompts, seen, _ = road(parse(*SHORT, *never, "--config.sft.save_freq=-1"))
    assert (len(prompts), len(seen)) == (4, 2)  # it trains all the same
    assert [name for name in files if name.startswith(("checkpoints/", "samples/eval"))] == []
    with pytest.raises(ValueError, match="no effect without trainer.test_freq of at least 0"):
        parse(*never, "--config.trainer.best_metric=eval/accuracy")


def test_a_warm_up_longer_than_a_short_run_is_cut_and_said(capsys):
    optim = "actor_rollout_ref.actor.optim"
    config = parse(f"--config.{optim}.lr_warmup_steps=99", "--config.sft.steps=7")
    _, schedule = setup.make_optimizer(config, total_steps=5)
    assert [float(schedule(i)) for i in (0, 4)] == pytest.approx([1e-4, 5e-4])
    setup.make_cold_start_optimizer(config)
    first, second = capsys.readouterr().err.splitlines()
    assert f"{optim}.lr_warmup_steps is 99, but there are 5 optimizer steps" in first
    assert "sft.lr_warmup_steps is 20, but there are 7 optimizer steps" in second


def test_every_key_is_walked():
    walked = {key for key in keys(default_config()) if not key.startswith("algorithm.")}
    assert set(WALK) == walked | {"algorithm.filter_groups", "algorithm.filter_max_attempts"}


def test_every_key_is_declared_with_a_meaning_and_the_reference_is_as_declared():
    assert set(declarations()) == set(keys(default_config()))
    assert [name for name, key in declarations().items() if not key.meaning] == []
    script = Path(__file__).resolve().parents[1] / "scripts" / "make_config_reference.py"
    made = runpy.run_path(str(script))
    written = made["REFERENCE"].read_text()
    assert written == made["reference"](), "stale: run python scripts/make_config_reference.py"


@pytest.mark.parametrize("name", [n for n, key in declarations().items() if key.choices])
def test_a_choice_that_a_key_does_not_have_is_refused_with_those_that_it_has(name):
    with pytest.raises(ValueError, match=rf"{name} is one of .*; given 'neither'"):
        parse(f"--config.{name}=neither")


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("anchor.mode", anchor.MODES),
        ("actor_rollout_ref.actor.optim.lr_scheduler_type", optimizer.SCHEDULES),
        ("actor_rollout_ref.actor.sequence_exchange", per_device.EXCHANGES),
        ("trainer.gradient_checkpointing", decoder.REMAT_POLICIES),
    ],
)
def test_the_choices_of_a_key_are_those_of_the_part_that_it_sets(name, options):
    assert sorted(declarations()[name].choices) == sorted(options)


@pytest.mark.parametrize("name", [n for n, k in declarations().items() if k.least is not None])
def test_a_number_below_the_least_that_a_key_allows_is_refused(name):
    least = declarations()[name].least
    with pytest.raises(ValueError, match=rf"{name} is (at least |in \[){least}"):
        parse(f"--config.{name}={least - 2}")


def test_defaults_are_no_values_that_configs_share():
    first, second = default_config(), default_config()
    first.trainer.total_training_steps = 3
    first.algorithm.adaptive_tau_max = 1.0
    with first.unlocked():
        first.data.chat_template_kwargs.tone = "kindly"
    assert second.trainer.total_training_steps is None
    assert second.algorithm.adaptive_tau_max is None
    assert second.data.chat_template_kwargs.to_dict() == {}
