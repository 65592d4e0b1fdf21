"""Runs a command line and turns errors into one message and an exit code."""

from __future__ import annotations

import gc
import os
import sys

from autopar.cli.common import app
from autopar.errors import EXIT_NO_PLAN, EXIT_OK, EXIT_RUN_FAILED, EXIT_USAGE, InputError, NoFeasiblePlan, RunError

GC_THRESHOLD = 200_000
"""Objects after which garbage is collected."""


def run(arguments: list[str] | None = None) -> int:
    """Run a command line and return its exit code; every error that a user can cause is one message."""
    from typer.main import get_command

    try:
        result = get_command(app).main(args=arguments, prog_name="autopar", standalone_mode=False)
        return result if isinstance(result, int) else EXIT_OK
    except InputError as error:
        return _fail(str(error), EXIT_USAGE)
    except NoFeasiblePlan as error:
        return _fail(str(error), EXIT_NO_PLAN)
    except RunError as error:
        return _fail(str(error), EXIT_RUN_FAILED)
    except KeyboardInterrupt:
        return _fail("interrupted", 130)
    except BrokenPipeError:
        # The reader has seen enough, as in `autopar plan ... | head`.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_OK
    except Exception as error:
        if hasattr(error, "format_message") and hasattr(error, "exit_code"):
            return _fail(error.format_message(), EXIT_USAGE)
        if type(error).__name__ in ("Exit", "Abort"):
            return int(getattr(error, "exit_code", EXIT_RUN_FAILED))
        if os.environ.get("AUTOPAR_DEBUG"):
            raise
        return _fail(
            f"internal error: {type(error).__name__}: {error}. This is a bug of autopar; AUTOPAR_DEBUG=1 shows where",
            EXIT_RUN_FAILED,
        )


def _fail(message: str, code: int) -> int:
    print(f"autopar: error: {message}", file=sys.stderr)
    return code


def main() -> None:
    """Entry point of the ``autopar`` command."""
    # An answer makes many objects and hardly a cycle: a tenth of a plan's time went into looking for them.
    gc.set_threshold(GC_THRESHOLD)
    sys.exit(run())
