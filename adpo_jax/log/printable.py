"""Text of others on a terminal: what models, data, folders and clients wrote cannot steer it.

Escape sequences clear the screen, set the title of the window or hide what was printed; controls of
writing direction show a text in another order than it has. `printable` spells them out. `guard`
does so for everything that this process prints or logs, tracebacks and warnings included.
"""

import contextlib
import errno
import logging
import os
import re
import sys
import unicodedata
from collections.abc import Callable
from typing import Any, TextIO

# Characters that are not printable by Python's own measure, but harmless: other spaces, and the two
# joiners that emoji and several scripts need.
_JOINERS = "\u200c\u200d"
_SUSPECTS = re.compile(r"[^\x20-\x7e\n\t]")


def printable(text: str) -> str:
    """The text with control characters spelled out; newlines and tabs stay.

    >>> printable("a\\x1b[2Jb\\n")
    'a\\\\x1b[2Jb\\n'
    """
    return _SUSPECTS.sub(_spelled, text.replace("\r\n", "\n"))


def _spelled(match: re.Match) -> str:
    c = match[0]
    harmless = c.isprintable() or c in _JOINERS or unicodedata.category(c) == "Zs"
    return c if harmless else repr(c)[1:-1]


def say(text: Any, to: TextIO | None = None) -> None:
    """Prints a line, or several, at once; the text may be anybody's.

    Args:
      to: where to; None for standard error.
    """
    print(printable(str(text)), file=to or sys.stderr, flush=True)


def say_error(error: BaseException | str) -> None:
    """Prints what went wrong, as every command line does before it exits."""
    say(f"error: {error}")


class LastingStream:
    """A text stream that outlives its readers, and spells out what its encoding lacks.

    When a pipe has no reader any more, or a terminal is gone, the rest goes to the null device: a
    run is not lost for want of a reader.

    Attributes:
      unguarded: the stream below.
      has_reader: whether what is written has gone to anybody so far.
    """

    def __init__(self, stream: TextIO):
        self.unguarded, self.has_reader = stream, True

    def write(self, text: str) -> int:
        try:
            self._lasting(self.unguarded.write, text)
        except UnicodeEncodeError:  # a terminal of few characters
            encoding = self.unguarded.encoding
            spelled = text.encode(encoding, "backslashreplace").decode(encoding)
            self._lasting(self.unguarded.write, spelled)
        return len(text)

    def writelines(self, lines) -> None:
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        self._lasting(self.unguarded.flush)

    def _lasting(self, call: Callable, *arguments: str) -> None:
        try:
            call(*arguments)
        except OSError as error:
            if error.errno not in (errno.EPIPE, errno.EIO):
                raise
            self.has_reader = False
            # In the place of the descriptor, so that what is buffered goes there too.
            with open(os.devnull, "wb") as nowhere:
                os.dup2(nowhere.fileno(), self.unguarded.fileno())

    def __getattr__(self, name: str) -> Any:
        return getattr(self.unguarded, name)


class GuardedStream(LastingStream):
    """A lasting stream that spells out control characters."""

    def write(self, text: str) -> int:
        super().write(printable(text))
        return len(text)


def guarded(stream: Any) -> Any:
    """The stream, guarded; None stays None."""
    return stream if stream is None or isinstance(stream, GuardedStream) else GuardedStream(stream)


def has_reader(stream: Any) -> bool:
    """Whether a stream still has a reader, as far as is known."""
    return getattr(stream, "has_reader", True)


def unguarded(stream: Any) -> Any:
    """The stream below a guarded one."""
    return stream.unguarded if isinstance(stream, LastingStream) else stream


def drawable(stream: Any) -> Any:
    """The stream for text that `printable` has seen, and drawings; None stays None."""
    return stream if stream is None else LastingStream(unguarded(stream))


def guard() -> None:
    """Guards standard output and standard error of this process, and what is logged to them.

    The command lines call it once, before anything else. Python's own hooks for exceptions and
    warnings print to `sys.stderr`, and so are guarded too.
    """
    sys.stdout, sys.stderr = guarded(sys.stdout), guarded(sys.stderr)
    streams = {id(unguarded(stream)): stream for stream in (sys.stdout, sys.stderr)}
    loggers = [logging.root, *logging.Logger.manager.loggerDict.values()]
    handlers = [handler for logger in loggers for handler in getattr(logger, "handlers", ())]
    # absl's handler prints through another one, and it is not installed before absl's app runs.
    if "absl.logging" in sys.modules:
        handlers.append(sys.modules["absl.logging"].get_absl_handler())
    for handler in handlers:
        handler = getattr(handler, "python_handler", handler)
        # A handler that was made before this call holds the stream of that time. It gets the very
        # object that is `sys.stderr` now: absl's closes any other when logging is set up again.
        stream = getattr(handler, "stream", None)
        if stream is not None and id(unguarded(stream)) in streams:
            handler.stream = streams[id(unguarded(stream))]
    _let_bars_draw()


def _let_bars_draw() -> None:
    """Lets tqdm, which shows the downloads of the hub, move the cursor; its words are guarded."""
    with contextlib.suppress(ImportError):
        from tqdm import std

        original = std.tqdm.__init__
        if getattr(original, "guarded", False):
            return

        def __init__(self, iterable=None, desc=None, total=None, leave=True, file=None, *a, **k):
            desc = printable(desc) if isinstance(desc, str) else desc
            file = drawable(sys.stderr if file is None else file)
            original(self, iterable, desc, total, leave, file, *a, **k)

        __init__.guarded = True
        std.tqdm.__init__ = __init__
