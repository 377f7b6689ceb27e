"""The oracle of layouts under its name in tests; it is that of `tools/verify_layouts.py`."""

from tools.layouts.oracle import (
    DEFAULTS,
    SEQ,
    VOCAB,
    LayoutResult,
    StepRecord,
    global_tensors,
    make_batch,
    make_config,
    make_run,
    microbatches,
    run_layout,
)

__all__ = [
    "DEFAULTS",
    "SEQ",
    "VOCAB",
    "LayoutResult",
    "StepRecord",
    "global_tensors",
    "make_batch",
    "make_config",
    "make_run",
    "microbatches",
    "run_layout",
]
