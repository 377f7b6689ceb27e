"""Keys and values of the positions that were already read, so that generation reads each once.

Layers write at ``length`` and never move it; the model moves it once, after all layers.
"""

import torch
from torch import Tensor


class KVCache:
    """Room for ``max_len`` positions of ``max_batch`` sequences in every layer."""

    holds_latents = False
    """Whether latent attention puts its latents here, not keys and values of heads."""

    def __init__(
        self,
        num_layers: int,
        max_batch: int,
        max_len: int,
        groups: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        *,
        value_dim: int | None = None,
    ) -> None:
        """Allocate.

        Args:
            num_layers: Layers of the model, keyed by global index.
            max_batch: Most sequences at a time.
            max_len: Most positions of a sequence, prompt included.
            groups: Key-value heads (query groups) of a layer.
            head_dim: Size of one head of keys.
            dtype: Of keys and values: that of the model.
            device: Of the model.
            value_dim: Size of one head of values; ``head_dim`` when None.
        """
        shape = (num_layers, max_batch, groups, max_len)
        value_dim = head_dim if value_dim is None else value_dim
        self.keys = torch.zeros(*shape, head_dim, dtype=dtype, device=device)
        self.values = torch.zeros(*shape, value_dim, dtype=dtype, device=device)
        self.max_len = max_len
        self.length = 0
        """Positions held so far, the same for all sequences."""

    def append(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Write new positions of one layer and return all of them.

        Args:
            layer: Global index of the layer.
            key: [b, groups, s, head_dim], of the ``s`` positions that follow ``length``.
            value: [b, groups, s, value_dim], of the same.

        Returns:
            Views of all keys and all values so far, [b, groups, length + s, size of a head].
        """
        batch, _, new, _ = key.shape
        end = self.length + new
        assert end <= self.max_len, f"{end} positions do not fit a cache of {self.max_len}"
        keys = self.keys[layer, :batch, :, :end]
        values = self.values[layer, :batch, :, :end]
        keys[:, :, self.length :] = key
        values[:, :, self.length :] = value
        return keys, values

    def advance(self, positions: int) -> None:
        """Count ``positions`` more as held; the model calls it after its last layer."""
        self.length += positions
