import json
import shutil
from pathlib import Path

import pytest
import torch

from megatron.core.dist_checkpointing.offline import StoredCheckpoint
from tools.checkpoint import contents, inspect, keys
from tools.checkpoint.difference import difference
from tools.checkpoint.rewrite import Made, copied, write


def changed(source: Path, folder: Path, values: dict[str, dict[tuple[int, ...], float]]) -> Path:
    """Copy a checkpoint, but for some elements."""
    checkpoint = StoredCheckpoint.open(source)
    tensors = {key: copied(checkpoint, key) for key in checkpoint.keys}
    for key, elements in values.items():
        tensor = checkpoint.read(key)
        for index, value in elements.items():
            tensor[index] = value
        tensors[key] = Made(checkpoint.facts(key), lambda tensor=tensor: tensor)
    return write(checkpoint, folder, tensors, common=checkpoint.common)[0]


def test_the_table_says_what_is_there(run_folder: Path, call) -> None:
    code, text, errors = call(inspect.main, run_folder)
    assert (code, errors) == (0, "")
    lines = {line.split("  ")[0]: line.split() for line in text.splitlines()}
    assert lines["iteration"][1:] == ["6,", "48", "samples"]
    assert "adam, 6 steps" in text
    assert lines["layer 0"][2] == "dense"
    assert lines["layer 2"][2:5] == ["MoE", "4", "2"]
    assert "--moe-router-score-function sigmoid" in text
    assert "moe_token_dispatcher" not in text


def test_parameters_and_bytes_are_counted_once(run_folder: Path) -> None:
    checkpoint = StoredCheckpoint.open(run_folder, 2)
    found = contents.contents_of(checkpoint)
    sizes = {key: checkpoint.read(key).numel() for key in checkpoint.keys}
    weights = {k: n for k, n in sizes.items() if k.startswith("model.") and "_bias" not in k}
    experts = sum(n for key, n in weights.items() if "local_experts" in key)
    assert found.parameters == sum(weights.values())
    assert found.active_parameters == found.parameters - experts // 2, "2 of 4 experts a token"
    assert found.bytes_of["exp_avg"] == found.bytes_of["exp_avg_sq"] == 4 * found.parameters
    assert sum(found.bytes_of.values()) == sum(f.facts.nbytes for f in checkpoint.index.values())


def test_tensors_are_listed_by_pattern(run_folder: Path, call) -> None:
    code, text, _ = call(inspect.main, run_folder, "--tensors", "model.*layers.1.mlp.router*")
    assert code == 0
    assert text.splitlines() == [
        "model.decoder.layers.1.mlp.router.expert_bias  float32 [4]",
        "model.decoder.layers.1.mlp.router.weight  float32 [4, 16]",
    ]
    listed = json.loads(call(inspect.main, run_folder, "--tensors", "rng", "--json")[1])
    assert listed["rng.0.torch"]["dtype"] == "uint8"
    assert call(inspect.main, run_folder, "--tensors", "nonsense")[0] == 2


def test_json_has_all_of_it(run_folder: Path, call) -> None:
    data = json.loads(call(inspect.main, run_folder, "--json", "--ckpt-step", "4")[1])
    assert data["iteration"] == 4
    assert data["architecture"]["--num-experts"] == 4
    parts = {part["name"]: part for part in data["parts"]}
    assert parts["layer 1"]["experts"] == 4
    assert parts["embedding"]["bytes"]["exp_avg"] == 4 * parts["embedding"]["parameters"]


def test_verify_names_the_tensor_and_ends_with_1(run_folder: Path, tmp_path: Path, call) -> None:
    assert call(inspect.main, run_folder, "--verify")[0] == 0
    folder = shutil.copytree(run_folder, tmp_path / "run")
    checkpoint = StoredCheckpoint.open(folder)
    key = "optimizer.exp_avg.decoder.layers.2.mlp.experts.local_experts.3.linear_fc2.weight"
    block = checkpoint.index[key].blocks[0]
    with (checkpoint.path / block.file).open("r+b") as stream:
        stream.seek(block.facts.begin + 8)
        stream.write(b"\x7f")
    code, text, _ = call(inspect.main, folder, "--verify")
    assert code == 1
    assert text.splitlines()[1:] == [f"  - {key} (in {block.file}) is not what was written (hash)"]
    told = json.loads(call(inspect.main, folder, "--verify", "--json")[1])
    assert told["whole"] is False
    assert call(inspect.main, folder, "--verify", "--ckpt-step", "2")[0] == 0


QKV = "model.decoder.layers.1.self_attention.linear_qkv.weight"
ROUTER = "model.decoder.layers.1.mlp.router.weight"
NORM = "model.decoder.final_layernorm.weight"


