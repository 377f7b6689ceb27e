"""What no layout may change: loads that must be refused, tried both ways, and layouts that are."""

from pathlib import Path
from typing import NamedTuple

import torch

from megatron.core.errors import CheckpointError
from megatron.training.checkpointing import load_checkpoint, save_checkpoint
from megatron.training.config.run_config import RunConfig
from megatron.training.run import TrainState
from tools.layouts.oracle import make_run
from tools.layouts.ranks import run_ranks
from tools.reshard.layouts import TIED, Model, refusals

OTHERS = {
    "tied embeddings": (),
    "untied embeddings": ("--untie-embeddings-and-output-weights",),
    "another padded vocabulary": ("--padded-vocab-size", "128"),
    "another number format": ("--bf16",),
    "another number of experts": ("--num-experts", "4"),
    "another place of dense layers": ("--moe-layer-freq", "[1,0,0,1]"),
}
"""Name -> options on top of the first model. That model itself is the first."""


class Refusal(NamedTuple):
    """A load that was tried, or a layout that was asked for."""

    what: str
    said: str
    """Why it was refused; empty when it was not, which is wrong."""


def refused() -> list[Refusal]:
    """Return what the rules of the configuration say to layouts that are not offered."""
    return [Refusal(name, said) for name, said in refusals().items()]


def tried_loads(folder: Path) -> list[Refusal]:
    """Load each of ``OTHERS`` into the first, and the first into each; on one process."""
    run_ranks(_try_all, 1, folder)
    return torch.load(folder / "refusals.pt", weights_only=False)


def _config(words: tuple[str, ...]) -> RunConfig:
    base = tuple(word for word in TIED.words if word != "--fp64" or "--bf16" not in words)
    model = Model("other", (*base, *words), TIED.layouts, is_exact=True)
    return model.config(model.layouts[0])


def _try_all(folder: Path) -> None:
    runs = {name: make_run(_config(words)) for name, words in OTHERS.items()}
    for name, run in runs.items():
        saved = save_checkpoint(
            folder / name,
            TrainState(iteration=1),
            config=run.config,
            model=run.model,
            optimizer=run.optimizer,
        )
        assert saved.path is not None, saved.error
    first, *others = OTHERS
    pairs = [pair for name in others for pair in ((first, name), (name, first))]
    found = []
    for source, target in pairs:
        run, said = runs[target], ""
        try:
            load_checkpoint(
                folder / source, config=run.config, model=run.model, optimizer=run.optimizer
            )
        except CheckpointError as error:
            lines = str(error).splitlines()[1:] or [str(error)]
            said = "; ".join(line.removeprefix("  - ") for line in lines).replace(
                str(folder), "FOLDER"
            )
        found.append(Refusal(f"{source} -> {target}", said))
    torch.save(found, folder / "refusals.pt")
