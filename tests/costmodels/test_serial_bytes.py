"""Bytes in series on a collective's longest path: gloo's tree and segments, and everything else as sent."""

import numpy as np
import pytest

from costmodels.collectives import KINDS, link_seconds, rounds, sent_bytes, serial_bytes
from costmodels.hardware import Link
from costmodels.stack import load_stack

GLOO = load_stack("autopar-gloo").algorithms
LINK = Link(name="link", bandwidth=25e6, latency=1e-3)


def tree_copies(num_ranks: int) -> int:
    """Brute force: rank r sends at once to all its children r + 2^j > r, 2^j > r; each child starts when it has all."""

    def finish(rank: int) -> int:
        children = [rank + 2**j for j in range(num_ranks.bit_length()) if 2**j > rank and rank + 2**j < num_ranks]
        return max((len(children) + finish(child) for child in children), default=0)

    return finish(0)


@pytest.mark.parametrize("num_ranks", [2, 4, 8, 16])
def test_tree_broadcast_matches_its_tree(num_ranks: int) -> None:
    depth = int(np.log2(num_ranks))
    assert float(serial_bytes("broadcast", num_ranks, 1.0, GLOO)) == tree_copies(num_ranks)
    assert float(sent_bytes("broadcast", num_ranks, 1.0, GLOO)) == depth
    assert float(rounds("broadcast", num_ranks, GLOO)) == depth


@pytest.mark.parametrize("num_ranks", [3, 5, 6, 7, 12])
def test_tree_of_other_sizes_is_an_upper_bound(num_ranks: int) -> None:
    assert float(serial_bytes("broadcast", num_ranks, 1.0, GLOO)) >= tree_copies(num_ranks)


def test_two_ranks_gather_in_three_segments_of_time() -> None:
    size = 4 * 2**20
    assert float(serial_bytes("all_gather", 2, size, GLOO)) == 3 * size / 4
    assert float(link_seconds("all_gather", 2, size, LINK, GLOO)) == pytest.approx(1e-3 + 0.75 * size / 25e6)
    assert float(serial_bytes("all_gather", 2, size, {})) == size / 2
    assert float(serial_bytes("all_gather", 4, size, GLOO)) == 3 * size / 4


@pytest.mark.parametrize("kind", KINDS)
def test_otherwise_what_is_sent(kind: str) -> None:
    ranks = np.array([2.0, 3.0, 4.0, 8.0])
    assert np.array_equal(serial_bytes(kind, ranks, 1e6, {}), sent_bytes(kind, ranks, 1e6, {}))
    assert np.all(serial_bytes(kind, ranks, 1e6, GLOO) >= sent_bytes(kind, ranks, 1e6, GLOO))
