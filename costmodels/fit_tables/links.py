"""Collectives: rings and switches of NVLink, networks between nodes."""

from __future__ import annotations

from costmodels.fit_tables.solve import TableFit


def fit_link_tables() -> tuple[TableFit, ...]:
    """Placeholder."""
    return ()
