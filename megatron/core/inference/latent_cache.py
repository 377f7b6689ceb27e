"""What latent attention remembers of a position: its latent and its one rotated key, for all heads.

Source: DeepSeek-V2 (arXiv:2405.04434), section 2.1.2 and table 1.
"""

import torch
from torch import Tensor

from megatron.core.inference.kv_cache import KVCache


class LatentCache(KVCache):
    """A cache of one group whose keys are [latent, rotated key] and whose values are the latent."""

    holds_latents = True

    def __init__(
        self,
        num_layers: int,
        max_batch: int,
        max_len: int,
        latent_dim: int,
        rotated_dim: int,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
    ) -> None:
        """Allocate.

        Args:
            num_layers: See ``KVCache``.
            max_batch: See ``KVCache``.
            max_len: See ``KVCache``.
            latent_dim: Width of the latent that keys and values are made from.
            rotated_dim: Width of the rotated key.
            dtype: See ``KVCache``.
            device: See ``KVCache``.
        """
        width = latent_dim + rotated_dim
        super().__init__(num_layers, max_batch, max_len, 1, width, dtype, device, value_dim=0)
        self.latent_dim = latent_dim

    def append(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """See ``KVCache.append``; ``value`` is the latent in ``key`` and is not kept again."""
        keys, _ = super().append(layer, key, value[..., :0])
        return keys, keys[..., : self.latent_dim]
