"""What every peer and we measure on: shapes, weights, a batch, and how a repeat is timed.

numpy alone, since each peer has an environment of its own. All draw the same weights and the same
batch from fixed seeds, in float32 and under the names of a Hugging Face Qwen3. Each prints the mean
log-prob of the batch's completions (`check`), so that the arithmetic can be seen to agree.
"""

import argparse
import json
import os
import statistics
import sys
import time
from pathlib import Path

import numpy as np

# The peers' environments and the weights that were drawn.
HOME = Path(os.environ.get("PEERS_HOME", Path.home() / ".cache" / "adpo_peers"))

SHAPES = {
    # For trying the scripts.
    "XS": {"vocab": 128, "hidden": 64, "inter": 128, "layers": 2, "heads": 4, "kv": 2}
    | {"head_dim": 16},
    "S": {"vocab": 512, "hidden": 256, "inter": 768, "layers": 4, "heads": 8, "kv": 4}
    | {"head_dim": 32},
    "M": {"vocab": 32768, "hidden": 512, "inter": 1536, "layers": 8, "heads": 8, "kv": 4}
    | {"head_dim": 64},
    # SmolLM2-135M's.
    "L": {"vocab": 49152, "hidden": 576, "inter": 1536, "layers": 30, "heads": 9, "kv": 3}
    | {"head_dim": 64},
}
ROPE_THETA, NORM_EPS = 1_000_000, 1e-6
PAD, EOS, FIRST = 0, 1, 2  # ids from FIRST on are words
OPT = {"lr": 1e-6, "b1": 0.9, "b2": 0.999, "eps": 1e-8, "wd": 0.01, "max_grad_norm": 1.0}
PHASES = ("rollout", "rollout_eos", "update", "e2e")


