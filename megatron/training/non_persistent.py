"""Checkpoints between the persistent ones, of which only the newest is kept.

``global`` ones are like any other, in a folder that all nodes share. With ``local`` and
``in_memory`` each node keeps what its own ranks hold, on a disk or in memory of its own: nothing is
shared, and they load only where every node and every rank is what it was.
"""

import hashlib
import logging
import os
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import torch.distributed as dist
from torch.distributed import ProcessGroup

from megatron.core.dist_checkpointing import folders
from megatron.core.dist_checkpointing.agreement import (
    attempt,
    broadcast,
    describe,
    gather,
    rank_in,
)
from megatron.core.dist_checkpointing.folders import Place
from megatron.core.dist_checkpointing.object_folders import place
from megatron.core.dist_checkpointing.store import CheckpointContent
from megatron.core.errors import CheckpointError
from megatron.core.process_groups_config import node_group
from megatron.training.checkpoint_state import LoadedState, SaveResult
from megatron.training.checkpointing import publish
from megatron.training.config.checkpoint import CheckpointConfig
from megatron.training.config.checkpoint_args import LAYOUT
from megatron.training.config.checkpoint_rules import MEMORY
from megatron.training.config.run_config import RunConfig
from megatron.training.initialize import Launch
from megatron.training.memory_room import check_room
from megatron.training.starting_point import (
    StartingPoint,
    starting_point,
    stored_facts,
    takes_newer,
)

log = logging.getLogger(__name__)

SUBFOLDER = "non_persistent"
_FACTS = "non_persistent"
Offers = Mapping[int, str]
"""Iteration -> mark of the save, of what one node could load."""


class Found(NamedTuple):
    """What the nodes have."""

    iteration: int | None
    """The newest that all have; None without one."""
    why: str
    """Why none, or no newer one, can be taken; empty where there is nothing to say."""


