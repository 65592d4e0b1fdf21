"""Intervals of a step time: within which factors of a prediction four of five runs were that no fit had seen.

``specs/bands.toml`` holds the factors by what is known of a case: the same engine on the same device, with or without
experts; the engine on another device; an engine that nothing was fitted on. ``autopar.validate.bands`` fits them.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path

from costmodels.records import from_plain, read_toml


@dataclass(frozen=True, kw_only=True, slots=True)
class Band:
    """An interval in seconds."""

    low: float
    high: float


@dataclass(frozen=True, kw_only=True, slots=True)
class BandRule:
    """Factors for the cases that match; an empty field matches all.

    Attributes:
        stack: engine, without its variants.
        device: name.
        experts: whether the model has experts; None for both.
        low, high: factors of the prediction.
        rows: left-out runs behind them.
        origin: which.
    """

    low: float
    high: float
    rows: int
    origin: str
    stack: str = ""
    device: str = ""
    experts: bool | None = None

    def matches(self, stack: str, device: str, experts: bool) -> bool:
        """Whether the rule is for such a case."""
        return (
            self.stack in ("", stack) and self.device in ("", device) and self.experts in (None, experts)
        )  # fmt: skip

    def around(self, prediction: float) -> Band:
        """The interval around a prediction."""
        return Band(low=self.low * prediction, high=self.high * prediction)


@dataclass(frozen=True, kw_only=True, slots=True)
class Bands:
    """Rules, the narrowest first; the last one matches everything."""

    band: tuple[BandRule, ...]

    def rule_of(self, stack: str, device: str, experts: bool) -> BandRule:
        """The first rule that matches an engine, named with variants or without, on a device."""
        name = stack.split("+")[0]
        return next((rule for rule in self.band if rule.matches(name, device, experts)), UNKNOWN)


UNKNOWN = BandRule(low=0.75, high=1.35, rows=0, origin="assumed: no bands were fitted")


def bands_file() -> Path:
    """The file that ships."""
    return Path(str(resources.files("costmodels"))) / "specs" / "bands.toml"


@cache
def load_bands(path: Path | None = None) -> Bands:
    """Read rules, the shipped ones by default."""
    where = path or bands_file()
    return from_plain(Bands, read_toml(where), str(where)) if where.exists() else Bands(band=(UNKNOWN,))
