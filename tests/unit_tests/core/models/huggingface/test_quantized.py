"""FP8 in blocks and MXFP4 become plain numbers on the way in."""

from pathlib import Path

import pytest
import torch

from megatron.core.errors import CheckpointError
from megatron.core.models.huggingface.folder import HfFolder
from megatron.core.models.huggingface.quantized import PlainNumbers
from tests.helpers.hf_tiny import write_folder

pytest.importorskip("safetensors")
FP8 = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}


def fp8_folder(folder: Path, **others: torch.Tensor) -> tuple[Path, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    codes = torch.randn(300, 200, generator=generator).to(torch.float8_e4m3fn)
    scales = torch.rand(3, 2, generator=generator) + 0.5
    wide = scales.repeat_interleave(128, 0).repeat_interleave(128, 1)[:300, :200]
    tensors = {"a.weight": codes, "a.weight_scale_inv": scales, **others}
    return write_folder(folder, FP8, tensors), codes.float() * wide


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fp8_is_multiplied_block_by_block(tmp_path: Path, dtype: torch.dtype) -> None:
    folder, expected = fp8_folder(tmp_path, norm=torch.ones(3))
    with HfFolder.open(folder) as opened:
        numbers = PlainNumbers(opened, dtype)
        assert numbers.is_quantized
        assert set(numbers.facts) == {"a.weight", "norm"}
        assert numbers.facts["a.weight"] == ((300, 200), dtype)
        assert torch.equal(numbers.read("a.weight"), expected.to(dtype))
        assert torch.equal(numbers.read("a.weight", (5, 9)), expected[5:9].to(dtype))
        assert numbers.read("norm").dtype == torch.float32


def test_fp8_without_scales_or_with_others_is_refused(tmp_path: Path) -> None:
    codes = torch.zeros(300, 200).to(torch.float8_e4m3fn)
    folder = write_folder(tmp_path / "a", FP8, {"a.weight": codes})
    with HfFolder.open(folder) as opened, pytest.raises(CheckpointError, match="without its scal"):
        PlainNumbers(opened, torch.float32)
    tensors = {"a.weight": codes, "a.weight_scale_inv": torch.ones(2, 2)}
    folder = write_folder(tmp_path / "b", FP8, tensors)
    with HfFolder.open(folder) as opened, pytest.raises(CheckpointError, match=r"must be \[3, 2\]"):
        PlainNumbers(opened, torch.float32)


def test_another_quantization_is_refused_by_name(tmp_path: Path) -> None:
    config = {"quantization_config": {"quant_method": "gptq"}}
    folder = write_folder(tmp_path, config, {"a": torch.ones(1)})
    with HfFolder.open(folder) as opened, pytest.raises(CheckpointError, match="'gptq'"):
        PlainNumbers(opened, torch.float32)


def test_mxfp4_is_what_transformers_makes_of_it(tmp_path: Path) -> None:
    mxfp4 = pytest.importorskip("transformers.integrations.mxfp4")
    generator = torch.Generator().manual_seed(2)
    blocks = torch.randint(0, 256, (3, 260, 2, 16), generator=generator, dtype=torch.uint8)
    scales = torch.randint(120, 134, (3, 260, 2), generator=generator, dtype=torch.uint8)
    config = {"quantization_config": {"quant_method": "mxfp4"}}
    name = "model.layers.0.mlp.experts.gate_up_proj"
    tensors = {f"{name}_blocks": blocks, f"{name}_scales": scales, f"{name}_bias": torch.ones(2)}
    expected = mxfp4.convert_moe_packed_tensors(blocks, scales)
    with HfFolder.open(write_folder(tmp_path, config, tensors)) as opened:
        numbers = PlainNumbers(opened, torch.bfloat16)
        assert set(numbers.facts) == {name, f"{name}_bias"}
        assert numbers.facts[name].shape == (3, 64, 260) == tuple(expected.shape)
        assert torch.equal(numbers.read(name), expected)
        assert torch.equal(numbers.read(name, (1, 2)), expected[1:2])