@dataclass(frozen=True, kw_only=True)
class NonPersistent:
    """Where this rank's non-persistent checkpoints are, and who writes them together."""

    options: CheckpointConfig
    world: ProcessGroup
    group: ProcessGroup
    """The ranks that share a folder: all, or those of this node."""
    node: int
    """First rank of this node."""
    layout: Mapping[str, Any]
    """What must be the same where nodes load what they kept; plain JSON."""

    @classmethod
    def create(cls, config: RunConfig, launch: Launch) -> "NonPersistent | None":
        """Return None where no such checkpoints are wanted. Every rank calls this once."""
        options, world = config.checkpoint, dist.group.WORLD
        if options.non_persistent_ckpt_type is None:
            return None
        assert world is not None, "the ranks are connected first"
        node = launch.rank - launch.local_rank
        group = world
        if options.non_persistent_ckpt_type != "global":
            timeout = timedelta(minutes=config.distributed.distributed_timeout_minutes)
            group = node_group(node, timeout)
        layout = _layout(config, launch.world_size, node)
        return cls(options=options, world=world, group=group, node=node, layout=layout)

    def folder(self, base: str) -> Place:
        """Return where this node keeps them.

        Args:
            base: Folder of the run's persistent checkpoints: ``--save`` or ``--load``.
        """
        if self.options.non_persistent_ckpt_type == "global":
            shared = self.options.non_persistent_global_ckpt_dir
            return place(base) / SUBFOLDER if shared is None else place(shared) / _name_of_run(base)
        return self._folder_of_run(base) / f"node{self.node:05d}"

    def save(self, iteration: int, content: CheckpointContent) -> SaveResult:
        """Save, then delete what this replaces; where a node fails, none deletes anything older.

        Args:
            iteration: Of the checkpoint.
            content: What the ranks hold.

        Returns:
            As ``publish``; on every rank a failure where one rank failed.
        """
        base = self.options.save
        assert base is not None, "a rule asks for --save"
        folder = self.folder(base)
        mark = broadcast(uuid.uuid4().hex, self.world)
        facts = {_FACTS: {"mark": mark, **self._identity(base)}}
        marked = replace(content, common={**content.common, **facts})
        is_whole = self.options.non_persistent_ckpt_type == "global"
        problem = ""
        try:
            attempt(lambda: self._make_private(base), self.group)
            if self.options.non_persistent_ckpt_type == "in_memory":
                check_room(self._folder_of_run(base), content.tensors, self.group)
        except CheckpointError as error:
            problem = str(error)
        result = SaveResult(iteration=iteration, path=None, error=problem)
        if not any(gather(problem, self.world)):
            result = publish(folder, iteration, marked, self.group, is_complete=is_whole)
        errors = [error for error in gather(result.error, self.world) if error]
        if rank_in(self.group) == 0:
            _delete(folder, lambda i: (i == iteration) == bool(errors))
        if errors:
            result = replace(result, path=None, error="\n".join(dict.fromkeys(errors)))
        return replace(result, kind=self.options.non_persistent_ckpt_type or "")

    def newest(self, base: str) -> Found:
        """Return the newest checkpoint that every node has whole; every rank calls this."""
        offers: tuple[Offers, str] | None = None
        if rank_in(self.group) == 0:
            offers = self._offers(base)
        found = [(rank, *offer) for rank, offer in enumerate(gather(offers, self.world)) if offer]
        return agreed(found)

    def load(
        self,
        config: RunConfig,
        load: Callable[..., LoadedState],
    ) -> LoadedState:
        """Load the newest of the persistent and the non-persistent checkpoints of ``--load``.

        Args:
            config: Of this run.
            load: ``load_checkpoint`` of this run: ``load(folder, config=..., group=...)``.

        Raises:
            CheckpointError: What is left cannot be loaded.
        """
        options = config.checkpoint
        if options.load is None or not takes_newer(options):
            return load(options.load, config=config)
        start = broadcast(attempt(lambda: self._persistent(options), self.world), self.world)
        there = 0 if start is None or start.weights_only else start.iteration
        found = self.newest(options.load)
        if found.iteration is None or found.iteration <= there:
            return _with_notice(load(options.load, config=config), found.why)
        taken = replace(options, ckpt_step=found.iteration, pretrained_checkpoint=None)
        folder = str(self.folder(options.load))
        problem = ""
        try:
            loaded = load(folder, config=replace(config, checkpoint=taken), group=self.group)
        except CheckpointError as error:
            problem = str(error)
        problems = list(dict.fromkeys(text for text in gather(problem, self.world) if text))
        kind = f"the {options.non_persistent_ckpt_type} checkpoint of iteration {found.iteration}"
        if not problems:
            newer = f"newer than iteration {there} of --load {options.load}"
            return _with_notice(loaded, f"{kind} is taken, since it is {newer}")
        if not there:
            raise CheckpointError("\n".join(problems))
        log.warning("%s is not taken: %s", kind, " | ".join(problems))
        return load(options.load, config=config)

    def clean(self) -> None:
        """Free the memory that checkpoints of this run take, when it has ended well."""
        if self.options.non_persistent_ckpt_type != "in_memory" or self.options.save is None:
            return
        if rank_in(self.group) == 0:
            folders.discard(self.folder(self.options.save))
            with suppress(OSError):  # another node of this machine has something there
                self._folder_of_run(self.options.save).rmdir()

    def _folder_of_run(self, base: str) -> Path:
        name = _name_of_run(base)
        if self.options.non_persistent_ckpt_type == "in_memory":
            return MEMORY / f"megatron-{os.getuid()}-{name}"
        assert self.options.non_persistent_local_ckpt_dir is not None, "a rule asks for it"
        return Path(self.options.non_persistent_local_ckpt_dir) / name

    def _make_private(self, base: str) -> None:
        """Make the folder in memory, which every user of the machine sees, this user's alone."""
        if self.options.non_persistent_ckpt_type != "in_memory":
            return
        folder = self._folder_of_run(base)
        folder.mkdir(mode=0o700, exist_ok=True)
        self._refuse_foreign(base)

    def _refuse_foreign(self, base: str) -> None:
        folder = self._folder_of_run(base)
        if folder.is_symlink() or (folder.exists() and folder.stat().st_uid != os.getuid()):
            raise CheckpointError(f"{folder} is not of this user")

    def _identity(self, base: str) -> dict[str, Any]:
        """Return what a stored checkpoint must have been saved with."""
        if self.options.non_persistent_ckpt_type == "global":
            is_shared = self.options.non_persistent_global_ckpt_dir is not None
            return {"run": _name_of_run(base)} if is_shared else {}
        return {"run": _name_of_run(base), "layout": dict(self.layout)}

    def _offers(self, base: str) -> tuple[Offers, str]:
        """Return what this node could load, and why not more."""
        folder, why = self.folder(base), ""
        offers: dict[int, str] = {}
        try:
            if self.options.non_persistent_ckpt_type == "in_memory":
                self._refuse_foreign(base)
            there = folders.complete_iterations(folder)
        except (OSError, CheckpointError) as error:
            return offers, describe(error)
        for iteration in there:
            try:
                facts = stored_facts(StartingPoint(folder=folder, iteration=iteration))
                stored = dict(facts[_FACTS])
                mark = str(stored.pop("mark"))
            except (CheckpointError, KeyError, TypeError, ValueError):
                why = f"iteration {iteration} in {folder} is not readable"
                continue
            if difference := _difference(stored, self._identity(base)):
                why = f"iteration {iteration} in {folder} is of another {difference}"
            else:
                offers[iteration] = mark
        return offers, why

    def _persistent(self, options: CheckpointConfig) -> StartingPoint | None:
        return starting_point(options) if rank_in(self.world) == 0 else None


