"""Loss scales: what the loss is multiplied by so that small gradients survive fp16. Pure.

Numbers on the host: a step reads the norm of its gradient there anyway, and all ranks read the
same, so all of them hold the same scale without a message. Who multiplies is the training step, who
divides is the optimizer. Source: Micikevicius et al. 2018 (arXiv:1710.03740), section 3.2.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping

from megatron.core.optimizer.optimizer_config import OptimizerConfig

GROWTH_FACTOR = 2.0
BACKOFF_FACTOR = 0.5


class GradScaler(ABC):
    """A scale of the loss, and how it follows from what became of the steps."""

    def __init__(self, initial_scale: float) -> None:
        """Begin with ``initial_scale``, above 0."""
        assert initial_scale > 0.0, f"{initial_scale=}"
        self._scale = float(initial_scale)

    @property
    def scale(self) -> float:
        """What the loss of the next step is multiplied by, and its gradient divided by."""
        return self._scale

    @property
    @abstractmethod
    def can_fall(self) -> bool:
        """Whether further gradients that are not finite would lower the scale."""

    @abstractmethod
    def update(self, *, found_inf: bool) -> None:
        """Take in a step: ``found_inf`` says that its gradient was not finite."""

    @abstractmethod
    def state_dict(self) -> dict[str, float] | None:
        """Return what a checkpoint keeps, as JSON; None when all of it is in the options."""

    @abstractmethod
    def load_state_dict(self, state: Mapping[str, float] | None) -> None:
        """Go on from what ``state_dict`` of another scaler returned; None changes nothing."""


class ConstantGradScaler(GradScaler):
    """The same scale for ever; 1.0 where none is needed."""

    @property
    def can_fall(self) -> bool:
        """See GradScaler.can_fall."""
        return False

    def update(self, *, found_inf: bool) -> None:
        """Change nothing."""

    def state_dict(self) -> None:
        """See GradScaler.state_dict."""

    def load_state_dict(self, state: Mapping[str, float] | None) -> None:
        """Keep the scale of the options."""


class DynamicGradScaler(GradScaler):
    """The largest power of two below which gradients of late were finite, more or less.

    The scale halves when ``hysteresis`` gradients were not finite, and at each one from then on; it
    doubles after ``growth_interval`` finite ones in a row, which also forgives earlier ones.
    """

    def __init__(
        self,
        initial_scale: float,
        *,
        min_scale: float,
        growth_interval: int,
        hysteresis: int,
    ) -> None:
        """Begin to search at ``initial_scale``.

        Args:
            initial_scale: Far too large, as a rule: falling takes a step for each halving, and
                rising ``growth_interval`` of them.
            min_scale: The scale never falls below it.
            growth_interval: Finite gradients in a row after which the scale doubles.
            hysteresis: Gradients that are not finite, in a row or not, until the scale falls.
        """
        super().__init__(initial_scale)
        assert 0.0 < min_scale <= initial_scale, f"{min_scale=} {initial_scale=}"
        assert growth_interval >= 1, f"{growth_interval=}"
        assert hysteresis >= 1, f"{hysteresis=}"
        self._min_scale = min_scale
        self._growth_interval = growth_interval
        self._hysteresis = hysteresis
        self._growth_tracker = 0
        self._hysteresis_tracker = hysteresis

    @property
    def can_fall(self) -> bool:
        """See GradScaler.can_fall."""
        return self._scale > self._min_scale

    def update(self, *, found_inf: bool) -> None:
        """See GradScaler.update."""
        if found_inf:
            self._growth_tracker = 0
            self._hysteresis_tracker = max(0, self._hysteresis_tracker - 1)
            if self._hysteresis_tracker == 0:
                self._scale = max(self._scale * BACKOFF_FACTOR, self._min_scale)
            return
        self._growth_tracker += 1
        if self._growth_tracker >= self._growth_interval:  # above it: a resumed run's is shorter
            self._growth_tracker = 0
            self._hysteresis_tracker = self._hysteresis
            self._scale *= GROWTH_FACTOR

    def state_dict(self) -> dict[str, float]:
        """Return ``scale``, ``growth_tracker`` and ``hysteresis_tracker``, as Megatron names them.

        The finite gradients since the scale last changed, and how many that are not finite are
        still forgiven.
        """
        return {
            "scale": self._scale,
            "growth_tracker": self._growth_tracker,
            "hysteresis_tracker": self._hysteresis_tracker,
        }

    def load_state_dict(self, state: Mapping[str, float] | None) -> None:
        """See GradScaler.load_state_dict; the smallest scale is that of this run."""
        if state is not None:
            self._scale = max(float(state["scale"]), self._min_scale)
            self._growth_tracker = int(state["growth_tracker"])
            self._hysteresis_tracker = min(int(state["hysteresis_tracker"]), self._hysteresis)


def build_grad_scaler(config: OptimizerConfig, *, fp16: bool) -> GradScaler:
    """Return the scaler that the options ask for.

    Args:
        config: Of the optimizer; a given ``loss_scale`` is constant.
        fp16: Whether the model computes in fp16; everything else reaches as far down as fp32.
    """
    if config.loss_scale is not None:
        return ConstantGradScaler(config.loss_scale)
    if not fp16:
        return ConstantGradScaler(1.0)
    return DynamicGradScaler(
        config.initial_loss_scale,
        min_scale=config.min_loss_scale,
        growth_interval=int(config.loss_scale_window),
        hysteresis=config.hysteresis,
    )
