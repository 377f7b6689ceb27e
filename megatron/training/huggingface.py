"""Checkpoints of ours out of folders of Hugging Face's, and back: tensor by tensor, no ranks.

What is written here is an ordinary checkpoint with weights alone; a run that loads it begins at
iteration 0 with a fresh optimizer. Names and layouts are in megatron.core.models.huggingface.
"""

import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron.core.dist_checkpointing import folders
from megatron.core.dist_checkpointing.index import TensorFacts
from megatron.core.dist_checkpointing.mapping import MODEL, OPTIMIZER
from megatron.core.dist_checkpointing.offline import OfflineWriter, StoredCheckpoint, shared_out
from megatron.core.errors import CheckpointError
from megatron.core.models.huggingface import accounting, writer
from megatron.core.models.huggingface.config_file import CONFIG, read_config
from megatron.core.models.huggingface.exchange import hf_tensor, is_equal, our_tensor
from megatron.core.models.huggingface.family import FAMILIES, Family, family_of
from megatron.core.models.huggingface.folder import HfFolder
from megatron.core.models.huggingface.options import hf_config_of, model_options
from megatron.core.models.huggingface.quantized import PlainNumbers, target_dtype
from megatron.core.models.huggingface.weight_plan import WeightPlan, weight_plan
from megatron.training.config.run_config import RunConfig
from megatron.training.huggingface_family import (
    config_of,
    fitting_family,
    options_of_checkpoint,
)
from megatron.training.huggingface_files import ORIGIN, kept_of_folder, side_files
from megatron.training.huggingface_model import dtype_flags, model_facts
from megatron.training.resume_rules import architecture, config_data, config_from_data
from megatron.training.starting_point import WEIGHTS_ONLY

DTYPES = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp64": torch.float64,
}
"""Names of number formats on the command line."""
ITERATION = 0
"""Of a checkpoint that an import writes."""
SHARD_BYTES = 5 * 10**9
_FILE_BYTES = 5 * 10**9


@dataclass(frozen=True)
class Exchanged:
    """What an import or export did."""

    path: Path
    family: Family
    options: Mapping[str, Any]
    """Of the model, field -> value."""
    num_tensors: int
    """Written."""
    size_bytes: int
    seconds: float
    ignored: tuple[str, ...] = ()
    """Tensors on disk that are known to be no weights."""


