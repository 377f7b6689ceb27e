"""Options of the machine: devices, backends, process groups."""

from dataclasses import dataclass, field
from typing import Literal

from megatron.core.config_field import flag


@dataclass(kw_only=True)
class DistributedConfig:
    """Devices and process groups."""

    distributed_backend: Literal["nccl", "gloo"] | None = None
    """Communication library; nccl with --device cuda and gloo with cpu when not set."""

    device: Literal["cuda", "cpu"] | None = None
    """Where the model runs; cuda when one is there, else cpu, when not set."""

    cpu_kernels: Literal["auto", "compiled", "torch"] = "auto"
    """On a CPU in bf16 and fp32, compute attention, norms, activations, losses and the optimizer
    by C++ that is compiled when a run first needs it, in seconds, and kept in the user's cache
    folder (auto: where there is a compiler), or by PyTorch alone (torch). Last bits differ."""

    cpu_core_binding: Literal["auto", "none"] = "auto"
    """Give each of several ranks on a machine of CPUs cores of its own, whole ones of one NUMA node
    where they fit, within what the process was given (auto); not where the launcher has given each
    rank a set of its own, or where there are fewer cores than threads. none lets all run on all."""

    cpu_allocator: Literal["keep", "default"] = "keep"
    """On a CPU, let the process keep the memory that a step frees for the next one (keep), or give
    it back to the system as glibc does by itself (default): the same peak, and a fault for each
    page in each step. Left alone where MALLOC_*, GLIBC_TUNABLES or LD_PRELOAD is set."""

    cpu_float32_products: Literal["auto", "onednn", "torch"] = "auto"
    """Who multiplies fp32 matrices on a CPU: oneDNN on AMD's processors where it is exact, which is
    tried out at the start, and torch's choice, MKL, elsewhere (auto); oneDNN, or an error where it
    would round to bf16 (onednn); torch's choice (torch). Last bits differ."""

    distributed_timeout_minutes: int = 10
    """Minutes after which a collective that some rank never joins ends the run."""

    check_replica_hash: int | None = field(
        default=None,
        metadata=flag("--check-replica-hash", "--check-weight-hash-across-dp-replicas-interval"),
    )
    """Iterations between checks that ranks with copies of a weight or expert bias hold the same
    bits; a difference ends the run and names tensor and ranks. Checked at the start only when not
    set."""

    check_collectives: bool = False
    """Before each collective, compare it with those of the other ranks: operation, size, dtype,
    rows to each rank. A difference, or a rank that does not come, ends the run and names both
    places in the program. For debugging: slow, and nothing overlaps. Sends between stages and in a
    ring are not compared, nor is what --async-save does in the background."""
