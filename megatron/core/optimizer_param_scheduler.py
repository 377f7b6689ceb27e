"""Learning rate and weight decay as pure functions of the samples consumed so far.

Nothing is counted here and nothing is remembered: a resumed run asks with the same number and
gets the same values. Steps are samples, whatever the field names (Megatron's) say.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from megatron.core.errors import ConfigError

DecayStyle = Literal["constant", "linear", "cosine", "inverse-square-root", "WSD"]
WsdDecayStyle = Literal["exponential", "linear", "cosine", "minus_sqrt"]
IncreaseStyle = Literal["constant", "linear", "cosine"]

# ratio of the way done, in (0, 1] -> share of (max_lr - min_lr) that is left
_DECAY: dict[str, Callable[[float], float]] = {
    "linear": lambda ratio: 1.0 - ratio,
    "cosine": lambda ratio: 0.5 * (math.cos(math.pi * ratio) + 1.0),
}
_WSD_DECAY: dict[str, Callable[[float], float]] = {
    **_DECAY,
    "exponential": lambda ratio: 2.0 * 0.5**ratio - 1.0,
    "minus_sqrt": lambda ratio: 1.0 - math.sqrt(ratio),
}
_INCREASE: dict[str, Callable[[float], float]] = {
    "linear": lambda ratio: ratio,
    "cosine": lambda ratio: 0.5 * (math.cos(math.pi * (1.0 - ratio)) + 1.0),
}


class HasParamGroups(Protocol):
    """An optimizer, as far as a schedule knows it."""

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Dicts with ``lr`` and ``weight_decay``, and perhaps ``lr_mult`` and ``wd_mult``."""


@dataclass(frozen=True, kw_only=True)
class OptimizerParamScheduler:
    """The schedule of one run; two equal schedules give equal values at every point.

    Raises:
        ConfigError: The settings contradict each other; all problems at once.
    """

    init_lr: float
    """Learning rate at which warm-up begins."""
    max_lr: float
    """Learning rate at the end of warm-up."""
    min_lr: float
    """Learning rate at the end of the decay, and after it."""
    lr_warmup_steps: int
    """Samples of warm-up."""
    lr_decay_steps: int
    """Sample, counted from the start of the run, at which the decay ends."""
    lr_decay_style: DecayStyle
    """Shape of the decay."""
    start_wd: float
    """Weight decay at the start of the run."""
    end_wd: float
    """Weight decay after ``wd_incr_steps`` samples."""
    wd_incr_steps: int
    """Samples over which weight decay goes from ``start_wd`` to ``end_wd``."""
    wd_incr_style: IncreaseStyle
    """Shape of that way."""
    wsd_decay_steps: int | None = None
    """Samples of the final decay of WSD."""
    lr_wsd_decay_style: WsdDecayStyle | None = None
    """Shape of the final decay of WSD."""

    def __post_init__(self) -> None:
        """Refuse settings that contradict each other."""
        ConfigError.raise_if_any(self._problems())

    def lr_at(self, samples: int) -> float:
        """Return the learning rate of the step that begins after ``samples`` samples.

        Sources: cosine Loshchilov and Hutter 2017 (arXiv:1608.03983); inverse square root Vaswani
        et al. 2017 (arXiv:1706.03762); WSD Hu et al. 2024 (arXiv:2404.06395).
        """
        if samples <= self.lr_warmup_steps and self.lr_warmup_steps > 0:
            return self.init_lr + (self.max_lr - self.init_lr) * samples / self.lr_warmup_steps
        if self.lr_decay_style == "constant":
            return self.max_lr
        if samples > self.lr_decay_steps:
            return self.min_lr
        if self.lr_decay_style == "inverse-square-root":
            root = math.sqrt(max(self.lr_warmup_steps, 1)) / math.sqrt(max(samples, 1))
            return max(self.min_lr, self.max_lr * root)
        return self.min_lr + self._share_left(samples) * (self.max_lr - self.min_lr)

    def wd_at(self, samples: int) -> float:
        """Return the weight decay of the step that begins after ``samples`` samples."""
        if samples > self.wd_incr_steps or self.wd_incr_style == "constant":
            return self.end_wd
        ratio = samples / self.wd_incr_steps if self.wd_incr_steps else 1.0
        return self.start_wd + _INCREASE[self.wd_incr_style](ratio) * (self.end_wd - self.start_wd)

    def step(self, optimizer: HasParamGroups, consumed_samples: int) -> None:
        """Set the values for the step that begins after ``consumed_samples`` samples."""
        lr, wd = self.lr_at(consumed_samples), self.wd_at(consumed_samples)
        for group in optimizer.param_groups:
            group["lr"] = lr * group.get("lr_mult", 1.0)
            group["weight_decay"] = wd * group.get("wd_mult", 1.0)

    def _share_left(self, samples: int) -> float:
        if self.lr_decay_style == "WSD":
            assert self.wsd_decay_steps is not None, "checked at construction"
            done = samples - (self.lr_decay_steps - self.wsd_decay_steps)
            if done <= 0:
                return 1.0
            return _WSD_DECAY[self.lr_wsd_decay_style or "exponential"](done / self.wsd_decay_steps)
        length = self.lr_decay_steps - self.lr_warmup_steps
        return _DECAY[self.lr_decay_style]((samples - self.lr_warmup_steps) / length)

    def _problems(self) -> Iterator[str]:
        if not 0.0 <= self.min_lr <= self.max_lr:
            yield f"--min-lr {self.min_lr} must lie between 0 and --lr {self.max_lr}"
        if not 0.0 <= self.init_lr <= self.max_lr:
            yield f"--lr-warmup-init {self.init_lr} must lie between 0 and --lr {self.max_lr}"
        if self.lr_decay_steps < 1:
            yield f"--lr-decay-iters must be at least 1 (= {self.lr_decay_steps} samples)"
        elif not 0 <= self.lr_warmup_steps < self.lr_decay_steps:
            yield (
                f"warm-up of {self.lr_warmup_steps} samples must end before the decay does, at "
                f"{self.lr_decay_steps} samples: lower --lr-warmup-iters or raise --lr-decay-iters"
            )
        yield from self._wd_problems()
        if self.lr_decay_style == "WSD":
            yield from self._wsd_problems()

    def _wd_problems(self) -> Iterator[str]:
        if not 0.0 <= self.start_wd <= self.end_wd:
            yield (
                f"--start-weight-decay {self.start_wd} must lie between 0 and "
                f"--end-weight-decay {self.end_wd}"
            )
        if self.wd_incr_style == "constant" and self.start_wd != self.end_wd:
            yield (
                f"--start-weight-decay {self.start_wd} and --end-weight-decay {self.end_wd} "
                "differ: choose --weight-decay-incr-style linear or cosine"
            )

    def _wsd_problems(self) -> Iterator[str]:
        room = self.lr_decay_steps - self.lr_warmup_steps
        if self.wsd_decay_steps is None:
            yield "--lr-decay-style WSD needs --lr-wsd-decay-iters"
        elif not 0 < self.wsd_decay_steps <= room:
            yield (
                f"--lr-wsd-decay-iters (= {self.wsd_decay_steps} samples) must be at least 1 and "
                f"fit between the end of warm-up and that of the decay (= {room} samples)"
            )
