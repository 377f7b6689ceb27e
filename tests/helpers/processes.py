"""What child processes cost. Processor time, not the clock: the machine may be busy."""

import resource


def child_seconds() -> float:
    """Return the processor time of all finished children so far, in seconds."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime
