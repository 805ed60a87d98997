"""Chat templates, rendered in a process that can be killed.

A template comes with its model's folder and is a program: it may loop, allocate or raise. So it
runs in `template_worker.py`, with a limit of CPU time and of memory. One such process serves the
whole run, and a fresh one takes its place when it had to be killed.
"""

import atexit
import contextlib
import json
import os
import select
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

CPU_S = 5.0  # of a request
WALL_S = 120.0  # likewise, on a machine that is busy with other things
START_S = 120.0
MEMORY = 1 << 30  # bytes
LONGEST = 1 << 25  # characters of a request's texts
CHATS = 64  # of a request
# What the process gets of the environment; a template needs none of it.
_ENVIRONMENT = ("PATH", "PYTHONPATH", "PYTHONHOME", "LD_LIBRARY_PATH", "TZ", "LANG", "SYSTEMROOT")


class TemplateError(ValueError):
    """A template that fails, or does not come to an end; the text says why."""


def render(
    template: str, conversations: Sequence[Sequence[Mapping]], **variables: Any
) -> list[str]:
    """The texts that a template makes of conversations.

    Args:
      template: Jinja's source; it may use what transformers gives to chat templates.
      conversations: lists of messages.
      variables: further variables of the template. All values are plain JSON; others are given to
        the template as text.

    Raises:
      TemplateError: for a template that raises, loops or needs too much memory.
    """
    texts: list[str] = []
    for start in range(0, len(conversations), CHATS):
        texts += _WORKER.render(template, conversations[start : start + CHATS], variables)
    return texts


def chat_texts(
    tokenizer: Any,
    conversations: Sequence[Sequence[Mapping]],
    *,
    add_generation_prompt: bool = False,
    continue_final_message: bool = False,
    tools: Sequence[Mapping] | None = None,
    documents: Sequence[Mapping] | None = None,
    **variables: Any,
) -> list[str]:
    """What `tokenizer.apply_chat_template(..., tokenize=False)` gives, from the killable process.

    A tokenizer with an `apply_chat_template` of its own, which is code that the user trusts, is
    asked itself.

    Args:
      tokenizer: a Hugging Face tokenizer.
      continue_final_message: leave the last message open, so that the model continues it.
      variables: further variables of the template.

    Raises:
      TemplateError: as `render`; or where the template does not write the message to continue.
    """
    from transformers import PreTrainedTokenizerBase

    known = {"tools": tools, "documents": documents, "add_generation_prompt": add_generation_prompt}
    if type(tokenizer).apply_chat_template is not PreTrainedTokenizerBase.apply_chat_template:
        known["continue_final_message"] = continue_final_message
        return tokenizer.apply_chat_template(
            [list(chat) for chat in conversations], tokenize=False, **known, **variables
        )
    template = tokenizer.get_chat_template(None, tools)
    chats = [list(map(_plain, chat)) for chat in conversations]
    if continue_final_message:
        for chat in chats:
            chat[-1] = chat[-1] | {"content": chat[-1]["content"] + _END}
    texts = render(template, chats, **tokenizer.special_tokens_map, **known, **variables)
    return list(map(_open, texts)) if continue_final_message else texts


# It stands where the message to continue ends.
_END = "7c1d3ab24e905f68 "


def _open(text: str) -> str:
    """The text up to the end of the message to continue, whose spaces the template may cut."""
    before, mark, after = text.rpartition(_END.rstrip())
    if not mark:
        raise TemplateError("it does not write the message that is to be continued")
    return before if after.startswith(" ") else before.rstrip()


def _plain(message: Mapping) -> dict:
    """The message without empty keys, and its reasoning under the names that templates read.

    Source: transformers 5.24, `_normalize_chat_messages` and `_alias_reasoning_fields`.
    """
    plain = {key: value for key, value in message.items() if value is not None}
    names = ("reasoning_content", "thinking", "reasoning")
    reasoning = next((plain[name] for name in names if name in plain), None)
    if reasoning is None:
        return plain
    return {"thinking": reasoning, **plain, "reasoning_content": reasoning}


class _Worker:
    """The process, started when there is first something to render; safe to use from any thread."""

    def __init__(self):
        self._lock = threading.Lock()
        self._process: subprocess.Popen | None = None
        self._source: str | None = None
        self._number = 0
        self._unread = bytearray()

    def render(self, template: str, chats: Sequence, variables: Mapping) -> list[str]:
        with self._lock:
            try:
                return self._rendered(template, chats, variables)
            except TemplateError:
                raise
            except BaseException:
                self._kill()  # what it would still say belongs to a request that nobody waits for
                raise

    def _rendered(self, template: str, chats: Sequence, variables: Mapping) -> list[str]:
        if self._process is None or self._process.poll() is not None:
            self._start()
        new = template != self._source
        self._number += new
        request = {
            "template": self._number,
            "source": template if new else None,
            "chats": list(chats),
            "variables": dict(variables),
        }
        self._source = None  # until it is known to be good
        line = json.dumps(request, default=str).encode() + b"\n"
        try:
            self._process.stdin.write(line)
            self._process.stdin.flush()
            answer = json.loads(self._read_line(time.monotonic() + WALL_S))
        except (OSError, EOFError, ValueError, RecursionError):
            self._kill()
            raise TemplateError(
                f"it does not come to an end within {CPU_S:g} s, or needs more memory than a "
                "template may have"
            ) from None
        if "error" in answer:
            raise TemplateError(str(answer["error"]))
        self._source = template
        return answer["texts"]

    def _start(self) -> None:
        self._kill()
        script = Path(__file__).with_name("template_worker.py")
        # -P keeps the folder of the script, which has files.py, from the modules it may import.
        command = [sys.executable, "-P", str(script), str(CPU_S), str(MEMORY), str(LONGEST)]
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={k: os.environ[k] for k in _ENVIRONMENT if k in os.environ},
            start_new_session=True,  # Ctrl-C is for the run
            bufsize=-1,
        )
        try:
            self._read_line(time.monotonic() + START_S)
        except (OSError, EOFError):
            raise RuntimeError(
                f"the process that renders chat templates does not start: {script}"
            ) from None

    def _read_line(self, deadline: float) -> bytes:
        """The next line; raises EOFError when the process has ended or the time is over."""
        descriptor, searched = self._process.stdout.fileno(), 0
        while (end := self._unread.find(b"\n", searched)) < 0:
            searched = len(self._unread)
            left = max(0.0, deadline - time.monotonic())
            ready, _, _ = select.select([descriptor], [], [], left)
            piece = os.read(descriptor, 1 << 20) if ready else b""
            # Six characters of JSON for one of the text are the most there can be, pairs apart.
            if not piece or searched > 13 * LONGEST:
                raise EOFError
            self._unread += piece
        line = bytes(self._unread[:end])
        del self._unread[: end + 1]
        return line

    def _kill(self) -> None:
        process, self._process, self._source = self._process, None, None
        self._unread.clear()
        if process is not None:
            process.kill()
            for pipe in (process.stdin, process.stdout):
                with contextlib.suppress(OSError):
                    pipe.close()
            process.wait()

    def close(self) -> None:
        with self._lock:
            self._kill()


_WORKER = _Worker()
atexit.register(_WORKER.close)
