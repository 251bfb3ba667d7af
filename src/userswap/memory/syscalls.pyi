"""The window of the system-call wrappers; see ``syscalls.pyx``."""

from typing import NamedTuple

class Patched(NamedTuple):
    """What ``install`` reached: libraries, their imports, and imports that could not be changed."""

    objects: int
    slots: int
    refused: int

def install() -> None:
    """Patch every loaded library, and those loaded later; idempotent."""

def patched() -> Patched:
    """Say how many loaded libraries call through our wrappers, and by how many imports."""
