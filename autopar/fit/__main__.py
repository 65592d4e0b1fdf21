"""``python -m autopar.fit RUNS.csv ...``: fit every constant of ``specs/fitted.toml`` on measured runs.

Prints errors with the fit as it stands, fitted, and with each model left out; ``--write`` puts values and origins into
the specifications.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from autopar.errors import InputError
from autopar.fit.cases import read_cases
from autopar.fit.constants import read_constants
from autopar.fit.errors import errors_by_source
from autopar.fit.fitting import fit
from autopar.fit.leave_out import leave_out, model_keys
from autopar.fit.problem import prepare
from autopar.fit.write_back import write_values


def main(arguments: list[str] | None = None) -> int:
    """Run the command; exit code 0, or 2 for wrong usage."""
    parser = argparse.ArgumentParser(prog="python -m autopar.fit", description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path, help="CSV files of measured runs")
    parser.add_argument("--constants", type=Path, help="which constants are free; specs/fitted.toml by default")
    parser.add_argument("--only", default="", help="free only constants whose name contains this")
    parser.add_argument("--sources", default="", help="use only these sources, separated by commas")
    parser.add_argument("--iterations", type=int, default=10)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--no-leave-out", action="store_true", help="do not refit without each model")
    parser.add_argument("--write", action="store_true", help="write values and origins into the specifications")
    options = parser.parse_args(arguments)
    try:
        return _run(options)
    except InputError as error:
        print(f"autopar.fit: error: {error}", file=sys.stderr)
        return 2


def _run(options: argparse.Namespace) -> int:
    started = time.monotonic()
    constants = tuple(c for c in read_constants(options.constants) if options.only in c.name)
    cases, refused = read_cases(options.runs)
    sources = {name for name in options.sources.split(",") if name}
    problem = prepare([case for case in cases if not sources or case.source in sources])
    print(
        f"{len(problem.cases)} runs, {len(refused)} not understood, {len(problem.failures)} cannot be priced "
        f"({time.monotonic() - started:.0f} s)"
    )
    result = fit(problem, constants, iterations=options.iterations, processes=options.processes)
    print(f"fitted in {result.solution.iterations} iterations ({time.monotonic() - started:.0f} s)")
    left = None
    if not options.no_leave_out:
        left = leave_out(result, model_keys(problem.cases), processes=options.processes)
        print(f"left out each model ({time.monotonic() - started:.0f} s)")
    print(f"\n{'source':24} {'what':7} {'rows':>5} {'fitted MAPE':>12} {'bias':>6} {'left-out':>9} {'bias':>6}")
    inside = errors_by_source(result, result.solution.residuals)
    outside = errors_by_source(result, left.residuals) if left else {}
    for (source, quantity), e in inside.items():
        found = outside.get((source, quantity))
        beside = f"{found.mape:9.2f} {found.bias:+6.1f}" if found else ""
        print(f"{source:24} {quantity:7} {e.rows:5d} {e.mape:12.2f} {e.bias:+6.1f} {beside}")
    print(f"\n{'constant':64} {'start':>10} {'fitted':>10} {'sigmas':>7} {'rows':>5}")
    for constant, x in zip(constants, result.solution.x, strict=True):
        value = result.values[constant.name]
        at_bound = "  at its bound" if min(abs(x - b) for b in constant.bounds) < 1e-6 else ""
        print(
            f"{constant.name:64} {constant.start:10.4g} {value:10.4g} {x / constant.prior_sigma:+7.2f} "
            f"{len(result.rows_of(constant)):5d}{at_bound}"
        )
    if options.write:
        for path in write_values(result, left):
            print(f"wrote {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
