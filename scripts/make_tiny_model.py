"""Makes a small Qwen3-shaped Hugging Face folder with random weights and a BPE tokenizer.

    python scripts/make_tiny_model.py --text=train.jsonl --out=tiny-qwen3

For trying a config end to end where no real checkpoint is at hand: the folder loads in
`transformers` like any other. The tokenizer is trained on the given text and has a chat template.
"""

import argparse
import itertools
from pathlib import Path

import jax
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from adpo_jax.policy import Policy

CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}"
    "{% endif %}"
)


def make_tokenizer(text: Path, vocab_size: int, lines: int = 2000) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer trained on the first lines of a text file."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    with text.open(encoding="utf-8") as file:
        tokenizer.train_from_iterator(itertools.islice(file, lines), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def qwen3_config(vocab_size: int, hidden: int, layers: int) -> dict:
    """A `config.json` of Qwen3's shape."""
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "vocab_size": vocab_size,
        "hidden_size": hidden,
        "intermediate_size": 3 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": max(hidden // 4, 8),
        "hidden_act": "silu",
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1_000_000.0,
        "tie_word_embeddings": True,
        "initializer_range": 0.05,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--text", type=Path, required=True, help="file to train the tokenizer on")
    parser.add_argument("--out", type=Path, required=True, help="the folder to make")
    parser.add_argument("--vocab-size", type=int, default=1024)
    parser.add_argument("--hidden", type=int, default=64)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if not args.text.is_file():
        parser.error(f"--text {args.text} is no file")
    if args.out.exists() and (not args.out.is_dir() or any(args.out.iterdir())):
        parser.error(f"--out {args.out} is there already, and not empty: give another folder")

    tokenizer = make_tokenizer(args.text, args.vocab_size)
    config = qwen3_config(len(tokenizer), args.hidden, args.layers)
    policy, params = Policy.from_config(config, jax.random.key(args.seed))
    policy.save_pretrained(args.out, params, tokenizer)
    print(f"{args.out}: {sum(x.size for x in jax.tree.leaves(params)):,} parameters")


if __name__ == "__main__":
    main()
