"""Stops a run in good order, within a grace period, on a signal or a preemption notice.

The signals are SIGTERM, SIGINT and SIGHUP, which a terminal sends that closes, unless it is ignored
(nohup). The first asks the run to stop. A stage that has changed nothing yet (rollout, grading,
evaluation) is abandoned at once; any other stage is finished. When the grace period ends first, the
process exits at once, and the next one goes on from the last checkpoint. A second Ctrl-C exits at
once too.
"""

import contextlib
import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils

from adpo_jax.run.checkpoint_files import complete_steps
from adpo_jax.run.exit_codes import INTERRUPTED, SECOND_INTERRUPT

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class Interrupted(BaseException):
    """The run was asked to stop. It is no `Exception`, so that nobody takes it for an error."""


class Interruption:
    """Whether the run was asked to stop. As a context manager it takes the signals over.

    Args:
      grace_s: seconds from the first signal until the process exits, whatever it is doing then.

    Attributes:
      checkpoints: the folder of the run's checkpoints; None before it is known.
    """

    def __init__(self, grace_s: float = 30.0):
        self.grace_s = grace_s
        self.checkpoints: Path | None = None
        self._name: str | None = None
        self._may_raise = False
        self._checks = 0
        self._before: dict = {}
        self._ends: tuple[socket.socket, socket.socket] | None = None

    @property
    def requested(self) -> bool:
        """Whether this process was asked to stop."""
        return self._name is not None

    @property
    def what_is_left(self) -> str:
        """What the same command does after an exit at this moment, in words."""
        if self.checkpoints is None:
            return "this process has saved nothing yet, and the same command goes on as before"
        with contextlib.suppress(OSError):  # a disk that cannot be read has nothing to go on from
            if complete_steps(self.checkpoints):
                return "the last checkpoint is whole, and the same command goes on from it"
        return "nothing has been saved, and the same command starts again"

    def check(self) -> None:
        """Raises if this or any other process was asked to stop; all processes must call this.

        Raises:
          Interrupted: on all processes at the same call.
        """
        asked = self.requested
        self._checks += 1
        if jax.process_count() > 1:
            preempted = _reached_preemption(self._checks)
            asked = bool(np.any(multihost_utils.process_allgather(np.array(asked or preempted))))
        if asked:
            raise Interrupted(self._name or "a preemption notice")

    @contextlib.contextmanager
    def abandonable(self) -> Iterator[None]:
        """A stage that may be given up anywhere; a signal raises `Interrupted` in it.

        Code of the user may catch `Interrupted` within the stage, whose result must not be used
        then. So it is raised again at the end of the stage, in the place of any other error.

        Where there are several processes no stage is given up, since one process may not leave the
        others in the middle of a collective.
        """
        allowed = self._may_raise = jax.process_count() == 1
        try:
            if allowed and self.requested:
                raise Interrupted(self._name)
            yield
        except Exception as error:
            if allowed and self.requested:
                raise Interrupted(self._name) from error
            raise
        finally:
            self._may_raise = False
        if allowed and self.requested:
            raise Interrupted(self._name)

    def __enter__(self):
        # Python runs a handler when the main thread is back from the compiler or the device. The
        # grace period and the second Ctrl-C cannot wait for that, so the kernel tells a thread.
        self._ends = socket.socketpair()
        self._ends[1].setblocking(False)
        self._before = {
            number: signal.signal(number, self._handle)
            for number in SIGNALS
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN
        }
        signal.set_wakeup_fd(self._ends[1].fileno(), warn_on_full_buffer=False)
        threading.Thread(target=self._watch, name="signals", daemon=True).start()
        return self

    def __exit__(self, *_):
        signal.set_wakeup_fd(-1)
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._ends[1].close()  # ends the thread

    def _handle(self, number: int, _frame) -> None:
        self._name = signal.Signals(number).name
        if self._may_raise:
            self._may_raise = False
            raise Interrupted(self._name)

    def _watch(self) -> None:
        interrupts = 0
        timer = None
        with self._ends[0] as end:
            while received := end.recv(1):
                number = received[0]
                if number not in SIGNALS:
                    continue
                interrupts += number == signal.SIGINT
                if interrupts > 1:
                    _exit("second interrupt: exiting at once", SECOND_INTERRUPT)
                if timer is None:
                    timer = threading.Timer(self.grace_s, self._give_up)
                    timer.daemon = True
                    timer.start()
                    name = signal.Signals(number).name
                    text = f"{name}: stopping, within {self.grace_s:g} s; a second Ctrl-C exits"
                    _print(text)
        if timer is not None:
            timer.cancel()

    def _give_up(self) -> None:
        # The disk that this asks may hang, and be the reason of it all.
        last = threading.Timer(2.0, os._exit, (INTERRUPTED,))
        last.daemon = True
        last.start()
        left = "what is saved is not known"
        with contextlib.suppress(Exception):
            left = self.what_is_left
        _exit(f"not done after {self.grace_s:g} s: exiting; {left}", INTERRUPTED)


def _exit(text: str, code: int) -> None:
    _print(text)
    os._exit(code)


def _print(text: str) -> None:
    with contextlib.suppress(OSError):  # the terminal may be what has gone
        print(text, file=sys.stderr, flush=True)


def _reached_preemption(number: int) -> bool:
    """Whether JAX's preemption service asks all processes to stop at their `number`-th call."""
    try:
        return multihost_utils.reached_preemption_sync_point(number)
    except RuntimeError:  # the service is off
        return False