def test_diff_finds_the_first_and_the_largest(run_folder: Path, tmp_path: Path, call) -> None:
    values = {
        ROUTER: {(1, 2): 7.5, (3, 0): 0.25},
        NORM: {(5,): float("nan")},
        QKV: {(4, 3): 1e-30},
    }
    other = changed(run_folder, tmp_path / "other", values)
    code, text, _ = call(inspect.main, "--diff", run_folder, other)
    assert code == 1
    data = json.loads(call(inspect.main, "--diff", run_folder, other, "--json")[1])
    before = {key: StoredCheckpoint.open(run_folder).read(key) for key in values}
    assert data["different"] == [QKV, ROUTER, NORM]
    assert data["first"]["key"] == QKV
    assert data["first"]["element"] == [4, 3]
    assert data["first"]["values"] == [before[QKV][4, 3].item(), pytest.approx(1e-30)]
    assert data["largest"]["key"] == NORM, "nothing is as far as what is no number"
    assert data["equal_tensors"] == len(StoredCheckpoint.open(run_folder).keys) - 3
    code, text, _ = call(inspect.main, "--diff", run_folder, other, "--tensors", "router.weight")
    assert code == 1
    largest = 7.5 - before[ROUTER][1, 2].item()
    assert f"{ROUTER}[1, 2]: {before[ROUTER][1, 2].item()!r} and 7.5: {largest:.3g} apart" in text
    assert call(inspect.main, "--diff", run_folder, other, "--tensors", "embedding")[0] == 0


def test_diff_tells_state_and_shapes_apart_from_options(run_folder: Path, tmp_path: Path) -> None:
    source = StoredCheckpoint.open(run_folder)
    config = {**source.common["config"]}
    config["training"] = {**config["training"], "micro_batch_size": 8}
    tensors = {key: copied(source, key) for key in source.keys}
    write(source, tmp_path / "options", tensors, common={**source.common, "config": config})
    other = StoredCheckpoint.open(tmp_path / "options")
    found = difference(source, other, (source.keys, other.keys))
    assert found.is_equal
    assert found.options == ["micro batch size: 4 and 8"]
    common = {**source.common, "consumed_train_samples": 7}
    del tensors[NORM]
    tensors[ROUTER] = Made(source.facts(QKV), lambda: source.read(QKV))
    write(source, tmp_path / "state", tensors, common=common)
    other = StoredCheckpoint.open(tmp_path / "state")
    found = difference(source, other, (source.keys, other.keys))
    assert found.state == ["consumed train samples: 48 and 7"]
    assert found.only_first == [NORM]
    assert found.facts == [f"{ROUTER}: float32 [4, 16] and float32 [48, 16]"]
    assert not found.is_equal


def test_equal_bits_are_equal_and_a_sign_of_zero_is_not(run_folder: Path, tmp_path: Path) -> None:
    first = changed(run_folder, tmp_path / "a", {NORM: {(1,): 0.0, (2,): float("nan")}})
    second = changed(run_folder, tmp_path / "b", {NORM: {(1,): -0.0, (2,): float("nan")}})
    one, two = StoredCheckpoint.open(first), StoredCheckpoint.open(second)
    found = difference(one, two, ([NORM], [NORM]))
    assert found.first is not None
    assert found.first.element == (1,)
    assert found.largest is not None
    assert found.largest.size == 0.0, "no distance, and the numbers that are none are equal"


def test_keys_come_in_the_order_of_a_token() -> None:
    names = [
        "model.embedding.word_embeddings.weight",
        "model.embedding.position_embeddings.weight",
        "model.decoder.layers.2.input_layernorm.weight",
        "model.decoder.layers.2.self_attention.linear_qkv.weight",
        "model.decoder.layers.2.self_attention.linear_proj.weight",
        "model.decoder.layers.2.pre_mlp_layernorm.weight",
        "model.decoder.layers.2.mlp.router.weight",
        "model.decoder.layers.2.mlp.experts.local_experts.2.linear_fc1.gate.weight",
        "model.decoder.layers.2.mlp.experts.local_experts.10.linear_fc1.gate.weight",
        "model.decoder.layers.10.input_layernorm.weight",
        "model.decoder.final_layernorm.weight",
        "model.output_layer.weight",
        "optimizer.exp_avg.embedding.word_embeddings.weight",
        "rng.0.numpy",
    ]
    generator = torch.Generator().manual_seed(0)
    mixed = [names[n] for n in torch.randperm(len(names), generator=generator)]
    assert sorted(mixed, key=keys.model_order) == names


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["/nowhere"], "/nowhere holds no checkpoint"),
        ([], "give FOLDER, or --diff A B"),
        (["RUN", "--ckpt-step", "3"], "no complete checkpoint of iteration 3; complete here: 2, 4"),
        (["RUN", "--diff", "RUN", "RUN"], "--diff takes two folders and stands without FOLDER"),
        (["--diff", "RUN", "/nowhere"], "/nowhere holds no checkpoint"),
        (["RUN", "--verfy"], "did you mean --verify?"),
        (["RUN", "--verify", "--tensors"], "--verify looks at all tensors"),
    ],
)
def test_mistakes_are_one_line_and_code_2(run_folder: Path, call, words, message) -> None:
    code, text, errors = call(inspect.main, *(run_folder if w == "RUN" else w for w in words))
    assert (code, text) == (2, "")
    assert message in errors
    assert errors.count("\n") == 1
