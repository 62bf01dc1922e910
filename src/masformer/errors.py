"""The one exception type that masformer raises for a wrong value."""


class MasformerError(ValueError):
    """A value that cannot be used: says what was wrong, what is allowed and, where it helps, what to do.

    The command line prints its text as one line and exits with `exit_code`.
    """

    exit_code = 2


def check_int(name: str, value: object, minimum: int) -> None:
    """Raises MasformerError unless `value` is a whole number of at least `minimum`."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise MasformerError(f"{name} must be a whole number, got {value!r}")
    if value < minimum:
        raise MasformerError(f"{name} must be at least {minimum}, got {value}")
