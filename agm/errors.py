"""Named errors: what was received, what was expected, what to do."""

from collections.abc import Callable
from typing import Any


class AgmError(Exception):
    """Root of every error that this project raises on purpose."""


class AgmValueError(AgmError, ValueError):
    """An argument has a wrong value, shape or type."""


def check_argument(name: str, value: Any, wanted: str, valid: Callable[[Any], bool]) -> None:
    """Raise :class:`AgmValueError` unless ``valid(value)``, also where its type cannot be asked."""
    try:
        accepted = valid(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        accepted = False
    if not accepted:
        raise AgmValueError(f"{name} must be {wanted}, got {value!r}")


def check_state(owner: object, state: dict[str, Any], *names: str) -> None:
    """Raise :class:`AgmValueError` unless ``state`` has all ``names``, before any is read."""
    missing = [name for name in names if name not in state]
    if missing:
        raise AgmValueError(
            f"the state has no {', '.join(missing)}; load what the state_dict of "
            f"{type(owner).__name__} gave"
        )
