"""What models, data, folders and clients wrote does not steer the terminal that it is shown on."""

import contextlib
import io
import json
import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest
import rich.console
from safetensors.numpy import load_file, save_file
from test_bad_input import (  # noqa: F401  (fixtures)
    ARITHMETIC,
    MODEL,
    model,
    outcome,
    workplace,
    write_rows,
)

from adpo_jax import evaluate, export, generate
from adpo_jax.log.printable import GuardedStream, printable
from adpo_jax.log.progress import Progress
from adpo_jax.report import __main__ as report
from adpo_jax.serve import __main__ as serve

ROOT = Path(__file__).resolve().parents[1]
# Clears the screen, sets the title, rings, hides by C1, turns the writing direction, goes back.
HOSTILE = "\x1b[2J\x1b]0;pwned\x07\x9b31m\u202egnp\u2066\rerror: none\x08\x7f"
STEERS = ("\x1b", "\x07", "\x9b", "\u202e", "\u2066", "\r", "\x08", "\x7f")


def assert_inert(shown: str):
    assert [c for c in STEERS if c in shown] == []


def test_controls_are_spelled_out_and_all_that_is_text_stays():
    assert_inert(printable(HOSTILE))
    assert printable(HOSTILE).startswith(r"\x1b[2J\x1b]0;pwned\x07\x9b31m\u202egnp")
    text = "two\nlines\tand Grüße, 你好\u3000世界, \u00a0, نص, 👩\u200d🔬, \\x1b, [bold]"
    assert printable(text) == text
    assert printable("windows\r\nlines") == "windows\nlines"
    assert printable("lone \ud800") == r"lone \ud800"


# --- the command lines


def spoil_a_tensor_name():
    weights = load_file("model/model.safetensors")
    save_file(weights | {HOSTILE: weights["model.norm.weight"]}, "model/model.safetensors")


def spoil_the_architecture():
    config = json.loads(Path("model/config.json").read_text())
    Path("model/config.json").write_text(json.dumps(config | {"architectures": [HOSTILE]}))


def spoil_the_tokenizer():
    Path("model/tokenizer.json").write_text(json.dumps({"version": HOSTILE, "model": HOSTILE}))


def spoil_the_chat_template():
    text = "{{ raise_exception('" + HOSTILE.replace("\r", "\\r") + "') }}"
    Path("model/chat_template.jinja").write_text(text)


def spoil_the_data():
    write_rows(
        "good.jsonl", [{"question": [{"role": HOSTILE, "content": "x"}], "answer": "#### 1"}]
    )


def spoil_a_column():
    write_rows("good.jsonl", [{HOSTILE: "a", "answer": "#### 1"}])


@pytest.mark.parametrize(
    "spoil",
    [
        spoil_a_tensor_name,
        spoil_the_architecture,
        spoil_the_tokenizer,
        spoil_the_chat_template,
        spoil_the_data,
        spoil_a_column,
    ],
)
def test_an_error_of_a_run_shows_hostile_text_spelled_out(spoil, monkeypatch, capsys):
    spoil()
    argv = [ARITHMETIC, "--workdir=run", f"--config.{MODEL}.path=model",
            "--config.data.train_files=good.jsonl", "--config.data.val_files="]  # fmt: skip
    code, err = outcome(argv, monkeypatch, capsys)
    assert code == 2, err
    assert_inert(err)
    assert err.startswith("error: ")
    assert "pwned" in err or spoil is spoil_the_tokenizer, "the test shows nothing"


def test_the_other_command_lines_show_hostile_text_spelled_out(monkeypatch, capsys):
    spoil_the_architecture()
    assert serve.main(["--model=model"]) == 2
    for command, argument in ((generate, "--prompt=x"), (export, "--out=out")):
        monkeypatch.setattr(sys, "argv", ["command", "--model=model", argument])
        assert command.main() == 2
    monkeypatch.setattr(sys, "argv", ["report", HOSTILE])
    assert report.main() == 2
    err = capsys.readouterr().err
    assert_inert(err)
    assert len([line for line in err.splitlines() if line.startswith("error: ")]) == 4
    assert err.count("pwned") >= 4
    evaluate.say_error(ValueError("two\nlines"))
    assert capsys.readouterr().err == "error: two\nlines\n"


PROGRAM = """
import sys
from adpo_jax.log.printable import guard
import absl.logging, logging
early = logging.StreamHandler(sys.stderr)
logging.getLogger("early").addHandler(early)
logging.getLogger("early").propagate = False
guard()
import threading, tqdm, warnings
HOSTILE = {hostile!r}
print(HOSTILE)
sys.stdout.writelines([HOSTILE, "\\n"])
warnings.warn(HOSTILE)
logging.getLogger("early").warning(HOSTILE)
absl.logging.use_absl_handler()
absl.logging.error(HOSTILE)
logging.getLogger("another").warning(HOSTILE)
def fail():
    raise RuntimeError(HOSTILE)
thread = threading.Thread(target=fail)
thread.start()
thread.join()
for _ in tqdm.tqdm([1], desc=HOSTILE, file=sys.stdout):
    pass
fail()
"""


def test_whatever_a_process_prints_logs_warns_of_or_dies_of_is_spelled_out():
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM.replace("{hostile!r}", repr(HOSTILE))],
        capture_output=True,
        cwd=ROOT,
        check=False,
    )
    out, err = done.stdout.decode(), done.stderr.decode()
    assert done.returncode == 1
    assert_inert(err)
    assert err.count("pwned") >= 6, err
    drawn, bar = out.split("\n", 2)[:2], out.split("\n", 2)[2]
    assert [line.count("pwned") for line in drawn] == [1, 1]
    assert_inert("".join(drawn))
    assert bar.startswith("\r"), "a progress bar draws"
    assert_inert(bar.replace("\r", ""))


