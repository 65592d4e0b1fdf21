"""What reading a run found: values with the assumptions that they rest on, or why a run cannot be read."""

from __future__ import annotations

import re
from typing import TypeAlias, TypeVar

from autopar.errors import InputError

Value = TypeVar("Value")
Read: TypeAlias = tuple[Value, tuple[str, ...]]
"""A value and the assumptions behind it."""


class CannotRead(InputError):
    """A run that the program cannot represent. The message is the reason."""


def find_int(text: str, *patterns: str) -> int | None:
    """The first group of the first pattern that occurs, as a whole number."""
    for pattern in patterns:
        match = re.search(pattern, text)
        if match:
            return int(match[1])
    return None


def has(text: str, pattern: str) -> bool:
    """Whether a regular expression occurs."""
    return re.search(pattern, text) is not None
