"""Policies from folders beside the one that is trained: a teacher to learn from, a reference."""

import dataclasses
import functools
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from parsing import parse
from test_resume import SHORT, assert_same, interrupt
from test_train import on_one_device, scalars, train
from test_update import make_learner

from adpo_jax import Policy, losses, update
from adpo_jax.data import arithmetic
from adpo_jax.devices import sharding
from adpo_jax.dry_run.programs import traced_learning
from adpo_jax.model.divergence import token_divergences
from adpo_jax.run.config_checks import finalized
from adpo_jax.run.preparation import prepare
from adpo_jax.update.gradient import ForwardPass, Teacher
from adpo_jax.update.layouts import layout_of
from adpo_jax.update.packing import Packing, pack

SGD = optax.sgd(1.0)
# Another architecture and size, and a few tokens that the policy does not know.
LARGER = tiny.CONFIG | {"hidden_size": 24, "num_hidden_layers": 1, "vocab_size": 40}
LARGER |= {"tie_word_embeddings": False, "num_key_value_heads": 4}
MIXTURE = tiny.CONFIG | {"architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe"}
MIXTURE |= {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 12}
MIXTURE |= {"norm_topk_prob": True, "num_hidden_layers": 1}


@functools.cache
def teacher_and_params():
    return Policy.from_config(LARGER, jax.random.key(5))


def dense_divergence(log_p, log_t, beta):
    p, t = jnp.exp(log_p), jnp.exp(log_t)
    if beta == 0:
        return (t * (log_t - log_p)).sum(-1)
    if beta == 1:
        return (p * (log_p - log_t)).sum(-1)
    log_m = jnp.log(beta * t + (1 - beta) * p)
    return (beta * t * (log_t - log_m) + (1 - beta) * p * (log_p - log_m)).sum(-1)


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_divergences_of_chunks_and_their_gradient_are_those_of_whole_logits(beta):
    policy, params = tiny.policy_and_params()
    teacher, teacher_params = teacher_and_params()
    rng = np.random.default_rng(0)
    hidden, theirs = (
        jnp.asarray(rng.normal(size=(4, 5, n)), jnp.float32)
        for n in (policy.config.hidden_size, teacher.config.hidden_size)
    )
    weights = jnp.asarray(rng.normal(size=(4, 5)), jnp.float32)

    def chunked(mesh, params, hidden):
        return token_divergences(
            policy.config,
            params,
            hidden,
            teacher.config,
            teacher_params,
            theirs,
            beta=beta,
            temperature=0.7,
            tokens_per_chunk=3,
            mesh=mesh,
        )

    def dense(params, hidden):
        log_p = jax.nn.log_softmax(hidden @ params["embed"].T / 0.7)
        log_t = jax.nn.log_softmax((theirs @ teacher_params["head"])[..., :32] / 0.7)
        return dense_divergence(log_p, log_t, beta)

    def graded(divergence):
        def total(params, hidden):
            found = divergence(params, hidden)
            return (weights * found).sum(), found

        return jax.jit(jax.grad(total, (0, 1), has_aux=True))(params, hidden)

    expected = graded(dense)
    assert expected[1].min() > 0
    meshes = [sharding.make_mesh(1, 2, 2, devices=jax.devices()[:4])] if beta == 0.3 else []
    for mesh in (None, *meshes):
        found = graded(functools.partial(chunked, mesh))
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6), found, expected
        )


def test_a_teacher_of_fewer_tokens_is_refused():
    policy, params = tiny.policy_and_params()
    small = dataclasses.replace(policy.config, vocab_size=30)
    with pytest.raises(ValueError, match="the teacher embeds 30 tokens and the policy 32"):
        token_divergences(policy.config, params, jnp.zeros((1, 1, 16)), small, None, None, beta=0.5)


def test_the_reverse_kl_has_the_gradient_of_log_policy_over_teacher():
    rng = np.random.default_rng(1)
    log_probs, teacher = (-rng.exponential(size=(4, 6)).astype(np.float32) for _ in range(2))
    mask = np.ones((4, 6))
    mask[1, 3:] = mask[2, 2] = 0

    def loss(log_probs, **options):
        return losses.opd_loss(log_probs, before, np.ones(4), mask, num_generations=2, **options)

    before = log_probs
    slope, metrics = jax.grad(loss, has_aux=True)(log_probs, teacher_log_probs=teacher)
    expected = mask * (log_probs - teacher) / mask.sum()
    np.testing.assert_allclose(slope, expected, atol=1e-7)
    np.testing.assert_allclose(metrics["opd/divergence"], expected.sum(), rtol=1e-5)
    # Two nats up, where the teacher would go up too: the ratio is beyond the clip.
    clipped = jax.grad(loss, has_aux=True)(log_probs + 2.0, teacher_log_probs=teacher)[0]
    np.testing.assert_array_equal(clipped[(teacher > log_probs) & (mask > 0)], 0)

    apart = rng.exponential(size=(4, 6)).astype(np.float32)
    jsd = functools.partial(losses.opd_loss, distillation_loss="jsd", num_generations=2)
    value, _ = jsd(log_probs, before, np.ones(4), mask, divergence=apart)
    np.testing.assert_allclose(value, (mask * apart).sum() / mask.sum(), rtol=1e-6)
    with pytest.raises(ValueError, match="needs the divergence at each token"):
        jsd(log_probs, before, np.ones(4), mask)
    with pytest.raises(ValueError, match="needs teacher_log_probs"):
        loss(log_probs)


