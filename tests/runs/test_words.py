"""Words for networks and pipeline layouts."""

import pytest

from autopar.runs.networks import Network, parse_network
from autopar.runs.reading import CannotRead
from autopar.runs.stages import expand_layout

GBPS = 1e9 / 8


@pytest.mark.parametrize(
    ("text", "per_node", "fabric", "gbits"),
    [
        ("NVLink + 4x100Gb RoCE per node", 8, "roce", 50),
        ("1600 Gbps/node RoCE", 8, "roce", 200),
        ("NVSwitch + 800 Gb/s per node (config)", 8, "infiniband", 100),
        ("NVLink + 400 Gb/s RDMA per GPU (Grand Teton)", 8, "roce", 400),
        ("NVSwitch + 8x200Gb HDR IB per node (Selene)", 8, "infiniband", 200),
        ("NVLink4 + IB NDR (DGX)", 8, "infiniband", 400),
        ("NVSwitch + HDR IB", 16, "infiniband", 100),
        ("NVLink + 25 Gb/s TCP (p3.16xlarge)", 8, "ethernet", 3.125),
        ("NVLink + 4x100Gb/s OmniPath per node (Jean Zay)", 8, "omnipath", 50),
        ("3.2 Tbps EFA", 8, "efa", 400),
        ("8x400G RoCE", 8, "roce", 400),
        ("50 GB/s per GPU InfiniBand", 8, "infiniband", 400),
        ("4xEDR", 8, "infiniband", 50),
        ("HDR100 InfiniBand", 4, "infiniband", 100),
        ("Selene", 8, "infiniband", 200),
        ("100 GbE", 8, "ethernet", 12.5),
    ],
)
def test_networks(text: str, per_node: int, fabric: str, gbits: float) -> None:
    found, _ = parse_network(text, per_node)
    assert found == Network(fabric=fabric, bandwidth=pytest.approx(gbits * GBPS))


@pytest.mark.parametrize("text", ["", "NVLink", "NVL72 NVLink5 + IB", "NVLink 400GB/s (A800)", "NVSwitch (150 GB/s)"])
def test_words_that_say_nothing_of_the_network(text: str) -> None:
    assert parse_network(text, 8) == (None, ())


def test_layouts_expand() -> None:
    assert expand_layout("Et*2|(t|)*2tmL") == ("Ett", "t", "t", "tmL")
    assert expand_layout("Et*4|(t*4|)*14tmL") == ("Etttt", *["tttt"] * 14, "tmL")
    assert expand_layout("Et*3|(tt|)*6mL") == ("Ettt", *["tt"] * 6, "mL")
    with pytest.raises(CannotRead, match="cannot be read at"):
        expand_layout("Et*2|[t]")
