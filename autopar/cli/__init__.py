"""The command line: reads arguments, calls the library, prints. Wrong input is one line on standard error.

Exit codes: 0 fine, 1 a run failed, 2 wrong usage, 3 no feasible plan, or a cluster that is not fit.
"""

from autopar.cli import answers, checking, checkpoints, cluster, planning, running, training, validating
from autopar.cli.common import app
from autopar.cli.main import main, run

__all__ = [
    "answers",
    "app",
    "checking",
    "checkpoints",
    "cluster",
    "main",
    "planning",
    "run",
    "running",
    "training",
    "validating",
]
