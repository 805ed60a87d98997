"""Serves a policy to clients of OpenAI's API.

    python -m adpo_jax.serve --model Qwen/Qwen3-0.6B --dtype bfloat16

`--model` is a Hugging Face folder or hub name, the folder of a run, or one of its checkpoints. The
server needs the extra [serve]: starlette and uvicorn, on which FastAPI is built. They are pure
Python, tell when a client has gone, and let requests under way finish on SIGTERM.

The server listens on this machine alone unless `--host` says otherwise. Then it needs an API key,
from the environment variable ADPO_JAX_API_KEY or a file, since others can read a command line.
"""

import argparse
import asyncio
import dataclasses
import os
import socket
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from adpo_jax.log.printable import say_error
from adpo_jax.run.command_line import Parser, begin, json_object, unless_interrupted
from adpo_jax.run.config_files import run_of, user_path

LOCAL = ("127.0.0.1", "::1", "localhost")
KEY_VARIABLE = "ADPO_JAX_API_KEY"
# Tokens of a piece of a long prompt. Others wait that long for their next token.
CHUNK_SIZE = 512
# Seconds for threads to end once no request is under way. One may be compiling for minutes.
CLOSE_S = 5.0


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(prog="adpo-jax serve", description=__doc__.split("\n")[0])

    def add(flag: str, **options):
        # The flags of the trainer have underscores.
        also = "--" + flag[2:].replace("-", "_")
        parser.add_argument(*dict.fromkeys((flag, also)), **options)

    add("--model", required=True, help="Hugging Face folder or name, run, or checkpoint")
    add("--name", help="what clients call the model; by default its folder's or run's name")
    add("--dtype", default="float32", help="float32 or bfloat16")
    add("--trust-remote-code", action="store_true", help="run its tokenizer's own code")
    keys = "keys of config.json with other values; null leaves a key out"
    add("--override-config", type=json_object, metavar="JSON", help=keys)
    meant = "take control tokens (<|im_end|>) in requests for such; they are text otherwise"
    add("--allow-control-tokens", action="store_true", help=meant)
    add("--host", default="127.0.0.1")
    add("--port", type=_number(int, 0, 65535), default=8000, help="0 for any that is free")
    add("--api-key-file", type=user_path, help=f"holds the API key; or set {KEY_VARIABLE}")
    several = "; may be given more than once"
    add(
        "--allowed-host",
        type=_host,
        action="append",
        default=[],
        help="a name that clients may address the server by, beside this machine's; * for any"
        + several,
    )
    add(
        "--cors-origin",
        type=_origin,
        action="append",
        default=[],
        help="an origin (https://example.org) whose pages may use the server; * for any" + several,
    )
    weights = "lets /update_weights take weights from folders in it, and /pause and /resume work"
    add("--weights-root", type=user_path, help=f"a folder; {weights}")
    add("--slots", type=_number(int, 1), default=64, help="completions decoded at once, at most")
    half = "tokens; by default half of the model's positions, at most 2048"
    add("--max-prompt-length", type=_number(int, 1), help=half)
    add("--max-response-length", type=_number(int, 1), help=half)
    longer = "of a text that is tokenised; by default 16 times --max-prompt-length"
    add("--max-prompt-characters", type=_number(int, 1), help=longer)
    experts = "tell the experts of a mixture that each token went through (/inference/v1/generate)"
    add("--enable-return-routed-experts", action="store_true", help=experts)
    pieces = "tokens of a piece, a power of two, in which longer prompts are read beside decoding"
    default = f"0 for none; by default {CHUNK_SIZE}"
    add(
        "--prefill-chunk-size",
        type=_number(int, 0),
        default=CHUNK_SIZE,
        help=f"{pieces}; {default}",
    )
    add("--steps-per-dispatch", type=_number(int, 1), default=4, help="tokens that come at once")
    share, count, seconds = _number(float, 0, 1), _number(int, 0), _number(float, 0)
    add("--gpu-memory-utilization", type=share, default=0.9, help="of the device's memory")
    add("--max-requests", type=count, default=256, help="under way at once; others get a 429")
    of_one = "under way at once from one address; by default half of --max-requests"
    add("--max-requests-per-client", type=_number(int, 1), help=of_one)
    add("--max-body-bytes", type=_number(int, 1), default=1 << 20, help="of a request")
    head = "seconds for the head of a request to arrive, and no more from a silent client"
    add("--head-timeout", type=seconds, default=10.0, help=head)
    add("--body-timeout", type=seconds, default=30.0, help="seconds for the body of a request")
    drain = "for requests under way after SIGTERM"
    add("--drain-seconds", type=count, default=60, help=drain)
    return parser.parse_args(argv)


