"""Checkpoints on disk: pieces under any division, atomic, kept, and every kind of damage found; nothing is executed."""

from __future__ import annotations

import hashlib
import json
import math
import os
import pickle
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from torch import Tensor, nn

import autopar
from autopar.cli import run
from autopar.errors import EXIT_OK, EXIT_USAGE, InputError, RunError
from autopar.plan import parse_slug
from autopar.runtime.checkpoint import Checkpoints, Loaded
from autopar.runtime.checkpoint.contents import Content
from autopar.runtime.checkpoint.folder import saved_steps, step_path
from autopar.runtime.checkpoint.manifest import (
    WEIGHT,
    Manifest,
    StoredFile,
    StoredTensor,
    check_cover,
    file_name,
    read_manifest,
    write_manifest,
)
from autopar.runtime.checkpoint.random_state import source_of
from autopar.runtime.checkpoint.reading import Reader
from autopar.runtime.checkpoint.tensor_file import DTYPES, TensorToWrite, write_tensors
from autopar.runtime.checkpoint.writing import Part, merged, part_of, share_of, write_part
from autopar.runtime.parallel.holdings import Cut, Piece, Runs, number_copies, pieces_of
from autopar.runtime.parallel.parallel_model import ParallelModel

Made = tuple[ParallelModel, torch.optim.Optimizer]


def make(seed: int = 0, **changes: int) -> Made:
    torch.manual_seed(seed)
    width = changes.get("width", 40)
    module = nn.Sequential(nn.Linear(3, width), nn.BatchNorm1d(width), nn.Dropout(0.5), nn.Linear(width, 1))
    model = autopar.parallelize(module, parse_slug("mb4"), loss_fn=F.mse_loss, num_microbatches=1, device="cpu")
    return model, torch.optim.AdamW(model.parameter_groups(), lr=0.1)


def train(made: Made, step: int) -> float:
    generator = torch.Generator().manual_seed(step)
    loss = made[0].train_step(torch.randn(4, 3, generator=generator), torch.randn(4, 1, generator=generator))
    made[1].step()
    made[1].zero_grad()
    return loss.item()


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Path, Made]:
    """Three checkpoints of which two are kept, and the model as it was in the end."""
    made = make()
    checkpoints = Checkpoints(tmp_path / "run", keep=2)
    for step in (1, 2, 3):
        train(made, step)
        checkpoints.save(step, *made, {"position": 10 * step})
    return tmp_path / "run", made


def load(folder: Path) -> Loaded | None:
    return Checkpoints(folder).load_latest(*make(seed=5))


def test_resumed_losses_are_equal(tmp_path: Path) -> None:
    """Weights, moments, step counts, running means and the random numbers of dropout are as they were.

    Controls: without the moments, or without the random state, they are not.
    """
    made, checkpoints = make(), Checkpoints(tmp_path)
    for step in (1, 2):
        train(made, step)
    checkpoints.save(2, *made, {"position": [1, {"a": None}], "name": "x"})
    expected = [train(made, step) for step in (3, 4)]
    fresh = make(seed=5)
    loaded = Checkpoints(tmp_path).load_latest(*fresh)
    assert loaded is not None and loaded.step == 2 and loaded.state == {"position": [1, {"a": None}], "name": "x"}
    assert [train(fresh, step) for step in (3, 4)] == expected
    without = make(seed=5)
    assert Checkpoints(tmp_path).load_latest(without[0], None) is not None
    assert [train(without, step) for step in (3, 4)] != expected
    assert Checkpoints(tmp_path).load_latest(*fresh) is not None
    torch.manual_seed(0)
    assert [train(fresh, step) for step in (3, 4)] != expected


def test_nothing_to_load(tmp_path: Path) -> None:
    assert load(tmp_path) is None and load(tmp_path / "missing") is None


def test_two_are_kept_and_leftovers_removed(saved: tuple[Path, Made]) -> None:
    folder, made = saved
    assert sorted(path.name for path in folder.iterdir()) == ["step-00000002", "step-00000003"]
    (folder / ".tmp-step-00000009").mkdir()
    (folder / "notes.txt").write_text("mine")
    assert load(folder) is not None
    assert sorted(path.name for path in folder.iterdir()) == ["notes.txt", "step-00000002", "step-00000003"]
    (folder / ".tmp-step-00000009").mkdir()
    Checkpoints(folder, keep=1).save(4, *made, {})
    assert sorted(path.name for path in folder.iterdir()) == ["notes.txt", "step-00000004"]
    with pytest.raises(InputError, match="keep=0"):
        Checkpoints(folder, keep=0)


