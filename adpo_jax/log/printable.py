"""Text of others on a terminal: what models, data, folders and clients wrote cannot steer it.

Escape sequences clear the screen, set the title of the window or hide what was printed; controls of
writing direction show a text in another order than it has. `printable` spells them out. `guard`
does so for everything that this process prints or logs, tracebacks and warnings included.
"""

import contextlib
import logging
import re
import sys
import unicodedata
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


class GuardedStream:
    """A text stream that spells out control characters.

    Attributes:
      unguarded: the stream below, for those who draw (progress bars).
    """

    def __init__(self, stream: TextIO):
        self.unguarded = stream

    def write(self, text: str) -> int:
        shown = printable(text)
        try:
            self.unguarded.write(shown)
        except UnicodeEncodeError:  # a terminal of few characters
            encoding = self.unguarded.encoding
            self.unguarded.write(shown.encode(encoding, "backslashreplace").decode(encoding))
        return len(text)

    def writelines(self, lines) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.unguarded, name)


def guarded(stream: Any) -> Any:
    """The stream, guarded; None stays None."""
    return stream if stream is None or isinstance(stream, GuardedStream) else GuardedStream(stream)


def unguarded(stream: Any) -> Any:
    """The stream below a guarded one; for text that `printable` has seen, and drawings."""
    return stream.unguarded if isinstance(stream, GuardedStream) else stream


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
            file = unguarded(sys.stderr if file is None else file)
            original(self, iterable, desc, total, leave, file, *a, **k)

        __init__.guarded = True
        std.tqdm.__init__ = __init__
