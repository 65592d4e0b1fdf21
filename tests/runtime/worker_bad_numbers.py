"""Started by test_bad_numbers on two ranks: one of them makes a bad number; what everybody is told."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from test_bad_numbers import BATCH, bad_gradient, broken, message_of, model

from autopar.plan import parse_slug
from autopar.runtime.launch.progress import report_progress, send_message
from autopar.runtime.launch.worker import joined


def main(path: str) -> None:
    """Every case: plan, module, rank, and whether forward or backward goes wrong there."""
    with report_progress(), joined("cpu"):
        for slug, name, rank, phase in json.loads(Path(path).read_text()):
            parallel = model(slug)
            mine = name if dist.get_rank() == rank else "nothing"
            with broken(parallel, mine, bad_gradient if phase == "backward" else lambda x: x * torch.inf):
                told = message_of(parallel, size=BATCH // parse_slug(slug).layout.dp)
            everyone: list[str] = [""] * dist.get_world_size()
            dist.all_gather_object(everyone, told)
            if dist.get_rank() == 0:
                send_message({"told": everyone})


if __name__ == "__main__":
    main(sys.argv[1])