def arguments(doc: str) -> argparse.Namespace:
    """The command line of a peer's script."""
    parser = argparse.ArgumentParser(description=doc.split("\n")[0])
    parser.add_argument("--shape", choices=SHAPES, default="S")
    parser.add_argument("--phase", choices=PHASES, required=True)
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--gens", type=int, default=8, help="completions of a prompt")
    parser.add_argument("--prompt-len", type=int, default=64)
    parser.add_argument("--new", type=int, default=128, help="tokens of a completion, at most")
    parser.add_argument("--micro", type=int, default=16, help="completions of a micro-batch")
    parser.add_argument("--mean-len", type=float, default=40.0, help="of rollout_eos")
    parser.add_argument("--warmup", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    return parser.parse_args()


def param_count(shape: str) -> dict[str, int]:
    """Parameters of the layers and norms, of the (tied) head, and of both."""
    c = SHAPES[shape]
    attention = 2 * c["hidden"] * c["head_dim"] * (c["heads"] + c["kv"])
    layer = attention + 3 * c["hidden"] * c["inter"] + 2 * c["hidden"] + 2 * c["head_dim"]
    body, head = layer * c["layers"] + c["hidden"], c["vocab"] * c["hidden"]
    return {"body": body, "head": head, "total": body + head}


def weights(shape: str) -> dict[str, np.ndarray]:
    """Arrays [out, in] under their names in a Hugging Face folder; kept in HOME once drawn."""
    path = HOME / "cache" / f"weights_of_{shape}.npz"
    if path.exists():
        with np.load(path) as file:
            return dict(file)
    c, random = SHAPES[shape], np.random.default_rng(0)
    D, F, h = c["hidden"], c["inter"], c["head_dim"]

    def matrix(*size):
        return (0.02 * random.standard_normal(size)).astype(np.float32)

    def norm(size):
        return (1 + 0.1 * random.standard_normal(size)).astype(np.float32)

    drawn = {"model.embed_tokens.weight": matrix(c["vocab"], D), "model.norm.weight": norm(D)}
    for i in range(c["layers"]):
        of_layer = {
            "input_layernorm": norm(D),
            "post_attention_layernorm": norm(D),
            "self_attn.q_proj": matrix(c["heads"] * h, D),
            "self_attn.k_proj": matrix(c["kv"] * h, D),
            "self_attn.v_proj": matrix(c["kv"] * h, D),
            "self_attn.o_proj": matrix(D, c["heads"] * h),
            "self_attn.q_norm": norm(h),
            "self_attn.k_norm": norm(h),
            "mlp.gate_proj": matrix(F, D),
            "mlp.up_proj": matrix(F, D),
            "mlp.down_proj": matrix(D, F),
        }
        drawn |= {f"model.layers.{i}.{name}.weight": x for name, x in of_layer.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(f".{os.getpid()}.npz")  # two benches may draw at once
    np.savez(part, **drawn)
    part.replace(path)
    return drawn


def batch(a) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Prompts [P, T], completions [P G, N] and GRPO's advantages [P G]; no padding, no ends."""
    random, vocab = np.random.default_rng(1), SHAPES[a.shape]["vocab"]
    prompts = random.integers(FIRST, vocab, (a.prompts, a.prompt_len)).astype(np.int32)
    completions = random.integers(FIRST, vocab, (a.prompts * a.gens, a.new)).astype(np.int32)
    rewards = random.standard_normal((a.prompts, a.gens))
    spread = rewards.std(axis=1, ddof=1, keepdims=True) + 1e-4
    advantages = (rewards - rewards.mean(axis=1, keepdims=True)) / spread
    return prompts, completions, advantages.reshape(-1).astype(np.float32)


def eos_ids(a) -> list[int]:
    """The last ids of the vocabulary, as many as make lengths geometric with mean `mean_len`."""
    vocab = SHAPES[a.shape]["vocab"]
    return list(range(vocab - max(1, round(vocab / a.mean_len)), vocab))


def prompt_text(ids) -> str:
    """Ids as words, one token each for `hf_tokenizer`."""
    return " ".join(f"t{i}" for i in ids)


def reward_from_text(completions: list[str]) -> list[float]:
    """The share of even ids among the words of each completion."""
    found = []
    for text in completions:
        ids = [int(word[1:]) for word in text.split() if word.startswith("t")]
        found.append(float(np.mean([i % 2 == 0 for i in ids])) if ids else 0.0)
    return found


def hf_tokenizer(shape: str):
    """A tokenizer with a word for every id, made on the spot."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"<pad>": PAD, "<eos>": EOS}
    words |= {f"t{i}": i for i in range(FIRST, SHAPES[shape]["vocab"])}
    made = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        pad_token="<pad>",
        eos_token="<eos>",
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


# --- timing


def _used() -> tuple[float, float]:
    """CPU seconds of this process and its children that ended, and of the whole machine."""
    own, ticks = os.times(), os.sysconf("SC_CLK_TCK")
    fields = [int(x) for x in Path("/proc/stat").read_text().split("\n")[0].split()[1:]]
    return own.user + own.system, (sum(fields[:3]) + sum(fields[5:8])) / ticks


class Runs:
    """Timed repeats: wall and CPU seconds, and how many CPUs others used meanwhile."""

    def __init__(self):
        self.wall, self.cpu, self.other = [], [], []

    def start(self):
        self._started = (time.perf_counter(), *_used())

    def stop(self) -> None:
        wall, (own, machine) = time.perf_counter() - self._started[0], _used()
        cpu = own - self._started[1]
        self.wall.append(wall)
        self.cpu.append(cpu)
        self.other.append(max(0.0, machine - self._started[2] - cpu) / wall)

    def timed(self, work, warmup: int, repeats: int) -> tuple[float, list]:
        """Runs `work` a few times: the seconds of the first ones, the results of the others."""
        started = time.perf_counter()
        for _ in range(warmup):
            work()
        first = time.perf_counter() - started
        reset_peak()
        results = []
        for _ in range(repeats):
            self.start()
            results.append(work())
            self.stop()
        return first, results


def reset_peak() -> None:
    """Forgets the most memory that the process had."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


def status_mb(key: str) -> float:
    """A size in /proc/self/status, in MB; -1 where there is none."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1]) / 1024
    return -1.0


def stat(values, digits: int = 4) -> dict:
    """The median, least and most of some numbers."""
    values = list(values)
    return {
        "median": round(statistics.median(values), digits),
        "min": round(min(values), digits),
        "max": round(max(values), digits),
        "n": len(values),
    }


def emit(peer: str, a, runs: Runs, tokens: list, versions: dict, *, warm_s: float, **more) -> None:
    """Prints the `RESULT` line of a peer.

    Args:
      tokens: of each repeat.
      more: further fields.
    """
    line = {
        "peer": peer,
        "phase": a.phase,
        "shape": a.shape,
        "wall_s": stat(runs.wall),
        "cpu_s": stat(runs.cpu),
        "other_cpus": stat(runs.other, 2),
        "tokens": stat(tokens, 0),
        "tokens_per_s": stat([t / w for t, w in zip(tokens, runs.wall)], 1),
        "tokens_per_cpu_s": stat([t / max(c, 1e-9) for t, c in zip(tokens, runs.cpu)], 1),
        "peak_rss_mb": round(status_mb("VmHWM")),
        "warmup_s": round(warm_s, 2),
        "versions": versions,
        "python": sys.version.split()[0],
        **more,
    }
    print("RESULT " + json.dumps(line), flush=True)