def test_a_torn_one_does_not_count_as_kept(saved: tuple[Path, Made]) -> None:
    folder, made = saved
    os.truncate(folder / "step-00000003" / file_name(0), 100)
    Checkpoints(folder, keep=2).save(4, *made, {})
    assert saved_steps(folder) == (2, 3, 4)
    # Going on from an earlier step, the later ones stay until their step comes again, and do not push out the new one.
    Checkpoints(folder, keep=1).save(2, *made, {"again": True})
    assert saved_steps(folder) == (2, 3, 4) and read_manifest(step_path(folder, 2)).state == {"again": True}
    Checkpoints(folder, keep=2).save(4, *made, {})
    assert saved_steps(folder) == (2, 3, 4)
    Checkpoints(folder, keep=2).save(5, *made, {})
    assert saved_steps(folder) == (4, 5)


class Bomb:
    """Pickled, it makes a file when it is read."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.target),)


def flip(path: Path, at: int = -5) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def swap(path: Path) -> None:
    """Exchange the files of two steps, which are equally long."""
    other = path.parent.with_name("step-00000002") / path.name
    content = other.read_bytes()
    shutil.copy(path, other)
    path.write_bytes(content)


def rewrite(path: Path) -> None:
    """Change what the manifest says, but not its hash."""
    path.write_text(path.read_text().replace('"position": 30', '"position": 31'))


TENSORS, MANIFEST, HASH = file_name(0), "manifest.json", "manifest.sha256"
DAMAGE: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "flipped byte": (TENSORS, flip, f"{TENSORS} was altered"),
    "flipped byte of the header": (TENSORS, lambda path: flip(path, 30), f"{TENSORS} was altered"),
    "truncated": (TENSORS, lambda path: os.truncate(path, 1000), f"{TENSORS} has 1000 bytes instead of"),
    "empty": (TENSORS, lambda path: os.truncate(path, 0), f"{TENSORS} has 0 bytes"),
    "missing": (TENSORS, Path.unlink, f"{TENSORS} cannot be read: No such file"),
    "manifest rewritten": (MANIFEST, rewrite, f"{MANIFEST} is not the one that was written"),
    "manifest torn": (MANIFEST, lambda path: os.truncate(path, 50), f"{MANIFEST} is not the one"),
    "manifest missing": (MANIFEST, Path.unlink, f"{MANIFEST} cannot be read"),
    "hash missing": (HASH, Path.unlink, f"{HASH} cannot be read"),
    "hash garbled": (HASH, lambda path: path.write_bytes(b"\xff\xfe"), f"{MANIFEST} is not the one"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_named_and_the_one_before_used(saved: tuple[Path, Made], name: str) -> None:
    file, break_it, message = DAMAGE[name]
    break_it(saved[0] / "step-00000003" / file)
    with pytest.warns(UserWarning, match="step-00000003 is not used"):
        loaded = load(saved[0])
    assert loaded is not None and loaded.step == 2 and loaded.state == {"position": 20}
    assert len(loaded.skipped) == 1 and message in loaded.skipped[0]


def test_swapped_files_are_found_in_both(saved: tuple[Path, Made]) -> None:
    swap(saved[0] / "step-00000003" / TENSORS)
    with pytest.warns(UserWarning), pytest.raises(InputError) as caught:
        load(saved[0])
    assert "has no whole checkpoint: step-00000003 is not used" in str(caught.value)
    assert "step-00000002 is not used" in str(caught.value)


@pytest.mark.parametrize("file", [TENSORS, MANIFEST, HASH])
def test_a_pickle_is_never_executed(saved: tuple[Path, Made], tmp_path: Path, file: str) -> None:
    target = tmp_path / "executed"
    attack = pickle.dumps(Bomb(target))
    pickle.loads(attack)
    assert target.is_dir(), "the attack itself must work, or this test shows nothing"
    target.rmdir()
    (saved[0] / "step-00000003" / file).write_bytes(attack)
    (saved[0] / "step-00000002" / "optimizer.pt").write_bytes(attack)
    with pytest.warns(UserWarning):
        loaded = load(saved[0])
    assert loaded is not None and loaded.step == 2 and not target.exists()


@pytest.mark.parametrize("file", [TENSORS, MANIFEST])
def test_a_pickle_with_the_right_hashes_is_not_executed_either(
    saved: tuple[Path, Made], tmp_path: Path, file: str
) -> None:
    """Whoever can write all files can forge all hashes: even then nothing runs."""
    target, path = tmp_path / "executed", saved[0] / "step-00000003"
    (path / file).write_bytes(pickle.dumps(Bomb(target)))
    if file == TENSORS:
        manifest = read_manifest(path)
        content = (path / TENSORS).read_bytes()
        forged = StoredFile(size=len(content), sha256=_sha256(content))
        fields = {name: getattr(manifest, name) for name in Manifest.__dataclass_fields__}
        write_manifest(path, Manifest(**{**fields, "files": (forged,)}))
    else:
        (path / HASH).write_text(f"{_sha256((path / MANIFEST).read_bytes())}  {MANIFEST}\n")
    with pytest.warns(UserWarning):
        loaded = load(saved[0])
    assert loaded is not None and loaded.step == 2 and not target.exists()


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def test_another_model_is_an_error_and_changes_nothing(saved: tuple[Path, Made]) -> None:
    other = make(width=41)
    before = [parameter.clone() for parameter in other[0].parameters()]
    with pytest.raises(InputError, match=r"has 0.weight as F32 \[40, 3\], but the model has it as F32 \[41, 3\]"):
        Checkpoints(saved[0]).load_latest(*other)
    assert all(torch.equal(a, b) for a, b in zip(before, other[0].parameters(), strict=True))
    model, _ = make()
    with pytest.raises(InputError, match="was trained with AdamW, but this run uses SGD"):
        Checkpoints(saved[0]).load_latest(model, torch.optim.SGD(model.parameters(), lr=0.1))
    small = nn.Sequential(nn.Linear(3, 40))
    fewer = autopar.parallelize(small, parse_slug("mb4"), loss_fn=F.mse_loss, num_microbatches=1, device="cpu")
    with pytest.raises(InputError, match=r"has 1.weight, which the model does not have"):
        Checkpoints(saved[0]).load_latest(fewer, None)


def test_what_cannot_be_saved(tmp_path: Path) -> None:
    model, adam = make()
    with pytest.raises(InputError, match="must be JSON"):
        Checkpoints(tmp_path).save(1, model, adam, {"a": torch.zeros(2)})
    factored = torch.optim.Adafactor(model.parameters(), lr=0.1)
    train((model, factored), 1)
    with pytest.raises(InputError, match="row_var of shape .* cannot be divided anew"):
        Checkpoints(tmp_path).save(1, model, factored, {})
    stranger = torch.optim.AdamW([nn.Parameter(torch.ones(2))])
    stranger.param_groups[0]["params"][0].grad = torch.ones(2)
    stranger.step()
    with pytest.raises(InputError, match=r"pass model.parameters\(\)"):
        Checkpoints(tmp_path).save(1, model, stranger, {})
    assert not tmp_path.exists() or not list(tmp_path.iterdir())


def test_a_full_disk_leaves_the_others(
    saved: tuple[Path, Made], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder, made = saved

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    for asynchronous in (False, True):
        with monkeypatch.context() as patch, pytest.raises(RunError) as caught:
            patch.setattr(os, "fsync", full)
            checkpoints = Checkpoints(folder, asynchronous=asynchronous)
            checkpoints.save(4, *made, {})
            checkpoints.wait()
        assert "the checkpoint of step 4 was not written: rank 0: No space left on device" in str(caught.value)
        assert "still holds those of steps 2, 3" in str(caught.value)
        assert saved_steps(folder) == (2, 3) and not list(folder.glob(".tmp-*"))
    loaded = load(folder)
    assert loaded is not None and loaded.step == 3


def test_old_ones_that_cannot_be_removed_are_no_failure(
    saved: tuple[Path, Made], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, made = saved

    def busy(path: Path) -> None:
        raise OSError(16, "Device or resource busy")

    monkeypatch.setattr(shutil, "rmtree", busy)
    with pytest.warns(UserWarning, match="old checkpoints could not be removed: .*busy"):
        Checkpoints(folder).save(4, *made, {})
    assert saved_steps(folder) == (2, 3, 4)


def test_a_folder_of_this_node_alone_is_named(saved: tuple[Path, Made], monkeypatch: pytest.MonkeyPatch) -> None:
    folder, made = saved
    monkeypatch.setattr("autopar.runtime.checkpoint.folder.begin", lambda *arguments: None)
    with pytest.raises(RunError, match="all nodes must share"):
        Checkpoints(folder).save(4, *made, {})


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("asynchronous", [False, True])
def test_resumed_losses_are_equal_on_a_gpu(tmp_path: Path, asynchronous: bool) -> None:
    """Fused AdamW keeps its step count on the device, dropout draws from the device's generator."""

    def fresh(seed: int) -> Made:
        torch.manual_seed(seed)
        module = nn.Sequential(nn.Linear(3, 40), nn.Dropout(0.5), nn.Linear(40, 1))
        model = autopar.parallelize(module, parse_slug("mb4"), loss_fn=F.mse_loss, num_microbatches=1, device="cuda")
        return model, torch.optim.AdamW(model.parameter_groups(), lr=0.1, fused=True)

    def step(made: Made) -> float:
        loss = made[0].train_step(torch.ones(4, 3, device="cuda"), torch.ones(4, 1, device="cuda"))
        made[1].step()
        made[1].zero_grad()
        return loss.item()

    made, other, checkpoints = fresh(0), fresh(1), Checkpoints(tmp_path, asynchronous=asynchronous)
    step(made)
    checkpoints.save(1, *made, {})
    expected = [step(made), step(made)]
    checkpoints.wait()
    assert checkpoints.load_latest(*other) is not None
    assert [step(other), step(other)] == expected


