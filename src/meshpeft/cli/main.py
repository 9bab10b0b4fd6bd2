"""`meshpeft COMMAND ...`: finds the command, runs it, and turns errors into one sentence and an exit code."""

from __future__ import annotations

import difflib
import os
import signal
import sys
from collections.abc import Sequence

from meshpeft.cli.commands import COMMANDS
from meshpeft.training.streams import make_streams_lenient, plain_warnings

__all__ = ["main"]

USAGE = "usage: meshpeft COMMAND [OPTIONS]\n\n{}\n\n`meshpeft COMMAND --help` lists the options of a command.".format(
    "\n".join(f"  {name:<10}{command.summary}" for name, command in COMMANDS.items())
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns:
        The exit code: 0; 2 for bad input, after one sentence on stderr; 1 for a worker that died, after its
        traceback; 128 and the signal's number for an interrupted run, or where nobody reads the output any more (as
        after `| head`) of a command that only prints. What else goes wrong is raised.
    """
    arguments = list(sys.argv[1:] if argv is None else argv) or [""]
    command = COMMANDS.get(arguments[0])
    make_streams_lenient(end_without_reader=command is None or not command.has_results)
    try:
        code = _run(*arguments)
        sys.stdout.flush()
    except BrokenPipeError:
        # What is left to be written has nowhere to go, and would fail again when the interpreter ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    return code


def _run(command: str, *arguments: str) -> int:
    if command in ("-h", "--help"):
        print(USAGE)
        return 0
    if command == "--version":
        from meshpeft import __version__

        print(f"meshpeft {__version__}")
        return 0
    if command not in COMMANDS:
        found = difflib.get_close_matches(command, COMMANDS, n=1)
        hint = f"; did you mean {found[0]}?" if found else ""
        reason = f"there is no command {command!r}{hint}" if command else "no command was given"
        print(f"meshpeft: {reason}\n\n{USAGE}", file=sys.stderr)
        return 2
    try:
        with plain_warnings(f"meshpeft {command}"):
            COMMANDS[command].run(arguments)
    except KeyboardInterrupt:
        print(f"meshpeft {command}: interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        code = _explain(command, error)
        if code is None:
            raise
        return code
    return 0


def _explain(command: str, error: Exception) -> int | None:
    """Print an error that is no fault of the code, and return its exit code; `None` for any other error."""
    # Only now: `meshpeft COMMAND --help` need not import it.
    from meshpeft.parallel.errors import MeshPEFTError
    from meshpeft.training.launch import RunInterrupted, WorkerDied, speaks_for_all

    if isinstance(error, WorkerDied):
        print(f"meshpeft {command}: {error}", file=sys.stderr)
        return 1
    if not isinstance(error, MeshPEFTError):
        return None
    if speaks_for_all():
        print(f"meshpeft {command}: {error}", file=sys.stderr)
    return error.exit_code if isinstance(error, RunInterrupted) else 2


if __name__ == "__main__":
    sys.exit(main())
