"""The global random generators of this process, as plain tensors.

Training itself draws nothing from them (dropout is a function of seed and sample), but a user's
own model or data code may; a run that resumes on as many ranks finds them where they were.
"""

import random

import numpy as np
import torch
from torch import Tensor


def capture_rng_state() -> dict[str, Tensor]:
    """Return library -> state; copies, on the CPU."""
    version, words, gauss = random.getstate()
    numpy_state = np.random.get_state(legacy=False)
    assert isinstance(numpy_state, dict), "numpy's global generator is not a MT19937"
    inner = numpy_state["state"]
    state = {
        "torch": torch.get_rng_state(),
        "python": torch.tensor([version, *words], dtype=torch.int64),
        "python_gauss": _optional(gauss),
        "numpy": torch.from_numpy(np.append(inner["key"], inner["pos"]).astype(np.int64)),
        "numpy_gauss": _optional(numpy_state["gauss"] if numpy_state["has_gauss"] else None),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def restore_rng_state(state: dict[str, Tensor]) -> None:
    """Put the generators back to what ``capture_rng_state`` returned."""
    torch.set_rng_state(state["torch"])
    version, *words = state["python"].tolist()
    random.setstate((version, tuple(words), _value(state["python_gauss"])))
    *key, position = state["numpy"].tolist()
    gauss = _value(state["numpy_gauss"])
    np.random.set_state(
        ("MT19937", np.array(key, np.uint32), position, gauss is not None, gauss or 0.0)
    )
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def _optional(value: float | None) -> Tensor:
    return torch.tensor([value is not None, value or 0.0], dtype=torch.float64)


def _value(pair: Tensor) -> float | None:
    there, value = pair.tolist()
    return value if there else None