def test_asynchronous_values_are_those_of_the_call(tmp_path: Path) -> None:
    made, checkpoints = make(), Checkpoints(tmp_path, asynchronous=True)
    for step in (1, 2, 3):
        train(made, step)
        state = {"step": step}
        checkpoints.save(step, *made, state)
        state["step"] = -1
    expected = [parameter.clone() for parameter in made[0].parameters()]
    train(made, 4)
    checkpoints.wait()
    fresh = make(seed=5)
    loaded = checkpoints.load_latest(*fresh)
    assert loaded is not None and loaded.state == {"step": 3} and saved_steps(tmp_path) == (2, 3)
    assert all(torch.equal(a, b) for a, b in zip(expected, fresh[0].parameters(), strict=True))


def test_momentum_and_types_are_kept(tmp_path: Path) -> None:
    def fresh() -> Made:
        module = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1)).to(torch.bfloat16)
        model = autopar.parallelize(module, parse_slug("mb4"), loss_fn=F.mse_loss, num_microbatches=1, device="cpu")
        return model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)

    def step(made: Made) -> float:
        loss = made[0].train_step(torch.ones(4, 3, dtype=torch.bfloat16), torch.ones(4, 1, dtype=torch.bfloat16))
        made[1].step()
        made[1].zero_grad()
        return loss.item()

    made = fresh()
    step(made)
    Checkpoints(tmp_path).save(1, *made, {})
    expected, other = [step(made), step(made)], fresh()
    Checkpoints(tmp_path).load_latest(*other)
    assert [step(other), step(other)] == expected
    assert {tensor.dtype for tensor in read_manifest(step_path(tmp_path, 1)).tensors} == {"BF16"}


