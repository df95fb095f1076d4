"""Named errors of the benchmarks."""

from agm import AgmError


class DataError(AgmError, ValueError):
    """Images that are missing, unreadable or of the wrong classes."""


class TeacherError(AgmError, ValueError):
    """A model or its weights that cannot be built, loaded or evaluated."""


class UsageError(AgmError, ValueError):
    """A command line that does not make sense."""