@pytest.mark.parametrize("kind", ["jsd", "reverse_kl"])
def test_any_cut_of_a_batch_gives_the_gradient_of_the_divergence_from_the_teacher(kind):
    policy, params = tiny.policy_and_params()
    teacher, teacher_params = teacher_and_params()
    batch, rewards = tiny.batch(P=4, G=2)
    algorithm = losses.Opd(distillation_loss=kind, jsd_beta=0.4 if kind == "jsd" else 0.5)
    of_teacher, _ = update.make_log_probs(teacher)(teacher_params, batch)
    log_probs = {"teacher": np.asarray(of_teacher)} if kind == "reverse_kl" else {}
    scores = jax.device_get(algorithm.score(jnp.asarray(rewards)))

    def step(batch, log_probs, num_micro=1):
        taught = teacher if kind == "jsd" else None
        run = update.make_update(policy, algorithm, SGD, num_micro=num_micro, teacher=taught)
        state = update.init_state(policy, jax.tree.map(jnp.copy, params), SGD)
        state = state.replace(fixed_params={"teacher": jax.tree.map(jnp.copy, teacher_params)})
        state, metrics = run(state, batch, scores, log_probs)
        return jax.device_get(state.params), jax.device_get(metrics)

    def dense(params):
        found = policy.logits(params, batch.tokens_PGS.reshape(8, -1), mask)
        theirs = teacher.logits(teacher_params, batch.tokens_PGS.reshape(8, -1), mask)[..., :32]
        found, theirs = (jax.nn.log_softmax(x)[:, -T - 1 : -1] for x in (found, theirs))
        trained = batch.completion_mask_PGT.reshape(8, T)
        if kind == "jsd":
            return (trained * dense_divergence(found, theirs, 0.4)).sum() / trained.sum()
        targets = batch.tokens_PGS.reshape(8, -1)[:, -T:]
        own = jnp.take_along_axis(found, targets[..., None], -1)[..., 0]
        apart = jax.lax.stop_gradient(own) - of_teacher.reshape(8, T)
        return (trained * apart * own).sum() / trained.sum()

    T = batch.num_completion
    mask = batch.attention_mask_PGS.reshape(8, -1)
    expected = jax.tree.map(lambda p, g: p - g, params, jax.grad(dense)(params))
    sequences = batch.sequences()
    ragged = [
        [x[: len(c.trained)] for x, c in zip(group, completions)]
        for group, completions in zip(np.asarray(of_teacher), sequences.completions)
    ]
    given = dict.fromkeys(log_probs, ragged)
    sequences = dataclasses.replace(sequences, log_probs=given)
    # A stream holds one completion: groups are split.
    packing = Packing(sequences, completions_per_micro=1, whole_groups=False)
    cuts = [step(batch, log_probs, 2), step(packing.batch(sequences), {})]
    for found in cuts:
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-6), found[0], expected
        )
        assert found[1]["opd/divergence"] == pytest.approx(cuts[0][1]["opd/divergence"], rel=1e-5)


def test_a_teacher_or_reference_takes_none_of_the_experts_that_the_sampler_took():
    policy, params = Policy.from_config(MIXTURE, jax.random.key(0))
    other, others = Policy.from_config(MIXTURE | {"num_experts": 4}, jax.random.key(7))
    plain, _ = tiny.sequences(P=2, G=2)
    rng = np.random.default_rng(0)

    def with_experts(completion):
        experts = rng.integers(0, 8, (len(completion), 1, 2)).astype(np.uint8)
        return dataclasses.replace(completion, experts=experts)

    replayed = dataclasses.replace(
        plain, completions=[list(map(with_experts, group)) for group in plain.completions]
    )
    learner = make_learner(policy, algorithm=losses.Opd())
    learner = dataclasses.replace(learner, fixed={"teacher": other})
    own = learner.log_probs(params, replayed)[0], learner.log_probs(params, plain)[0]
    assert not np.array_equal(own[0][0][0], own[1][0][0])
    forward = learner.fixed_forwards["teacher"]
    found, expected = (learner.log_probs(others, s, forward)[0] for s in (replayed, plain))
    jax.tree.map(np.testing.assert_array_equal, found, expected)

    # In the update the teacher of the JSD runs in the same micro-batches as the policy.
    dense, dense_params = tiny.policy_and_params()
    forward = ForwardPass(dense, 1.0, False, Teacher(other, 0.5, others))
    apart = jax.jit(lambda batch: forward.batch(dense_params, layout_of(batch))[-1])
    np.testing.assert_array_equal(apart(pack(replayed)), apart(pack(plain)))


