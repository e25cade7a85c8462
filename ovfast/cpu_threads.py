"""How many processors this process may use."""

import os


def available_threads() -> int:
    """Processors of this process."""
    return len(os.sched_getaffinity(0))
