"""Started by test_launch: ranks that work, fail, leave, hang or talk nonsense."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

from autopar.runtime.launch.progress import report_progress, send_message


def oversleep() -> None:
    """Never return."""
    time.sleep(10_000)


def main() -> None:
    """Do what the job says."""
    mode, rank = json.loads(Path(sys.argv[1]).read_text())["mode"], int(os.environ["RANK"])
    with report_progress() as progress:
        print(f"hello of rank {rank}")
        for step in range(3):
            progress.update(plan="p", step=step)
            if rank == 0:
                send_message({"rank": rank, "said": step})
            time.sleep(0.3)
        if mode == "raise" and rank == 1:
            raise ValueError("bad luck")
        if mode == "exit" and rank == 1:
            os._exit(3)
        if mode == "torn" and rank == 0:
            print("@autopar {torn", flush=True)
        if mode == "hang" and rank == 1:
            oversleep()
        if mode != "well" and rank == 0:
            progress.update(step=3)
            time.sleep(10_000)


if __name__ == "__main__":
    if json.loads(Path(sys.argv[1]).read_text())["mode"] == "import":
        import no_such_module  # noqa: F401
    main()
