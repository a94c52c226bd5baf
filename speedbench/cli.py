"""The command line: finds the command, and turns what the user can mend into one sentence."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping, Sequence

from speedbench.cli_base import OK, USAGE
from speedbench.environment import redact_text
from speedbench.types import UserError

COMMANDS: Mapping[str, str] = {
    "run": "speedbench.cli_run:run_command",
    "sweep": "speedbench.cli_sweep:sweep_command",
    "report": "speedbench.cli_report:report_command",
    "compare": "speedbench.cli_compare:compare_command",
    "upload": "speedbench.cli_upload:upload_command",
    "calibrate": "speedbench.cli_calibrate:calibrate_command",
    "engines": "speedbench.cli_calibrate:engines_command",
    "prepare": "speedbench.cli_data:prepare_command",
    "data": "speedbench.cli_data:data_command",
}
"""Command -> the function that runs it, imported when it is asked for."""


def main(argv: Sequence[str] | None = None, prog: str = "speedbench") -> int:
    """Run one command. Returns the exit code."""
    from speedbench.cli_measure import is_silent_replica

    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        return _dispatch(argv, prog)
    except UserError as error:
        if not is_silent_replica():
            print(f"{prog}: {redact_text(str(error))}", file=sys.stderr)
        return USAGE
    except OSError as error:
        if isinstance(error, BrokenPipeError):  # `... | head`
            return OK
        told = UserError(f"{redact_text(str(error))}: check the path and its permissions")
        print(f"{prog}: {told}", file=sys.stderr)
        return USAGE


def _dispatch(argv: list[str], prog: str) -> int:
    if not argv or argv[0] in ("-h", "--help"):
        from speedbench.cli_run import ABOUT

        print(ABOUT.format(prog=f"{prog} run"))
        print("commands: " + ", ".join(COMMANDS))
        return OK
    if argv[0] == "--version":
        from speedbench import __version__

        print(f"speedbench {__version__}")
        return OK
    if argv[0] not in COMMANDS:
        raise UserError(f"there is no command '{argv[0]}': expected {', '.join(COMMANDS)}")
    module, _, function = COMMANDS[argv[0]].partition(":")
    command = getattr(importlib.import_module(module), function)
    return int(command(argv[1:], prog if prog != "speedbench" else f"speedbench {argv[0]}"))
