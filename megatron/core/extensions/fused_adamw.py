"""AdamW by torch's fused kernel, without the classes of torch.optim around it.

The first ``torch.optim`` optimizer that is made imports torch._dynamo: 800 modules, a second of
every start. What is left of the class is a loop over groups and one call.
"""

from collections import defaultdict
from typing import Any

import torch
from torch import Tensor


class FusedAdamW:
    """Steps parameters that carry their ``.grad``; bit for bit torch.optim.AdamW(fused=True).

    ``param_groups`` and ``state`` are laid out as those of torch. A parameter without state gets
    it in its first step: ``step`` (fp32, []), ``exp_avg`` and ``exp_avg_sq``.
    """

    _step_supports_amp_scaling = True  # what torch's fused optimizers say of themselves

    def __init__(
        self,
        groups: list[dict[str, Any]],
        *,
        lr: float,
        betas: tuple[float, float],
        eps: float,
    ) -> None:
        """Take ``groups``, each with its ``params`` and ``weight_decay``."""
        common = {"lr": lr, "betas": betas, "eps": eps}
        self.param_groups: list[dict[str, Any]] = [{**common, **group} for group in groups]
        self.state: dict[Tensor, dict[str, Tensor]] = {}
        self.grad_scale: Tensor | None = None
        """Gradients are divided by it in the kernel, [] fp32; nothing when None."""
        self.found_inf: Tensor | None = None
        """1.0 makes the step do nothing, [] fp32; None never does."""

    @torch.no_grad()
    def step(self) -> None:
        """Update every parameter and its state in place."""
        for group in self.param_groups:
            alike: dict[tuple[torch.device, torch.dtype], list[Tensor]] = defaultdict(list)
            for param in group["params"]:
                alike[param.device, param.dtype].append(param)
            for params in alike.values():
                self._step(params, group)

    def _step(self, params: list[Tensor], group: dict[str, Any]) -> None:
        states = [self._state_of(param) for param in params]
        steps = [state["step"] for state in states]
        torch._foreach_add_(steps, 1)
        torch._fused_adamw_(
            params,
            [_grad_of(param) for param in params],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            steps,
            lr=group["lr"],
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            amsgrad=False,
            maximize=False,
            grad_scale=self.grad_scale,
            found_inf=self.found_inf,
        )
        if self.found_inf is not None:
            torch._foreach_sub_(steps, [self.found_inf] * len(steps))

    def _state_of(self, param: Tensor) -> dict[str, Tensor]:
        if param not in self.state:
            self.state[param] = {
                "step": torch.zeros((), dtype=torch.float32, device=param.device),
                "exp_avg": torch.zeros_like(param),
                "exp_avg_sq": torch.zeros_like(param),
            }
        return self.state[param]


def _grad_of(param: Tensor) -> Tensor:
    assert param.grad is not None, "a flat gradient is set once and kept"
    return param.grad
