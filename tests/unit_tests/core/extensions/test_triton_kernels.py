"""Triton's kernels in Triton's interpreter on a CPU give what torch gives."""

import importlib.util
import json
import os
import subprocess
import sys

import pytest

from megatron.core.extensions import triton_ops
from tests.helpers.triton_cases import CASES

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None,
    reason="triton is not installed: pip install triton (290 MB; no GPU is needed)",
)


@pytest.fixture(scope="module")
def failed() -> dict[str, str]:
    """Case -> what failed, of all cases in one process."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.helpers.triton_cases"],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@needs_triton
@pytest.mark.parametrize("case", CASES)
def test_a_kernel_gives_what_torch_gives(case, failed):
    assert case not in failed, failed[case]


def test_without_a_device_they_are_not_usable_and_the_reason_is_told(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert triton_ops.unusable.__wrapped__() == "needs a CUDA device"
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert triton_ops.unusable.__wrapped__() == "the package triton is not installed"