def _host(text: str) -> str:
    """The name of a host, as clients send it."""
    if "/" in text:
        raise argparse.ArgumentTypeError(f"wanted a name such as example.org; given {text!r:.80}")
    return text


def _origin(text: str) -> str:
    """An origin as browsers send it: lower case, and no slash at the end."""
    if text == "*":
        return text
    scheme, separator, host = text.removesuffix("/").lower().partition("://")
    if not (scheme and separator and host) or "/" in host:
        raise argparse.ArgumentTypeError(
            f"wanted an origin such as https://example.org; given {text!r:.80}"
        )
    return f"{scheme}://{host}"


def _number(kind: type, least: float, most: float = 2**31 - 1):
    """What argparse makes a number of, within bounds."""

    def number(text: str):
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not least <= value <= most:
            what = "a whole number" if kind is int else "a number"
            bounds = f"{least:,} to {most:,}" if most < 2**31 - 1 else f"at least {least:,}"
            raise argparse.ArgumentTypeError(f"wanted {what}, {bounds}; given {text!r:.40}")
        return value

    return number


def read_api_key(a: argparse.Namespace) -> str | None:
    """The key that clients must send; None for none.

    Raises:
      ValueError: for a file without one, or none where others can reach the server.
    """
    key = os.environ.get(KEY_VARIABLE, "").strip()
    if a.api_key_file is not None:
        try:
            key = a.api_key_file.read_text(encoding="utf-8").strip()
        except (OSError, ValueError) as error:
            raise ValueError(f"--api-key-file: {error}") from None
        if not key:
            raise ValueError(f"--api-key-file: {a.api_key_file} is empty")
    if not key and a.host not in LOCAL:
        raise ValueError(
            f"--host {a.host} lets others in: set {KEY_VARIABLE} or --api-key-file, or listen on "
            "127.0.0.1"
        )
    return key or None


def make_server(a: argparse.Namespace, on_close: Callable[[Any], None] = lambda service: None):
    """A uvicorn server of the model that the command line names.

    Args:
      on_close: called with the service when it begins to end.

    Raises:
      ValueError: for anything on the command line that cannot work.
    """
    try:
        from adpo_jax.serve.hosting import bound
    except ImportError as error:
        raise ValueError(
            f"{error.name} is missing: pip install 'adpo-jax[serve]', or '.[serve]' in a clone"
        ) from None
    api_key = read_api_key(a)
    # A port that is taken is told before the model is loaded. Nobody is let in until it is there.
    sockets = bound(a.host, a.port, "--port")
    try:
        return _server_of_model(a, api_key, sockets, on_close)
    except BaseException:
        for opened in sockets:
            opened.close()
        raise