@given(
    st.lists(st.tuples(st.sampled_from(sorted(DTYPES)), st.lists(st.integers(0, 4), max_size=3)), max_size=6),
    st.dictionaries(st.text(max_size=3), st.text(max_size=3), max_size=2),
)
@settings(deadline=None, max_examples=40)
def test_files_are_those_of_safetensors(
    tmp_path_factory: pytest.TempPathFactory, wanted: list[tuple[str, list[int]]], notes: dict[str, str]
) -> None:
    path = tmp_path_factory.mktemp("file") / "x.safetensors"
    generator = torch.Generator().manual_seed(len(wanted))
    tensors = {}
    for at, (dtype, shape) in enumerate(wanted):
        bits = torch.randint(256, (math.prod(shape) * DTYPES[dtype].itemsize,), generator=generator)
        raw = (bits % 2 if dtype == "BOOL" else bits).to(torch.uint8)
        tensors[f"t{at}"] = raw.view(DTYPES[dtype]).view(shape)
    stored = write_tensors(
        path,
        [
            TensorToWrite(key=key, dtype=wanted[at][0], shape=tuple(tensor.shape), make=lambda t=tensor: t)
            for at, (key, tensor) in enumerate(tensors.items())
        ],
        notes=notes,
    )
    content = path.read_bytes()
    assert stored == StoredFile(size=len(content), sha256=_sha256(content))
    with safe_open(path, framework="pt") as file:
        assert set(file.keys()) == set(tensors) and (file.metadata() or {}) == notes
        for key, tensor in tensors.items():
            found = file.get_tensor(key)
            assert found.dtype == tensor.dtype and found.shape == tensor.shape
            assert torch.equal(found.reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8))


