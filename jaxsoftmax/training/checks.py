# SPDX-License-Identifier: Apache-2.0
"""What an option may be. Its name in an error is the one a user types."""

from collections.abc import Collection

from jaxsoftmax.training.errors import ProgramError

_LARGEST = 2**31 - 1


def flag(name: str) -> str:
    """An option's name on the command line."""
    return "--" + name.replace("_", "-")


def whole_number(name: str, number: int, least: int) -> None:
    """Raise a `ProgramError` if the number is less, or too large for the device's integers."""
    if number < least:
        raise ProgramError(f"{flag(name)} must be at least {least}; got {number}")
    if number > _LARGEST:
        raise ProgramError(f"{flag(name)} must be at most {_LARGEST}; got {number}")


def one_of(name: str, value: str, values: Collection[str]) -> None:
    """Raise a `ProgramError` if the value is none of them."""
    if value not in values:
        raise ProgramError(f"{flag(name)} must be one of {', '.join(values)}; got {value!r}")


def positive(name: str, number: float, *, or_zero: bool = False) -> None:
    """Raise a `ProgramError` if the device sees no positive finite number."""
    # It sees float32, and takes less than 1.2e-38 for 0: a step of size 0.
    if not 1.2e-38 <= number <= 1e38 and not (or_zero and number == 0):
        raise ProgramError(
            f"{flag(name)} must be {'0 or ' * or_zero}a positive finite number in float32; got "
            f"{number:g}"
        )


def seed(number: int) -> None:
    """Raise a `ProgramError` if the number seeds nothing."""
    if not 0 <= number < 2**32:
        raise ProgramError(f"--seed must be from 0 to {2**32 - 1}; got {number}")
