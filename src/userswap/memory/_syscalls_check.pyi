"""A small arena of really missing memory, to try the system-call wrappers on."""

def start(bytes_: int) -> int:
    """Make the arena (once), patch the libraries, take SIGBUS; the arena's address."""

def evict() -> None:
    """Take every folio that is not pinned out of memory."""

def wipe() -> None:
    """Make the arena all zeros and out of memory; forget failures, counts and settings."""

def fail(offset: int, error: int) -> None:
    """Make pinning the folio at this offset fail with an errno (0: no more)."""

def set_share(bytes_: int, leave: bool = True) -> None:
    """Set the most bytes that one pin holds, and whether a folio leaves with its last pin."""

def counts() -> tuple[int, int, int]:
    """Count calls of pin, the most bytes pinned at a time, bytes pinned now."""

def is_resident(offset: int) -> bool:
    """Whether the folio at this offset is in memory."""
