"""The environments of the embedded tasks, written as those of a user are."""


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
    """A number is to be found in a few guesses. The reward is the share of guesses not needed.

    Attributes:
      guesses: guesses so far.
      found: whether one was right.
    """

    MOST_GUESSES = 8

    def reset(self, secret: int, **row) -> None:
        """Takes the number of the row."""
        self._secret = secret
        self.guesses, self.found = 0, False

    def guess(self, number: int) -> str:
        """Tells whether the number that is looked for is higher or lower than a guess.

        Args:
            number: The guess.

        Returns:
            "higher", "lower" or "right".
        """
        if self.found or self.guesses >= self.MOST_GUESSES:
            raise ValueError("the game is over")
        self.guesses += 1
        self.found = int(number) == self._secret
        return "right" if self.found else "higher" if int(number) < self._secret else "lower"

    def get_reward(self) -> float:
        """1 for a right first guess, 0 where no guess was right."""
        return (self.MOST_GUESSES - self.guesses + 1) / self.MOST_GUESSES if self.found else 0.0
