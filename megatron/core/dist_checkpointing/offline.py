"""Checkpoints read and written by one process, one tensor at a time: what tools are made of.

No process group, no GPU, no model: a reader knows keys and tensors, a writer streams tensors into
any number of files. Both go through the same index, checks and atomic publishing as training.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron.core.dist_checkpointing import folders
from megatron.core.dist_checkpointing.folders import Place
from megatron.core.dist_checkpointing.index import (
    INDEX,
    StoredBlock,
    StoredTensor,
    TensorFacts,
    TensorIndex,
    read_index,
    write_index,
)
from megatron.core.dist_checkpointing.manifest import (
    TENSOR_SUFFIX,
    read_manifest,
    verify_manifest,
    write_manifest,
)
from megatron.core.dist_checkpointing.save_plan import PlannedBlock
from megatron.core.dist_checkpointing.serialization import tensor_file_name
from megatron.core.dist_checkpointing.store import (
    COMMON,
    CheckpointContent,
    open_checkpoint,
    write_documents,
)
from megatron.core.dist_checkpointing.tensor_file import (
    BlockOutline,
    DamagedBlockError,
    TensorFileWriter,
    read_block,
    verify_block,
)
from megatron.core.errors import CheckpointError

_DOCUMENTS = (COMMON, INDEX)


@dataclass(frozen=True)
class StoredCheckpoint:
    """A checkpoint on disk, whatever layout saved it; tensors are read when asked for."""

    path: Place
    common: Mapping[str, Any]
    """Its ``common.json``."""
    index: TensorIndex

    @classmethod
    def open(cls, folder: Place, iteration: int | None = None) -> "StoredCheckpoint":
        """Open a checkpoint whose small files and file sizes are as its manifest says.

        Args:
            folder: As --save of the run; or one checkpoint in it, such as ``iter_0000010``.
            iteration: Which checkpoint of the folder; the latest when None.

        Raises:
            CheckpointError: Nothing there, or damaged.
        """
        folder, iteration = _named(folder, iteration)
        opened = open_checkpoint(folder, None, iteration=iteration)
        if opened is None:
            raise CheckpointError(f"{folder} holds no checkpoint")
        return cls(opened.path, opened.common, read_index(opened.path))

    @property
    def keys(self) -> list[str]:
        """Names of all tensors."""
        return list(self.index)

    @property
    def documents(self) -> dict[str, Path]:
        """Relative name -> file of what is neither tensor nor index, such as the tokenizer's."""
        path = self.path
        assert isinstance(path, Path), f"{path}: tools that copy documents work in folders"
        return {
            name: path / name
            for name in read_manifest(self.path)
            if name not in _DOCUMENTS and not name.endswith(TENSOR_SUFFIX)
        }

    def facts(self, key: str) -> TensorFacts:
        """Return shape and dtype of a tensor."""
        return self.index[key].facts

    def read(self, key: str) -> Tensor:
        """Return the whole tensor, every block of it checked.

        Raises:
            CheckpointError: A block is damaged or missing; says which tensor.
            OSError: A file cannot be read.
        """
        stored = self.index[key]
        whole = torch.empty(stored.facts.shape, dtype=stored.facts.dtype)
        if problem := _holes(stored):
            raise CheckpointError(f"{self.path} is damaged:\n  - {key} {problem}")
        for block in stored.blocks:
            is_whole = block.shape == stored.facts.shape
            part = whole if is_whole else torch.empty(block.shape, dtype=whole.dtype)
            try:
                with (self.path / block.file).open("rb", buffering=0) as stream:
                    read_block(stream, block.facts, part)
            except DamagedBlockError as error:
                text = f"{key} (in {block.file}) {error}"
                raise CheckpointError(f"{self.path} is damaged:\n  - {text}") from error
            if not is_whole:
                whole[box(block.offset, block.shape)] = part
        return whole

    def block_hashes(self, key: str) -> dict[tuple[tuple[int, ...], tuple[int, ...]], str]:
        """Return (offset, shape) of each block of a tensor -> its hash, without reading it.

        Two tensors with the same are equal; with other blocks nothing is said.
        """
        return {(b.offset, b.shape): b.facts.hash for b in self.index[key].blocks}

    def verify(self) -> list[str]:
        """Compare the bytes of every block with its hash; see ``verify_checkpoint``."""
        return verify_blocks(self.path, self.index)


