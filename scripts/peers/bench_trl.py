"""Times Hugging Face TRL's GRPOTrainer on a CPU in float32, with transformers' generate.

  PEERS_HOME/venv-trl/bin/python bench_trl.py --shape S --phase rollout

rollout      the trainer's own generation; nothing but the length ends a completion
rollout_eos  the same, where V / mean_len ids end one
update       loss and backward pass of each micro-batch, clipping, a step of AdamW
e2e          `train()`, timed from one optimizer step to the next
"""

import os

os.environ["HF_HUB_OFFLINE"] = os.environ["TRANSFORMERS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
os.environ["CUDA_VISIBLE_DEVICES"] = ""

import tempfile
import time
import warnings

import common
import datasets
import numpy as np
import torch
import transformers
import trl

a = common.arguments(__doc__)
warnings.simplefilter("ignore")
transformers.logging.set_verbosity_error()
datasets.disable_progress_bars()
VERSIONS = {m.__name__: m.__version__ for m in (trl, transformers, torch)}
SEQUENCES = a.prompts * a.gens


def make_model():
    """A Qwen3 of the shape with the common weights."""
    c = common.SHAPES[a.shape]
    config = transformers.Qwen3Config(
        vocab_size=c["vocab"],
        hidden_size=c["hidden"],
        intermediate_size=c["inter"],
        num_hidden_layers=c["layers"],
        num_attention_heads=c["heads"],
        num_key_value_heads=c["kv"],
        head_dim=c["head_dim"],
        tie_word_embeddings=True,
        rms_norm_eps=common.NORM_EPS,
        max_position_embeddings=4096,
        rope_parameters={"rope_type": "default", "rope_theta": float(common.ROPE_THETA)},
        pad_token_id=common.PAD,
        eos_token_id=common.EOS,
        bos_token_id=None,
        attn_implementation="sdpa",
        dtype="float32",
    )
    model = transformers.Qwen3ForCausalLM(config)
    given = {name: torch.from_numpy(x) for name, x in common.weights(a.shape).items()}
    missing, unexpected = model.load_state_dict(given, strict=False)
    assert not unexpected, unexpected
    assert set(missing) <= {"lm_head.weight"}, missing
    model.tie_weights()
    return model.float()


def make_trainer(steps: int) -> trl.GRPOTrainer:
    """The trainer; its data are the common prompts, once for each step."""
    prompts, _, _ = common.batch(a)
    rows = [{"prompt": common.prompt_text(ids)} for ids in prompts] * steps
    config = trl.GRPOConfig(
        output_dir=tempfile.mkdtemp(prefix="trl_"),
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        per_device_train_batch_size=a.micro,
        gradient_accumulation_steps=SEQUENCES // a.micro,
        num_generations=a.gens,
        max_completion_length=a.new,
        temperature=1.0,
        top_p=1.0,
        top_k=0,
        beta=0.0,
        num_iterations=1,
        loss_type="grpo",
        learning_rate=common.OPT["lr"],
        adam_beta1=common.OPT["b1"],
        adam_beta2=common.OPT["b2"],
        adam_epsilon=common.OPT["eps"],
        weight_decay=common.OPT["wd"],
        max_grad_norm=common.OPT["max_grad_norm"],
        lr_scheduler_type="constant",
        max_steps=steps,
        logging_steps=10_000,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        shuffle_dataset=False,
        dataloader_pin_memory=False,
        seed=0,
    )
    model = make_model()
    if a.phase == "rollout_eos":
        model.generation_config.eos_token_id = common.eos_ids(a)
    trainer = trl.GRPOTrainer(
        model=model,
        args=config,
        processing_class=common.hf_tokenizer(a.shape),
        reward_funcs=[lambda completions, **_: common.reward_from_text(completions)],
        train_dataset=datasets.Dataset.from_list(rows),
    )
    if a.phase != "rollout_eos":
        # The trainer has these four places for what ends a completion; -1 is no token.
        trainer.generation_config.eos_token_id = None
        trainer.generation_kwargs["eos_token_id"] = None
        model.generation_config.eos_token_id = None
        trainer.eos_token_ids = [-1]
    return trainer


def sequences() -> torch.Tensor:
    """Prompts and completions [P G, T] of the common batch."""
    prompts, completions, _ = common.batch(a)
    both = np.concatenate([np.repeat(prompts, a.gens, 0), completions], axis=1)
    return torch.from_numpy(both.astype(np.int64))


def check(trainer) -> dict:
    """The mean log-prob of eight completions."""
    ids = sequences()[:8]
    with torch.no_grad():
        found = trainer._get_per_token_logps_and_entropies(
            trainer.model, ids, torch.ones_like(ids), a.new, batch_size=8
        )
    return {"logp_mean": float(found[0].mean())}


def rollout(trainer, runs):
    prompts, _, _ = common.batch(a)
    each = [row.tolist() for row in np.repeat(prompts, a.gens, 0)]

    def work():
        ids, *_ = trainer._generate_single_turn(each, None, {}, a.gens)
        return sum(map(len, ids))

    return runs.timed(work, a.warmup, a.repeats)


def update(trainer, runs, found: dict):
    _, completions, advantages = common.batch(a)
    trainer.create_optimizer_and_scheduler(10)
    trainer.current_gradient_accumulation_steps = SEQUENCES // a.micro
    prompt_ids = sequences()[:, : a.prompt_len]
    completion_ids = torch.from_numpy(completions.astype(np.int64))
    advantages = torch.from_numpy(advantages)
    norms = []

    def work():
        for first in range(0, SEQUENCES, a.micro):
            rows = slice(first, first + a.micro)
            loss = trainer.compute_loss(
                trainer.model,
                {
                    "prompt_ids": prompt_ids[rows],
                    "prompt_mask": torch.ones_like(prompt_ids[rows]),
                    "completion_ids": completion_ids[rows],
                    "completion_mask": torch.ones_like(completion_ids[rows]),
                    "advantages": advantages[rows],
                    "num_items_in_batch": torch.tensor(float(SEQUENCES * a.new)),
                },
            )
            trainer.accelerator.backward(loss)
        parameters = trainer.model.parameters()
        norm = trainer.accelerator.clip_grad_norm_(parameters, common.OPT["max_grad_norm"])
        norms.append(float(norm))
        trainer.optimizer.step()
        trainer.model.zero_grad()
        return SEQUENCES * (a.prompt_len + a.new)

    timed = runs.timed(work, a.warmup, a.repeats)
    found["grad_norm_first"] = norms[0]
    return timed


def iterations(trainer, runs):
    """The whole trainer, told apart by the ends of its optimizer steps."""

    class Ends(transformers.TrainerCallback):
        steps = 0

        def on_step_end(self, *_, **__):
            self.steps += 1
            if self.steps == a.warmup:
                common.reset_peak()
            if self.steps > a.warmup:
                runs.stop()
            if self.steps >= a.warmup:
                runs.start()

    trainer.add_callback(Ends())
    started = time.perf_counter()
    trainer.train()
    first = time.perf_counter() - started - sum(runs.wall)
    return first, [SEQUENCES * (a.prompt_len + a.new)] * len(runs.wall)


def main():
    runs = common.Runs()
    trainer = make_trainer(a.warmup + a.repeats if a.phase == "e2e" else 1)
    found = check(trainer)
    trainer.model.train()
    if a.phase == "update":
        first, tokens = update(trainer, runs, found)
    elif a.phase == "e2e":
        first, tokens = iterations(trainer, runs)
    else:
        first, tokens = rollout(trainer, runs)
    common.emit("trl", a, runs, tokens, VERSIONS, warm_s=first, check=found)


main()
