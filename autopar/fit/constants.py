"""Which numbers of the specifications are fitted: ``specs/fitted.toml``, one table ``[[constant]]`` each."""

from __future__ import annotations

import math
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from importlib import resources
from pathlib import Path

from autopar.errors import InputError
from costmodels.records import from_plain, read_toml
from costmodels.shipped import SpecPath


class Quantity(StrEnum):
    """What a constant is fitted on."""

    TIME = "time"
    MEMORY = "memory"


@dataclass(frozen=True, kw_only=True, slots=True)
class Constant:
    """One free number.

    Attributes:
        name: path of the number in the specifications, ``devices.h100.matmul.peak_fraction``; keys with dots in them
            are quoted as in TOML.
        also: further places that hold the same number.
        start: what is believed before any run is seen; the centre of the prior. Above 0.
        low, high: bounds.
        prior_sigma: standard deviation of log(value / start) under the prior.
        sources: of the runs that it is fitted on; empty means all. Others are priced with it and do not move it.
        quantity: fitted on step times or on memory.
        why: what the number stands for and why it is free.
    """

    name: str
    start: float
    low: float
    high: float
    prior_sigma: float
    why: str
    also: tuple[str, ...] = ()
    sources: tuple[str, ...] = ()
    quantity: Quantity = Quantity.TIME

    def __post_init__(self) -> None:
        if not 0 < self.low <= self.start <= self.high:
            raise InputError(
                f"constant {self.name}: start={self.start} must lie between low={self.low} and high={self.high}, "
                "and low above 0"
            )
        if not self.prior_sigma > 0:
            raise InputError(f"constant {self.name}: prior_sigma is {self.prior_sigma}; it must be above 0")
        for path in self.paths:
            if len(path) < 3 or path[0] not in ("devices", "fabrics", "stacks"):
                raise InputError(
                    f"constant {self.name}: {'.'.join(path)} is no path such as devices.h100.matmul.peak_fraction"
                )

    @property
    def paths(self) -> tuple[SpecPath, ...]:
        """Every place of the number."""
        return tuple(parse_path(text) for text in (self.name, *self.also))

    @property
    def bounds(self) -> tuple[float, float]:
        """Bounds of log(value / start)."""
        return math.log(self.low / self.start), math.log(self.high / self.start)

    def applies_to(self, source: str) -> bool:
        """Whether runs of a source may move it."""
        return not self.sources or source in self.sources


@dataclass(frozen=True, kw_only=True, slots=True)
class _File:
    constant: tuple[Constant, ...]


def parse_path(text: str) -> SpecPath:
    """Split a dotted path as TOML does: ``a.b."c.d"`` has three keys. Raises InputError."""
    try:
        place: object = tomllib.loads(f"{text} = 0")
    except tomllib.TOMLDecodeError:
        raise InputError(f"'{text}' is not a dotted path of keys") from None
    keys: list[str] = []
    while isinstance(place, Mapping):
        [(key, place)] = place.items()
        keys.append(key)
    return tuple(keys)


def constants_file() -> Path:
    """The file that ships."""
    return Path(str(resources.files("costmodels") / "specs" / "fitted.toml"))


def read_constants(path: str | Path | None = None) -> tuple[Constant, ...]:
    """Read constants from a file, the shipped one by default. Raises InputError, also for a place named twice."""
    where = path or constants_file()
    found = from_plain(_File, read_toml(where), str(where)).constant
    places = [place for constant in found for place in constant.paths]
    twice = sorted({".".join(place) for place in places if places.count(place) > 1})
    if twice:
        raise InputError(f"{where}: named more than once: {', '.join(twice)}")
    return found


def spec_values(constants: tuple[Constant, ...], values: Mapping[str, float]) -> dict[SpecPath, float]:
    """Values by constant's name as numbers at their places."""
    return {path: values[c.name] for c in constants if c.name in values for path in c.paths}
