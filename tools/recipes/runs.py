"""Start the examples as a user does: their plan for the cluster, and their toy on this machine."""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

ROOT = Path(__file__).resolve().parents[2]
GIB = 2**30
_STEP = re.compile(r"iteration +(\d+)/.*? lm loss: (\S+)")


class Plan(NamedTuple):
    """What the dry run of an example found."""

    world_size: int
    total: int
    active: int
    embedding: int
    """Rows of the embedding, counted in both."""
    mtp: tuple[int, int]
    """Total and active parameters of the layers for multi-token prediction, counted in both."""
    layout: str
    gib: float
    """Memory of the rank that needs most."""
    deadlock: list[str] | None
    seconds: float


class Toy(NamedTuple):
    """How the toy of an example trained."""

    steps: int
    first_loss: float
    last_loss: float
    seconds: float


FoundT = TypeVar("FoundT", Plan, Toy)


class ExampleError(Exception):
    """An example did not run; holds the end of what it said."""


def script_of(example: str) -> Path:
    """Return the script of ``example``, such as ``mixtral/8x7b``."""
    family, name = example.split("/")
    return ROOT / "examples" / family / f"train_{name}.sh"


def plan(example: str, folder: Path) -> Plan:
    """Run ``train_X.sh --plan`` and read what it found.

    Raises:
        ExampleError: It ended with an error, or with a deadlock or a missing weight.
    """
    file = folder / f"{example.replace('/', '_')}.json"
    begun = time.monotonic()
    _run(example, "--plan", "--dry-run-json", str(file))
    seconds = time.monotonic() - begun
    found: dict[str, Any] = json.loads(file.read_text())
    params, parts = found["parameters"], found["parameters"]["parts"]
    mtp = parts.get("mtp", {"dense_params": 0, "expert_params": 0, "active_params": 0})
    return Plan(
        world_size=found["world_size"],
        total=params["whole"],
        active=params["active"],
        embedding=parts["embedding"]["dense_params"],
        mtp=(mtp["dense_params"] + mtp["expert_params"], mtp["active_params"]),
        layout=_layout(found),
        gib=max(sum(v for k, v in one.items() if k != "ranks") for one in found["memory"]) / GIB,
        deadlock=found["deadlock"],
        seconds=seconds,
    )


def toy(example: str) -> Toy:
    """Run ``train_X.sh --toy`` on two ranks and read its losses.

    Raises:
        ExampleError: It ended with an error.
    """
    begun = time.monotonic()
    said = _run(example, "--toy", "--log-interval", "1")
    steps = [(int(step), float(loss)) for step, loss in _STEP.findall(said)]
    if not steps:
        raise ExampleError(f"{example} --toy logged no step:\n{said[-2000:]}")
    return Toy(steps[-1][0], steps[0][1], steps[-1][1], time.monotonic() - begun)


def kept(
    kind: type[FoundT], folder: str | None, example: str, find: Callable[[], FoundT]
) -> FoundT:
    """Return what a run before left in ``folder``, else what ``find`` finds, which is left there.

    Args:
        kind: ``Plan`` or ``Toy``.
        folder: None to find it in any case.
        example: Of which.
        find: Runs it.
    """
    if folder is None:
        return find()
    file = Path(folder) / f"{example.replace('/', '_')}.{kind.__name__.lower()}.json"
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(find()._asdict()))
    return kind(**json.loads(file.read_text()))


def _run(example: str, *flags: str) -> str:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    result = subprocess.run(
        ["bash", str(script_of(example)), *flags],
        capture_output=True,
        text=True,
        env=os.environ | {"PATH": path},
    )
    if result.returncode:
        said = (result.stdout[-1500:] + result.stderr[-1500:]).strip()
        raise ExampleError(f"{example} {flags[0]} ended with {result.returncode}:\n{said}")
    return result.stdout


def _layout(found: dict[str, Any]) -> str:
    sizes = {**found["expert_grid"], **found["dense_grid"]}
    shown = [(name, sizes[name]) for name in ("tp", "cp", "pp", "ep", "etp", "dp")]
    return " ".join(f"{name.upper()} {size}" for name, size in shown if size > 1 or name == "dp")
