"""Started by test_checkpoints_across_plans: writes checkpoints under plans, reads them under others, trains on."""

from __future__ import annotations

import dataclasses
import json
import os
import resource
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.optim import ZeroRedundancyOptimizer

import autopar
from autopar.errors import InputError, RunError
from autopar.model.spec import ModelSpec
from autopar.model.transformer import build, language_model_loss
from autopar.plan import parse_slug
from autopar.runtime.checkpoint import Checkpoints
from autopar.runtime.checkpoint import checkpoints as module
from autopar.runtime.checkpoint.contents import model_contents, optimizer_contents
from autopar.runtime.checkpoint.folder import saved_steps, step_path
from autopar.runtime.checkpoint.manifest import read_manifest
from autopar.runtime.checkpoint.reading import Reader
from autopar.runtime.launch.progress import report_progress, send_message
from autopar.runtime.launch.worker import joined
from autopar.runtime.parallel.parallel_model import ParallelModel

# 36, 44 and 50 leave a rest on some of the layouts, and some ranks get none of five positions.
SPEC = ModelSpec(
    name="odd", num_layers=4, hidden_size=36, num_heads=4, num_kv_heads=4, ffn_size=44, vocab_size=50,
    max_seq_len=5, fused_qkv=False,
)  # fmt: skip
EXPERTS = dataclasses.replace(SPEC, name="experts", num_experts=6, top_k=2, expert_ffn_size=22)
TIED = dataclasses.replace(
    SPEC, name="tied", hidden_size=40, num_kv_heads=2, vocab_size=52, fused_qkv=True, tied_embeddings=True
)
MODELS = {"experts": EXPERTS, "tied": TIED}
BATCH, SEQ, BEFORE, AFTER = 8, 4, 2, 2
Made = tuple[ParallelModel, torch.optim.Optimizer]


def make(slug: str, seed: int = 0, spec: ModelSpec = SPEC) -> Made:
    """A model under a plan with its optimizer.

    ``+zero`` behind the slug takes torch's own ZeRO-1 optimizer, ``experts@`` before it another model.
    """
    plan, name = parse_slug(slug.removesuffix("+zero").rpartition("@")[2]), slug.rpartition("@")[0]
    spec = MODELS.get(name, spec)
    model = autopar.parallelize(
        build(spec, seed), plan, loss_fn=language_model_loss, device="cpu",
        num_microbatches=BATCH // plan.layout.dp // plan.microbatch_size,
    )  # fmt: skip
    if slug.endswith("+zero"):
        return model, ZeroRedundancyOptimizer(model.parameters(), torch.optim.AdamW, lr=3e-3, fused=True)
    return model, torch.optim.AdamW(model.parameter_groups(), lr=3e-3, fused=True)


def train(made: Made, step: int) -> float:
    """One step; the mean loss of the global batch before it."""
    model, optimizer = made
    layout = model.plan.layout
    tokens = torch.randint(50, (BATCH, SEQ + 1), generator=torch.Generator().manual_seed(step))
    position = layout.coordinates(dist.get_rank())
    mine = tokens.chunk(layout.dp)[position["dp_replicate"] * layout.dp_shard + position["dp_shard"]]
    loss = model.train_step(mine[:, :-1], mine[:, 1:]).clone()
    optimizer.step()
    optimizer.zero_grad()
    dist.all_reduce(loss)
    return loss.item() / dist.get_world_size()


def values(made: Made) -> dict[tuple[str, str, int], Tensor]:
    """Copies of all tensors on this rank."""
    model, optimizer = made
    contents = model_contents(model) + optimizer_contents(model, optimizer)[0]
    return {(content.name, content.kind, at): content.local.clone() for at, content in enumerate(contents)}


def same_bits(left: Tensor, right: Tensor) -> bool:
    """Equal type, shape and bits, so that -0.0 and 0.0 differ."""
    if left.dtype != right.dtype or left.shape != right.shape:
        return False
    return torch.equal(*(x.contiguous().reshape(-1).view(torch.uint8) for x in (left, right)))


