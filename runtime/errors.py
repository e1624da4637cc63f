"""Errors that a user can act on: each says what was found, what was expected and what to do.

Every class is also a builtin, so that a caller who knows nothing of this toolkit can catch it.
"""

INTERRUPTED_EXIT_CODE = 130


class ToolkitError(Exception):
    """The family's root; command lines print it as one line and exit with `exit_code`."""

    exit_code = 1


class UsageError(ToolkitError, ValueError):
    """A request that cannot be met as it was written: a size, a label, an option."""

    exit_code = 2


class ArtefactError(ToolkitError, ValueError):
    """A file that is missing, damaged, altered or of another kind than it should be."""

    exit_code = 3


class IncompatibleError(ToolkitError, RuntimeError):
    """This machine or installation cannot run what was asked for."""

    exit_code = 4


class ResourceError(ToolkitError, OSError):
    """Memory, disk space or a permission is missing."""

    exit_code = 5


class StoppedError(ToolkitError):
    """A run that its `on_step` ended."""

    exit_code = INTERRUPTED_EXIT_CODE


class NumericalError(ToolkitError, ArithmeticError):
    """A computation left the finite numbers."""

    exit_code = 6