# In a run.


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model of the embedded task's tokenizer, of another size than the policy."""
    small = arithmetic.MODEL_CONFIG | {"hidden_size": 24, "num_hidden_layers": 1, "head_dim": 8}
    small |= {"intermediate_size": 32}
    policy, params = Policy.from_config(small, jax.random.key(9))
    path = tmp_path_factory.mktemp("model") / "teacher"
    policy.save_pretrained(path, params, arithmetic.make_tokenizer())
    return path


def test_a_run_with_teacher_and_reference_from_folders_goes_on_exactly(folder, tmp_path):
    of_teacher = tmp_path / "teacher"
    shutil.copytree(folder, of_teacher)
    config = parse(
        *SHORT,
        "--config.algorithm.adv_estimator=opd",
        "--config.algorithm.distillation_loss=jsd",
        f"--config.teacher.path={of_teacher}",
        "--config.algorithm.beta_reference_kl=0.1",
        f"--config.actor_rollout_ref.ref.path={folder}",
        "--config.actor_rollout_ref.actor.optim.lr=0.01",
    )
    train(config, tmp_path / "whole")
    interrupt(config, tmp_path / "run", 2)
    train(config, tmp_path / "run")
    assert_same(tmp_path / "run", tmp_path / "whole", 3)
    apart = [row["opd/divergence"] for row in scalars(tmp_path / "whole")]
    assert apart[0] > apart[-1] > 0
    assert all(row["opd/reference_kl"] > 0 for row in scalars(tmp_path / "whole"))

    parts = on_one_device(finalized(config))
    held = parts.learner.state_bytes()
    assert held["teacher"] == held["reference"] > 0
    # Of the dry run: the reference alone has a program of its own, the JSD is in the update.
    assert set(traced_learning(parts.learner, tiny.sequences(G=2)[0])) == {"reference", "update"}

    weights = of_teacher / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\1")
    with pytest.raises(ValueError, match="teacher_weights"):
        prepare(config, tmp_path / "run", build=on_one_device)


def refusal(*changes):
    with pytest.raises(ValueError) as caught:
        on_one_device(finalized(parse(*SHORT, *(f"--config.{change}" for change in changes))))
    return str(caught.value)


def test_folders_that_cannot_teach_are_refused_in_words(folder, tmp_path):
    taught = "algorithm.adv_estimator=opd"
    assert "teacher.path names none" in refusal(taught)
    assert "no effect without algorithm.adv_estimator=opd" in refusal(f"teacher.path={folder}")
    of_reference = f"actor_rollout_ref.ref.path={folder}"
    assert "no effect without algorithm.beta_reference_kl" in refusal(of_reference)
    assert "teacher.path: " in refusal(taught, f"teacher.path={tmp_path / 'nowhere'}")
    assert "give the folder of a model" in refusal(taught, "teacher.path=embedded:arithmetic")

    other = tmp_path / "other"
    shutil.copytree(folder, other)
    path = other / "tokenizer.json"
    content = json.loads(path.read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["A"], vocabulary["B"] = vocabulary["B"], vocabulary["A"]
    path.write_text(json.dumps(content))
    text = refusal(taught, f"teacher.path={other}")
    assert "4 entries differ: number " in text
    assert "both need the same vocabulary" in text

    path = other / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"use_qk_clip": True}))
    (other / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    assert "teacher have their own" in refusal(taught, f"teacher.path={other}")
    override = "teacher.override_config={'use_qk_clip': None}"
    assert "no effect without teacher.path" in refusal(override)
    settings = (taught, f"teacher.path={other}", override)
    config = parse(*SHORT, *(f"--config.{change}" for change in settings))
    parameters = on_one_device(finalized(config)).fixed["teacher"].load()
    assert parameters["embed"].shape == (512, 24)

    fewer = "actor_rollout_ref.model.hf_config={'vocab_size': 600}"
    assert "it embeds 512 tokens and the policy 600" in refusal(
        "algorithm.beta_reference_kl=0.1", of_reference, fewer
    )
