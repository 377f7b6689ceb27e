"""Weights that are kept in 8 or 4 bits on disk, as numbers of the format that is wanted.

DeepSeek's FP8 has a factor for each block of 128 x 128 (``NAME_scale_inv`` beside ``NAME``); MXFP4
of GPT-OSS one power of two for each 32 numbers of a row (``NAME_blocks`` and ``NAME_scales``, which
are NAME turned). Products are fp32 and rounded once; a few rows are in fp32 at a time.

Source: DeepSeek-V3 (arXiv:2412.19437), section 3.3.2; OCP Microscaling Formats v1.0.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from megatron.core.dist_checkpointing.index import TensorFacts
from megatron.core.errors import CheckpointError
from megatron.core.models.huggingface.folder import HfFolder

_SCALE, _BLOCKS, _SCALES = "_scale_inv", "_blocks", "_scales"
_METHODS = ("fp8", "mxfp4")
_FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_ROWS = 128


class PlainNumbers:
    """A folder whose tensors all read as numbers of one format, whatever they are kept as."""

    def __init__(self, folder: HfFolder, dtype: torch.dtype) -> None:
        """Look at what is quantized, and how.

        Args:
            folder: Open.
            dtype: Of what quantized tensors become; others stay as they are.

        Raises:
            CheckpointError: Quantized in another way; says which and the way round.
        """
        self._folder, self._dtype = folder, dtype
        settings = folder.config.get("quantization_config") or {}
        method = settings.get("quant_method")
        if settings and method not in _METHODS:
            raise CheckpointError(
                f"{folder.path}: config.json says quant_method {method!r}, which is not read here "
                f"(only {', '.join(_METHODS)}); use the weights before quantization, or have "
                "transformers dequantize and save them"
            )
        self._block = tuple(settings.get("weight_block_size") or (_ROWS, _ROWS))
        self.facts: Mapping[str, TensorFacts] = dict(self._facts())
        """Name -> shape, and the format on disk or that of the result."""

    @property
    def is_quantized(self) -> bool:
        """Whether anything is."""
        return self.facts.keys() != self._folder.facts.keys() or any(
            fact.dtype == torch.float8_e4m3fn for fact in self._folder.facts.values()
        )

    def read(self, name: str, rows: tuple[int, int] | None = None) -> Tensor:
        """Return a tensor, or some of its rows; see ``HfFolder.read``."""
        there = self._folder.facts
        if name + _SCALE in there:
            whole = self._from_fp8(name)
            return whole if rows is None else whole[rows[0] : rows[1]]
        if name in there:
            return self._folder.read(name, rows)
        return self._from_mxfp4(name, rows)

    def _facts(self) -> dict[str, TensorFacts]:
        there = self._folder.facts
        found: dict[str, TensorFacts] = {}
        for name, fact in there.items():
            original = name.removesuffix(_SCALE)
            if original != name and original in there:
                continue
            stem = name.removesuffix(_BLOCKS)
            if stem != name and stem + _SCALES in there:
                *front, groups, half = fact.shape
                shape = (*front[:-1], groups * half * 2, front[-1])
                found[stem] = TensorFacts(shape, self._dtype)
                continue
            stem = name.removesuffix(_SCALES)
            if stem != name and stem + _BLOCKS in there:
                continue
            if fact.dtype == torch.float8_e4m3fn:
                if name + _SCALE not in there:
                    raise CheckpointError(f"{self._folder.path}: {name} is FP8 without its scales")
                self._check_scales(name)
                fact = TensorFacts(fact.shape, self._dtype)
            found[name] = fact
        return found

    def _check_scales(self, name: str) -> None:
        shape = self._folder.facts[name].shape
        scales = self._folder.facts[name + _SCALE].shape
        wanted = tuple(-(-size // block) for size, block in zip(shape, self._block, strict=True))
        if scales != wanted:
            raise CheckpointError(
                f"{self._folder.path}: {name}{_SCALE} is {list(scales)} and must be {list(wanted)} "
                f"for {list(shape)} in blocks of {list(self._block)}"
            )

    def _from_fp8(self, name: str) -> Tensor:
        codes, scales = self._folder.read(name), self._folder.read(name + _SCALE).float()
        high, wide = self._block
        result = torch.empty(codes.shape, dtype=self._dtype)
        for number, begin in enumerate(range(0, codes.shape[0], high)):
            factors = scales[number].repeat_interleave(wide)[: codes.shape[1]]
            result[begin : begin + high] = codes[begin : begin + high].float() * factors
        return result

    def _from_mxfp4(self, name: str, rows: tuple[int, int] | None) -> Tensor:
        first, last = rows or (0, self.facts[name].shape[0])
        parts = [self._one_of_mxfp4(name, number) for number in range(first, last)]
        return torch.stack(parts) if len(parts) > 1 else parts[0][None]

    def _one_of_mxfp4(self, name: str, number: int) -> Tensor:
        """Return one matrix of a stack, turned as it is without quantization."""
        blocks = self._folder.read(name + _BLOCKS, (number, number + 1))[0]
        scales = self._folder.read(name + _SCALES, (number, number + 1))[0]
        table = torch.tensor([*_FP4, *(-value for value in _FP4)])
        result = torch.empty(self.facts[name].shape[1:], dtype=self._dtype)
        for begin in range(0, blocks.shape[0], _ROWS):
            codes = blocks[begin : begin + _ROWS].int()  # [rows, groups, 16], the low half first
            pairs = torch.stack([table[codes & 15], table[codes >> 4]], dim=-1).flatten(2)
            exponents = scales[begin : begin + _ROWS].int() - 127
            numbers = torch.ldexp(pairs, exponents[..., None]).flatten(1)
            result[:, begin : begin + _ROWS] = numbers.T
        return result


def target_dtype(folder: HfFolder, wanted: torch.dtype | None, known: Any) -> torch.dtype:
    """Return the number format of an import: the wanted one, else that of most numbers.

    Args:
        folder: Open.
        wanted: None where nothing is said.
        known: Formats that a model can have; others become bf16.
    """
    if wanted is not None:
        return wanted
    count: dict[torch.dtype, int] = {}
    for fact in folder.facts.values():
        count[fact.dtype] = count.get(fact.dtype, 0) + fact.nbytes
    best = max(count, key=lambda dtype: count[dtype], default=torch.bfloat16)
    return best if best in known else torch.bfloat16
