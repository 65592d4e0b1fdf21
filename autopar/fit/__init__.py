"""Constants of devices, networks and stacks fitted on measured runs.

Which constants are free is data (``constants``); ``problem`` prices measured runs under trial values, ``solve`` is the
least squares, ``fitting`` joins the two, ``leave_out`` refits without a part of the runs, ``write_back`` puts values
and their origins into the specifications. ``python -m autopar.fit`` does it all.
"""

from autopar.fit.constants import Constant, read_constants
from autopar.fit.fitting import FitResult, fit
from autopar.fit.leave_out import LeftOut, architecture, leave_out
from autopar.fit.problem import Case, Predictions, Problem, predict, prepare

__all__ = [
    "Case",
    "Constant",
    "FitResult",
    "LeftOut",
    "Predictions",
    "Problem",
    "architecture",
    "fit",
    "leave_out",
    "predict",
    "prepare",
    "read_constants",
]
