"""Text to tokens, tokens to samples, samples to batches: nothing lost, nothing twice, the same under every layout."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from autopar.errors import InputError
from autopar.runtime.data.corpus import measured_rows, training_samples
from autopar.runtime.data.feed import Feed
from autopar.runtime.data.files import find_files
from autopar.runtime.data.order import permuted
from autopar.runtime.data.samples import Samples, split
from autopar.runtime.data.tokenizer import END_OF_TEXT, Bytes, load_tokenizer, train_tokenizer
from autopar.runtime.data.tokens import check_tokens, open_tokens, read_header, write_tokens

TEXT = "the quick brown fox jumps over the lazy dog\n" * 40


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    folder = tmp_path / "texts"
    (folder / "deep").mkdir(parents=True)
    (folder / "b.txt").write_text(TEXT)
    (folder / "a.txt").write_text("first")
    (folder / "deep" / "c.md").write_text("third: \u00e9")
    (folder / ".hidden").write_text("never")
    return folder


def test_files_of_a_folder_a_pattern_and_a_name(texts: Path) -> None:
    def names(*patterns: str) -> list[str]:
        return [path.name for path in find_files(patterns)]

    assert names(str(texts)) == ["a.txt", "b.txt", "c.md"]
    assert names(f"{texts}/*.txt") == ["a.txt", "b.txt"]
    assert names(f"{texts}/**/*.md") == ["c.md"]
    assert names(f"{texts}/b.txt", str(texts)) == ["b.txt", "a.txt", "c.md"]
    with pytest.raises(InputError, match=r"nothing\*: no such file"):
        names(f"{texts}/nothing*")


def test_bytes_come_back(texts: Path, tmp_path: Path) -> None:
    files = find_files([str(texts)])
    header = write_tokens(files, Bytes(), tmp_path / "tokens", None)
    assert bytes(open_tokens(tmp_path / "tokens")) == b"".join(path.read_bytes() for path in files)
    assert (header.vocab_size, header.dtype, header.num_tokens) == (256, "uint8", sum(f.stat().st_size for f in files))
    assert check_tokens(tmp_path / "tokens") == header == read_header(tmp_path / "tokens")


def test_tokens_are_made_once_and_anew_when_a_file_changes(texts: Path, tmp_path: Path) -> None:
    files, folder = find_files([str(texts)]), tmp_path / "tokens"
    write_tokens(files, Bytes(), folder, None)
    stamp = (folder / "tokens.bin").stat().st_mtime_ns
    write_tokens(files, Bytes(), folder, None)
    assert (folder / "tokens.bin").stat().st_mtime_ns == stamp
    (texts / "a.txt").write_text("another")
    assert write_tokens(files, Bytes(), folder, None).num_tokens == sum(f.stat().st_size for f in files)


def test_torn_and_altered_tokens_are_told(texts: Path, tmp_path: Path) -> None:
    folder = tmp_path / "tokens"
    write_tokens(find_files([str(texts)]), Bytes(), folder, None)
    content = (folder / "tokens.bin").read_bytes()
    (folder / "tokens.bin").write_bytes(b"X" + content[1:])
    with pytest.raises(InputError, match="not what its header was written for"):
        check_tokens(folder)
    (folder / "tokens.bin").write_bytes(content[:-1])
    with pytest.raises(InputError, match="bytes, not the"):
        open_tokens(folder)
    header = json.loads((folder / "tokens.json").read_text())
    (folder / "tokens.json").write_text(json.dumps(header | {"dtype": "object"}))
    with pytest.raises(InputError, match="dtype 'object'"):
        open_tokens(folder)


def test_a_learned_tokenizer(texts: Path, tmp_path: Path) -> None:
    pytest.importorskip("tokenizers")
    files, file = find_files([str(texts)]), tmp_path / "own" / "tokenizer.json"
    train_tokenizer(files, 300, file)
    tokenizer = load_tokenizer(str(file))
    assert 257 < tokenizer.vocab_size <= 300
    header = write_tokens(files, tokenizer, tmp_path / "tokens", file)
    tokens = open_tokens(tmp_path / "tokens")
    assert header.dtype == "uint16" and int(tokens.max()) < header.vocab_size
    assert list(np.flatnonzero(tokens == tokenizer.separator))[-1] == tokens.size - 1
    assert (tokens == tokenizer.separator).sum() == len(files)
    decoded = tokenizer.inner.decode(tokens.tolist(), skip_special_tokens=False)  # type: ignore[attr-defined]
    assert decoded == "".join(path.read_text() + END_OF_TEXT for path in files)
    assert load_tokenizer(str(tmp_path / "tokens")).sha256 == tokenizer.sha256
    with pytest.raises(InputError, match="alone take 257"):
        train_tokenizer(files, 256, file)


def test_bad_tokenizers_and_texts(tmp_path: Path) -> None:
    pytest.importorskip("tokenizers")
    with pytest.raises(InputError, match="no such file"):
        load_tokenizer(str(tmp_path / "none.json"))
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(InputError, match=r"not a tokenizer\.json"):
        load_tokenizer(str(tmp_path / "bad.json"))
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    (tmp_path / "good.txt").write_text(TEXT)
    train_tokenizer([tmp_path / "good.txt"], 260, tmp_path / "tokenizer.json")
    with pytest.raises(InputError, match="not UTF-8"):
        write_tokens([tmp_path / "latin.txt"], load_tokenizer(str(tmp_path)), tmp_path / "t", None)
    (tmp_path / "empty.txt").touch()
    with pytest.raises(InputError, match="no text"):
        write_tokens([tmp_path / "empty.txt"], Bytes(), tmp_path / "t", None)


@pytest.mark.parametrize("size", [1, 2, 3, 5, 64, 1000, 4097])
def test_the_order_is_a_permutation(size: int) -> None:
    found = permuted(np.arange(size), size, seed=3, epoch=0)
    assert sorted(found.tolist()) == list(range(size))
    assert found.tolist() == [int(permuted(i, size, seed=3, epoch=0)) for i in range(size)]
    if size > 50:
        others = [permuted(np.arange(size), size, seed=s, epoch=e) for s, e in ((4, 0), (3, 1))]
        assert all((found != other).mean() > 0.9 for other in others)
        assert (found != np.arange(size)).mean() > 0.9


def test_the_order_is_even() -> None:
    """Where neighbours go is uncorrelated: the mean distance of random places is a third of the size."""
    size = 10_000
    found = permuted(np.arange(size), size, seed=0, epoch=0)
    assert abs(np.abs(np.diff(found)).mean() / size - 1 / 3) < 0.01


def test_an_epoch_has_every_sequence_once() -> None:
    samples = Samples(tokens=np.arange(103, dtype=np.uint8), seq_len=10, seed=1)
    assert samples.num_sequences == 10  # tokens 101 and 102 are the ragged tail
    epoch = samples.rows(0, 10)
    assert sorted(epoch[:, 0].tolist()) == list(range(0, 100, 10))
    assert (epoch == epoch[:, :1] + np.arange(11)).all() and epoch.dtype == np.int64
    assert sorted(samples.sequences(10, 10)) == list(range(10)) != samples.sequences(10, 10)
    across = samples.sequences(5, 10)
    assert across == samples.sequences(5, 5) + samples.sequences(10, 5)


def test_splits_share_no_token() -> None:
    training, held_out = split(np.arange(200), 10, validation=0.25, validation_sequences=4, seed=0)
    assert training.tokens.tolist() == list(range(150)) and held_out.tokens.tolist() == list(range(150, 200))
    assert held_out.sequences(0, 6) == [0, 1, 2, 3, 0, 1]
    everything, none = split(np.arange(200), 10, validation=0.25, validation_sequences=0, seed=0)
    assert everything.tokens.size == 200 and none.num_sequences == 0
    with pytest.raises(InputError, match="make 4 sequences of 10, but one evaluation takes 5"):
        split(np.arange(200), 10, validation=0.25, validation_sequences=5, seed=0)
    with pytest.raises(InputError, match="10 tokens of training text are too few for a sequence of 10"):
        split(np.arange(10), 10, validation=0.0, validation_sequences=0, seed=0)


def feed_of(samples: Samples, share: int, num_shares: int, first: int = 0) -> Feed:
    return Feed(
        samples.rows, first_sample=first, global_batch=8, share=share, num_shares=num_shares, device=torch.device("cpu")
    )


def test_shares_make_up_the_global_batch_and_a_feed_goes_on_anywhere() -> None:
    samples = Samples(tokens=np.arange(1000) % 251, seq_len=16, seed=5)
    with feed_of(samples, 0, 1) as whole:
        batches = [whole.take() for _ in range(12)]
        assert whole.next_sample == 96
    for num_shares in (2, 4):
        feeds = [feed_of(samples, share, num_shares) for share in range(num_shares)]
        for batch in batches[:4]:
            assert torch.equal(torch.cat([feed.take() for feed in feeds]), batch)
        for feed in feeds:
            feed.__exit__(None, None, None)
    with feed_of(samples, 0, 1, first=64) as later:
        assert torch.equal(later.take(), batches[8])


def test_a_feed_passes_errors_on() -> None:
    def rows(start: int, count: int) -> np.ndarray:
        raise InputError("torn")

    feed = Feed(rows, first_sample=0, global_batch=2, share=0, num_shares=1, device=torch.device("cpu"))
    with feed, pytest.raises(InputError, match="torn"):
        feed.take()


def test_sources_of_a_job(texts: Path, tmp_path: Path) -> None:
    write_tokens(find_files([str(texts)]), Bytes(), tmp_path / "tokens", None)
    rows = measured_rows(str(tmp_path / "tokens"), 8, seed=0)(0, 3)
    training, _ = training_samples(str(tmp_path / "tokens"), 8, validation=0.1, validation_sequences=0, seed=0)
    assert rows.shape == (3, 9) and (rows == training.rows(0, 3)).all()
    assert measured_rows("", 8, seed=0)(0, 3).shape == (3, 9)
