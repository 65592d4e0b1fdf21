"""Worker of test_fake_group: one rank of a fake group runs plans dry, and writes what it would call."""

from __future__ import annotations

import json
import sys
import traceback
from pathlib import Path

from autopar.model.spec import ModelSpec
from autopar.plan import parse_slug
from autopar.runtime.step.dry_run import dry_run
from autopar.workload import Workload
from costmodels.records import from_plain, to_plain


def main(path: str) -> None:
    job, results = json.loads(Path(path).read_text(encoding="utf-8")), {}
    for case in job["cases"]:
        spec, workload = (
            from_plain(ModelSpec, case["model"], "model"),
            from_plain(Workload, case["workload"], "workload"),
        )
        plan = parse_slug(case["slug"])
        try:
            counted = dry_run(plan, spec, workload, job["rank"] % plan.layout.world_size, clip=case["clip"])
            results[case["name"]] = to_plain(counted)
        except Exception:
            results[case["name"]] = traceback.format_exc()
        print(case["name"], flush=True)
    Path(job["out"]).write_text(json.dumps(results), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1])
