"""Several ranks of this machine, under its name in tests; see `tools/layouts/ranks.py`."""

from tools.layouts.ranks import run_ranks

__all__ = ["run_ranks"]
