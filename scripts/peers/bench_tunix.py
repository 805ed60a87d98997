"""Times Google's Tunix on a CPU in float32: its Qwen3, vanilla sampler and GRPO learner.

  PEERS_HOME/venv-tunix/bin/python bench_tunix.py --shape S --phase rollout

rollout      the cluster's `generate`; nothing but the length ends a completion
rollout_eos  the same, where V / mean_len ids end one
update       `update_actor` of each micro-batch, as the learner calls it
e2e          `train`, timed by its global steps
"""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("KAGGLE_USERNAME", "none")

import importlib.metadata

import common
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from tunix.models.qwen3 import model as qwen3
from tunix.rl import rl_cluster
from tunix.rl.grpo import grpo_learner
from tunix.rl.rollout import base_rollout

a = common.arguments(__doc__)
VERSIONS = {n: importlib.metadata.version(n) for n in ("google-tunix", "jax", "flax", "optax")}
SEQUENCES = a.prompts * a.gens
MESH = jax.sharding.Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("fsdp", "tp"))


def make_model():
    """Tunix's Qwen3 of the shape with the common weights."""
    c = common.SHAPES[a.shape]
    D, H, K, h = c["hidden"], c["heads"], c["kv"], c["head_dim"]
    config = qwen3.ModelConfig(
        num_layers=c["layers"],
        vocab_size=c["vocab"],
        embed_dim=D,
        hidden_dim=c["inter"],
        num_heads=H,
        head_dim=h,
        num_kv_heads=K,
        rope_theta=common.ROPE_THETA,
        norm_eps=common.NORM_EPS,
        use_tied_embedding=True,
        dtype=jnp.float32,
        param_dtype=jnp.float32,
        remat_config=qwen3.RematConfig.NONE,
    )
    with MESH:
        model = qwen3.Qwen3(config, rngs=nnx.Rngs(0))
    drawn = common.weights(a.shape)

    def put(variable, x):
        old = variable.get_value()
        assert old.shape == x.shape, (old.shape, x.shape)
        variable.set_value(jax.device_put(jnp.asarray(np.ascontiguousarray(x)), old.sharding))

    put(model.embedder.input_embedding, drawn["model.embed_tokens.weight"])
    put(model.final_norm.w, drawn["model.norm.weight"])
    for i, layer in enumerate(model.layers):

        def of(name, *shape, i=i):
            x = drawn[f"model.layers.{i}.{name}.weight"].T
            return x.reshape(shape) if shape else x

        put(layer.input_layernorm.w, of("input_layernorm"))
        put(layer.post_attention_layernorm.w, of("post_attention_layernorm"))
        put(layer.attn.q_proj.w, of("self_attn.q_proj", D, H, h))
        put(layer.attn.k_proj.w, of("self_attn.k_proj", D, K, h))
        put(layer.attn.v_proj.w, of("self_attn.v_proj", D, K, h))
        put(layer.attn.o_proj.w, of("self_attn.o_proj", H, h, D))
        put(layer.attn.q_norm.w, of("self_attn.q_norm"))
        put(layer.attn.k_norm.w, of("self_attn.k_norm"))
        for part in ("gate_proj", "up_proj", "down_proj"):
            put(getattr(layer.mlp, part).kernel, of(f"mlp.{part}"))
    return model


def make_learner(steps: int):
    """The cluster and the learner that drives it."""
    optimizer = optax.chain(
        optax.clip_by_global_norm(common.OPT["max_grad_norm"]),
        optax.adamw(
            common.OPT["lr"],
            b1=common.OPT["b1"],
            b2=common.OPT["b2"],
            eps=common.OPT["eps"],
            weight_decay=common.OPT["wd"],
        ),
    )
    if a.micro % a.gens:
        raise SystemExit(f"a micro-batch of Tunix is whole groups of {a.gens}; given {a.micro}")
    # -1 is no token: the sampler has no other way to end at the length alone.
    ends = common.eos_ids(a) if a.phase == "rollout_eos" else [-1]
    config = rl_cluster.ClusterConfig(
        role_to_mesh=dict.fromkeys(
            (rl_cluster.Role.ACTOR, rl_cluster.Role.REFERENCE, rl_cluster.Role.ROLLOUT), MESH
        ),
        rollout_engine="vanilla",
        offload_to_cpu=False,
        training_config=rl_cluster.RLTrainingConfig(
            actor_optimizer=optimizer,
            eval_every_n_steps=10_000,
            max_steps=steps,
            mini_batch_size=a.prompts,
            train_micro_batch_size=a.micro // a.gens,
            rollout_micro_batch_size=a.prompts,
            compute_logps_micro_batch_size=a.micro // a.gens,
        ),
        rollout_config=base_rollout.RolloutConfig(
            max_tokens_to_generate=a.new,
            max_prompt_length=a.prompt_len,
            kv_cache_size=a.prompt_len + a.new,
            temperature=1.0,
            top_p=1.0,
            top_k=None,
            eos_tokens=ends,
        ),
    )
    # Newer versions have another name for it.
    make_cluster = getattr(rl_cluster, "RLEngine", None) or rl_cluster.RLCluster
    cluster = make_cluster(
        actor=make_model(),
        reference=None,
        tokenizer=common.hf_tokenizer(a.shape),
        cluster_config=config,
    )
    learner = grpo_learner.GRPOLearner(
        cluster,
        algo_config=grpo_learner.GRPOConfig(
            num_generations=a.gens, num_iterations=1, beta=0.0, epsilon=0.2
        ),
        reward_fns=lambda prompts, completions, **_: common.reward_from_text(completions),
    )
    return cluster, learner


