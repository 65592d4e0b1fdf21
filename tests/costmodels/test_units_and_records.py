from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

import pytest

from costmodels.errors import InputError, nearest
from costmodels.records import from_plain, read_json, read_record, to_plain, write_record
from costmodels.units import format_bytes, format_seconds, parse_bandwidth, parse_bytes


class Colour(StrEnum):
    RED = "red"


@dataclass(frozen=True, kw_only=True, slots=True)
class Inner:
    size: int
    share: float = 0.5


@dataclass(frozen=True, kw_only=True, slots=True)
class Outer:
    name: str
    inner: Inner
    colour: Colour = Colour.RED
    numbers: tuple[float, ...] = ()
    table: Mapping[str, int] = field(default_factory=dict)
    maybe: Inner | None = None


def test_bits_and_bytes_are_told_apart() -> None:
    assert parse_bandwidth("200mbit") == 25e6
    assert parse_bandwidth("25 Gbit/s") == 3.125e9
    assert parse_bandwidth("450GB/s") == 450e9
    assert parse_bytes("4KiB") == 4096
    assert parse_bytes("4KB") == 4000


@pytest.mark.parametrize("text", ["", "fast", "10", "10 parsecs", "1.2.3GB/s", "-5GB/s"])
def test_nonsense_is_refused(text: str) -> None:
    with pytest.raises(InputError):
        parse_bandwidth(text)


def test_formats() -> None:
    assert format_seconds(0.0123) == "12.3 ms"
    assert format_seconds(3.2e-5) == "32 us"
    assert format_bytes(1.5 * 2**30) == "1.50 GiB"


def test_record_round_trip(tmp_path) -> None:
    record = Outer(name="a", inner=Inner(size=3), numbers=(1.0, 2.0), table={"x": 1}, maybe=Inner(size=1, share=1.0))
    assert from_plain(Outer, json.loads(json.dumps(to_plain(record))), "memory") == record
    write_record(tmp_path / "r.json", record, 1)
    assert read_record(Outer, tmp_path / "r.json", 1) == record


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"name": "a", "inner": {"size": 1}, "colur": "red"}, "unknown key 'colur'; did you mean 'colour'"),
        ({"name": "a"}, "key 'inner' is missing"),
        ({"name": 5, "inner": {"size": 1}}, "expected str, found 5"),
        ({"name": "a", "inner": {"size": "big"}}, "inner: size: expected int, found 'big'"),
        ({"name": "a", "inner": {"size": True}}, "expected int, found True"),
        ({"name": "a", "inner": {"size": 1}, "colour": "rde"}, "unknown value 'rde'; did you mean 'red'"),
        ({"name": "a", "inner": {"size": 1}, "numbers": 3}, "expected a list"),
    ],
)
def test_wrong_data_is_one_clear_message(data, message) -> None:
    with pytest.raises(InputError, match=message.replace("(", r"\(")):
        from_plain(Outer, data, "x.toml")


def test_missing_and_torn_files(tmp_path) -> None:
    with pytest.raises(InputError, match="no such file"):
        read_json(tmp_path / "absent.json")
    (tmp_path / "torn.json").write_text('{"schema_version": 1, "na')
    with pytest.raises(InputError, match="not valid JSON .line 1.*torn"):
        read_json(tmp_path / "torn.json")
    (tmp_path / "old.json").write_text('{"schema_version": 0}')
    with pytest.raises(InputError, match="schema_version is 0, this program reads 1"):
        read_record(Outer, tmp_path / "old.json", 1)


def test_a_failed_write_leaves_the_old_file(tmp_path) -> None:
    target = tmp_path / "r.json"
    write_record(target, Inner(size=1), 1)
    with pytest.raises(TypeError):
        write_record(target, Inner(size=object()), 1)  # type: ignore[arg-type]
    assert read_record(Inner, target, 1) == Inner(size=1)
    assert [path.name for path in tmp_path.iterdir()] == ["r.json"]


def test_nearest_names() -> None:
    assert "did you mean 'h100'" in nearest("h10", ["h100", "v100", "a100-40g"])
    assert "known: a, b" in nearest("zzz", ["b", "a"])
