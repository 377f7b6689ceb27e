"""Options of the machine: devices, backends, process groups."""

from dataclasses import dataclass
from typing import Literal


@dataclass(kw_only=True)
class DistributedConfig:
    """Devices and process groups."""

    distributed_backend: Literal["nccl", "gloo"] | None = None
    """Communication library; nccl with --device cuda and gloo with cpu when not set."""

    device: Literal["cuda", "cpu"] | None = None
    """Where the model runs; cuda when one is there, else cpu, when not set."""

    distributed_timeout_minutes: int = 10
    """Minutes after which a collective that some rank never joins ends the run."""
