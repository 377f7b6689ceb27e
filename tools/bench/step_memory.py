"""How much memory a step of bench-S takes: each contender in a process of its own.

Counted two ways. *Resident*: the most that the process held during steps (VmHWM), above what it
held before it built anything. *Tensors*: the most that tensors held, by the events of torch's
profiler. Beside ours stands what ``--dry-run`` foretells, which allocates nothing.
"""

import argparse
import ctypes
import gc
import json
import subprocess
import sys
from itertools import accumulate
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from torch.profiler import ProfilerActivity, profile

from megatron.training.dry_run.recorded_run import MemoryUse, Recipe, record_step
from pretrain_gpt import forward_step, model_provider
from tools.bench.step_ours import Data, Size, Step, add_size_options, bench_s, run_config, size_of
from tools.bench.step_peers import PeerStep, make_peers, missing
from tools.bench.world import world_of_one

_MIB = 1 << 20
_STEPS = 2
"""Before the peak is read: state of the optimizer and workspaces come with the first."""


def memory_rows(args: argparse.Namespace, device: str) -> list[dict[str, object]]:
    """Return one row for each dtype and contender."""
    absent, rows = missing(), []
    for dtype in args.dtypes:
        for name in args.contenders:
            if name in absent:
                continue
            found = in_own_process(name, dtype, size_of(args))
            row = {"dtype": dtype, "what": name, "resident_mib": None, **found}
            if name == "ours":
                use = foretold(size_of(args), dtype, device)
                row |= {"formula_mib": use.total / _MIB} | {
                    f"{key}_mib": value / _MIB for key, value in use._asdict().items()
                }
            rows.append(row)
    return rows


def foretold(size: Size, dtype: str, device: str) -> MemoryUse:
    """Return the bytes that a dry run of ours expects."""
    config = run_config(bench_s(size.hidden, bf16=dtype == "bf16"), size)
    recipe = Recipe(
        config=config,
        layout=config.model.layout(1),
        model_provider=model_provider,
        forward_step=forward_step,
        device=device,
    )
    return record_step(recipe, recipe.groups(), 0).memory


def in_own_process(name: str, dtype: str, size: Size) -> dict[str, float]:
    """Return what ``measure`` finds in a fresh process."""
    words = [sys.executable, __file__, "--contender", name, "--dtype", dtype]
    words += ["--hidden-size", str(size.hidden), "--vocab-size", str(size.vocabulary)]
    words += ["--seq-length", str(size.sequence), "--micro-batch-size", str(size.microbatch)]
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"the memory of {name} in {dtype} was not measured:\n{done.stderr}")
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def measure(name: str, dtype: str, size: Size, device: str) -> dict[str, float]:
    """Return MiB of this process, which has done nothing else before."""
    with world_of_one():
        start, base = _allocated(device), _resident()["VmRSS"]
        step = _contender(name, dtype, size, device)
        gc.collect()
        _give_back()
        is_reset = _forget_peak(device)
        for _ in range(_STEPS):
            step()
        peak = _resident()["VmHWM"]
        found = {"tensors_mib": _tensor_peak(step, start, device) / _MIB}
    if is_reset and device == "cpu":
        found["resident_mib"] = (peak - base) / 1024
    return found


def _contender(name: str, dtype: str, size: Size, device: str) -> Step | PeerStep:
    """Build one; ours, whose weights the others get, is gone when this returns."""
    data = Data(size)
    ours = Step(bench_s(size.hidden, bf16=dtype == "bf16"), size, device, data)
    return ours if name == "ours" else next(make_peers([name], ours, data))


def _tensor_peak(step: Step | PeerStep, start: int, device: str) -> int:
    """Return the most bytes that tensors hold during a step, above ``start``."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() - start
    before = _held_by_tensors()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        step()
    events = [e for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"]
    changes = [event.nbytes() for event in sorted(events, key=lambda e: e.start_ns())]
    return before + max(accumulate(changes), default=0)


def _held_by_tensors() -> int:
    """Return the bytes of all tensors of this process, gradients included; storages count once."""
    tensors = [one for one in gc.get_objects() if issubclass(type(one), torch.Tensor)]
    tensors += [one.grad for one in tensors if one.is_leaf and one.grad is not None]
    storages = (tensor.untyped_storage() for tensor in tensors)
    return sum({storage._cdata: storage.nbytes() for storage in storages}.values())


def _allocated(device: str) -> int:
    return torch.cuda.memory_allocated() if device == "cuda" else 0


def _resident() -> dict[str, int]:
    """Return VmRSS, what this process holds now, and VmHWM, the most so far, in KiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    fields = (line.split() for line in lines if line.startswith(("VmRSS", "VmHWM")))
    return {field[0].rstrip(":"): int(field[1]) for field in fields}


def _give_back() -> None:
    """Let the allocator return what building the models left behind, where it is glibc's."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _forget_peak(device: str) -> bool:
    """Let VmHWM begin anew; return whether the system does that."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _parse() -> Any:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--contender", required=True, help="Who.")
    parser.add_argument("--dtype", required=True, help="fp32 or bf16.")
    add_size_options(parser)
    return parser.parse_args()


if __name__ == "__main__":
    options = _parse()
    torch.set_num_threads(1)
    where = "cuda" if torch.cuda.is_available() else "cpu"
    print(json.dumps(measure(options.contender, options.dtype, size_of(options), where)))
