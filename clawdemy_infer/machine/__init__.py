"""The machine in front of you: probes, and the calibration that is made of them."""

import sys


def in_notebook() -> bool:
    """Does what is printed go into a notebook? HTML is shown there, and stderr is red."""
    return type(sys.stdout).__module__.startswith("ipykernel")
