"""Names of what a recorded run writes."""

LOADED = "loaded"
"""Folder of the tensors as they were before the first step; event of the line that says so."""
STEP = "step"
"""Event of a line about one step."""


def after_step_folder(iteration: int) -> str:
    """Name the folder of the tensors after a step."""
    return f"after_step_{iteration}"


def steps_file(rank: int) -> str:
    """Name the file of a rank with a line for each event."""
    return f"steps{rank}.jsonl"
