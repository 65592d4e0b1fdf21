"""Errors that a user can cause, worded for that user: what is wrong, which value, what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class InputError(ValueError):
    """Input from outside (file, command line, argument) that cannot be used. Never one of our own bugs."""


def nearest(word: str, known: Iterable[str]) -> str:
    """Return a hint such as ``; did you mean 'h100'?`` or the list of what is known."""
    options = sorted(known)
    close = difflib.get_close_matches(word.lower(), [option.lower() for option in options], n=1, cutoff=0.5)
    if close:
        match = next(option for option in options if option.lower() == close[0])
        return f"; did you mean '{match}'?"
    return f"; known: {', '.join(options)}"
