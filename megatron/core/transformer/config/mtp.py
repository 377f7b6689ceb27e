"""Options of multi-token prediction. TransformerConfig inherits them."""

from dataclasses import dataclass


@dataclass(kw_only=True)
class MTPConfig:
    """Multi-token prediction."""

    mtp_num_layers: int | None = None
    """Modules of multi-token prediction (D), one after another: the k-th predicts the token k
    further ahead than the model does, in training alone. None for none."""

    mtp_loss_scaling_factor: float = 0.1
    """Weight of the mean of the D losses of --mtp-num-layers beside the loss of the model."""

    @property
    def mtp_depths(self) -> int:
        """Number of modules of multi-token prediction; 0 for none."""
        return self.mtp_num_layers or 0