SET_UP_AGAIN = """
import absl.logging, logging.config, sys
absl.logging.use_absl_handler()
from adpo_jax.log.printable import guard
guard()
guard()
logging.config.dictConfig({"version": 1, "disable_existing_loggers": False})
print("still open", file=sys.stderr)
"""


def test_standard_error_stays_open_when_logging_is_set_up_again():
    """As uvicorn does it: absl's handler closes its stream unless that is `sys.stderr` itself."""
    command = [sys.executable, "-c", SET_UP_AGAIN]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert "still open" in done.stderr
    assert done.returncode == 0


def test_every_command_line_is_guarded():
    starts = ["adpo_jax/main.py", "adpo_jax/evaluate.py", "adpo_jax/serve/__main__.py"]
    starts += ["adpo_jax/report/__main__.py", "adpo_jax/generate.py", "adpo_jax/export.py"]
    starts += ["adpo_jax/__main__.py"]
    starts += ["scripts/compare.py"]
    guards = re.compile(r"\n    (guard|begin)\(\)\n")
    assert [name for name in starts if not guards.search((ROOT / name).read_text())] == []


def test_a_terminal_that_knows_few_characters_gets_the_rest_spelled_out():
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    GuardedStream(stream).write("Grüße\n")
    stream.flush()
    assert stream.buffer.getvalue() == b"Gr\\xfc\\xdfe\n"


def test_the_progress_bar_and_its_table_draw_but_hostile_words_in_them_do_not(monkeypatch):
    screen = io.StringIO()
    options = {"force_terminal": True, "width": 200, "_environ": {"TERM": "xterm"}}
    console = rich.console.Console(file=screen, **options)
    sample = {"prompt": HOSTILE, "completion": "[red]not markup[/red]", "reward": 1.0}
    sample["components"] = {f"[bold]{HOSTILE}": 1.0, "b": 0.5}
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with Progress(HOSTILE, total=4, console=console) as progress:
        progress.update(1, HOSTILE)
        progress.print_samples([sample])
        print(HOSTILE, file=sys.stderr)  # of someone else
    shown = screen.getvalue()
    assert "[red]not markup[/red]" in shown
    for sequence in ("\x1b[2J\x1b", "\x1b]0;", "\x07", "\x9b", "\u202e", "\x08"):
        assert sequence not in shown
    assert shown.count("pwned") >= 4


# --- outputs that end, or know few characters

LASTING = """
import os, sys, time
from adpo_jax.log.printable import guard
guard()
from adpo_jax.log.progress import Progress
sys.stdin.read()  # until the reader has gone
print("before", flush=True)
with Progress("step", total=2) as progress:
    for step in (1, 2):
        progress.update(step, "loss 1 \u2603")
        progress.print_samples([{"prompt": "\u2603", "completion": "\u2603\u00fc", "reward": 1.0,
                                 "components": {"f": 1.0}}])
        print("beside")
        sys.stdout.flush()
print("after")
print("done", file=sys.stderr)
"""


def program(**options) -> subprocess.Popen:
    """A program that shows what a run shows, once its standard input ends."""
    return subprocess.Popen(
        [sys.executable, "-c", LASTING],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="latin-1",
        **options,
    )


def test_a_program_outlives_the_reader_of_its_output():
    process = program(stdout=subprocess.PIPE)
    process.stdout.close()
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (0, "done\n")


def test_a_program_outlives_its_terminal():
    main, side = pty.openpty()
    process = program(stdout=side, env=os.environ | {"TERM": "xterm"})
    os.close(side)
    os.close(main)
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (0, "done\n")


@pytest.mark.parametrize("encoding", ["latin-1", "ascii"])
@pytest.mark.parametrize("terminal", [False, True])
def test_a_sample_with_a_character_that_the_output_lacks_is_spelled_out(encoding, terminal):
    main, side = pty.openpty()
    environment = os.environ | {"PYTHONIOENCODING": encoding, "TERM": "xterm"}
    process = program(stdout=side if terminal else subprocess.PIPE, env=environment)
    os.close(side)
    process.stdin.close()
    with os.fdopen(main, "rb", buffering=0) as screen, process:
        shown = b""
        with contextlib.suppress(OSError):  # the end of a terminal
            while piece := screen.read(65536) if terminal else process.stdout.read().encode():
                shown += piece
        assert process.stderr.read() == "done\n"
    assert process.returncode == 0
    assert b"\\u2603" in shown
    assert b"after" in shown


def test_a_long_note_leaves_the_count_and_the_time_in_sight():
    screen = io.StringIO()
    options = {"force_terminal": True, "width": 80, "_environ": {"TERM": "xterm"}}
    with Progress("step", 1000, console=rich.console.Console(file=screen, **options)) as progress:
        progress.update(120, "loss 1.2345  reward 0.531  " * 9)
    last = screen.getvalue().rpartition("step")[2]
    assert re.search(r"━━.*\b120/1000\b.*-:--:--.*loss 1\.2345.*…", last), last


def test_a_terminal_that_cannot_draw_gets_lines_at_once():
    screen = io.StringIO()
    options = {"force_terminal": True, "width": 80, "_environ": {"TERM": "dumb"}}
    with Progress("step", 4, console=rich.console.Console(file=screen, **options)) as progress:
        progress.update(1, "loss 1")
        assert "step 1/4  loss 1" in screen.getvalue()
