"""Two iterations with real tokenizers, through their own chat templates, and with a real model.

`python scripts/fetch_models.py FOLDER` fetches them; ADPO_JAX_MODELS names the folder.
"""

import json
import os
import shutil
from pathlib import Path

import jax
import pytest
from parsing import parse
from transformers import AutoTokenizer

from adpo_jax import train
from adpo_jax.run import preparation, setup
from adpo_jax.run.interruption import Interruption

MODELS = Path(os.environ.get("ADPO_JAX_MODELS") or "no-models")
MODEL = "actor_rollout_ref.model"
TINY = {
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 4,
    "tie_word_embeddings": True,
    "max_position_embeddings": 512,
}
# The sizes of the vocabularies that the published models embed.
EMBEDDED = {
    "qwen3": {"model_type": "qwen3", "vocab_size": 151_936},
    "gemma3": {"model_type": "gemma3_text", "vocab_size": 262_144},
    "llama3_1": {"model_type": "llama", "vocab_size": 128_256},
}
ENDS = {"qwen3": "<|im_end|>", "gemma3": "<end_of_turn>", "llama3_1": "<|eot_id|>"}


def there(name: str) -> Path:
    folder = MODELS / name
    if not folder.is_dir():
        pytest.skip(
            f"there is no {folder}: python scripts/fetch_models.py FOLDER makes it, and "
            "ADPO_JAX_MODELS=FOLDER names it"
        )
    return folder


def trained(folder: Path, tmp_path: Path, **changes):
    """The folder of a run of two iterations, and its parts."""
    rows = [{"question": f"What is {n} plus {n}?", "answer": str(2 * n)} for n in range(4)]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {
        f"{MODEL}.path": folder,
        "data.train_files": data,
        "data.val_files": "",
        "data.prompt_template": "{prompt}",
        "data.train_batch_size": 2,
        "data.max_prompt_length": 96,
        "data.max_response_length": 4,
        "algorithm.num_generations": 2,
        "sft.steps": 0,
        "trainer.total_training_steps": 2,
        "trainer.save_freq": 0,
        "trainer.test_freq": 0,
        **changes,
    }
    config = parse("arithmetic", *(f"--config.{key}={value}" for key, value in settings.items()))
    prepared = preparation.prepare(
        config, str(tmp_path / "run"), build=lambda c: setup.build(c, jax.devices()[:1])
    )
    with Interruption() as interruption:
        train.run(prepared, interruption)
    return tmp_path / "run", prepared.parts


def metrics_of(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("name", EMBEDDED)
def test_a_real_tokenizer_trains_two_iterations_through_its_own_template(name, tmp_path):
    source = there(name)
    folder = Path(shutil.copytree(source, tmp_path / name))
    (folder / "config.json").write_text(json.dumps(TINY | EMBEDDED[name]))
    run, parts = trained(folder, tmp_path, **{f"{MODEL}.random_init": "true"})
    losses = [row for row in metrics_of(run) if "loss" in "".join(row)]
    assert len(losses) >= 2
    tokenizer = AutoTokenizer.from_pretrained(source)
    asked = [{"role": "user", "content": "What is 0 plus 0?"}]
    text = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
    assert tokenizer.decode(parts.train_prompts.token_ids[0]) == text
    assert tokenizer.convert_tokens_to_ids(ENDS[name]) in parts.sampling.stop_token_ids
    exported = {path.name: path.read_bytes() for path in (run / "export").glob("token*")}
    for file in source.iterdir():
        assert exported[file.name] == file.read_bytes()


def test_smollm2_trains_two_iterations_as_it_is_published(tmp_path):
    # The state of an optimizer for all weights would be 1.6 GB on the disk.
    run, _ = trained(there("smollm2"), tmp_path, **{f"{MODEL}.lora_rank": 2})
    assert len([row for row in metrics_of(run) if "loss" in "".join(row)]) >= 2
