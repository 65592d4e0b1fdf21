"""Work shared by a few processes that inherit everything by fork: only results travel."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Sequence
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def fork_map(function: Callable[[Item], Result], items: Sequence[Item], processes: int = 2) -> list[Result]:
    """``[function(item) for item in items]`` in up to ``processes`` processes; an error in one is raised here.

    Falls back on this process where there is no fork, or nothing to share.
    """
    if processes < 2 or len(items) < 2 or "fork" not in multiprocessing.get_all_start_methods():
        return [function(item) for item in items]
    context = multiprocessing.get_context("fork")
    count = min(processes, len(items))
    receivers, workers = [], []
    for part in range(1, count):
        receiver, sender = context.Pipe(duplex=False)

        def work(part: int = part, sender: object = sender) -> None:
            try:
                answer: object = [function(item) for item in items[part::count]]
            except BaseException as error:
                answer = error
            sender.send(answer)  # type: ignore[attr-defined]

        worker = context.Process(target=work, daemon=True)
        worker.start()
        sender.close()
        receivers.append(receiver)
        workers.append(worker)
    results: dict[int, Result] = {}
    for place, item in zip(range(0, len(items), count), items[0::count], strict=True):
        results[place] = function(item)
    for part, (receiver, worker) in enumerate(zip(receivers, workers, strict=True), start=1):
        try:
            found = receiver.recv()
        except EOFError:
            raise RuntimeError("a worker process ended without an answer") from None
        worker.join()
        if isinstance(found, BaseException):
            raise found
        results.update(zip(range(part, len(items), count), found, strict=True))
    return [results[place] for place in range(len(items))]
