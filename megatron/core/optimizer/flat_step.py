"""The step of a torch optimizer over flat tensors: made, filled with zero moments, called.

Knows tensors and numbers, not models. A fused torch optimizer divides gradients and skips a
non-finite step inside its kernel; any other gets gradients divided, and is not called to skip.
On a CPU fp32 AdamW is compiled (``cpu_kernels/flat_buffers.py``): one pass that also rounds.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from megatron.core.cpu_kernels.flat_buffers import AdamWConstants, FlatKernels, flat_kernels
from megatron.core.extensions.fused_adamw import FusedAdamW
from megatron.core.extensions.registry import resolve
from megatron.core.optimizer.clip_grads import clip_divisor
from megatron.core.optimizer.optimizer_config import OptimizerConfig


class FlatStep:
    """Steps flat main parameters by the gradients in their ``.grad``.

    Moments exist from the start, as zeros, so that a checkpoint can be loaded before any step.
    """

    def __init__(
        self,
        config: OptimizerConfig,
        groups: list[dict[str, Any]],
        rounded: Mapping[Tensor, Tensor] | None = None,
    ) -> None:
        """Make the optimizer.

        Args:
            config: Kind and constants of the optimizer, and ``clip_grad``.
            groups: torch parameter groups; every parameter is flat, has its ``.grad``, and
                every group names its ``weight_decay``.
            rounded: Parameter -> the narrower weights that it is rounded to by whoever steps, or
                by the step itself where it ``rounds``.
        """
        self._clip_grad = config.clip_grad
        self.optimizer = _make_optimizer(config, groups)
        self.moment_names = _moment_names(config)
        self._mains: list[Tensor] = [main for group in groups for main in group["params"]]
        for main in self._mains:
            self.optimizer.state[main] = {
                "step": torch.zeros((), dtype=torch.float32, device=main.device),
                **{name: torch.zeros_like(main) for name in self.moment_names},
            }
        self._folds = bool(getattr(self.optimizer, "_step_supports_amp_scaling", False))
        # the kernel's divisor is fp32, too coarse for fp64
        self._folds_clipping = self._folds and all(
            main.dtype == torch.float32 for main in self._mains
        )
        self._kernels = self._find_kernels()
        self._rounded = dict(rounded or {})
        self._step_count = 0

    def rounds(self, main: Tensor) -> bool:
        """Whether a step writes the narrower weights of ``main`` too."""
        narrow = self._rounded.get(main)
        return (
            self._kernels is not None
            and narrow is not None
            and narrow.dtype == torch.bfloat16
            and narrow.is_contiguous()
        )

    @property
    def step_count(self) -> int:
        """Steps taken, skipped ones left out."""
        return self._step_count

    @step_count.setter
    def step_count(self, count: int) -> None:
        self._step_count = count
        for main in self._mains:
            self.optimizer.state[main]["step"].fill_(count)
        for group in self.optimizer.param_groups:
            group["step"] = count  # where apex counts; torch ignores it

    def moments(self, main: Tensor) -> dict[str, Tensor]:
        """Return the flat moments of ``main`` by name."""
        state = self.optimizer.state[main]
        return {name: state[name] for name in self.moment_names}

    def step(self, norm: Tensor, loss_scale: float = 1.0) -> float:
        """Clip and step; do nothing at all if the gradient is not finite.

        Gradients may be divided in place when they are clipped or scaled.

        Args:
            norm: Global norm of the gradient as it is in ``.grad``, a scalar on the device, equal
                on all ranks.
            loss_scale: What the loss was multiplied by, and so the gradient.

        Returns:
            The norm of the gradient of the loss itself; reading it is the only time the host
            waits for the device.
        """
        norm = norm / loss_scale
        if self._kernels is not None:
            value = norm.item()
            if math.isfinite(value):
                self._step_compiled(self._kernels, self._divisor(norm, loss_scale))
        elif self._folds:
            self._launch(norm, loss_scale)
            value = norm.item()
        else:
            value = norm.item()
            if math.isfinite(value):
                self._divide(norm, loss_scale)
                self.optimizer.step()
        self._step_count += math.isfinite(value)
        return value

    def _launch(self, norm: Tensor, loss_scale: float) -> None:
        """Queue the step without knowing the norm on the host (the protocol of ``GradScaler``)."""
        optimizer: Any = self.optimizer
        optimizer.found_inf = torch.logical_not(torch.isfinite(norm)).float()
        optimizer.grad_scale = None
        divisor = self._divisor(norm, loss_scale)
        if divisor is not None and self._folds_clipping:
            optimizer.grad_scale = divisor.float()
        else:
            self._divide(norm, loss_scale)
        optimizer.step()

    def _find_kernels(self) -> FlatKernels | None:
        """Return the compiled step where it computes what ``optimizer`` would; else None."""
        if type(self.optimizer) is not FusedAdamW or not self._mains:
            return None
        flats: list[Tensor] = []
        for main in self._mains:
            assert main.grad is not None, "a flat gradient is set once and kept"
            flats += [main, main.grad, *self.moments(main).values()]
        return flat_kernels(*flats)

    def _step_compiled(self, kernels: FlatKernels, divisor: Tensor | None) -> None:
        for group in self.optimizer.param_groups:
            constants = AdamWConstants(
                self._step_count + 1,
                float(group["lr"]),
                group["betas"],
                group["eps"],
                float(group["weight_decay"]),
                1.0 if divisor is None else divisor.item(),
            )
            for main in group["params"]:
                state = self.optimizer.state[main]
                narrow = self._rounded[main] if self.rounds(main) else None
                moments = (state["exp_avg"], state["exp_avg_sq"])
                kernels.adamw(main, main.grad, *moments, constants, narrow)
                state["step"].fill_(constants.step)

    def _divisor(self, norm: Tensor, loss_scale: float) -> Tensor | None:
        """Return what gradients are divided by, [] fp64; None for nothing."""
        if self._clip_grad > 0.0:
            return clip_divisor(norm, self._clip_grad) * loss_scale
        return None if loss_scale == 1.0 else torch.full_like(norm, loss_scale)

    def _divide(self, norm: Tensor, loss_scale: float) -> None:
        divisor = self._divisor(norm, loss_scale)
        if divisor is not None:
            for main in self._mains:
                assert main.grad is not None, "a flat gradient is set once and kept"
                main.grad.div_(divisor)


def _moment_names(config: OptimizerConfig) -> tuple[str, ...]:
    if config.optimizer == "adam":
        return ("exp_avg", "exp_avg_sq")
    return ("momentum_buffer",) if config.sgd_momentum else ()


def _make_optimizer(
    config: OptimizerConfig, groups: list[dict[str, Any]]
) -> torch.optim.Optimizer | FusedAdamW:
    assert config.lr is not None, "--lr is resolved before an optimizer is made"
    if config.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=config.lr, momentum=config.sgd_momentum, fused=True)
    betas = (config.adam_beta1, config.adam_beta2)
    optimizer: torch.optim.Optimizer | FusedAdamW = resolve("adam")(
        groups, lr=config.lr, betas=betas, eps=config.adam_eps
    )
    return optimizer
