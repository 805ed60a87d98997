"""Samples completions from a model: text on the screen as it is sampled, JSON lines to a file.

    adpo-jax generate --model Qwen/Qwen3-0.6B --prompt "What is 12 x 13?" --n 8
    adpo-jax generate --model runs/mine --prompts questions.jsonl --out answers.jsonl

`--model` is a Hugging Face folder or hub name, the folder of a run, or one of its checkpoints
(`runs/.../checkpoints/50`). Prompts go through the chat template where there is one, and those for
a run through its prompt template and system prompt. A line of `--prompts` is {"prompt": text or
[messages]}; its other keys are copied to the output, whose own keys they cannot have the names of.

All completions are sampled at once; the screen follows the first one that has not ended. When
nobody reads it any more (`adpo-jax generate ... | head`), sampling ends unless `--out` is given.
"""

import argparse
import dataclasses
import functools
import json
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

from adpo_jax.log.printable import has_reader, printable, say_error
from adpo_jax.run.command_line import Parser, begin, json_object, unless_interrupted
from adpo_jax.run.config_files import user_path
from adpo_jax.run.exit_codes import USER_ERROR

# The tokens of a completion where nothing is asked for and the model has the positions.
MAX_TOKENS = 512
# The keys that a row of the output has beside those of its prompt.
OUTPUT_KEYS = (
    "prompt_index",
    "sample",
    "completion",
    "num_tokens",
    "finish_reason",
    "log_prob",
)