def same_files(left: Path, right: Path) -> None:
    """The newest checkpoints of two folders hold the same tensors and numbers; checked on rank 0."""
    if dist.get_rank():
        return
    paths = [step_path(folder, saved_steps(folder)[-1]) for folder in (left, right)]
    one, other = (read_manifest(path) for path in paths)
    readers = [Reader(path, manifest) for path, manifest in zip(paths, (one, other), strict=True)]
    assert one.scalars == other.scalars and one.state == other.state
    assert {(t.name, t.kind) for t in one.tensors} == {(t.name, t.kind) for t in other.tensors}
    for tensor in one.tensors:
        twin = readers[1].find(tensor.name, tensor.kind)
        assert twin is not None and same_bits(readers[0].whole(tensor), readers[1].whole(twin)), tensor.name


def write(folder: Path, slug: str) -> dict[str, Any]:
    """Train, save, train on without interruption; then load what was saved, and train on again."""
    made = make(slug)
    for step in range(BEFORE):
        train(made, step)
    checkpoints = Checkpoints(folder / slug)
    noise = torch.get_rng_state()
    checkpoints.save(BEFORE, *made, {"position": 7})
    kept, drawn = values(made), torch.rand(3)
    losses = [train(made, BEFORE + step) for step in range(AFTER)]
    assert not all(same_bits(kept[key], value) for key, value in values(made).items()), "the control must differ"
    torch.manual_seed(99)
    loaded = checkpoints.load_latest(*made)
    assert loaded is not None and loaded.step == BEFORE and loaded.state == {"position": 7} and not loaded.skipped
    assert torch.equal(torch.get_rng_state(), noise) and torch.equal(torch.rand(3), drawn)
    assert all(same_bits(kept[key], value) for key, value in values(made).items())
    assert [train(made, BEFORE + step) for step in range(AFTER)] == losses
    return {"plan": slug, "losses": losses}


def carry(folder: Path, source: str, slug: str) -> dict[str, Any]:
    """Load under another plan into a model of other values, save, and train on."""
    made, name = make(slug, seed=1), f"{source}--{slug}"
    loaded = Checkpoints(folder / source).load_latest(*made)
    assert loaded is not None and loaded.step == BEFORE
    Checkpoints(folder / name).save(loaded.step, *made, loaded.state)
    same_files(folder / source, folder / name)
    return {"plan": name, "losses": [train(made, BEFORE + step) for step in range(AFTER)]}


def carry_back(folder: Path, source: str, slug: str) -> dict[str, Any]:
    """What went from plan to plan and comes back is, on every rank, what it was."""
    made, again = make(slug, seed=2), make(slug, seed=3)
    assert Checkpoints(folder / slug).load_latest(*made) and Checkpoints(folder / source).load_latest(*again)
    one, other = values(made), values(again)
    assert one.keys() == other.keys() and all(same_bits(one[key], other[key]) for key in one)
    return {"plan": f"{source} back", "losses": [train(again, BEFORE + step) for step in range(AFTER)]}


def asynchronously(folder: Path, slug: str) -> dict[str, Any]:
    """What is written by a thread is what was there at the call, though training goes on."""
    made = make(slug)
    train(made, 0)
    Checkpoints(folder / "sync").save(1, *made, {})
    checkpoints = Checkpoints(folder / "async", asynchronous=True)
    checkpoints.save(1, *made, {})
    losses = [train(made, step) for step in (1, 2)]
    checkpoints.wait()
    same_files(folder / "sync", folder / "async")
    return {"plan": f"async {slug}", "losses": losses}


def raised(kind: type[Exception], action: Callable[[], object]) -> str:
    """The message of the error that an action must raise."""
    try:
        action()
    except kind as error:
        return str(error)
    raise AssertionError(f"no {kind.__name__}")


