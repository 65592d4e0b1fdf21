"""Batches of real text: the same for every layout."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from autopar.runtime.data.text import Corpus, standard_library


def test_shares_make_up_the_global_batch() -> None:
    corpus = standard_library(32)
    for shares in (1, 2, 4):
        parts = [corpus.share(5, 16, index, shares) for index in range(shares)]
        assert torch.equal(torch.cat(parts), corpus.global_batch(5, 16))
    assert not torch.equal(corpus.global_batch(5, 16), corpus.global_batch(6, 16))


def test_samples_are_text_and_differ() -> None:
    corpus = standard_library(64)
    batch = corpus.global_batch(0, 200)
    assert batch.shape == (200, 65) and batch.dtype == torch.int64
    assert len({tuple(row) for row in batch.tolist()}) == 200
    assert bytes(corpus.data[:200]).isascii() and corpus.data.size > 1_000_000
    assert b"import " in bytes(corpus.data)


@pytest.mark.parametrize("size", [10, 97, 1000])
def test_every_offset_is_inside(size: int) -> None:
    corpus = Corpus(data=np.arange(size, dtype=np.uint8), seq_len=8)
    batch = corpus.global_batch(3, 50)
    following = (batch[:, :-1] + 1) % 256
    assert torch.equal(batch[:, 1:], following)
