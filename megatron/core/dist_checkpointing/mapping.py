"""Which global keys a checkpoint holds: the tensors of model and optimizer, named without ranks.

    model.<name>                weights and persistent buffers
    optimizer.<state>.<name>    moments and fp32 main weights, shaped like the parameter
    rng.<rank>.<library>        random state of one rank (see rng_state.py)

Experts are named by their global id, so nothing here depends on data or expert parallel sizes.
"""

from collections.abc import Iterable, Iterator, Mapping

from torch import Tensor, nn

from megatron.core.param_role import ParamRole, logical_tensors, role_of

MODEL = "model."
OPTIMIZER = "optimizer."
RNG = "rng."

NamedState = Iterable[tuple[str, ParamRole, Mapping[str, Tensor]]]


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return views of the weights and persistent buffers of this rank, by global key.

    Args:
        model: Every parameter carries a ``ParamRole``.
    """
    tensors: dict[str, Tensor] = {}
    for name, param in model.named_parameters():
        for key, piece in logical_tensors(name, param.detach(), role_of(param)):
            _add(tensors, MODEL + key, piece)
    for name, buffer in _persistent_buffers(model):
        _add(tensors, MODEL + name, buffer)
    return tensors


def optimizer_tensors(named_state: NamedState) -> dict[str, Tensor]:
    """Return views of the optimizer's tensors of this rank, by global key.

    Args:
        named_state: (parameter name, role, state name -> tensor shaped like the parameter), as
            ``MegatronOptimizer.named_state`` yields.
    """
    tensors: dict[str, Tensor] = {}
    for name, role, states in named_state:
        for state, tensor in states.items():
            for key, piece in logical_tensors(name, tensor.detach(), role):
                _add(tensors, f"{OPTIMIZER}{state}.{key}", piece)
    return tensors


def _add(tensors: dict[str, Tensor], key: str, tensor: Tensor) -> None:
    assert key not in tensors, f"two tensors are named {key}"
    tensors[key] = tensor


def _persistent_buffers(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for prefix, module in model.named_modules():
        for name, buffer in module.named_buffers(recurse=False):
            if name not in module._non_persistent_buffers_set:
                yield (f"{prefix}.{name}" if prefix else name), buffer
