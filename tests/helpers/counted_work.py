"""What one training step does, counted: calls, allocations, operations, never seconds.

The counts do not depend on the machine: the model is small, its batches are made from numbers, and
what is compiled, or is not, is chosen by the caller.
"""

import json
import sys
import tempfile
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron.core.cpu_kernels import choice
from megatron.training.dry_run.events import MESSAGES, Post
from megatron.training.dry_run.recorded_run import Recipe, record_step
from megatron.training.run import TrainState
from megatron.training.train_step import train_step
from pretrain_gpt import forward_step, model_provider
from tests.helpers.ranks import run_ranks
from tools.bench.timed_run import options_of, random_batch
from tools.layouts.oracle import make_config, make_run, microbatches

ROOT = str(Path(__file__).parents[2])
LAYERS, HIDDEN, SEQUENCE, SAMPLES, MICROBATCHES, VOCABULARY, TOPK = 2, 64, 128, 4, 2, 1 << 14, 2
TOKENS = SEQUENCE * SAMPLES
"""Of a microbatch: more than one chunk of logits."""
WARM_UP = 1
_PRODUCTS = {
    "mm": 0,
    "addmm": 1,
    "addmm_": 1,
    "bmm": 0,
    "baddbmm": 1,
    "baddbmm_": 1,
    "_grouped_mm": 0,
}
"""Name of an operation -> place of its first factor."""
_MASKS = ("tril", "tril_", "triu", "triu_", "tril_indices", "triu_indices")


@dataclass
class Work:
    """Counts of one step."""

    dispatched_calls: int = 0
    """Operations that torch was asked for, backward included."""
    megatron_calls: int = 0
    """Calls of Python functions of ``megatron``."""
    python_calls: int = 0
    """Calls of all Python functions, torch's included."""
    allocations: int = 0
    """Tensors with memory of their own that operations returned."""
    allocated_bytes: int = 0
    largest_bytes: int = 0
    mask_calls: int = 0
    """Operations that make triangular masks."""
    wide_allocations: int = 0
    """Those of at least tokens x top-k x hidden elements."""
    whole_logits: int = 0
    """Those of at least tokens x vocabulary elements."""
    product_flops: int = 0
    """Of matrix products that torch computes."""
    by_op: dict[str, int] = field(default_factory=dict)
    """Calls by operation."""
    largest: list[str] = field(default_factory=list)
    """The largest allocations, for messages."""

    def numbers(self) -> dict[str, int]:
        """Return what has a ceiling."""
        return {key: value for key, value in asdict(self).items() if isinstance(value, int)}


class CountedOps(TorchDispatchMode):
    """Counts what goes through torch's dispatcher inside the block."""

    def __init__(self) -> None:
        super().__init__()
        self.by_op: Counter[str] = Counter()
        self.made: list[tuple[int, int, str]] = []
        """(bytes, elements, what) of each allocation."""
        self.flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        known = {
            one.untyped_storage()._cdata
            for one in tree_leaves((args, kwargs))
            if isinstance(one, Tensor)
        }
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        self.by_op[name] += 1
        self.flops += _flops(name, args)
        for one in tree_leaves(result):
            if isinstance(one, Tensor) and one.untyped_storage()._cdata not in known:
                known.add(one.untyped_storage()._cdata)
                size = one.untyped_storage().nbytes()
                what = f"{name} {tuple(one.shape)} {str(one.dtype).removeprefix('torch.')}"
                self.made.append((size, size // one.element_size(), what))
        return result


def _flops(name: str, args: Any) -> int:
    place = _PRODUCTS.get(name)
    if place is None:
        return 0
    first, second = args[place], args[place + 1]
    return 2 * first.numel() * second.shape[-1]


class CountedCalls:
    """Counts calls of Python functions inside the block."""

    def __init__(self) -> None:
        self.all = self.ours = 0

    def __enter__(self) -> "CountedCalls":
        sys.setprofile(self._note)
        return self

    def __exit__(self, *_: object) -> None:
        sys.setprofile(None)

    def _note(self, frame: FrameType, event: str, _: object) -> None:
        if event == "call":
            self.all += 1
            self.ours += frame.f_code.co_filename.startswith(f"{ROOT}/megatron/")


def counted_step(kernels: choice.Choice, *, bf16: bool, layers: int = LAYERS) -> Work:
    """Count the work of one step, in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "work.json"
        run_ranks(_count, 1, kernels, bf16, layers, path)
        return Work(**json.loads(path.read_text()))


def _options(*, bf16: bool, layers: int = LAYERS) -> dict[str, Any]:
    return options_of(
        hidden=HIDDEN, layers=layers, sequence=SEQUENCE, experts=8, vocabulary=VOCABULARY, bf16=bf16
    ) | {"micro_batch_size": SAMPLES, "global_batch_size": SAMPLES * MICROBATCHES}


def _count(kernels: choice.Choice, bf16: bool, layers: int, path: Path) -> None:
    choice.use(kernels)
    run = make_run(make_config(**_options(bf16=bf16, layers=layers)))
    state = TrainState(dropout_seed=1)
    batches = list(microbatches(run, 0, lambda ids: random_batch(ids, VOCABULARY, SEQUENCE)))
    for _ in range(WARM_UP):
        train_step(run, state, iter(batches))
    with CountedOps() as ops:
        train_step(run, state, iter(batches))
    with CountedCalls() as calls:
        train_step(run, state, iter(batches))
    work = Work(
        dispatched_calls=sum(ops.by_op.values()),
        megatron_calls=calls.ours,
        python_calls=calls.all,
        allocations=len(ops.made),
        allocated_bytes=sum(size for size, _, _ in ops.made),
        largest_bytes=max(size for size, _, _ in ops.made),
        mask_calls=sum(ops.by_op[name] for name in _MASKS),
        wide_allocations=sum(count >= TOKENS * TOPK * HIDDEN for _, count, _ in ops.made),
        whole_logits=sum(count >= TOKENS * VOCABULARY for _, count, _ in ops.made),
        product_flops=ops.flops,
        by_op=dict(ops.by_op),
        largest=[f"{what}: {size:,}" for size, _, what in sorted(ops.made, reverse=True)[:8]],
    )
    path.write_text(json.dumps(asdict(work)))


def counted_collectives(**layout: Any) -> dict[str, int]:
    """Return calls and bytes by kind of what rank 0 of two hands over in one step.

    Nothing is sent: the step is rehearsed as by ``--dry-run``.
    """
    config = make_config(**_options(bf16=False), **layout)
    recipe = Recipe(
        config=config,
        layout=config.model.layout(2),
        model_provider=model_provider,
        forward_step=forward_step,
        device="cpu",
    )
    found: Counter[str] = Counter()
    for event in record_step(recipe, recipe.groups(), 0).events:
        if isinstance(event, Post):
            name = event.op if event.op in MESSAGES else f"{event.op} over {event.group}"
            found[f"{name}, calls"] += 1
            found[f"{name}, bytes"] += event.elements * event.itemsize
    return dict(sorted(found.items()))
