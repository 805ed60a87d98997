"""How deeply values lie in values: what is too deep can be neither pickled nor written as JSON."""

from typing import Any


def nests_deeper(value: Any, most: int) -> bool:
    """Whether more than `most` dicts and lists lie in each other."""
    level = [value]
    for _ in range(most + 1):
        level = [v for v in level if isinstance(v, dict | list | tuple)]
        if not level:
            return False
        level = [
            v for outer in level for v in (outer.values() if isinstance(outer, dict) else outer)
        ]
    return True
