"""Environments of the embedded tasks, a calculator and a game, written as those of a user are."""


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


class GuessNumber:
    """Has a number in mind."""

    MAX_GUESSES = 6

    def reset(self, secret: int, **row) -> None:
        """Thinks of the row's number."""
        self._secret, self.guesses, self.found = int(secret), 0, False

    def guess(self, number: int) -> str:
        """Says whether the number is higher or lower than a guess.

        Args:
            number: The guess.

        Returns:
            "right", "higher" or "lower".
        """
        self.guesses += 1
        self.found = self.found or int(number) == self._secret
        if int(number) == self._secret:
            return "right"
        return "higher" if int(number) < self._secret else "lower"

    def get_reward(self) -> float:
        """The share of the guesses that are left, the last one included; 0 without success."""
        if not self.found or self.guesses > self.MAX_GUESSES:
            return 0.0
        return (self.MAX_GUESSES + 1 - self.guesses) / self.MAX_GUESSES