def import_checkpoint(
    hf_dir: Path,
    out_dir: Path,
    *,
    dtype: str | None = None,
    make_vocab_size_divisible_by: int = 1,
    ignore_fields: Collection[str] = (),
    with_mtp: bool = False,
) -> Exchanged:
    """Make a checkpoint of ours out of a folder of Hugging Face's.

    Args:
        hf_dir: Has config.json and weights in safetensors.
        out_dir: Gets ``iter_0000000`` and the tracker file.
        dtype: Key of ``DTYPES``; that of the files when None.
        make_vocab_size_divisible_by: The embedding gets rows of zeros up to a multiple of this.
        ignore_fields: See ``model_options``.
        with_mtp: See ``model_options``; without, tensors of such modules are left out and named.

    Raises:
        ConfigError: config.json cannot be built.
        CheckpointError: Tensors are missing, too many, or of other shapes; files are damaged; or
            ``out_dir`` holds a checkpoint already.
    """
    begin = time.perf_counter()
    if (there := folders.find_checkpoint(out_dir, ITERATION)) is not None:
        raise CheckpointError(f"{there} is there already; delete it or give another folder")
    with HfFolder.open(hf_dir) as source:
        options = model_options(source.config, ignore=ignore_fields, with_mtp=with_mtp)
        rows = options["padded_vocab_size"]
        unit = make_vocab_size_divisible_by
        options["padded_vocab_size"] = -(-rows // unit) * unit
        wanted = target_dtype(source, DTYPES[dtype] if dtype else None, DTYPES.values())
        options |= dtype_flags(wanted)
        numbers = PlainNumbers(source, wanted)
        config = config_of(options)
        config.tokenizer.unpadded_vocab_size = rows
        plan = weight_plan(family_of(source.config), options, vocab_size=rows)
        shapes = {key: fact.shape for key, fact in numbers.facts.items()}
        accounted = accounting.account(plan, shapes)
        facts = model_facts(config, options["padded_vocab_size"])
        accounting.compare_with_model(plan, {key: fact.shape for key, fact in facts.items()})
        read = accounting.named_reader(numbers, accounted)
        accounting.refuse_other_copies(hf_dir, numbers, accounted)
        stored = {MODEL + key: fact for key, fact in facts.items()}
        total = sum(fact.nbytes for fact in stored.values())
        files = shared_out(stored, max(1, -(-total // _FILE_BYTES)))
        with OfflineWriter(out_dir, ITERATION, files) as target:
            for key in target.order:
                name = key.removeprefix(MODEL)
                target.add(key, our_tensor(plan, name, stored[key].dtype, read))
            tokenizer, kept = kept_of_folder(hf_dir)
            common = _common(config, plan.family, hf_dir, source.config) | {"tokenizer": tokenizer}
            path, size = target.finish(common, kept)
    assert isinstance(path, Path), f"{path} is no folder"
    seconds = time.perf_counter() - begin
    return Exchanged(path, plan.family, options, len(stored), size, seconds, accounted.ignored)


def export_checkpoint(
    ckpt_dir: Path,
    hf_dir: Path,
    *,
    iteration: int | None = None,
    family: str | None = None,
    dtype: str | None = None,
    vocab_size: int | None = None,
    reference: Path | None = None,
    max_shard_bytes: int = SHARD_BYTES,
) -> Exchanged:
    """Make a folder of Hugging Face's out of a checkpoint of ours.

    It is read back, and every tensor compared bit for bit with what it was made of.

    Args:
        ckpt_dir: Folder of checkpoints, or one of them.
        hf_dir: To be made; not there yet, or empty.
        iteration: Which checkpoint; the latest when None.
        family: How to name the weights; when None the family that it was imported as, else that
            of ``reference`` if it fits, else the first that does.
        dtype: Key of ``DTYPES``; the model's when None. Wider than that, main weights are taken
            where the checkpoint has them.
        vocab_size: Rows of the vocabulary to write; those that it was imported with when None, else
            the ids of the tokenizer, else all.
        reference: A folder of Hugging Face's, such as the one that training began with, to take
            tokenizer, generation settings and harmless fields of config.json from; what the
            checkpoint keeps of them when None.
        max_shard_bytes: Of one file of tensors.

    Raises:
        ConfigError: No family computes what this model computes.
        CheckpointError: Damage; something is there already; what was written reads differently.
    """
    begin = time.perf_counter()
    writer.refuse_target(hf_dir)
    source = StoredCheckpoint.open(ckpt_dir, iteration)
    config = config_from_data(dict(source.common["config"]))
    options = options_of_checkpoint(config, source.common["padded_vocab_size"])
    found = fitting_family(config, options, _families(family, source, reference))
    rows = vocab_size or _rows(source, options["padded_vocab_size"])
    plan = weight_plan(found, options, vocab_size=rows)
    accounting.compare_with_model(plan, _shapes(source))
    wanted = DTYPES[dtype] if dtype else _weights_dtype(source, plan)
    facts = _hf_facts(plan, wanted)
    beside = side_files(source, found, reference)
    hf_config = _hf_config(options, found, rows, wanted)

    def read(key: str) -> Tensor:
        return source.read(_precise(source, key, wanted))

    size = writer.write_folder(
        hf_dir,
        facts,
        lambda key: hf_tensor(plan, plan.repeats.get(key, key), facts[key].dtype, read),
        documents={CONFIG: beside.fields | hf_config, **beside.documents},
        copies=beside.copies,
        max_shard_bytes=max_shard_bytes,
        check=lambda written: verify_export(written, plan, facts, read),
    )
    seconds = time.perf_counter() - begin
    return Exchanged(hf_dir, found, options, len(facts), size, seconds)


def _families(asked: str | None, source: StoredCheckpoint, reference: Path | None) -> list[str]:
    """Return the families to choose from, in order: that of ``reference`` before all others."""
    asked = asked or (source.common.get(ORIGIN) or {}).get("family")
    if asked is not None:
        return [asked]
    first = [] if reference is None else [family_of(read_config(reference)).name]
    return list(dict.fromkeys([*first, *FAMILIES]))


def verify_export(
    hf_dir: Path, plan: WeightPlan, facts: Mapping[str, TensorFacts], read: Any
) -> None:
    """Import what was exported, tensor by tensor, and compare it with where it came from.

    Raises:
        CheckpointError: Names the tensors that differ.
    """
    with HfFolder.open(hf_dir) as again:
        shapes = {key: fact.shape for key, fact in again.facts.items()}
        accounted = accounting.account(plan, shapes)
        numbers = PlainNumbers(again, torch.float32)
        accounting.refuse_other_copies(hf_dir, numbers, accounted)
        back = accounting.named_reader(numbers, accounted)

        def is_same(key: str) -> bool:  # a function of its own: its tensors go with it
            dtype = facts[plan.pieces_of_key[key][0].hf_key].dtype
            original = read(key).to(dtype)
            return is_equal(plan, key, original, our_tensor(plan, key, dtype, back))

        wrong = [f"{key} reads differently" for key in plan.pieces_of_key if not is_same(key)]
    accounting.refuse(f"what was written to {hf_dir} is not what the checkpoint holds", wrong)


def _common(
    config: RunConfig, family: Family, hf_dir: Path, hf_config: Mapping[str, Any]
) -> dict[str, Any]:
    return {
        "iteration": ITERATION,
        WEIGHTS_ONLY: True,
        "consumed_train_samples": 0,
        "data_fingerprint": None,
        "dropout_seed": None,
        "optimizer": None,
        "loss_scale": None,
        "world_size": 1,
        "padded_vocab_size": config.tokenizer.padded_vocab_size,
        "architecture": architecture(config.model),
        "schedule": {},
        "torch": torch.__version__,
        "config": config_data(config),
        ORIGIN: {"family": family.name, "config": dict(hf_config)},
        "history": [f"imported from {hf_dir.name} of Hugging Face ({family.name})"],
    }


def _hf_config(
    options: Mapping[str, Any], family: Family, rows: int, dtype: torch.dtype
) -> dict[str, Any]:
    name = str(dtype).removeprefix("torch.")
    return hf_config_of({**options, "padded_vocab_size": rows}, family, dtype=name)


def _shapes(source: StoredCheckpoint) -> dict[str, tuple[int, ...]]:
    """Return key, without ``model.``, -> shape of the weights of a checkpoint."""
    keys = [key for key in source.keys if key.startswith(MODEL)]
    return {key.removeprefix(MODEL): source.facts(key).shape for key in keys}


def _rows(source: StoredCheckpoint, padded: int) -> int:
    """Return how many rows of the vocabulary mean something."""
    origin = (source.common.get(ORIGIN) or {}).get("config") or {}
    if origin.get("vocab_size"):
        return int(origin["vocab_size"])
    ids: int | None = (source.common["tokenizer"] or {}).get("vocab_size")
    settings = source.common["config"]["tokenizer"]
    if settings.get("unpadded_vocab_size"):
        return int(settings["unpadded_vocab_size"])
    unit = settings.get("make_vocab_size_divisible_by") or 1
    unit *= source.common["config"]["model"].get("tensor_model_parallel_size") or 1
    return ids if ids is not None and -(-ids // unit) * unit == padded else padded


def _weights_dtype(source: StoredCheckpoint, plan: WeightPlan) -> torch.dtype:
    key = next(key for key in plan.shapes if key not in plan.fp32_keys)
    return source.facts(MODEL + key).dtype


def _hf_facts(plan: WeightPlan, dtype: torch.dtype) -> dict[str, TensorFacts]:
    def kind(hf_key: str) -> torch.dtype:
        keys = {piece.key for piece in plan.pieces_of_hf_key[hf_key]}
        return torch.float32 if keys & plan.fp32_keys and dtype != torch.float64 else dtype

    facts = {key: TensorFacts(shape, kind(key)) for key, shape in plan.hf_shapes.items()}
    return facts | {key: facts[original] for key, original in plan.repeats.items()}


def _precise(source: StoredCheckpoint, key: str, dtype: torch.dtype) -> str:
    """Return the key of the main weight where more of it is wanted than the model keeps."""
    main = f"{OPTIMIZER}main_param.{key}"
    is_wider = dtype.itemsize > source.facts(MODEL + key).dtype.itemsize
    return main if is_wider and main in source.index else MODEL + key
