"""The error that stops a run because of a reward."""


class RewardError(ValueError):
    """A reward function failed, or gave something that is no reward.

    Attributes:
      function: the function's name.
      path: the file it came from; None for a built-in.
      sample: the offending completion with its columns, `{"completion": str, "columns": dict,
        "index": int}`, for the loop to save; None where no single sample is to blame.
      traceback_text: the traceback inside the function, "" where it did not raise.
      nonfinite: whether it gave a number that is not finite.
    """

    def __init__(
        self,
        message: str,
        *,
        function: str = "",  # has a default so that the error can be pickled
        path: str | None = None,
        sample: dict | None = None,
        traceback_text: str = "",
        nonfinite: bool = False,
    ):
        self.function = function
        self.path = path
        self.sample = sample
        self.traceback_text = traceback_text
        self.nonfinite = nonfinite
        where = f"{function} ({path})" if path else function
        super().__init__(
            f"reward function {where}: {message}"
            + (f"\n{traceback_text}" if traceback_text else "")
        )
