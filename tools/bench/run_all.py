"""Run every bench in this folder, one process each, and leave their JSON in one folder."""

import argparse
import subprocess
import sys
from pathlib import Path

NOT_BENCHES = {"run_all.py", "timing.py", "world.py", "__init__.py"}


def main() -> int:
    """Run the benches; the exit code counts those that failed."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--output", type=Path, required=True, help="Folder for the JSON files.")
    args = parser.parse_args()
    folder = Path(__file__).resolve().parent
    benches = sorted(p for p in folder.glob("*.py") if p.name not in NOT_BENCHES)
    return sum(
        subprocess.run([sys.executable, bench, "--output", args.output]).returncode != 0
        for bench in benches
    )


if __name__ == "__main__":
    sys.exit(main())
