import random

import numpy as np
import torch

from megatron.core.dist_checkpointing.rng_state import capture_rng_state, restore_rng_state


def draws() -> tuple[object, ...]:
    return (
        torch.rand(3).tolist(),
        random.random(),
        random.gauss(),
        np.random.rand(),
        np.random.standard_normal(),
    )


def test_generators_go_on_where_they_were() -> None:
    random.gauss()  # leaves a second value behind, as numpy's does
    np.random.standard_normal()
    state = capture_rng_state()
    expected = draws()
    draws()
    restore_rng_state({name: tensor.clone() for name, tensor in state.items()})
    assert draws() == expected