def verify_checkpoint(folder: Place, iteration: int | None = None) -> tuple[Place, list[str]]:
    """Look at every byte of a checkpoint, however damaged it is.

    Args:
        folder: See ``StoredCheckpoint.open``.
        iteration: See ``StoredCheckpoint.open``.

    Returns:
        Its path, and a line for everything that is not as it was written: small files, file sizes,
        and tensors by name.

    Raises:
        CheckpointError: There is no such checkpoint.
    """
    folder, iteration = _named(folder, iteration)
    found = folders.latest_iteration(folder) if iteration is None else iteration
    path = None if found is None else folders.find_checkpoint(folder, found)
    if path is None:
        complete = ", ".join(map(str, folders.complete_iterations(folder))) or "none"
        which = "no checkpoint" if iteration is None else f"no complete checkpoint {iteration}"
        raise CheckpointError(f"{folder} holds {which}; complete here: {complete}")
    problems: list[str] = []
    try:
        verify_manifest(path)
    except CheckpointError as error:
        lines = str(error).splitlines()
        problems = [line.removeprefix("  - ") for line in lines[1:]] or lines
    try:
        index = read_index(path)
    except CheckpointError as error:
        return path, list(dict.fromkeys([*problems, str(error)]))
    return path, [*problems, *verify_blocks(path, index)]


def verify_blocks(path: Place, index: TensorIndex) -> list[str]:
    """Return a line for each tensor with a block that is not as it was written."""
    problems = [f"{key} {problem}" for key, t in index.items() if (problem := _holes(t))]
    places = [(block, key) for key, stored in index.items() for block in stored.blocks]
    places.sort(key=lambda place: (place[0].file, place[0].facts.begin))
    for block, key in places:
        problem = _block_problem(path / block.file, block)
        if problem:
            problems.append(f"{key}{_where(block, index[key])} (in {block.file}) {problem}")
    return problems


def box(offset: Sequence[int], shape: Sequence[int]) -> tuple[slice, ...]:
    """Return the block at ``offset`` as an index into the whole tensor."""
    return tuple(slice(at, at + size) for at, size in zip(offset, shape, strict=True))


def whole_block(key: str, facts: TensorFacts) -> PlannedBlock:
    """Return a tensor as one block."""
    return PlannedBlock(key, facts, (0,) * len(facts.shape), facts.shape)


def shared_out(facts: Mapping[str, TensorFacts], num_files: int) -> list[list[PlannedBlock]]:
    """Share whole tensors out over files of about equal size, the large ones first.

    Returns:
        The blocks of each file.
    """
    files: list[list[PlannedBlock]] = [[] for _ in range(num_files)]
    load = [0] * num_files
    for key in sorted(facts, key=lambda key: -facts[key].nbytes):
        least = load.index(min(load))
        files[least].append(whole_block(key, facts[key]))
        load[least] += facts[key].nbytes
    return files


