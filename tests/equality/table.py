"""The equality table: every case against one process. ``python tests/equality/table.py reports/equality`` writes it."""

from __future__ import annotations

import argparse
import csv
import dataclasses
import json
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent
if str(FOLDER) not in sys.path:
    sys.path.insert(0, str(FOLDER))

from cases import BATCH, CASES, MODELS, SEQ, STEPS, TOLERANCE, Case  # noqa: E402

from autopar.estimate import Setting  # noqa: E402
from autopar.estimate.traffic import expected_collectives  # noqa: E402
from autopar.model.build import build_graph  # noqa: E402
from autopar.plan import Plan, parse_slug  # noqa: E402
from autopar.runtime.launch.launcher import launch  # noqa: E402
from autopar.runtime.launch.nodes import Node  # noqa: E402
from autopar.workload import Optimizer, Precision, Workload  # noqa: E402
from costmodels.hardware import load_cluster  # noqa: E402
from costmodels.stack import load_stack  # noqa: E402

Calls = Sequence[Sequence[tuple[str, str, int, int, int]]]
"""By rank: kind, axis, group size, calls, bytes of the collectives of one step."""
WORKLOAD = Workload(global_batch=BATCH, seq_len=SEQ, precision=Precision.FP32, optimizer=Optimizer.SGD)


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One layout against one process: the largest differences.

    Attributes:
        loss: of the loss of a step, absolute.
        norm: of the global gradient norm of a step, relative, on any rank.
        weights: of a weight after the last step, absolute.
        covered: whether the ranks' weights are each of the model's once.
        collectives: by rank, of one step: (kind, axis, group size, calls, bytes).
    """

    ranks: int
    model: str
    plan: str
    loss: float
    norm: float
    weights: float
    covered: bool
    collectives: Calls

    @property
    def equal(self) -> bool:
        """All within the tolerance."""
        return self.covered and max(self.loss, self.norm, self.weights) < TOLERANCE


def run_cases(ranks: int, cases: Sequence[Case], folder: Path, *, scale: float = 1.0, seed: int = 0) -> list[Row]:
    """Train under every case on ``ranks`` processes and compare with one; ``scale`` and ``seed`` spoil the latter."""
    from reference import train

    references = {name: train(name, folder, scale=scale, seed=seed) for name in {case.model for case in cases}}
    job, out = folder / "job.json", folder / "rows.json"
    weights = {name: str(reference.weights) for name, reference in references.items()}
    plain = [dataclasses.asdict(case) for case in cases]
    job.write_text(json.dumps({"cases": plain, "weights": weights, "out": str(out)}))
    node = Node(index=0, address="127.0.0.1", env={"PYTHONPATH": f"{FOLDER}:{FOLDER.parents[1]}"})
    launch("worker", job, nodes=[node], ranks_per_node=ranks, out_dir=folder / "logs", stall_timeout_s=300)
    return [_row(ranks, found, references[found["model"]]) for found in json.loads(out.read_text())]


def _row(ranks: int, found: dict[str, Any], reference: Any) -> Row:
    from safetensors import safe_open

    with safe_open(reference.weights, framework="np") as file:
        elements = sum(file.get_tensor(name).size for name in file.keys())  # noqa: SIM118
    return Row(
        ranks=ranks,
        model=found["model"],
        plan=parse_slug(found["slug"]).slug,
        loss=max(abs(a - b) for a, b in zip(found["losses"], reference.losses, strict=True)),
        norm=max(
            abs(a / b - 1) for norms in found["norms"] for a, b in zip(norms, reference.norms, strict=True)
        ),
        weights=found["weights"],
        covered=found["covered"] == elements,
        collectives=tuple(tuple(tuple(call) for call in rank) for rank in found["collectives"]),
    )  # fmt: skip


def expected(ranks: int, model: str, plan: Plan) -> Calls:
    """What the plan says that every rank calls in one step."""
    setting = Setting(
        graph=build_graph(MODELS[model], seq_len=SEQ, precision=Precision.FP32), workload=WORKLOAD,
        cluster=load_cluster(f"cpu:1x{ranks}"), stack=load_stack("autopar-gloo"),
    )  # fmt: skip
    return tuple(
        tuple(sorted((c.kind, c.axis, c.group_size, c.count, c.num_bytes) for c in rank))
        for rank in expected_collectives(setting, plan)
    )


def disagreements(counted: Calls, due: Calls, *, drops: bool) -> list[str]:
    """Where what ranks called is not what the plan says.

    Tokens go where the router sends them: the bytes of all-to-alls are the plan's in the sum over the ranks, not on
    each; fewer if the model ``drops`` what is over an expert's capacity.
    """
    found, sent = [], [0, 0]
    for rank, (ours, wanted) in enumerate(zip(counted, due, strict=True)):
        if _without_routing(ours) != _without_routing(wanted):
            found.append(f"rank {rank}: counted {set(ours) - set(wanted)}, due {set(wanted) - set(ours)}")
        for place, calls in enumerate((ours, wanted)):
            sent[place] += sum(call[4] for call in calls if call[0] == "all_to_all")
    if sent[0] > sent[1] or (sent[0] < sent[1] and not drops):
        found.append(f"all ranks' all-to-alls carry {sent[0]} bytes, due {sent[1]}")
    return found


def _without_routing(calls: Sequence[tuple[str, str, int, int, int]]) -> list[tuple[str, str, int, int, int]]:
    return sorted((*call[:4], call[4] if call[0] != "all_to_all" else 0) for call in calls)


def write_report(rows: Iterable[Row], out: Path) -> None:
    """README.md with the table, and table.csv."""
    rows = list(rows)
    out.mkdir(parents=True, exist_ok=True)
    with (out / "table.csv").open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        writer.writerow(["ranks", "model", "plan", "loss", "norm", "weights", "collectives_per_rank", "bytes_per_rank"])
        for row in rows:
            calls = [sum(call[3] for call in rank) for rank in row.collectives]
            sizes = [sum(call[4] for call in rank) for rank in row.collectives]
            writer.writerow(
                [row.ranks, row.model, row.plan, f"{row.loss:.2e}", f"{row.norm:.2e}", f"{row.weights:.2e}",
                 max(calls), max(sizes)]
            )  # fmt: skip
    (out / "README.md").write_text(_text(rows), encoding="utf-8")


def _text(rows: Sequence[Row]) -> str:
    worst = {name: max(getattr(row, name) for row in rows) for name in ("loss", "norm", "weights")}
    equal = sum(row.equal for row in rows)
    lines = [
        "# Every layout against one process",
        "",
        f"{equal} of {len(rows)} layouts on 1 to {max(row.ranks for row in rows)} processes equal a plain training "
        f"loop in one process within {TOLERANCE:g}, in fp32, over {STEPS} steps of gradient descent with momentum (at "
        "a rate at which a gradient that is wrong by a factor shows at once) and clipping by the global norm. Largest "
        f"differences: loss {worst['loss']:.1e}, gradient norm {worst['norm']:.1e} (relative), weights after the last "
        f"step {worst['weights']:.1e}. The collectives of every rank (kind, group, calls, bytes) are those that the "
        "plan's prediction counts; all-to-alls of experts carry its bytes in the sum over the ranks, since the router "
        "decides who sends how much.",
        "",
        "Made by `python tests/equality/table.py reports/equality`; `tests/equality` holds the same rows.",
        "",
        "| ranks | model | plan | loss | gradient norm | weights |",
        "|---:|---|---|---:|---:|---:|",
    ]
    lines += [
        f"| {row.ranks} | {row.model} | `{row.plan}` | {row.loss:.1e} | {row.norm:.1e} | {row.weights:.1e} |"
        for row in rows
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run all cases and write the report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--ranks", type=int, nargs="*", default=list(CASES))
    arguments, rows = parser.parse_args(), []
    for ranks in arguments.ranks:
        with tempfile.TemporaryDirectory() as folder:
            rows += run_cases(ranks, CASES[ranks], Path(folder))
        for row in rows[-len(CASES[ranks]) :]:
            print(f"{'ok   ' if row.equal else 'WRONG'} {row.ranks} {row.model:18} {row.plan:50} "
                  f"{row.loss:.1e} {row.norm:.1e} {row.weights:.1e}")  # fmt: skip
            due = expected(ranks, row.model, parse_slug(row.plan))
            for line in disagreements(row.collectives, due, drops=MODELS[row.model].capacity_factor > 0):
                print(f"      {line}")
    write_report(rows, arguments.out)


if __name__ == "__main__":
    main()
