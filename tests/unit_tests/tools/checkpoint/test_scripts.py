"""The tools as a user calls them: by path, from any folder, without torch until it is needed."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[4]
PROGRAM = """
import runpy, sys
sys.path[0] = sys.argv[1].rpartition("/")[0]
sys.argv = sys.argv[1:]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    sys.stderr.write("TORCH" if "torch" in sys.modules else "")
    sys.stderr.write("OURS" if "checkpoint" in str(sys.modules["inspect"].__file__) else "")
"""


@pytest.mark.parametrize(
    ("script", "words"),
    [("inspect", []), ("reshape", []), ("average", []), ("experts", []), ("experts", ["clone"])],
)
def test_help_comes_at_once_and_python_keeps_its_inspect(script, words, tmp_path: Path) -> None:
    path = ROOT / "tools" / "checkpoint" / f"{script}.py"
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(path), *words, "--help"],
        capture_output=True,
        check=False,
        cwd=tmp_path,
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert f"usage: {script}.py" in done.stdout


def test_a_script_does_its_work(run_folder: Path, tmp_path: Path) -> None:
    script = ROOT / "tools" / "checkpoint" / "inspect.py"
    done = subprocess.run(
        [sys.executable, str(script), str(run_folder), "--verify"],
        capture_output=True,
        check=False,
        cwd=tmp_path,
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "is whole" in done.stdout