def _server_of_model(
    a: argparse.Namespace,
    api_key: str | None,
    sockets: Sequence[socket.socket],
    on_close: Callable[[Any], None],
):
    from adpo_jax import pretrained
    from adpo_jax.engine.continuous import ContinuousBatch
    from adpo_jax.engine.engine import Engine
    from adpo_jax.serve.access import Hosts
    from adpo_jax.serve.app import App
    from adpo_jax.serve.decoding import Decoding
    from adpo_jax.serve.hosting import make_host
    from adpo_jax.serve.metrics import Metrics
    from adpo_jax.serve.protocol import Limits
    from adpo_jax.serve.service import Language, Service
    from adpo_jax.serve.weights import WeightsRoot

    model = pretrained.load(
        a.model,
        dtype=a.dtype,
        trust_remote_code=a.trust_remote_code,
        override_config=a.override_config,
    )
    # A request is a stranger's, whatever the data of the run were.
    prompt_format = dataclasses.replace(
        model.prompt_format, allow_control_tokens=a.allow_control_tokens
    )
    if a.enable_return_routed_experts and not model.policy.config.mixture:
        raise ValueError(
            "--enable-return-routed-experts tells of the experts of a mixture, and this model has "
            "none; leave it out"
        )
    weights_root = None
    if a.weights_root is not None:
        weights_root = WeightsRoot(a.weights_root, model.policy, a.override_config)
    limits = Limits(*_lengths(a, model.policy), a.max_prompt_characters)
    engine = Engine(
        model.policy.for_length(limits.max_prompt_length + limits.max_response_length),
        max_prompt_length=limits.max_prompt_length,
        max_response_length=limits.max_response_length,
        num_slots=a.slots,
        gpu_memory_utilization=a.gpu_memory_utilization,
        steps_per_dispatch=a.steps_per_dispatch,
        prefill_chunk_size=a.prefill_chunk_size,
    )
    batch = ContinuousBatch(engine, model.params, compile_ahead=True)
    language = Language(
        model.tokenizer, model.policy.config.vocab_size, model.stop_token_ids, prompt_format
    )
    name = a.name or model_name(a.model)

    def make_service() -> Service:
        def go_down():
            server.should_exit = True

        decoding = Decoding(batch, asyncio.get_running_loop(), on_failure=go_down)
        returns = {"routed_experts": a.enable_return_routed_experts}
        return Service(
            language, decoding, limits, Metrics(name, batch), weights_root, returns=returns
        )

    app = App(
        make_service,
        model_name=name,
        hosts=Hosts(a.host, a.allowed_host),
        api_key=api_key,
        cors_origins=a.cors_origin,
        max_body_bytes=a.max_body_bytes,
        max_requests=a.max_requests,
        max_requests_per_client=a.max_requests_per_client,
        body_timeout_s=a.body_timeout,
        on_close=on_close,
    )
    server = make_host(app, head_timeout_s=a.head_timeout, drain_s=a.drain_seconds, sockets=sockets)
    return server


def model_name(model: str) -> str:
    """What a model is served as by default: the name of its folder, or of the run that it is of."""
    path = Path(os.path.abspath(user_path(model)))
    run = run_of(str(path))
    return (run or path).name


def _lengths(a: argparse.Namespace, policy) -> tuple[int, int]:
    """Tokens of the longest prompt and the longest completion."""
    positions = policy.positions or 4096
    half = min(positions // 2, 2048)
    prompt, response = a.max_prompt_length or half, a.max_response_length or half
    if prompt < 1 or response < 1 or prompt + response > positions:
        raise ValueError(
            f"--max-prompt-length {prompt} + --max-response-length {response} must be positive and "
            f"at most the {positions} positions of this model"
        )
    return prompt, response


def main(
    argv: list[str] | None = None, on_close: Callable[[Any], None] = lambda service: None
) -> int:
    """Serves until it is told to stop; returns the exit code.

    Args:
      on_close: as of `make_server`.
    """
    a = arguments(argv)
    from adpo_jax.config import default_config
    from adpo_jax.devices import compilation_cache  # after the arguments, so that --help is quick

    compilation_cache.use(default_config().trainer.compilation_cache_dir)
    try:
        server = make_server(a, on_close)
        # Another server that was loading at the same time may listen there by now.
        server.run()
    except (OSError, ValueError) as error:
        say_error(error)
        return 2
    failed = server.app.service is None or server.app.service.decoding.failed
    return 1 if failed else 0


def run() -> int:
    """Runs `python -m adpo_jax.serve`; returns the exit code."""
    begin()
    return main(on_close=end_in_time)


def end_in_time(service: Any) -> None:
    """Ends this process in `CLOSE_S` if it has not ended by then."""

    def end():
        print("the server ends without its threads, which are still at work", file=sys.stderr)
        os._exit(1 if service.decoding.failed else 0)

    timer = threading.Timer(CLOSE_S, end)
    timer.daemon = True
    timer.start()


if __name__ == "__main__":
    sys.exit(unless_interrupted(run))
