"""The settings of a machine of CPUs, made once at the start and told in one line."""

import logging

from megatron.training.config.distributed import DistributedConfig
from megatron.training.machine.allocator import keep_memory
from megatron.training.machine.core_binding import bind
from megatron.training.machine.float32_products import choose_products

log = logging.getLogger(__name__)


def set_up_cpu(
    config: DistributedConfig, *, local_rank: int, local_world_size: int, threads: int
) -> None:
    """Bind this rank to cores, choose the allocator's ways and who multiplies; say so.

    Every rank of a run on CPUs calls this between making the process groups, whose threads stay
    free, and the model, whose memory then lies near its cores.

    Args:
        config: Has a flag against each setting.
        local_rank: Of this rank on its machine.
        local_world_size: Ranks of the machine.
        threads: Threads that compute in this rank.

    Raises:
        BackendError: See ``choose_products``.
    """
    told = [choose_products(config.cpu_float32_products)]
    told.append(keep_memory() if config.cpu_allocator == "keep" else "")
    if config.cpu_core_binding == "auto":
        told.append(bind(local_rank, local_world_size, threads))
    if said := [phrase for phrase in told if phrase]:
        log.info(" > machine: %s (--cpu-* flags change it)", "; ".join(said))
