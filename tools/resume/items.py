"""What a resumed run must have in common with the unbroken one, item by item, and what to suspect.

The order is that of causes: of what differs at the same moment, the first item is named.
"""

from typing import NamedTuple

from tools.resume.state_files import BUFFER, FROZEN, SCRATCH, WEIGHT


class Item(NamedTuple):
    """One row of the verdict."""

    name: str
    after_loading: str
    """What to suspect when it differs right after loading."""
    in_a_step: str = ""
    """What to suspect when it differs in a step, and nothing did before."""


_NOT_SAVED = "was not saved, or not loaded"
_STEP = "an update that depends on something that is in no checkpoint"

COUNTERS = Item("counters", f"where training stood {_NOT_SAVED}", "a step is counted otherwise")
DROPOUT = Item("dropout stream", f"the seed of the dropout masks {_NOT_SAVED}")
GENERATORS = Item(
    "random generators",
    f"the state of a global generator (torch, Python, numpy, CUDA) {_NOT_SAVED}",
    "something draws from a global generator in one run and not in the other, while the run is "
    "set up or loaded",
)
LOSS_SCALE = Item(
    "loss scale",
    f"the loss scale, or its count of steps to the next growth, {_NOT_SAVED}",
    "the loss scale follows something that is in no checkpoint",
)
WEIGHTS = Item("weights", f"a weight {_NOT_SAVED}", _STEP)
EXPERTS = Item("experts", f"an expert {_NOT_SAVED}", _STEP)
MAIN = Item("main weights", f"a main weight of the optimizer {_NOT_SAVED}", _STEP)
FIRST = Item("first moment", f"the optimizer's mean of gradients {_NOT_SAVED}", _STEP)
SECOND = Item("second moment", f"the optimizer's mean of squares {_NOT_SAVED}", _STEP)
BIAS = Item(
    "expert bias",
    f"the bias that balances experts {_NOT_SAVED} (is it a persistent buffer?)",
    "the bias follows counts of tokens that are in no checkpoint",
)
BUFFERS = Item("buffers", f"a buffer of the model {_NOT_SAVED} (is it persistent?)", _STEP)
SAMPLE_IDS = Item(
    "sample ids",
    "",
    "the position in the data was not saved or not used: the run reads on at another sample",
)
SAMPLES = Item(
    "samples", "", "the same sample number has other content: the order of the data has changed"
)
RATE = Item(
    "learning rate",
    "",
    "the schedule counts steps of its own, and that count was not saved or not loaded",
)
DECAY = Item("weight decay", "", RATE.in_a_step)
LOSS = Item(
    "loss",
    "",
    "tensors, counters and samples are the same, the forward pass is not: it depends on something "
    "that is in no checkpoint (dropout, noise, a cache, a counter in a module)",
)
NORM = Item("gradient norm", "", "the loss is the same, its gradient is not: see the backward pass")

ITEMS = (
    COUNTERS,
    DROPOUT,
    GENERATORS,
    LOSS_SCALE,
    WEIGHTS,
    EXPERTS,
    MAIN,
    FIRST,
    SECOND,
    BIAS,
    BUFFERS,
    SAMPLE_IDS,
    SAMPLES,
    RATE,
    DECAY,
    LOSS,
    NORM,
)
"""In the order of causes."""
_IN_STEP = (
    SAMPLE_IDS,
    SAMPLES,
    RATE,
    DECAY,
    LOSS,
    LOSS_SCALE,
    NORM,
    COUNTERS,
    DROPOUT,
    GENERATORS,
)
_OF_KIND = {
    "main_param": MAIN,
    "exp_avg": FIRST,
    "momentum_buffer": FIRST,
    "exp_avg_sq": SECOND,
}


def order_in_step(item: Item) -> int:
    """Return the place of an item among those of a step; tensors come last."""
    return _IN_STEP.index(item) if item in _IN_STEP else len(_IN_STEP) + ITEMS.index(item)


def item_of_tensor(name: str) -> Item:
    """Return the row that a tensor ``<kind>.<global name>`` belongs to."""
    kind = name.partition(".")[0]
    if kind in (BUFFER, SCRATCH):
        return BIAS if name.endswith("expert_bias") else BUFFERS
    if kind in (WEIGHT, FROZEN):
        return EXPERTS if ".local_experts." in name else WEIGHTS
    return _OF_KIND.get(kind, BUFFERS)
