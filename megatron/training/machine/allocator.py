"""Memory that a step gives back to glibc stays with the process, for the next step to use again.

By itself glibc maps every block over 32 MiB anew and gives the end of its heap back to the kernel:
each step then takes the same pages again, one fault and 4 KiB of zeros after the other.
"""

import ctypes
import os
import platform
import sys

# malloc.h
_TRIM_THRESHOLD, _MMAP_MAX = -1, -4
_NEVER = 2**31 - 1
_OWN_WORDS = ("MALLOC_", "GLIBC_TUNABLES", "LD_PRELOAD")


def keep_memory() -> str:
    """Tell glibc to keep what is freed, for the rest of this process; return a phrase.

    Nothing is set where there is no glibc, or where the environment says how to allocate.
    """
    if sys.platform != "linux" or platform.libc_ver()[0] != "glibc":
        return "allocator as it is (not glibc)"
    if said := sorted(name for name in os.environ if name.startswith(_OWN_WORDS)):
        return f"allocator as {', '.join(said)} says"
    libc = ctypes.CDLL(None)
    if libc.mallopt(_MMAP_MAX, 0) and libc.mallopt(_TRIM_THRESHOLD, _NEVER):
        return "freed memory kept for the next step"
    return "allocator as it is (glibc refused)"
