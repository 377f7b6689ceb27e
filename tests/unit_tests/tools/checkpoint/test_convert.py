"""tools/checkpoint/convert.py as a user calls it."""

from pathlib import Path

import pytest
import torch

from megatron.core.errors import ConfigError
from tests.helpers.hf_tiny import tiny_folder
from tools.checkpoint import convert

pytest.importorskip("safetensors")


def test_in_and_out_again_with_a_report(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    source = tiny_folder(tmp_path / "theirs", "mixtral")
    there = ["--load", str(source), "--save", str(tmp_path / "ours")]
    convert.main(["--from", "hf", "--to", "megatron", *there])
    shown = capsys.readouterr().out
    assert "family    mixtral (Mixtral)" in shown
    assert "--num-experts 8" in shown
    assert f"wrote     {tmp_path / 'ours/iter_0000000'}" in shown
    back = ["--load", str(tmp_path / "ours"), "--save", str(tmp_path / "again")]
    convert.main(["--from", "megatron", "--to", "hf", *back, "--dtype", "bf16"])
    assert "verified  read back, every tensor bit-equal" in capsys.readouterr().out
    from safetensors.torch import load_file

    tensors = load_file(tmp_path / "again/model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}


def test_flags_of_the_other_direction_are_refused(tmp_path: Path) -> None:
    words = ["--from", "hf", "--to", "megatron", "--load", "x", "--save", "y"]
    with pytest.raises(ConfigError, match="--family has no effect with --to megatron"):
        convert.main([*words, "--family", "llama"])
    words = ["--from", "hf", "--to", "hf", "--load", "x", "--save", "y"]
    with pytest.raises(ConfigError, match="nothing to convert"):
        convert.main(words)


@pytest.mark.parametrize(("text", "size"), [("5GB", 5 * 10**9), ("2MiB", 2 << 20), ("1000", 1000)])
def test_sizes_are_read_with_their_units(text: str, size: int) -> None:
    assert convert.size(text) == size


@pytest.mark.parametrize("text", ["5XB", "GB", "0", "-1GB"])
def test_what_is_no_size_is_refused(
    text: str, capsys: pytest.CaptureFixture, tmp_path: Path
) -> None:
    words = ["--from", "megatron", "--to", "hf", "--load", "x", "--save", "y"]
    with pytest.raises(SystemExit):
        convert.main([*words, f"--max-shard-size={text}"])
    assert "--max-shard-size" in capsys.readouterr().err
