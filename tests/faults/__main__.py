"""Every fault that there is a script for, and one table of them all.

    cd tests && ../.venv/bin/python -m faults [--whole]
"""

from __future__ import annotations

import sys

from faults import data, kills, plans, security
from faults.table import Fault, main


def carry_out(whole: bool) -> list[Fault]:
    """The faults in data, in plans, in what strangers hand over, and of machines that are taken away."""
    return [*data.carry_out(whole), *plans.carry_out(whole), *security.carry_out_all(whole), *kills.carry_out(whole)]


if __name__ == "__main__":
    sys.exit(main("all", __doc__, carry_out))