def check(cluster) -> dict:
    """The mean log-prob of eight completions."""
    prompts, completions, _ = common.batch(a)
    repeated = jnp.asarray(np.repeat(prompts, a.gens, 0)[:8])
    found = cluster.get_old_per_token_logps(repeated, jnp.asarray(completions[:8]), 8)
    return {"logp_mean": float(np.mean(found))}


def wait_for(cluster) -> None:
    jax.block_until_ready(nnx.state(cluster.actor_trainer.model, nnx.Param))


def rollout(cluster, runs):
    prompts, _, _ = common.batch(a)
    texts = [common.prompt_text(ids) for ids in prompts for _ in range(a.gens)]
    calls = 0

    def work():
        nonlocal calls
        calls += 1
        # Without a key of its own each call would draw the same completions.
        cluster.cluster_config.rollout_config.seed = jax.random.PRNGKey(calls)
        out = cluster.generate(texts, micro_batch_size=SEQUENCES)
        # The sampler leaves the token that ends a completion out; the model has drawn it.
        return sum(min(len(tokens) + 1, a.new) for tokens in out.tokens)

    return runs.timed(work, a.warmup, a.repeats)


def update(cluster, runs):
    prompts, completions, advantages = common.batch(a)
    prompt_ids = jnp.asarray(np.repeat(prompts, a.gens, 0))
    completion_ids, advantages = jnp.asarray(completions), jnp.asarray(advantages)

    def work():
        for first in range(0, SEQUENCES, a.micro):
            rows = slice(first, first + a.micro)
            example = grpo_learner.TrainExample(
                prompt_ids=prompt_ids[rows],
                prompt_mask=jnp.ones_like(prompt_ids[rows], dtype=bool),
                completion_ids=completion_ids[rows],
                completion_mask=jnp.ones_like(completion_ids[rows], dtype=bool),
                advantages=advantages[rows],
                ref_per_token_logps=None,
                old_per_token_logps=None,
            )
            cluster.update_actor([example], None, False)
        wait_for(cluster)
        return SEQUENCES * (a.prompt_len + a.new)

    return runs.timed(work, a.warmup, a.repeats)


def iterations(cluster, learner, runs):
    """The learner's own loop, with a clock around each of its global steps."""
    count, run_step = 0, learner._run_global_step

    def step(*args, **kwargs):
        nonlocal count
        count += 1
        if count == a.warmup + 1:
            common.reset_peak()
        runs.start()
        result = run_step(*args, **kwargs)
        wait_for(cluster)
        runs.stop()
        return result

    learner._run_global_step = step
    prompts, _, _ = common.batch(a)
    texts = np.array([common.prompt_text(ids) for ids in prompts])
    learner.train([{"prompts": texts}] * (a.warmup + a.repeats))
    assert count == a.warmup + a.repeats, count
    first = sum(runs.wall[: a.warmup])
    for measured in (runs.wall, runs.cpu, runs.other):
        del measured[: a.warmup]
    return first, [SEQUENCES * (a.prompt_len + a.new)] * a.repeats


def main():
    runs = common.Runs()
    cluster, learner = make_learner(a.warmup + a.repeats if a.phase == "e2e" else 1)
    found = check(cluster)
    if a.phase == "update":
        first, tokens = update(cluster, runs)
    elif a.phase == "e2e":
        first, tokens = iterations(cluster, learner, runs)
    else:
        first, tokens = rollout(cluster, runs)
    common.emit("tunix", a, runs, tokens, VERSIONS, warm_s=first, check=found)


main()
