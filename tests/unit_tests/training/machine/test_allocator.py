import os
import platform
import subprocess
import sys

import pytest

from megatron.training.machine.allocator import keep_memory

# blocks as in a step: above and below 32 MiB, written, and given back; prints faults a round
STEPS = """
import ctypes, resource, sys
from megatron.training.machine.allocator import keep_memory
if sys.argv[1] == "keep":
    assert keep_memory() == "freed memory kept for the next step"
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]
def step():
    blocks = []
    for mib in (3, 40, 17, 5):
        blocks.append(libc.malloc(mib << 20))
        ctypes.memset(blocks[-1], 1, mib << 20)
    for block in blocks:
        libc.free(block)
for _ in range(3):
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(4):
    step()
print((resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) // 4)
"""


def faults(how: str) -> int:
    env = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "GLIBC", "LD_PRE"))}
    done = subprocess.run(
        [sys.executable, "-c", STEPS, how], env=env, capture_output=True, text=True, timeout=60
    )
    assert not done.returncode, done.stderr
    return int(done.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc alone has these settings")
def test_a_step_faults_no_pages_that_the_one_before_had():
    assert faults("keep") < 100
    assert faults("default") > 40 * 256  # at least the block over 32 MiB, 4 KiB a page


def test_what_the_environment_says_is_left_alone(monkeypatch):
    if platform.libc_ver()[0] != "glibc":
        pytest.skip("nothing is set there anyway")
    monkeypatch.setenv("MALLOC_ARENA_MAX", "2")
    monkeypatch.setattr("ctypes.CDLL", None)  # would fail if it were used
    assert keep_memory().startswith("allocator as MALLOC_ARENA_MAX")


def test_nothing_is_set_without_glibc(monkeypatch):
    monkeypatch.setattr("platform.libc_ver", lambda: ("", ""))
    monkeypatch.setattr("ctypes.CDLL", None)
    assert keep_memory() == "allocator as it is (not glibc)"
