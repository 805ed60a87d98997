"""Faults of the grader itself: none ends a run; each kind is logged once, and all are counted.

A fault happens deep in a comparison that has no way to count it, often in a worker process. So
`report` hands it to whoever collects in the same task or thread, and logs it where nobody does.
"""

import contextlib
import contextvars
import logging
import threading
from collections.abc import Iterator

_MAX_SHOWN = 200

_logger = logging.getLogger("adpo_jax.rewards")
_collected: contextvars.ContextVar[list[str] | None] = contextvars.ContextVar(
    "collected", default=None
)
_logged: set[str] = set()
_lock = threading.Lock()


@contextlib.contextmanager
def collected() -> Iterator[list[str]]:
    """Collects the faults that are reported inside, as texts, instead of logging them."""
    faults: list[str] = []
    token = _collected.set(faults)
    try:
        yield faults
    finally:
        _collected.reset(token)


def report(error: Exception, answer: object, reference: object) -> None:
    """Reports an exception that comparing an answer with a reference raised."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    where = f" in {trace.tb_frame.f_code.co_name}, line {trace.tb_lineno}" if trace else ""
    # What comes before the first colon is the kind; what the model wrote is escaped.
    fault = (
        f"{type(error).__name__}{where}: the answer {_shown(answer)} and the reference "
        f"{_shown(reference)}"
    )
    faults = _collected.get()
    if faults is None:
        log(fault)
    else:
        faults.append(fault)


def log(fault: str) -> None:
    """Logs a fault if none of its kind has been logged in this process."""
    kind = fault.partition(":")[0]
    with _lock:
        if kind in _logged:
            return
        _logged.add(kind)
    _logger.error(
        "the grader has a fault, which we would like to hear of: %s. The answer counts as "
        "unreadable; later faults of this kind are only counted, in reward/grader_faults",
        fault,
    )


def _shown(text: object) -> str:
    try:
        return ascii(text)[:_MAX_SHOWN]
    except Exception:
        return f"of type {type(text).__name__}"
