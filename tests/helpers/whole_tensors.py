"""Slices made whole, under its name in tests; see `tools/layouts/whole_tensors.py`."""

from tools.layouts.whole_tensors import whole_tensors

__all__ = ["whole_tensors"]
