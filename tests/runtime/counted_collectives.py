"""Worker of test_emulate: calls collectives and counts what each node's interface sends meanwhile."""

import json
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

from autopar.runtime.launch.nodes import counter_paths
from autopar.runtime.launch.progress import report_progress
from autopar.runtime.profile.links import make_call, slowest, wait_for_all

REPEATS = 2
SETTLE_S = 0.1


def sent_so_far() -> int:
    return int(Path(counter_paths("eth0")[0]).read_text())


def main(path: str) -> None:
    job, results = json.loads(Path(path).read_text()), []
    with report_progress() as progress:
        dist.init_process_group("gloo")
        ranks = tuple(range(dist.get_world_size()))
        for kind, num_bytes in job["cases"]:
            progress.tick(kind)
            group = dist.new_group(list(ranks))
            peers = ranks[:2] if kind == "send" else ranks
            call = make_call(kind, torch.device("cpu"), group, peers, num_bytes)
            call = call if dist.get_rank() in peers else (lambda: None)
            call()
            wait_for_all()
            time.sleep(SETTLE_S)
            before, start = sent_so_far(), time.perf_counter()
            for _ in range(REPEATS):
                call()
            elapsed = time.perf_counter() - start
            time.sleep(SETTLE_S)
            sent = torch.zeros(len(ranks), dtype=torch.float64)
            sent[dist.get_rank()] = (sent_so_far() - before) / REPEATS
            dist.all_reduce(sent)
            results.append({"kind": kind, "sent": sent.tolist(), "seconds": slowest(elapsed) / REPEATS})
        if dist.get_rank() == 0:
            Path(job["out"]).write_text(json.dumps(results))
        wait_for_all()
        dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