def divided(shape: tuple[int, ...], seed: int) -> list[tuple[tuple[Cut, ...], Runs | None]]:
    """A random division over up to six ranks, some of which may hold equal pieces."""
    rng = random.Random(seed)
    rows: Runs | None = None
    if rng.random() < 0.5 and shape[0] >= 4:
        cut = rng.randint(1, shape[0] - 1)
        rows = ((cut, shape[0]), (0, cut))
    first, second, copies = rng.randint(1, 3), rng.randint(1, 2), rng.randint(1, 2)
    dims = [rng.randrange(len(shape)) for _ in range(2)]
    return [
        ((Cut(dim=dims[0], parts=first, index=a), Cut(dim=dims[1], parts=second, index=b)), rows)
        for a in range(first) for b in range(second) for _ in range(copies)
    ]  # fmt: skip


def local_of(whole: Tensor, pieces: tuple[Piece, ...]) -> Tensor:
    ends = [tuple(at + size for at, size in zip(p.local, p.shape, strict=True)) for p in pieces]
    local = torch.full([max(column) for column in zip(*ends, strict=True)] if ends else [0] * whole.ndim, -1.0)
    for piece in pieces:
        local[box(piece.local, piece.shape)] = whole[box(piece.offset, piece.shape)]
    return local


def box(start: tuple[int, ...], shape: tuple[int, ...]) -> tuple[slice, ...]:
    return tuple(slice(at, at + size) for at, size in zip(start, shape, strict=True))


@given(st.tuples(st.integers(1, 40), st.integers(1, 40)), st.integers(0, 10**6), st.integers(0, 10**6))
@settings(deadline=None, max_examples=40)
def test_any_division_reads_what_any_other_wrote(
    tmp_path_factory: pytest.TempPathFactory, shape: tuple[int, int], written: int, read: int
) -> None:
    folder = tmp_path_factory.mktemp("pieces")
    whole = torch.arange(math.prod(shape), dtype=torch.float32).view(shape)
    contents = []
    for cuts, rows in divided(shape, written):
        pieces = pieces_of(shape, cuts, rows)
        local = local_of(whole, pieces)
        contents.append([Content(name="w", kind=WEIGHT, shape=shape, pieces=pieces, local=local)])
    keys = [[content.key for content in held] for held in contents]
    parts: list[Part] = [
        part_of(held, number_copies(keys, rank), rank, copy=False) for rank, held in enumerate(contents)
    ]
    files = tuple(write_part(folder, rank, part.values, None) for rank, part in enumerate(parts))
    manifest = Manifest(
        step=1, plan="", model="", optimizer="", date="", files=files, scalars={}, state={},
        tensors=merged([part.tensors for part in parts]),
    )  # fmt: skip
    write_manifest(folder, manifest)
    assert read_manifest(folder) == manifest
    reader = Reader(folder, manifest)
    for cuts, rows in divided(shape, read):
        pieces = pieces_of(shape, cuts, rows)
        expected = local_of(whole, pieces)
        found = torch.full_like(expected, -1)
        reader.fill(manifest.tensors[0], pieces, found)
        assert torch.equal(found, expected)
    assert torch.equal(reader.whole(manifest.tensors[0]), whole)
    covered = torch.zeros(shape, dtype=torch.int)
    for piece in manifest.tensors[0].pieces:
        covered[box(piece.offset, piece.shape)] += 1
    assert bool((covered == 1).all())


def test_copies_share_the_writing() -> None:
    piece = Piece(offset=(3, 0), local=(1, 0), shape=(10, 100))
    shares = [share_of(piece, 3, number) for number in range(3)]
    assert [share.shape[0] for share in shares if share] == [3, 3, 4]
    assert [share.offset[0] for share in shares if share] == [3, 6, 9]
    assert [share.local[0] for share in shares if share] == [1, 4, 7]
    small = Piece(offset=(0,), local=(0,), shape=(10,))
    assert share_of(small, 3, 0) == small and share_of(small, 3, 1) is None
    scalar = Piece(offset=(), local=(), shape=())
    assert share_of(scalar, 2, 0) == scalar and share_of(scalar, 2, 1) is None


