"""The fields of a request's JSON body, each of the type and within the bounds it must have."""

import json
from collections.abc import Callable
from typing import Any

# Objects and lists inside each other: more than a tool's schema has, and well below the thousand at
# which Python's own functions give up.
MAX_DEPTH = 100


class ApiError(Exception):
    """A refusal in OpenAI's form.

    Attributes:
      status: of HTTP.
      param: the field at fault; None for the whole request.
      code: a word for programs; None for none.
    """

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        param: str | None = None,
        code: str | None = None,
        kind: str = "invalid_request_error",
    ):
        super().__init__(message)
        self.message, self.status = message, status
        self.param, self.code, self.kind = param, code, kind

    def body(self) -> dict[str, Any]:
        error = {"message": self.message, "type": self.kind}
        return {"error": error | {"param": self.param, "code": self.code}}


def parse_object(body: bytes) -> dict[str, Any]:
    """A JSON object.

    Raises:
      ApiError: for anything else, for text that is not UTF-8, and for one that is too deep.
    """
    try:
        # Halves of characters are told apart from other bytes below.
        text = body.decode("utf-8-sig", "surrogatepass")
        value = json.loads(text)
        is_too_deep = is_deeper(value, MAX_DEPTH)
    except RecursionError:
        is_too_deep = True
    except ValueError as error:  # bad UTF-8 and endless numbers too
        raise ApiError(f"the body is no valid JSON in UTF-8: {str(error)[:200]}") from None
    if is_too_deep:
        raise ApiError(f"the body is nested too deeply: up to {MAX_DEPTH} levels are taken")
    if not isinstance(value, dict):
        raise ApiError("the body must be a JSON object")
    if b"\\ud" in body.lower() or b"\xed" in body:
        _refuse_halves(value)
    return value


def is_deeper(value: Any, most: int) -> bool:
    """Whether objects and lists lie inside each other at more levels than these."""
    level = [value]
    for _ in range(most + 1):
        level = [x for x in level if isinstance(x, dict | list)]
        if not level:
            return False
        level = [x for each in level for x in (each.values() if type(each) is dict else each)]
    return True


def _refuse_halves(value: dict[str, Any]) -> None:
    """Refuses halves of characters, escaped (\\ud83d) or as bytes, which no text can hold."""
    for name, content in value.items():
        try:
            json.dumps([name, content], ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            half = error.object[error.start]
            raise ApiError(
                f"half a character, \\u{ord(half):04x}: such escapes come in pairs",
                param=name if name.isprintable() else None,
            ) from None


def shown(value: Any) -> str:
    """A value in a message, not longer than it needs to be."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


class Fields:
    """The fields of a body, taken one by one; null is as good as absent."""

    def __init__(self, body: dict[str, Any]):
        self._left = {name: value for name, value in body.items() if value is not None}

    def take(self, name: str, default: Any = None) -> Any:
        """A field as it is."""
        return self._left.pop(name, default)

    def checked(self, name: str, default: Any, wanted: str, holds: Callable[[Any], bool]) -> Any:
        """A field for which `holds` is true.

        Raises:
          ApiError: naming the field, what was wanted and what was given.
        """
        if name not in self._left:
            return default
        value = self._left.pop(name)
        if not holds(value):
            raise ApiError(f"{name} must be {wanted}; given {shown(value)}", param=name)
        return value

    def integer(self, name: str, default: int | None, low: int, high: int) -> int | None:
        def holds(value):
            return type(value) is int and low <= value <= high

        return self.checked(name, default, f"an integer from {low} to {high}", holds)

    def number(self, name: str, default: float, low: float, high: float) -> float:
        def holds(value):
            return type(value) in (int, float) and low <= value <= high

        return float(self.checked(name, default, f"a number from {low} to {high}", holds))

    def boolean(self, name: str, default: bool = False) -> bool:
        return self.checked(name, default, "true or false", lambda value: type(value) is bool)

    def without_effect(self, name: str, *values: Any) -> None:
        """A field that may be there only with a value that asks for nothing.

        Raises:
          ApiError: for any value but null and those given.
        """
        if name not in self._left:
            return
        value = self._left.pop(name)
        if value not in values:
            neutral = " or ".join(["null", *(json.dumps(v) for v in values)])
            raise ApiError(
                f"{name} has no effect in this server: leave it out, or send {neutral}; given "
                f"{shown(value)}",
                param=name,
                code="unsupported_parameter",
            )

    def finish(self) -> None:
        """Refuses what nobody took."""
        if self._left:
            name = sorted(self._left)[0]
            raise ApiError(
                f"this server knows no field {shown(name)}: leave it out",
                param=str(name)[:80],
                code="unknown_parameter",
            )
