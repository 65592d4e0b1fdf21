"""Planning answers fast: torch, which takes seconds to import, stays out of it."""

from __future__ import annotations

import subprocess
import sys

import pytest

PLANNING = (
    "autopar", "autopar.plan", "autopar.graph", "autopar.layout", "autopar.workload", "autopar.shard",
    "autopar.model.build", "autopar.model.presets", "autopar.model.huggingface", "costmodels",
)  # fmt: skip


def imported(statement: str) -> set[str]:
    """Modules that a fresh interpreter holds after a statement."""
    code = f"import sys\n{statement}\nprint(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_planning_does_not_import_torch() -> None:
    modules = imported("import " + ", ".join(PLANNING))
    assert set(PLANNING) <= modules
    assert "torch" not in modules


def test_capture_is_imported_when_it_is_asked_for() -> None:
    """The negative control: the same check sees torch once capture is touched."""
    assert "torch" in imported("import autopar\nautopar.capture")


def test_an_unknown_name_is_an_attribute_error() -> None:
    import autopar

    with pytest.raises(AttributeError, match="captur"):
        _ = autopar.captur
