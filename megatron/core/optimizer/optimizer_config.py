"""Options of the optimizer."""

from dataclasses import dataclass
from typing import Literal

from megatron.core.config_field import derived


@dataclass(kw_only=True)
class OptimizerConfig:
    """Optimizer."""

    optimizer: Literal["adam", "sgd"] = "adam"
    """AdamW (weight decay apart from the gradient), or SGD with momentum."""

    lr: float = derived()
    """Highest learning rate. When not set: 3e-4 with warm-up over 1 % of the run, announced."""

    min_lr: float = 0.0
    """Lowest learning rate of the decay."""

    weight_decay: float = 0.01
    """Weight decay of matrices; biases and norms have none."""

    adam_beta1: float = 0.9
    """Decay of the first moment."""

    adam_beta2: float = 0.999
    """Decay of the second moment."""

    adam_eps: float = 1e-8
    """Added to the root of the second moment."""

    sgd_momentum: float = 0.9
    """Momentum of SGD."""

    clip_grad: float = 1.0
    """Largest global L2 norm of the gradient; 0 turns clipping off."""

    loss_scale: float | None = None
    """What --fp16 multiplies the loss by, so that small gradients are not rounded to 0. When not
    given the scale is dynamic: it follows from the gradients that were not finite."""

    initial_loss_scale: float = 4294967296
    """Dynamic loss scale of the first step, 2**32. Updates are skipped until it has fallen to what
    gradients bear, 20 or so."""

    min_loss_scale: float = 1.0
    """The dynamic loss scale never falls below it; ten skipped updates in a row there end the
    run."""

    loss_scale_window: float = 1000
    """Updates in a row after which the dynamic loss scale doubles."""

    hysteresis: int = 2
    """Gradients that are not finite until the dynamic loss scale halves, and it halves at each one
    from then on until it has doubled again."""
