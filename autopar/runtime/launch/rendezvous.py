"""A store of its own for every start of the ranks.

torchrun shares its store with the ranks and keeps it when it starts them again (torch 2.13); keys of the dead ranks,
their addresses among them, are still there, and new ranks connect to dead ones. Here the ranks of one start agree on a
prefix that no other start has.
"""

from __future__ import annotations

import os
import time
import uuid
from datetime import timedelta

from torch.distributed import PrefixStore, Store, TCPStore  # type: ignore[attr-defined]

from autopar.errors import RunError

_POLL_S = 0.02


def fresh_store(timeout_s: float) -> Store | None:
    """A store whose keys only the ranks of this start have written; None where torchrun shares no store.

    Raises:
        RunError: not all ranks came within ``timeout_s`` seconds.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    store = TCPStore(
        os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), world_size, False,
        timeout=timedelta(seconds=timeout_s), wait_for_workers=False,
    )  # fmt: skip
    return PrefixStore(agree(store, rank, world_size, timeout_s), store)


def agree(store: Store, rank: int, world_size: int, timeout_s: float) -> str:
    """A name that all live ranks get and no earlier ranks had, through a store with their keys still in it.

    Every rank announces itself under a name of its own. Rank 0 answers whom it finds, under that name, with the name
    for all; answers to dead ranks go unread. It is done when each rank has thanked it under the name for all.
    """
    own, deadline = uuid.uuid4().hex, time.monotonic() + timeout_s
    if rank != 0:
        store.set(f"autopar/hello/{rank}", own)
        _wait(store, [f"autopar/answer/{own}"], deadline, "rank 0 did not answer")
        name = store.get(f"autopar/answer/{own}").decode()
        store.set(f"autopar/thanks/{name}/{rank}", "")
        return name
    missing = set(range(1, world_size))
    while missing:
        for other in sorted(missing):
            if store.check([f"autopar/hello/{other}"]):
                store.set(f"autopar/answer/{store.get(f'autopar/hello/{other}').decode()}", own)
            if store.check([f"autopar/thanks/{own}/{other}"]):
                missing.discard(other)
        if missing and time.monotonic() > deadline:
            raise RunError(f"rank {min(missing)} of {world_size} did not join within {timeout_s:g} s")
        time.sleep(_POLL_S)
    return own


def _wait(store: Store, keys: list[str], deadline: float, otherwise: str) -> None:
    while not store.check(keys):
        if time.monotonic() > deadline:
            raise RunError(f"{otherwise} in time: it ended, or cannot be reached")
        time.sleep(_POLL_S)
