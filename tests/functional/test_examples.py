"""Code that pages show runs as it stands."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = ["megatron/core/transformer/moe/README.md"]


@pytest.mark.parametrize("page", PAGES)
def test_python_of_a_page_runs(page):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)
    assert blocks
    for block in blocks:
        script = block + "\nassert output.isfinite().all()\n"
        result = subprocess.run(
            [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True
        )
        assert result.returncode == 0, result.stderr
        assert result.stderr == ""


def test_the_tiny_example_trains_on_two_ranks():
    result = subprocess.run(
        ["bash", "examples/tiny/train_2_ranks_cpu.sh", "--train-iters", "3", "--device", "cpu"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={"PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin"},
    )
    assert result.returncode == 0, result.stderr
    assert "iteration        3/       3" in result.stdout
