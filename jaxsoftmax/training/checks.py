# SPDX-License-Identifier: Apache-2.0
"""What an option may be. Its name in an error is the one a user types."""

import math
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


def learning_rate(rate: float) -> None:
    """Raise a `ProgramError` if the device sees no positive finite number."""
    # float32 is what the device will see: 1e-60 would be a step of size 0.
    if not 1e-38 <= rate <= 1e38 or math.isnan(rate):
        raise ProgramError(f"--learning-rate must be a positive finite number; got {rate:g}")


def seed(number: int) -> None:
    """Raise a `ProgramError` if the number seeds nothing."""
    if not 0 <= number < 2**32:
        raise ProgramError(f"--seed must be from 0 to {2**32 - 1}; got {number}")
