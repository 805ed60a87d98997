"""The environment of the embedded task with a tool, written as those of a user are."""


class Calculator:
    """Adds numbers."""

    def reset(self, **row) -> None:
        """A calculator remembers nothing."""

    def add(self, a: int, b: int) -> int:
        """Adds two numbers.

        Args:
            a: The first number.
            b: The second number.

        Returns:
            Their sum.
        """
        return int(a) + int(b)
