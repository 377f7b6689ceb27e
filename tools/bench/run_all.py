"""Run every bench in this folder, one process each, and leave their JSON in one folder."""

import argparse
import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).resolve().parent


def benches() -> list[Path]:
    """Return the files that can be run, but those that run others."""
    runs = (p for p in FOLDER.glob("*.py") if "\ndef main() -> " in p.read_text())
    return sorted(p for p in runs if not p.name.startswith("run_"))


def main() -> int:
    """Run the benches; the exit code counts those that failed."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--output", type=Path, required=True, help="Folder for the JSON files.")
    args = parser.parse_args()
    return sum(
        subprocess.run([sys.executable, bench, "--output", args.output]).returncode != 0
        for bench in benches()
    )


if __name__ == "__main__":
    sys.exit(main())
