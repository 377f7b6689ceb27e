"""Ways in which a checkpoint on a disk goes wrong, each done to the folder of one iteration."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from megatron.core.dist_checkpointing.folders import MANIFEST, TRACKER
from megatron.core.dist_checkpointing.index import INDEX, StoredBlock, read_index
from megatron.core.dist_checkpointing.serialization import tensor_file_name
from megatron.core.dist_checkpointing.store import COMMON

EXPERT = "model.decoder.layers.{layer}.mlp.experts.local_experts.{expert}.linear_fc2.weight"
Damage = Callable[[Path], None]
"""``damage(path)``: ``path`` is that of one iteration, beside which others and the tracker lie."""


def expert_key(layer: int, expert: int, *, state: str = "") -> str:
    """Return the key of a weight of an expert, or of ``state``, such as ``exp_avg``, of it."""
    key = EXPERT.format(layer=layer, expert=expert)
    return f"optimizer.{state}.{key.removeprefix('model.')}" if state else key


def flipped(key: str, *, at: float = 0.5, bit: int = 0) -> Damage:
    """Flip one bit of a tensor; ``at`` is the share of its bytes before it."""

    def damage(path: Path) -> None:
        block = _block(path, key)
        number = block.facts.begin + int(at * (block.facts.nbytes - 1))
        with (path / block.file).open("r+b") as stream:
            stream.seek(number)
            old = stream.read(1)[0]
            stream.seek(number)
            stream.write(bytes([old ^ (1 << bit)]))

    return damage


def exchanged(one: str, other: str) -> Damage:
    """Exchange the bytes of two tensors of one size, whichever files they are in."""

    def damage(path: Path) -> None:
        first, second = _block(path, one), _block(path, other)
        assert first.facts.nbytes == second.facts.nbytes, f"{one} and {other} differ in size"
        bytes_of_first, bytes_of_second = _read(path, first), _read(path, second)
        assert bytes_of_first != bytes_of_second, "nothing would change"
        _write(path, first, bytes_of_second)
        _write(path, second, bytes_of_first)

    return damage


def exchanged_files(path: Path) -> None:
    """Exchange the files of two ranks."""
    one, other, aside = tensor_file_name(0), tensor_file_name(1), "aside"
    for source, target in ((one, aside), (other, one), (aside, other)):
        (path / source).rename(path / target)


def cut(name: str, count: int) -> Damage:
    """Leave out the last ``count`` bytes of a file; append some when negative."""

    def damage(path: Path) -> None:
        size = (path / name).stat().st_size
        os.truncate(path / name, size - count)

    return damage


def removed(name: str) -> Damage:
    """Delete a file."""
    return lambda path: (path / name).unlink()


def filled(name: str, content: bytes) -> Damage:
    """Replace the content of a file of the checkpoint; ``../`` leads to the tracker."""

    def damage(path: Path) -> None:
        (path / name).write_bytes(content)

    return damage


def of_another_iteration(name: str) -> Damage:
    """Put the file of another iteration in the place of this one's."""

    def damage(path: Path) -> None:
        others = [entry for entry in path.parent.glob("iter_*") if entry != path]
        shutil.copyfile(others[0] / name, path / name)

    return damage


def changed_fact(path: Path) -> None:
    """Change a number in common.json, which stays what JSON readers take."""
    common = json.loads((path / COMMON).read_text())
    common["consumed_train_samples"] += 1
    (path / COMMON).write_text(json.dumps(common, indent=1) + "\n")


def _block(path: Path, key: str) -> StoredBlock:
    (block,) = read_index(path)[key].blocks
    return block


def _read(path: Path, block: StoredBlock) -> bytes:
    with (path / block.file).open("rb") as stream:
        stream.seek(block.facts.begin)
        return stream.read(block.facts.nbytes)


def _write(path: Path, block: StoredBlock, content: bytes) -> None:
    with (path / block.file).open("r+b") as stream:
        stream.seek(block.facts.begin)
        stream.write(content)


FILE_0, FILE_1 = tensor_file_name(0), tensor_file_name(1)
LAYER, EXPERT_0, EXPERT_3 = 1, expert_key(1, 0), expert_key(1, 3)
MOMENT = expert_key(1, 3, state="exp_avg_sq")
GARBAGE = b"\x80\x04\x95 no JSON"

DAMAGES: dict[str, tuple[Damage, tuple[str, ...]]] = {
    "a bit of an expert": (flipped(EXPERT_3), (f"{EXPERT_3} (in {FILE_1})", "CRC-32")),
    "its first bit": (flipped(EXPERT_3, at=0, bit=7), (f"{EXPERT_3} (in {FILE_1})", "CRC-32")),
    "its last bit": (flipped(EXPERT_3, at=1), (f"{EXPERT_3} (in {FILE_1})", "CRC-32")),
    "a bit of its moment": (flipped(MOMENT), (f"{MOMENT} (in {FILE_1})", "CRC-32")),
    "a bit of a generator": (flipped("rng.1.torch"), ("rng.1.torch", "CRC-32")),
    "experts exchanged": (exchanged(EXPERT_0, EXPERT_3), (EXPERT_0, EXPERT_3, "CRC-32")),
    "expert and its moment exchanged": (exchanged(EXPERT_3, MOMENT), (EXPERT_3, MOMENT)),
    "files of ranks exchanged": (exchanged_files, (FILE_0, FILE_1, "bytes instead of")),
    "file cut by a byte": (cut(FILE_1, 1), (f"{FILE_1} has", "it holds", "local_experts.2.")),
    "half a file": (cut(FILE_1, 30_000), (f"{FILE_1} has", "it holds", "local_experts.2.")),
    "file longer by a byte": (cut(FILE_0, -1), (f"{FILE_0} has", "it holds")),
    "file gone": (removed(FILE_1), (f"{FILE_1} is missing", "it holds", "local_experts.2.")),
    "file of another iteration": (
        of_another_iteration(FILE_1),
        ("layers.1.mlp.experts.local_experts.2.", "CRC-32", "more"),
    ),
    "index cut": (cut(INDEX, 100), (f"{INDEX} has",)),
    "index of another iteration": (of_another_iteration(INDEX), (INDEX,)),
    "index gone": (removed(INDEX), (f"{INDEX} is missing",)),
    "index garbage": (filled(INDEX, GARBAGE), (f"{INDEX} has",)),
    "a number in common.json": (changed_fact, (f"{COMMON} is not what was written (SHA-256)",)),
    "common.json cut": (cut(COMMON, 1), (f"{COMMON} has",)),
    "common.json gone": (removed(COMMON), (f"{COMMON} is missing",)),
    "manifest garbage": (filled(MANIFEST, GARBAGE), (f"{MANIFEST} is damaged",)),
    "manifest empty": (filled(MANIFEST, b""), (f"{MANIFEST} is damaged",)),
    "manifest of another kind": (filled(MANIFEST, b"[]"), (f"{MANIFEST} is damaged",)),
    "manifest of another iteration": (of_another_iteration(MANIFEST), ("is not what was",)),
    "manifest gone": (removed(MANIFEST), (TRACKER, "is missing or incomplete", "--ckpt-step")),
    "tracker garbage": (filled(f"../{TRACKER}", GARBAGE), (TRACKER, "not the number")),
    "tracker empty": (filled(f"../{TRACKER}", b""), (TRACKER, "not the number")),
    "tracker of a checkpoint that is gone": (
        filled(f"../{TRACKER}", b"7"),
        (TRACKER, "names iteration 7", "complete here: 1, 2"),
    ),
}
"""What is done to a checkpoint of 2 ranks with 2 experts of 2 layers each -> words of the error."""