def agreed(offers: Sequence[tuple[int, Offers, str]]) -> Found:
    """Return the newest iteration that all nodes have of the same save.

    Args:
        offers: For each node its first rank, what it has, and why not more.
    """
    newest = max((iteration for _, there, _ in offers for iteration in there), default=None)
    common = set.intersection(*(set(there.items()) for _, there, _ in offers))
    best = max((iteration for iteration, _ in common), default=None)
    reasons = [f"rank {rank}: {why}" for rank, _, why in offers if why]
    if newest is not None and best != newest and not reasons:
        without = [str(rank) for rank, there, _ in offers if newest not in there]
        lacking = f"the node of rank {', '.join(without)} has none" if without else "saves differ"
        reasons = [f"iteration {newest} is not on every node: {lacking}"]
    why = f"no newer non-persistent checkpoint is taken ({'; '.join(reasons)})" if reasons else ""
    return Found(best, why)


def _layout(config: RunConfig, world_size: int, node: int) -> dict[str, Any]:
    model = {name: getattr(config.model, name) for group in LAYOUT for name in group}
    shared = ("use_distributed_optimizer", "use_torch_fsdp2")
    ddp = {name: getattr(config.ddp, name) for name in shared}
    return {"world_size": world_size, "node": node, **model, **ddp}


def _difference(stored: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    """Say which run or layout a checkpoint is of, where it is of another one; else nothing."""
    if stored.get("run") != wanted.get("run"):
        return "run"
    then, now = stored.get("layout", {}), wanted.get("layout", {})
    names = sorted(name for name in then.keys() | now.keys() if then.get(name) != now.get(name))
    changes = ", ".join(f"{name} was {then.get(name)} and is {now.get(name)}" for name in names)
    return f"layout ({changes})" if changes else ""


def _name_of_run(base: str) -> str:
    """Return a name that restarts of a run share and other runs do not."""
    path = place(base).resolve()
    return f"{path.name}-{hashlib.sha256(str(path).encode()).hexdigest()[:12]}"


def _delete(folder: Place, is_doomed: Callable[[int], bool]) -> None:
    try:
        folders.delete(folder, filter(is_doomed, folders.complete_iterations(folder)))
    except OSError as error:
        log.warning("could not delete old checkpoints in %s: %s", folder, error)


def _with_notice(loaded: LoadedState, notice: str) -> LoadedState:
    return replace(loaded, notices=(notice, *loaded.notices)) if notice else loaded
