"""Named errors: what was received, what was expected, what to do."""


class AgmError(Exception):
    """Root of every error that this project raises on purpose."""


class AgmValueError(AgmError, ValueError):
    """An argument has a wrong value, shape or type."""