def failing(folder: Path, slug: str) -> dict[str, Any]:
    """A rank that cannot write: all ranks say so, and the checkpoint before is as it was."""
    made, messages = make(slug), []
    for asynchronous in (False, True):
        place = folder / f"failing{asynchronous}"
        checkpoints = Checkpoints(place, asynchronous=asynchronous)
        checkpoints.save(1, *made, {})
        checkpoints.wait()
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        if dist.get_rank() == 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
        if asynchronous:
            checkpoints.save(2, *made, {})
            messages.append(raised(RunError, checkpoints.wait))
        else:
            messages.append(raised(RunError, lambda c=checkpoints: c.save(2, *made, {})))
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        dist.barrier()
        assert sorted(path.name for path in place.iterdir()) == ["step-00000001"]
        loaded = checkpoints.load_latest(*made)
        assert loaded is not None and loaded.step == 1
        checkpoints.save(2, *made, {})
        checkpoints.wait()
    messages.append(raised(InputError, lambda: checkpoints.save(3, *made, {"a": {1, 2}})))
    other = make(slug, spec=dataclasses.replace(SPEC, ffn_size=48))
    messages.append(raised(InputError, lambda: checkpoints.load_latest(*other)))
    sgd = torch.optim.SGD(made[0].parameter_groups(), lr=0.1, momentum=0.9)
    messages.append(raised(InputError, lambda: checkpoints.load_latest(made[0], sgd)))
    return {"plan": f"failing {slug}", "messages": messages}


def torn(folder: Path, slug: str) -> dict[str, Any]:
    """One flipped byte in the newest checkpoint: the one before is loaded, on every rank."""
    made, place = make(slug), folder / "torn"
    checkpoints, kept = Checkpoints(place), values(made)
    for step in (1, 2):
        train(made, step)
        checkpoints.save(step, *made, {"at": step})
        kept = values(made) if step == 1 else kept
    if dist.get_rank() == 0:
        file = step_path(place, 2) / "rank-00001.safetensors"
        content = bytearray(file.read_bytes())
        content[-9] ^= 1
        file.write_bytes(content)
    dist.barrier()
    loaded = checkpoints.load_latest(*made)
    assert loaded is not None and loaded.step == 1 and loaded.state == {"at": 1}
    assert all(same_bits(kept[key], value) for key, value in values(made).items())
    return {"plan": f"torn {slug}", "messages": list(loaded.skipped)}


def dies(folder: Path, slug: str) -> dict[str, Any]:
    """Rank 1 is gone in the middle of a save: the launcher ends the run, and this is its last action."""
    made, checkpoints = make(slug), Checkpoints(folder / "dies")
    checkpoints.save(BEFORE, *made, {})
    if dist.get_rank() == 1:
        module.write_part = lambda *arguments: os._exit(9)
    checkpoints.save(BEFORE + 1, *made, {})
    raise AssertionError("saved without a rank")


def survives(folder: Path, slug: str) -> dict[str, Any]:
    """What was whole before a rank died is loaded, and what the dead save left is removed."""
    left = sorted(path.name for path in (folder / "dies").iterdir())
    dist.barrier()
    loaded = Checkpoints(folder / "dies").load_latest(*make(slug))
    assert loaded is not None and loaded.step == BEFORE and not loaded.skipped
    assert sorted(path.name for path in (folder / "dies").iterdir()) == [f"step-{BEFORE:08d}"]
    return {"plan": f"survives {slug}", "left": left}


ACTIONS: dict[str, Callable[..., dict[str, Any]]] = {
    "write": write, "carry": carry, "back": carry_back, "async": asynchronously, "failing": failing, "torn": torn,
    "dies": dies, "survives": survives,
}  # fmt: skip


def main() -> None:
    """Do what the job says, one after another."""
    job = json.loads(Path(sys.argv[1]).read_text())
    with report_progress() as progress, joined("cpu"):
        for action, *arguments in job["actions"]:
            progress.update(plan=" ".join([action, *arguments]))
            result = ACTIONS[action](Path(job["folder"]), *arguments)
            dist.barrier()
            if dist.get_rank() == 0:
                send_message(result)


if __name__ == "__main__":
    main()
