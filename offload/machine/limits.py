"""Refuses sizes that are larger than this machine."""

from offload.errors import BudgetError
from offload.machine.memory import ram
from offload.units import gib, parse_bytes


def check_ram(size: str | int | None) -> None:
    """Raise `BudgetError` if `size` is more RAM than this machine has."""
    asked, most = parse_bytes(size), ram().total
    if asked is not None and asked > most:
        raise BudgetError(
            f"--ram {size} is more than the {gib(most, 1)} of this machine: lower it, or leave "
            "it out"
        )
