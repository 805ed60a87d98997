"""A process in which environments live, for `pool.EnvironmentPool`.

It is asked one thing at a time: to describe the environments, to make or reset one, to call a tool
of one, or to end a rollout. An environment's random numbers (Python's, and NumPy's where it uses
them) are its own: they begin with a seed at each reset, whatever else the process does in between.
All are made with the same random numbers, so that one made anew is like one used before.
"""

import asyncio
import dataclasses
import inspect
import random
import sys
import traceback
from typing import Any

from adpo_jax.environments import contract
from adpo_jax.environments.contract import Unfit
from adpo_jax.rewards import loop, wire
from adpo_jax.rewards.worker import connected, limit_memory

# Characters of an answer; what the model reads is cut by tokens, and messages have a limit too.
_MOST_SAID = 1_000_000


def main(descriptor: int, lifeline: int, run: int) -> None:
    """Serves the run over a socket until it closes; arguments as of `rewards.worker.main`."""
    connection = connected(descriptor, lifeline, run)
    try:
        spec, timeout_s, memory_limit_mb = wire.receive_pickle(connection)
        limit_memory(memory_limit_mb)
        try:
            house = House(spec, timeout_s)
        except ValueError as error:
            wire.send_json(connection, {"refused": str(error)})
            return
        wire.send_json(connection, {})
        while True:
            verb, arguments = wire.receive_pickle(connection)
            wire.send_json(connection, house.answer(verb, arguments))
    except ConnectionError:
        pass


def _seed(seed: int) -> None:
    random.seed(seed)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(seed % 2**32)


class _Cancelled(Exception):
    """An async method took longer than it may."""


def _said_by(error: BaseException) -> str:
    """What an error says; the name of one that cannot say anything."""
    try:
        return str(error)
    except BaseException:
        return type(error).__name__


class House:
    """The environments of one process.

    Args:
      timeout_s: seconds for an async method, which is cancelled; others have this process killed.
    """

    def __init__(self, spec: contract.Spec, timeout_s: float):
        self._make, self._functions = contract.load(spec)
        self._timeout_s = timeout_s
        self._there: dict[int, Any] = {}
        self._random: dict[int, tuple] = {}

    def answer(self, verb: str, arguments: dict) -> dict:
        """What comes of a request: a dict that JSON can hold, with "error" where it failed.

        An environment's attributes come with it, since its process may be killed before the end.
        """
        answer = self._answer(verb, arguments)
        instance = self._there.get(arguments.get("number"))
        if instance is None:
            return answer
        return answer | {"attributes": contract.attributes_of(instance)}

    def _answer(self, verb: str, arguments: dict) -> dict:
        try:
            return getattr(self, verb)(**arguments)
        except _Cancelled:
            return {"error": "", "kind": "cancelled"}
        except MemoryError:
            return {"error": "it needs more memory than it may have", "kind": "raised"}
        except Unfit as error:
            return {"error": str(error), "kind": "unfit"}
        except BaseException as error:  # whatever it raises, the others' environments live on
            text = "".join(traceback.format_exception(error))[-20_000:]
            return {"error": _said_by(error)[:2000], "kind": "raised", "traceback": text}

    def describe(self) -> dict:
        """Every environment, made once for the purpose."""
        found = {}
        for name, make in self._make.items():
            described = contract.describe(make(), self._functions)
            found["" if name is None else name] = dataclasses.asdict(described)
        return {"environments": found, "several": None not in self._make}

    def reset(self, number: int, name: str | None, row: dict, seed: int) -> dict:
        """Prepares an environment for a row, which is made where it is not there yet."""
        if number not in self._there:
            _seed(0)  # whichever environments are made before, in this run and in a resumed one
            self._there[number] = self._make[name]()
        _seed(seed)
        reset = self._there[number].reset
        signature = contract.signature_of_reset(type(self._there[number]).__name__, reset)
        taken = {k: v for k, v in row.items() if signature.takes_any or k in signature.names}
        said = self._awaited(reset(**taken))
        self._keep_random(number)
        if isinstance(said, list):
            said = contract.content_of(said)
        if isinstance(said, str):
            # Prompts that are too long are cut at the front; half a character is no text.
            said = said[-_MOST_SAID:].encode(errors="replace").decode()
        elif said is not None:
            owner, returned = type(self._there[number]).__name__, contract.brief(said)
            raise Unfit(f"reset of {owner} returned {returned}; wanted text for the model, or None")
        return {"said": said}

    def call(self, number: int, tool: str, arguments: dict) -> dict:
        """Calls a tool; what it returns comes as text."""
        tools = contract.tools_of(self._there[number], self._functions)
        self._take_random(number)
        try:
            result = self._awaited(tools[tool](**arguments))
            return {"said": contract.content_of(result)[:_MOST_SAID]}
        finally:
            self._keep_random(number)

    def end(self, number: int) -> dict:
        """The reward of an environment; None where it has none."""
        instance = self._there[number]
        self._take_random(number)
        reward = None
        if callable(getattr(instance, contract.REWARD, None)):
            reward = contract.number_of(instance, self._awaited(instance.get_reward()))
        return {"reward": reward}

    def _awaited(self, result: Any) -> Any:
        if not inspect.isawaitable(result):
            return result

        async def awaited():
            try:
                async with asyncio.timeout(self._timeout_s) as limit:
                    return await result
            except TimeoutError:
                if limit.expired():
                    raise _Cancelled from None
                raise  # its own, of a connection say

        return loop.run(awaited(), keeps_tasks=True)

    def _take_random(self, number: int) -> None:
        python, numpy = self._random[number]
        random.setstate(python)
        if numpy is not None:
            sys.modules["numpy"].random.set_state(numpy)

    def _keep_random(self, number: int) -> None:
        numpy = sys.modules.get("numpy")
        state = numpy.random.get_state() if numpy is not None else None
        self._random[number] = random.getstate(), state
