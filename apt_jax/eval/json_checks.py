"""Checks of JSON files that people may have edited and full disks may have cut."""


def need(value, kind, complaint: str):
    """The value, where it is of that type; ValueError(complaint) where not."""
    if not isinstance(value, kind):
        raise ValueError(complaint)
    return value


def check_number(value, what: str) -> None:
    """ValueError where a value is neither None nor a number that can be shown."""
    if value is not None and not finite(value):
        raise ValueError(f"{what} is no number")


def finite(value) -> bool:
    """A number that can be shown and drawn: not NaN, infinite or beyond a float."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300
