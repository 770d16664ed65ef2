"""What ends a program with one line and exit status 2, and nothing else: no traceback."""

import contextlib
import subprocess
import sys


class ProgramError(Exception):
    """The message is one line for each fault; it names the file or setting, what was found and what was expected."""


class InputError(ProgramError):
    """Something that the user gave cannot be used."""


class OutputError(ProgramError):
    """A file cannot be written: a full disk, a folder without permission."""


class WorkerLostError(ProgramError):
    """Another process of a training on several machines has ended."""


class NonFiniteLossError(ProgramError):
    """The loss of a training step, or its gradient, is not a number."""


def expect(condition, where, found, expected):
    """Raise InputError unless the condition holds. where: the file or setting."""
    if not condition:
        raise InputError(f"{where}: found {found}, expected {expected}")


@contextlib.contextmanager
def reading(path, expected):
    """What goes wrong in the block becomes an InputError: libraries have many exceptions of their own."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise InputError(f"{path}: cannot be read ({reason}); expected {expected}") from None


def run(main):
    """Run a script's main function. A ProgramError, or a file that the system refuses, ends it with its one line."""
    try:
        main()
    except (ProgramError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except subprocess.CalledProcessError as error:  # which has said why
        sys.exit(error.returncode)
