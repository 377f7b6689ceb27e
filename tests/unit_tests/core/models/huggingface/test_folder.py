"""Folders of Hugging Face's that are missing something, or are damaged."""

import json
from pathlib import Path

import pytest
import torch

from megatron.core.errors import CheckpointError
from megatron.core.models.huggingface.accounting import account
from megatron.core.models.huggingface.folder import HfFolder
from tests.helpers.hf_cases import CASES
from tests.helpers.hf_tiny import plan_of, random_tensors, tiny_folder, write_folder

pytest.importorskip("safetensors")


def shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    with HfFolder.open(folder) as opened:
        return {key: fact.shape for key, fact in opened.facts.items()}


def test_a_folder_tells_its_tensors(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path, "llama2")
    assert shapes(folder) == dict(plan_of("llama2").hf_shapes)
    with HfFolder.open(folder) as opened:
        whole = opened.read("model.norm.weight")
        assert torch.equal(opened.read("model.norm.weight", (3, 5)), whole[3:5])


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is not a folder"):
        HfFolder.open(tmp_path / "none")
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        HfFolder.open(tmp_path)
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(CheckpointError, match="holds no JSON object"):
        HfFolder.open(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="cannot be read"):
        HfFolder.open(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"holds no model\.safetensors"):
        HfFolder.open(tmp_path)


def test_a_pickle_is_never_read(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"cos\nsystem\n")
    with pytest.raises(CheckpointError, match=r"may run any code.*save_pretrained"):
        HfFolder.open(tmp_path)


def test_a_file_that_is_cut_off(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path, "llama2")
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(CheckpointError, match=r"model\.safetensors is damaged or cannot be read"):
        HfFolder.open(folder)


def split_in_two(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    where = {key: f"model-{number % 2}.safetensors" for number, key in enumerate(tensors)}
    for name in set(where.values()):
        save_file({key: tensors[key] for key in where if where[key] == name}, folder / name)
    index = {"metadata": {}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path, "llama2")
    split_in_two(folder)
    assert shapes(folder) == dict(plan_of("llama2").hf_shapes)
    (folder / "model-1.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"files that are not there: model-1\.safetensors"):
        HfFolder.open(folder)


def test_an_index_that_lies(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path, "llama2")
    split_in_two(folder)
    file = folder / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    index["weight_map"]["model.extra.weight"] = "model-0.safetensors"
    file.write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"not in their files: model\.extra\.weight"):
        HfFolder.open(folder)
    file.write_text("{}")
    with pytest.raises(CheckpointError, match=r"index\.json is damaged"):
        HfFolder.open(folder)
    file.unlink()
    with pytest.raises(CheckpointError, match=r"2 \.safetensors files, and no"):
        HfFolder.open(folder)


def test_tensors_are_accounted_for_by_name() -> None:
    plan = plan_of("llama2")
    found = dict(plan.hf_shapes)
    del found["model.layers.2.self_attn.k_proj.weight"]
    found["model.layers.9.mlp.up_proj.weight"] = (1, 2)
    found["model.norm.weight"] = (5,)
    found["model.layers.0.self_attn.rotary_emb.inv_freq"] = (4,)
    with pytest.raises(CheckpointError) as raised:
        account(plan, found)
    assert str(raised.value).splitlines()[1:] == [
        "  - missing: model.layers.2.self_attn.k_proj.weight [32, 32] "
        "(decoder.layers.2.self_attention.linear_qkv.weight here)",
        "  - unexpected: model.layers.9.mlp.up_proj.weight [1, 2] (no tensor here)",
        "  - wrong shape: model.norm.weight is [5] and must be [32] "
        "(decoder.final_layernorm.weight here)",
    ]


def test_known_tensors_that_are_no_weights_are_told(tmp_path: Path) -> None:
    plan = plan_of("gpt2")
    found = dict(plan.hf_shapes) | {"transformer.h.0.attn.bias": (1, 1, 8, 8)}
    assert account(plan, found).ignored == ("transformer.h.0.attn.bias",)


def test_files_of_the_bare_model_have_shorter_names() -> None:
    plan = plan_of("gpt2")
    found = {key.removeprefix("transformer."): shape for key, shape in plan.hf_shapes.items()}
    found["h.0.attn.bias"] = (1, 1, 8, 8)
    accounted = account(plan, found)
    assert accounted.names["transformer.wte.weight"] == "wte.weight"
    assert accounted.ignored == ("h.0.attn.bias",)


def test_a_tied_output_layer_on_disk_is_a_copy() -> None:
    plan = plan_of("llama3-tied")
    shape = plan.hf_shapes["model.embed_tokens.weight"]
    accounted = account(plan, dict(plan.hf_shapes) | {"lm_head.weight": shape})
    assert accounted.copies == {"lm_head.weight": "model.embed_tokens.weight"}


def test_prediction_layers_behind_the_last_are_told() -> None:
    plan = plan_of("deepseek-v3")
    found = dict(plan.hf_shapes) | {"model.layers.4.eh_proj.weight": (1, 1)}
    assert account(plan, found).ignored == ("model.layers.4.eh_proj.weight",)


def test_numbers_of_an_unknown_kind(tmp_path: Path) -> None:
    plan = plan_of("llama2")
    tensors = random_tensors(plan)
    tensors["model.norm.weight"] = tensors["model.norm.weight"].to(torch.complex64)
    folder = write_folder(tmp_path, CASES["llama2"].config, tensors)
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight has numbers of kind C64"):
        HfFolder.open(folder)
