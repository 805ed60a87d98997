"""Environments as users write them; TRL takes this file as it is."""

import asyncio
import functools
import os
import random
import threading


def shout(text: str) -> str:
    """Says it louder.

    Args:
        text: What to say.
    """
    return text.upper()


async def whisper(text: str) -> str:
    """Says it softer.

    Args:
        text: What to say.
    """
    await asyncio.sleep(0)
    return text.lower()


class Counter:
    """Counts up."""

    def __init__(self):
        self.made = True
        self.resets = 0

    def reset(self, start: int = 0, **row) -> str | None:
        self.resets += 1
        self.count = start
        self.luck = random.random()
        return f" It stands at {start}." if start else None

    def add(self, number: int) -> int:
        """Adds to the count.

        Args:
            number: What to add.
        """
        self.count += number
        return self.count

    async def wait(self, seconds: float) -> str:
        """Waits.

        Args:
            seconds: How long.
        """
        await asyncio.sleep(seconds)
        return "waited"

    def fail(self) -> str:
        """Fails."""
        self.count += 10
        raise RuntimeError("it is broken")

    def hang(self) -> str:
        """Never returns."""
        while True:
            pass

    def _hidden(self):
        pass

    @property
    def double(self) -> int:
        return 2 * self.count

    def get_reward(self) -> float:
        return float(self.count)


class Other:
    """Has no reward of its own."""

    def reset(self, **row) -> None:
        self.row = row

    def look(self) -> str:
        """Says which columns the row has."""
        return ",".join(sorted(self.row))


def make_counter():
    return Counter()


BOTH = {"counter": Counter, "other": Other}


class NoReset:
    def tool(self) -> str:
        """A tool."""


class NoHints:
    def reset(self, **row):
        return None

    def tool(self, x):
        """A tool.

        Args:
            x: Something.
        """


class NoDoc:
    def reset(self, **row):
        return None

    def tool(self, x: int):
        return x


class ByPlace:
    def reset(self, **row):
        return None

    def tool(self, *numbers: int) -> str:
        """Adds.

        Args:
            numbers: What to add.
        """
        return str(sum(numbers))


class NoTools:
    def reset(self, **row):
        return None


class NeedsMore:
    def reset(self, secret, **row):
        return None

    def tool(self) -> str:
        """A tool."""


class BrokenReset:
    def reset(self, **row):
        raise RuntimeError("no such world")

    def tool(self) -> str:
        """A tool."""


class Slow:
    """Takes longer than it may, in a way that can be cancelled."""

    def reset(self, **row):
        return None

    async def wait(self) -> str:
        """Waits."""
        await asyncio.sleep(60)

    async def get_reward(self):
        await asyncio.sleep(60)


class Speechless(Exception):
    """Cannot be written."""

    def __str__(self):
        return None


class Careless:
    """Raises what our own deadline raises, and returns no number."""

    def reset(self, **row):
        return "caf\udce9"

    def speechless(self) -> str:
        """Fails without a word."""
        raise Speechless

    def unreachable(self) -> str:
        """Waits for a site."""
        raise TimeoutError("did not answer")

    async def hangs_up(self) -> str:
        """Waits for a site in another way."""
        raise TimeoutError("hung up")

    async def cancels(self) -> str:
        """Gives up."""
        raise asyncio.CancelledError

    def get_reward(self):
        return "good"


class Deck:
    """Draws before its first reset."""

    def __init__(self):
        self.deck = random.sample(range(52), 52)

    def reset(self, **row) -> str:
        return f"{self.deck[0]} {random.random()}"

    @property
    def leaves(self) -> int:
        raise SystemExit(1)

    def deal(self) -> str:
        """Deals a card, and has the process end soon."""
        threading.Timer(0.1, os._exit, (1,)).start()
        return "a card"


class Backend:
    """What an environment has a tool of."""

    def search(self, query: str) -> str:
        """Searches.

        Args:
            query: What for.
        """
        return f"found {query}"


class Bound:
    """Has tools of several kinds, and what is none."""

    def __init__(self):
        self.find = Backend().search
        self.reads = 0

    def reset(self, **row):
        return None

    def tool(self) -> str:
        """A tool."""

    @classmethod
    def other(cls) -> str:
        """Another tool."""

    @staticmethod
    def helper(x):
        return x

    @property
    def seen(self) -> int:
        self.reads += 1
        return self.reads

    @functools.cached_property
    def kept(self) -> int:
        return self.seen
