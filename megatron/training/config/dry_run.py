"""Options of the dry run: every rank of a run of any size, planned in one process."""

from dataclasses import dataclass


@dataclass(kw_only=True)
class DryRunConfig:
    """Dry run."""

    dry_run: bool = False
    """Train nothing: build all ranks without memory, in one process on the CPU; show ranks, layers,
    parameters, memory and communication; look for deadlocks. Exit code 1 if there is one."""

    dry_run_world_size: int | None = None
    """Ranks of the run that --dry-run looks at; torchrun's WORLD_SIZE, or 1, when not set."""

    dry_run_memory_gib: float | None = None
    """Memory of a device in GiB (2^30 bytes): --dry-run ends with exit code 1 if a rank needs more.
    No limit when not set."""

    dry_run_json: str | None = None
    """File to which --dry-run writes its figures as JSON. None is written when not set."""