class OfflineWriter:
    """Writes one checkpoint, tensor by tensor, and publishes it as training does. A context.

    Tensors come in the order of ``order``. Nothing is seen under the checkpoint's name before
    ``finish``; leaving without it leaves nothing behind.
    """

    def __init__(
        self, folder: Place, iteration: int, files: Iterable[Sequence[PlannedBlock]]
    ) -> None:
        """Take what goes where.

        Args:
            folder: Gets ``iter_0000010`` for iteration 10 and the tracker file.
            iteration: Names the checkpoint.
            files: For each file its blocks; those of all files tile every tensor.
        """
        self._folder, self._iteration = folder, iteration
        self._files = [list(blocks) for blocks in files]
        self._temporary: Place | None = None
        self._stack = ExitStack()
        self._places: dict[str, list[tuple[int, PlannedBlock]]] = defaultdict(list)
        for number, blocks in enumerate(self._files):
            for block in blocks:
                self._places[block.key].append((number, block))
        for key, places in self._places.items():
            there = sum(math.prod(block.shape) for _, block in places)
            assert there == math.prod(places[0][1].whole.shape), f"the files do not hold all {key}"
        self.order: list[str] = sorted(
            self._places, key=lambda key: -self._places[key][0][1].whole.dtype.itemsize
        )
        """Keys in the order in which ``add`` takes them: those of wide numbers first, so that
        every block begins at a multiple of its element size."""
        self._stored: dict[str, StoredTensor] = {}
        self._writers: dict[int, TensorFileWriter] = {}

    def __enter__(self) -> "OfflineWriter":
        self._temporary = folders.begin(self._folder, self._iteration)
        place = {key: number for number, key in enumerate(self.order)}
        for number, blocks in enumerate(self._files):
            blocks.sort(key=lambda block: (place[block.key], block.offset))
            if blocks:
                outlines = [BlockOutline(b.name, b.whole.dtype, b.shape) for b in blocks]
                path = self._temporary / tensor_file_name(number)
                writer = TensorFileWriter(path, outlines)
                self._writers[number] = self._stack.enter_context(writer)
        for places in self._places.values():
            places.sort(key=lambda entry: (entry[0], entry[1].offset))
        return self

    def __exit__(self, kind: object, *rest: object) -> None:
        if self._temporary is None:
            return  # published
        try:
            if self._writers:
                self._stack.__exit__(AssertionError, AssertionError("given up"), None)
        finally:
            folders.discard(self._temporary)
        assert kind is not None, "left without finish()"

    def add(self, key: str, tensor: Tensor) -> None:
        """Write a whole tensor; ``key`` is the next of ``order``."""
        assert key == self.order[len(self._stored)], f"{key} is not next"
        places = self._places[key]
        whole = places[0][1].whole
        assert (tuple(tensor.shape), tensor.dtype) == whole, f"{key} is not {whole}"
        blocks = []
        for number, block in places:
            facts = self._writers[number].add(tensor[box(block.offset, block.shape)])
            name = tensor_file_name(number)
            blocks.append(StoredBlock(block.offset, block.shape, name, facts))
        self._stored[key] = StoredTensor(whole, tuple(blocks))

    def finish(self, common: Mapping[str, Any], documents: Mapping[str, Path]) -> tuple[Place, int]:
        """Flush, write the rest, and give the checkpoint its name.

        Args:
            common: Its ``common.json``.
            documents: Relative name -> small file to copy.

        Returns:
            Path and size in bytes.
        """
        assert self._temporary is not None, "finish() belongs into the context"
        assert len(self._stored) == len(self.order), "tensors are missing"
        self._stack.close()
        self._writers = {}
        write_index(self._temporary, self._stored)
        content = CheckpointContent(tensors={}, common=common, files=documents)
        write_documents(self._temporary, content)
        size = write_manifest(self._temporary)
        path = folders.publish(self._temporary, self._folder, self._iteration)
        self._temporary = None
        return path, size


def _named(folder: Place, iteration: int | None) -> tuple[Place, int | None]:
    """Take ``runs/x/iter_0000010`` for iteration 10 of ``runs/x``."""
    number = folder.name.removeprefix("iter_")
    if iteration is None and number != folder.name and number.isdecimal():
        return folder.parent, int(number)
    return folder, iteration


def _holes(stored: StoredTensor) -> str:
    there = sum(math.prod(block.shape) for block in stored.blocks)
    wanted = math.prod(stored.facts.shape)
    return "" if there == wanted else f"has {there} of {wanted} elements in the index"


def _where(block: StoredBlock, stored: StoredTensor) -> str:
    return "" if block.shape == stored.facts.shape else f" from {list(block.offset)} on"


def _block_problem(path: Place, block: StoredBlock) -> str:
    try:
        with path.open("rb", buffering=0) as stream:
            verify_block(stream, block.facts)
    except DamagedBlockError as error:
        return str(error)
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    return ""