if TYPE_CHECKING:  # these import JAX, and --help is quick
    from adpo_jax.engine.generation import FinishedGroup
    from adpo_jax.engine.text_stream import TextStream
    from adpo_jax.pretrained import Pretrained
    from adpo_jax.records import Completion


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line, parsed."""
    parser = Parser(prog="adpo-jax generate", description=__doc__.split("\n")[0])
    parser.add_argument("--model", required=True, help="Hugging Face folder, run, checkpoint")
    parser.add_argument("--prompt", action="append", default=[], help="may be repeated")
    parser.add_argument("--prompts", type=user_path, help="JSON lines with a key `prompt`")
    parser.add_argument("--out", type=user_path, help="JSON lines, one a completion; a new file")
    parser.add_argument("--n", type=int, default=1, help="completions of each prompt")
    parser.add_argument(
        "--max-tokens",
        type=int,
        help=f"of a completion; the default is {MAX_TOKENS}, or what the model has positions for",
    )
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
    parser.add_argument(
        "--trust-remote-code", action="store_true", help="run its tokenizer's own code"
    )
    parser.add_argument(
        "--override-config",
        type=json_object,
        metavar="JSON",
        help="keys of config.json with other values; null leaves a key out",
    )
    parser.add_argument("--system", help="system prompt")
    parser.add_argument("--no-chat-template", action="store_true")
    parser.add_argument("--raw", action="store_true", help="no template of any kind")
    parser.add_argument(
        "--allow-control-tokens", action="store_true", help="in prompts; they are text otherwise"
    )
    parser.add_argument("--quiet", action="store_true", help="no completions on the screen")
    return parser.parse_args(argv)


def read_rows(a: argparse.Namespace) -> list[dict]:
    """The rows to complete, from the command line and the file."""
    rows = [{"prompt": text} for text in a.prompt]
    if a.prompts is not None:
        try:
            # JSON text may hold other line separators as they are.
            lines = a.prompts.read_text(encoding="utf-8-sig").split("\n")
        except (OSError, ValueError) as error:
            raise ValueError(f"--prompts {a.prompts}: {error}") from error
        rows += [
            _row(line, f"--prompts {a.prompts}: line {number}")
            for number, line in enumerate(lines, 1)
            if line.strip()
        ]
    if not rows:
        raise ValueError("nothing to complete: give --prompt or --prompts")
    return rows


def _row(line: str, where: str) -> dict:
    """A line of --prompts as a row; `where` opens the sentence about one that cannot be read."""
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where} is no JSON: {error.msg} at column {error.colno}") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} cannot be read as JSON: {error}") from error
    if not isinstance(row, dict) or "prompt" not in row:
        raise ValueError(
            f'{where} has no key "prompt"; wanted {{"prompt": text or [messages]}}, '
            f"given {line.strip()!r:.80}"
        )
    if taken := [key for key in OUTPUT_KEYS if key in row]:
        raise ValueError(
            f"{where} has the key {taken[0]!r}, which the output has for itself: rename it, or "
            "leave it out"
        )
    return row


def with_options(model: "Pretrained", a: argparse.Namespace) -> "Pretrained":
    """The model with the prompt format that the command line asks for."""
    from adpo_jax.pretrained import PromptFormat

    prompt_format = model.prompt_format
    if a.raw:
        prompt_format = PromptFormat(apply_chat_template=False)
    if a.no_chat_template:
        prompt_format = dataclasses.replace(prompt_format, apply_chat_template=False)
    if a.system is not None:
        prompt_format = dataclasses.replace(prompt_format, system_prompt=a.system)
    if a.allow_control_tokens:
        prompt_format = dataclasses.replace(prompt_format, allow_control_tokens=True)
    return dataclasses.replace(model, prompt_format=prompt_format)


class Unread(Exception):
    """Nobody reads what is shown any more."""


class Screen:
    """Shows completions one after the other, the first that has not ended as it is sampled.

    Args:
      new_text: makes a `TextStream` for a completion.
      is_all: whether completions go nowhere else, so that `push` and `end` raise `Unread` when
        standard output has no reader any more.
    """

    def __init__(
        self,
        new_text: Callable[[], "TextStream"],
        num_prompts: int,
        n: int,
        *,
        is_all: bool = False,
    ):
        self._order = [(prompt, sample) for prompt in range(num_prompts) for sample in range(n)]
        self._texts = {at: new_text() for at in self._order}
        self._unseen = dict.fromkeys(self._order, "")
        self._ended: dict[tuple[int, int], str] = {}
        self._at, self._is_all = 0, is_all
        self._header()

    def push(self, prompt: int, sample: int, tokens) -> None:
        """Takes new tokens of a completion."""
        self._unseen[prompt, sample] += self._texts[prompt, sample].push(tokens)
        self._show()

    def end(self, prompt: int, sample: int, completion: "Completion") -> None:
        """A completion has ended."""
        self._unseen[prompt, sample] += self._texts[prompt, sample].finish()
        self._ended[prompt, sample] = completion.finish_reason
        self._show()

    def _header(self) -> None:
        prompt, sample = self._order[self._at]
        print(f"--- prompt {prompt}, completion {sample}", flush=True)

    def _show(self) -> None:
        self._print()
        if self._is_all and not has_reader(sys.stdout):
            raise Unread

    def _print(self) -> None:
        while True:
            at = self._order[self._at]
            print(printable(self._unseen[at]), end="", flush=True)
            self._unseen[at] = ""
            if at not in self._ended:
                return
            print("" if self._ended[at] == "stop" else " [cut off at --max-tokens]")
            if self._at + 1 == len(self._order):
                return
            self._at += 1
            self._header()


def completions(
    group: "FinishedGroup", row: dict, new_text: Callable[[], "TextStream"]
) -> list[dict]:
    """A group as rows of the output.

    Args:
      new_text: makes a `TextStream` for a completion.
    """
    found = []
    for sample, completion in enumerate(group.completions):
        stream = new_text()
        text = stream.push(completion.tokens) + stream.finish()
        log_prob = float(completion.log_probs.sum())
        reason = completion.finish_reason
        own = (group.prompt_index, sample, text, len(completion), reason, log_prob)
        found.append(row | dict(zip(OUTPUT_KEYS, own, strict=True)))
    return found


def generate(a: argparse.Namespace) -> None:
    """Reads the model, samples, shows and writes.

    Raises:
      ValueError: for anything on the command line that cannot work.
      Unread: where completions are shown alone, and nobody reads them any more.
    """
    import jax

    from adpo_jax import pretrained
    from adpo_jax.engine.engine import Engine
    from adpo_jax.engine.sampling import SamplingParams
    from adpo_jax.engine.text_stream import TextStream
    from adpo_jax.log.progress import telling

    if not 0 <= a.seed < 2**32:  # JAX drops the bits above
        raise ValueError(f"--seed is a whole number from 0 to 2**32 - 1; given {a.seed}")
    rows = read_rows(a)
    sampling = SamplingParams(
        n=a.n,
        temperature=a.temperature,
        top_k=a.top_k,
        top_p=a.top_p,
        min_p=a.min_p,
        max_tokens=MAX_TOKENS if a.max_tokens is None else a.max_tokens,
        min_tokens=a.min_tokens,
        stop=tuple(a.stop),
        ignore_eos=a.ignore_eos,
    )
    if a.quiet and a.out is None:
        raise ValueError("--quiet shows nothing: give a file for the completions, --out")
    if a.out is not None and a.out.exists():
        raise ValueError(f"{a.out} is there already; give another --out")
    with telling(f"reading {a.model}"):
        read = pretrained.load(
            a.model,
            dtype=a.dtype,
            trust_remote_code=a.trust_remote_code,
            override_config=a.override_config,
        )
    model = with_options(read, a)
    prompts = model.prompts([row["prompt"] for row in rows], max_length=sys.maxsize)
    longest = max(len(prompt) for prompt in prompts)
    positions = model.policy.positions or sys.maxsize
    most = sampling.max_tokens
    if a.max_tokens is None:
        most = max(1, min(most, positions - longest))
    if longest >= positions:
        raise ValueError(
            f"the longest prompt has {longest} tokens, which leaves no place for a completion in "
            f"the {positions} positions of this model: give a prompt of at most {positions - 1}"
        )
    if longest + most > positions:
        raise ValueError(
            f"the longest prompt has {longest} tokens; with --max-tokens {most} that is "
            f"more than the {positions} positions of this model: lower --max-tokens"
        )
    sampling = dataclasses.replace(sampling, max_tokens=most, stop_token_ids=model.stop_token_ids)
    decode = functools.partial(model.tokenizer.decode, skip_special_tokens=True)
    engine = Engine(
        model.policy.for_length(longest + most),
        max_prompt_length=longest,
        max_response_length=most,
        num_slots=None if a.slots is None else min(a.slots, len(rows) * a.n),
        gpu_memory_utilization=0.9,
        group_size=a.n,
        # Few, so that text flows; a fourth of a second for a model of 30 tokens a second.
        steps_per_dispatch=32 if a.quiet else 8,
        detokenize=decode,
    )

    def new_text() -> TextStream:
        return TextStream(decode, sampling.stop, sampling.min_tokens)

    screen = None if a.quiet else Screen(new_text, len(rows), a.n, is_all=a.out is None)
    groups = engine.stream(
        model.params,
        prompts,
        sampling,
        jax.random.key(a.seed),
        on_tokens=None if screen is None else screen.push,
        on_completion=None if screen is None else screen.end,
    )
    out = a.out.open("x", encoding="utf-8") if a.out else None
    for group in groups:
        for line in completions(group, rows[group.prompt_index], new_text) if out else ():
            out.write(json.dumps(line) + "\n")
            out.flush()
    if out is not None:
        out.close()
        print(f"{len(rows) * a.n} completions in {a.out}", file=sys.stderr)


def main() -> int:
    """Samples what the command line asks for; returns the exit code."""
    a = arguments()
    from adpo_jax.config import default_config
    from adpo_jax.devices import compilation_cache

    compilation_cache.use(default_config().trainer.compilation_cache_dir)
    try:
        generate(a)
    except (OSError, ValueError) as error:
        say_error(error)
        return USER_ERROR
    except Unread:
        pass
    return 0


def run() -> int:
    """Runs `adpo-jax generate`; returns the exit code."""
    begin()
    return main()


if __name__ == "__main__":
    sys.exit(unless_interrupted(run))