def test_what_no_rank_holds_is_noticed() -> None:
    half = StoredTensor(name="w", kind=WEIGHT, dtype="F32", shape=(4,), pieces=())
    with pytest.raises(ValueError, match="the ranks hold 0 of the 4 elements of weight w"):
        check_cover([half])


def test_random_states_go_by_the_share_of_the_batch() -> None:
    four = parse_slug("dp4.mb1")
    assert [source_of(four.slug, four, rank) for rank in range(4)] == [0, 1, 2, 3]
    two = parse_slug("dp2.tp2.mb1")
    assert [source_of(four.slug, two, rank) for rank in range(4)] == [0, 0, 1, 1]
    assert [source_of(two.slug, four, rank) for rank in range(4)] == [0, 2, None, None]
    assert source_of("no plan", four, 0) is None


def test_the_manifest_can_be_checked_by_hand(saved: tuple[Path, Made]) -> None:
    """Its hash file is that of ``sha256sum``, and it is JSON that says what each file holds."""
    path = saved[0] / "step-00000003"
    digest, name = (path / HASH).read_text().split()
    assert name == MANIFEST and digest == _sha256((path / MANIFEST).read_bytes())
    plain = json.loads((path / MANIFEST).read_text())
    assert plain["schema_version"] == 1 and plain["step"] == 3 and plain["optimizer"] == "AdamW"
    assert plain["scalars"]["0.weight"] == {"step": {"value": 3.0, "dtype": "F32"}}


def test_show_lists_what_is_whole(saved: tuple[Path, Made], capsys: pytest.CaptureFixture[str]) -> None:
    folder = saved[0]
    flip(folder / "step-00000002" / TENSORS)
    (folder / "step-00000001").mkdir()
    assert run(["checkpoint", "show", str(folder), "--json"]) == EXIT_OK
    first, second, third = json.loads(capsys.readouterr().out)["checkpoints"]
    assert first["damage"].startswith("manifest.json cannot be read") and first["num_bytes"] == 0
    assert second["damage"] == f"{TENSORS} was altered: its hash is not that of the manifest"
    assert third["damage"] == "" and third["optimizer"] == "AdamW" and third["num_files"] == 1
    assert third["num_bytes"] == sum(file.stat().st_size for file in (folder / "step-00000003").iterdir())
    assert run(["checkpoint", "show", str(folder)]) == EXIT_OK
    lines = capsys.readouterr().out.splitlines()
    assert any("Sequential" in line and line.rstrip().endswith("whole") for line in lines)
    assert run(["checkpoint", "show", str(folder), "--no-hash", "--json"]) == EXIT_OK
    assert json.loads(capsys.readouterr().out)["checkpoints"][1]["damage"] == ""
    assert run(["checkpoint", "show", str(folder / "nowhere")]) == EXIT_USAGE
    assert "holds no checkpoints" in capsys.readouterr().err


def test_export_is_the_whole_model(
    saved: tuple[Path, Made], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, (model, _) = saved
    out = tmp_path / "deep" / "model.safetensors"
    assert run(["checkpoint", "export", str(folder), "-o", str(out)]) == EXIT_OK
    expected = model.modules[0].state_dict()
    with safe_open(out, framework="pt") as file:
        assert set(file.keys()) == set(expected) and file.metadata()["step"] == "3"
        assert all(torch.equal(file.get_tensor(key), value) for key, value in expected.items())
    assert [path.name for path in out.parent.iterdir()] == [out.name]
    assert run(["checkpoint", "export", str(folder), "-o", str(out), "--step", "9"]) == EXIT_USAGE
    assert "has no checkpoint of step 9; it has 2, 3" in capsys.readouterr().err
    flip(folder / "step-00000003" / TENSORS)
    assert run(["checkpoint", "export", str(folder), "-o", str(tmp_path / "other")]) == EXIT_USAGE
    assert "was altered" in (message := capsys.readouterr().err) and "--step takes one of the others: 2" in message
    assert not (tmp_path / "other").exists()
    assert run(["checkpoint", "export", str(folder), "--step", "2", "-o", str(tmp_path)]) == EXIT_USAGE
    assert "cannot be written" in capsys.readouterr().err
