"""What can go wrong, one class for each exit code (DESIGN.md, "stdout is the result, stderr is the story")."""


class HsiviError(Exception):
    """Anything the user is told in one line; `exit_code` is what the process leaves with."""

    exit_code = 1


class RunError(HsiviError):
    """Failed while running: diverged, out of memory, disk full."""


class InputError(HsiviError):
    """Bad usage, configuration or input: the message says what, which file or flag, and what to do next."""

    exit_code = 2


class GateError(HsiviError):
    """The work finished, but a quality gate of the user's (`--max-fid`) failed."""

    exit_code = 3


class InterruptError(HsiviError):
    """Stopped by the user (Ctrl-C, SIGINT); whatever could be kept was written first."""

    exit_code = 130


class TerminatedError(InterruptError):
    """Stopped by SIGTERM, as a queue or a container does; whatever could be kept was written first."""

    exit_code = 143
