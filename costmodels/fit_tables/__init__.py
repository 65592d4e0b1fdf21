"""Constants of devices and links fitted anew to the published tables that ship with the program.

``fit_tables()`` redoes every such fit: values, rows, error on the rows and on rows left out. Levels that published
training runs set (``peak_fraction`` of products, ``slowdown`` of links) are not taken from here; their origins say so.
"""

from __future__ import annotations

from costmodels.fit_tables.attention import fit_attention
from costmodels.fit_tables.links import fit_link_tables
from costmodels.fit_tables.products import fit_products
from costmodels.fit_tables.solve import TableFit

__all__ = ["TableFit", "fit_attention", "fit_link_tables", "fit_products", "fit_tables"]


def fit_tables() -> tuple[TableFit, ...]:
    """All fits; a few seconds."""
    return (*fit_products(), *fit_attention(), *fit_link_tables())
