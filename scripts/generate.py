"""Samples completions from a model: text to the screen as groups end, JSON lines to a file.

    python scripts/generate.py --model Qwen/Qwen3-0.6B --prompt "What is 12 x 13?" --n 8
    python scripts/generate.py --model runs/mine/hf --prompts questions.jsonl --out answers.jsonl

`--model` is a Hugging Face folder or hub name; a trained policy is one too once it is exported. A
line of `--prompts` is {"prompt": text or [messages]}; its other keys are copied to the output.
"""

import argparse
import json
import sys
from pathlib import Path

import jax
from transformers import AutoTokenizer

from adpo_jax import Engine, Policy, SamplingParams
from adpo_jax.engine import GroupOutput


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", required=True, help="Hugging Face folder or hub name")
    parser.add_argument("--prompt", action="append", default=[], help="may be repeated")
    parser.add_argument("--prompts", type=Path, help="JSON lines with a key `prompt`")
    parser.add_argument("--out", type=Path, help="JSON lines, one a completion")
    parser.add_argument("--n", type=int, default=1, help="completions of each prompt")
    parser.add_argument("--max-tokens", type=int, default=512)
    parser.add_argument("--min-tokens", type=int, default=0)
    parser.add_argument("--temperature", type=float, default=1.0, help="0 is greedy")
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--top-k", type=int, default=-1)
    parser.add_argument("--min-p", type=float, default=0.0)
    parser.add_argument("--stop", action="append", default=[], help="stop string; may be repeated")
    parser.add_argument("--ignore-eos", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--slots", type=int, default=None, help="completions decoded at once")
    parser.add_argument("--dtype", default="float32", help="float32 or bfloat16")
    parser.add_argument("--raw", action="store_true", help="no chat template")
    return parser.parse_args()


def read_rows(a: argparse.Namespace) -> list[dict]:
    """The rows to complete, from the command line and the file."""
    rows = [{"prompt": text} for text in a.prompt]
    if a.prompts is not None:
        lines = a.prompts.read_text(encoding="utf-8").splitlines()
        rows += [json.loads(line) for line in lines if line.strip()]
    if not rows:
        raise SystemExit("nothing to complete: give --prompt or --prompts")
    for number, row in enumerate(rows):
        if not isinstance(row, dict) or "prompt" not in row:
            raise SystemExit(f'row {number} has no key "prompt"')
    return rows


def token_ids(tokenizer, prompt, raw: bool) -> list[int]:
    """A prompt, text or messages, as the model is given it."""
    if raw or tokenizer.chat_template is None:
        if not isinstance(prompt, str):
            raise SystemExit("messages need a chat template, which this tokenizer has not")
        return tokenizer(prompt)["input_ids"]
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)


def stop_token_ids(policy: Policy, tokenizer) -> tuple[int, ...]:
    """What ends a completion, as the model's generation_config and tokenizer say."""
    stated = (policy.generation_config or {}).get("eos_token_id", [])
    ids = set(stated if isinstance(stated, list) else [stated])
    return tuple(sorted((ids | {tokenizer.eos_token_id}) - {None}))


def main():
    a = arguments()
    rows = read_rows(a)
    tokenizer = AutoTokenizer.from_pretrained(a.model)
    policy, params = Policy.from_pretrained(a.model, dtype=a.dtype)
    prompts = [token_ids(tokenizer, row["prompt"], a.raw) for row in rows]
    pad = tokenizer.pad_token_id
    sampling = SamplingParams(
        n=a.n,
        temperature=a.temperature,
        top_k=a.top_k,
        top_p=a.top_p,
        min_p=a.min_p,
        max_tokens=a.max_tokens,
        min_tokens=a.min_tokens,
        stop=tuple(a.stop),
        stop_token_ids=stop_token_ids(policy, tokenizer),
        ignore_eos=a.ignore_eos,
        pad_token_id=0 if pad is None else pad,
    )
    engine = Engine(
        policy,
        max_prompt_length=max(len(prompt) for prompt in prompts),
        max_response_length=a.max_tokens,
        num_slots=a.slots,
        gpu_memory_utilization=0.9,
        group_size=a.n,
        detokenize=tokenizer.decode,
    )
    out = a.out.open("w", encoding="utf-8") if a.out else None
    for group in engine.stream(params, prompts, sampling, jax.random.key(a.seed)):
        for line in completions(group, rows[group.prompt_index], tokenizer):
            print(f"--- prompt {group.prompt_index}, {line['finish_reason']}", flush=True)
            print(line["completion"], flush=True)
            if out is not None:
                out.write(json.dumps(line, ensure_ascii=False) + "\n")
                out.flush()
    if out is not None:
        out.close()
        print(f"{len(rows) * a.n} completions in {a.out}", file=sys.stderr)


def completions(group: GroupOutput, row: dict, tokenizer) -> list[dict]:
    """A group as rows of the output."""
    lines = []
    for sample, length in enumerate(group.lengths):
        tokens = group.tokens[sample, :length].tolist()
        lines.append(
            {
                **row,
                "prompt_index": group.prompt_index,
                "sample": sample,
                "completion": tokenizer.decode(tokens, skip_special_tokens=True),
                "num_tokens": int(length),
                "finish_reason": str(group.finish_reason[sample]),
                "log_prob": float(group.log_probs[sample].sum()),
            }
        )
    return lines


if __name__ == "__main__":
    main()
