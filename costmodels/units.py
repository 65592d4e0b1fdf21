"""The only place that converts units. Inside: seconds, bytes, FLOP, FLOP/s, bytes/s as plain numbers.

Memory is shown in GiB (2**30), links in GB/s (1e9), as the field does.
"""

from __future__ import annotations

import re

from costmodels.errors import InputError

KIB, MIB, GIB = 2**10, 2**20, 2**30
KB, MB, GB, TB = 1e3, 1e6, 1e9, 1e12
TFLOPS = 1e12

_BYTES = {
    "b": 1.0,
    "kb": 1e3, "mb": 1e6, "gb": 1e9, "tb": 1e12,
    "kib": 2.0**10, "mib": 2.0**20, "gib": 2.0**30, "tib": 2.0**40,
}  # fmt: skip
_BITS = {"bit": 1.0, "kbit": 1e3, "mbit": 1e6, "gbit": 1e9, "tbit": 1e12}
_QUANTITY = re.compile(r"\s*([0-9.]+(?:e[+-]?[0-9]+)?)\s*([a-z]+)(/s|ps)?\s*", re.IGNORECASE)


def parse_bytes(text: str) -> float:
    """Parse a size such as ``80 GiB`` or ``4MB`` into bytes. Raises InputError."""
    number, unit = _parse(text)
    if unit not in _BYTES:
        raise InputError(f"'{text}' is not a size: use a number with B, KB, MB, GB, KiB, MiB or GiB")
    return number * _BYTES[unit]


def parse_bandwidth(text: str) -> float:
    """Parse ``450 GB/s`` or ``200mbit`` into bytes/s. Bits and bytes are told apart by the unit. Raises InputError."""
    number, unit = _parse(text)
    if unit in _BITS:
        return number * _BITS[unit] / 8
    if unit in _BYTES:
        return number * _BYTES[unit]
    raise InputError(f"'{text}' is not a bandwidth: use for example 450GB/s, 25Gbit/s or 200mbit")


def _parse(text: str) -> tuple[float, str]:
    match = _QUANTITY.fullmatch(text)
    if not match:
        raise InputError(f"'{text}' is not a number with a unit, such as 80GiB or 200mbit")
    try:
        return float(match[1]), match[2].lower()
    except ValueError:
        raise InputError(f"'{text}' is not a number with a unit, such as 80GiB or 200mbit") from None


def format_seconds(seconds: float) -> str:
    """Format a duration with three significant digits: ``12.3 ms``."""
    for scale, unit in ((1.0, "s"), (1e-3, "ms"), (1e-6, "us")):
        if abs(seconds) >= scale:
            return f"{seconds / scale:.3g} {unit}" if seconds / scale < 1000 else f"{seconds / scale:.0f} {unit}"
    return f"{seconds * 1e9:.3g} ns" if seconds else "0 s"


def format_bytes(num_bytes: float) -> str:
    """Format a size in binary units: ``1.50 GiB``."""
    for scale, unit in ((GIB, "GiB"), (MIB, "MiB"), (KIB, "KiB")):
        if abs(num_bytes) >= scale:
            return f"{num_bytes / scale:.2f} {unit}"
    return f"{num_bytes:.0f} B"


def format_rate(bytes_per_s: float) -> str:
    """Format a bandwidth as links are named: ``450 GB/s``, ``12.5 MB/s``."""
    scale, unit = (GB, "GB/s") if abs(bytes_per_s) >= GB else (MB, "MB/s")
    return (
        f"{bytes_per_s / scale:.3g} {unit}" if abs(bytes_per_s) < 1000 * scale else f"{bytes_per_s / scale:.0f} {unit}"
    )


def format_count(number: float) -> str:
    """Format a count: ``70.6B``, ``14.2M``, ``384``."""
    for scale, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if abs(number) >= scale:
            return f"{number / scale:.3g}{unit}"
    return f"{number:.0f}"
