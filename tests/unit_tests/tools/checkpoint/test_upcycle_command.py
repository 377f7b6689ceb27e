"""Command line, tensors and receipt of upcycling; that models agree is in tests/parity."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from megatron.core.dist_checkpointing.offline import StoredCheckpoint
from megatron.training.huggingface import export_checkpoint
from tests.helpers.small_runs import alone_in_the_world
from tools.checkpoint import upcycle, upcycle_receipt
from tools.upcycling.dense_models import SEQ, save_dense

MLP = "model.decoder.layers.{}.mlp."
EXPERT = MLP + "experts.local_experts.{}."


@pytest.fixture(scope="session")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dense")
    with alone_in_the_world():
        for family, extra in {"gpt2": "", "llama": "--bf16"}.items():
            save_dense(folder / family, family, f"{extra} --num-layers 2")
    return folder


@pytest.fixture(autouse=True)
def alone(dense: Path) -> Iterator[None]:
    with alone_in_the_world():
        yield


@pytest.fixture
def made(call, tmp_path):
    def run(load: Path, *words: object) -> tuple[StoredCheckpoint, str]:
        base = ("--load", load, "--save", tmp_path / "moe", "--num-experts", 4, "--no-receipt")
        code, text, errors = call(upcycle.main, *base, *words)
        assert (code, errors) == (0, "")
        return StoredCheckpoint.open(tmp_path / "moe"), text

    return run


def test_experts_are_the_bits_of_the_mlp(dense, made) -> None:
    old = StoredCheckpoint.open(dense / "llama")
    new, text = made(dense / "llama", "--moe-layer-freq", "([0]+[1])")
    assert "layer 1: 4 experts, top-2\n" in text
    assert "to train on: --load" in text
    assert new.common["iteration"] == 0
    assert new.common["optimizer"] is None
    for expert in range(4):
        for name in ("linear_fc1.gate.weight", "linear_fc1.up.weight", "linear_fc2.weight"):
            want = old.read(MLP.format(1) + name)
            assert want.dtype == torch.bfloat16
            assert torch.equal(new.read(EXPERT.format(1, expert) + name), want)
    same = [key for key in old.keys if key.startswith("model.") and "layers.1.mlp" not in key]
    assert len(same) > 10
    assert all(torch.equal(new.read(key), old.read(key)) for key in same)
    rest = [key for key in new.keys if key not in same and "layers.1.mlp.experts" not in key]
    assert rest == [MLP.format(1) + "router.weight"]


def test_slices_with_a_shared_expert_take_every_channel_once(dense, made) -> None:
    old = StoredCheckpoint.open(dense / "gpt2")
    words = ("--granularity", 2, "--moe-shared-expert-intermediate-size", 16)
    new, text = made(dense / "gpt2", *words)
    assert "96 ffn channels = 16 shared + 40 x 2 slices" in text
    for name, dim in {"linear_fc1.weight": 0, "linear_fc1.bias": 0, "linear_fc2.weight": 1}.items():
        want = old.read(MLP.format(0) + name)
        parts = [new.read(MLP.format(0) + "shared_experts." + name)]
        for copy in (0, 2):  # first expert of a copy
            slices = [new.read(EXPERT.format(0, copy + part) + name) for part in (0, 1)]
            assert torch.equal(torch.cat(parts + slices, dim=dim), want)
    bias = old.read(MLP.format(0) + "linear_fc2.bias")
    assert torch.equal(new.read(MLP.format(0) + "shared_experts.linear_fc2.bias"), bias)
    assert not new.read(EXPERT.format(0, 3) + "linear_fc2.bias").any()


def test_the_factor_goes_into_second_matrices_when_folded(dense, made) -> None:
    old = StoredCheckpoint.open(dense / "gpt2")
    new, text = made(dense / "gpt2", "--granularity", 2, "--fold")
    assert "second matrices are multiplied by 2" in text
    assert new.common["architecture"]["--moe-router-topk-scaling-factor"] is None
    want = old.read(MLP.format(1) + "linear_fc2.weight")[:, 48:] * 2
    assert torch.equal(new.read(EXPERT.format(1, 1) + "linear_fc2.weight"), want)
    # each of 2 slices adds half of it, twice as much
    bias = old.read(MLP.format(1) + "linear_fc2.bias")
    assert torch.equal(new.read(EXPERT.format(1, 3) + "linear_fc2.bias"), bias)
    rows = new.read(MLP.format(1) + "router.weight")
    assert torch.equal(rows[0], rows[1])
    assert not torch.equal(rows[1], rows[2])


def test_noise_leaves_the_first_copy_and_is_the_same_again(dense, call, tmp_path) -> None:
    for name in ("a", "b"):
        words = ("--load", dense / "gpt2", "--save", tmp_path / name, "--num-experts", 4)
        assert call(upcycle.main, *words, "--noise", 0.1, "--no-receipt")[0] == 0
    one, two = (StoredCheckpoint.open(tmp_path / name) for name in ("a", "b"))
    assert all(one.block_hashes(key) == two.block_hashes(key) for key in one.keys)
    old = StoredCheckpoint.open(dense / "gpt2").read(MLP.format(0) + "linear_fc1.weight")
    experts = [one.read(EXPERT.format(0, expert) + "linear_fc1.weight") for expert in range(4)]
    assert torch.equal(experts[0], old)
    for expert in experts[1:]:
        assert 0.08 < (expert / old - 1).std() < 0.12
    assert not torch.equal(experts[1], experts[2])


def test_dropped_channels_are_the_same_in_all_matrices_of_an_expert(dense, made) -> None:
    old, prefix = StoredCheckpoint.open(dense / "gpt2"), MLP.format(1)
    new, _ = made(dense / "gpt2", "--drop", 0.25)
    drawn = []
    for expert in range(4):
        own = EXPERT.format(1, expert)
        changed = new.read(own + "linear_fc1.weight") != old.read(prefix + "linear_fc1.weight")
        channels = changed.all(dim=1)
        assert torch.equal(changed.any(dim=1), channels)
        assert int(channels.sum()) == 24
        second = new.read(own + "linear_fc2.weight") != old.read(prefix + "linear_fc2.weight")
        assert torch.equal(second.all(dim=0), channels)
        bias = new.read(own + "linear_fc1.bias") != old.read(prefix + "linear_fc1.bias")
        assert torch.equal(bias, channels)
        new_rows = new.read(own + "linear_fc1.weight")[channels]
        old_rows = old.read(prefix + "linear_fc1.weight")[channels]
        assert 0.9 < new_rows.std() / old_rows.std() < 1.1
        drawn.append(tuple(channels.tolist()))
    assert len(set(drawn)) == 4


BASE = ("--num-experts", 4, "--receipt-tokens", 128)


def test_the_receipt_lies_beside_the_checkpoint_and_can_be_made_again(
    dense, call, tmp_path
) -> None:
    words = ("--load", dense / "gpt2", "--save", tmp_path)
    code, text, _ = call(upcycle.main, *words, *BASE)
    assert code == 0
    assert "kept to rounding" in text
    first = json.loads((tmp_path / upcycle_receipt.RECEIPT).read_text())
    assert first["kept"]
    assert first["num_tokens"] == 128
    assert first["row_length"] == SEQ
    assert 0 < first["rounding"] < 1e-5
    data = tmp_path / "text.jsonl"
    data.write_text('{"text": "' + "a plain text " * 20 + '"}\n')
    code, text, _ = call(upcycle.main, *words, "--only-receipt", "--receipt-data", data)
    assert code == 0
    assert "text.jsonl" in text
    again = json.loads((tmp_path / upcycle_receipt.RECEIPT).read_text())
    assert again["perplexity_before"] != first["perplexity_before"]


def _half_the_second_matrix(*_: object) -> dict[int, float]:
    return {0: 1.0, 1: 0.5}


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("folds", _half_the_second_matrix),
        ("router_std", lambda *_: 0.02),
        ("channels_of", None),
    ],
    ids=["a scale is missing", "router rows are too large", "slices overlap"],
)
def test_a_planted_mistake_is_not_called_kept(
    name, wrong, dense, call, tmp_path, monkeypatch
) -> None:
    from megatron.training.upcycling import expert_tensors

    if wrong is None:
        right = expert_tensors.channels_of

        def wrong(model, granularity):
            return type("Overlapping", (type(right(model, granularity)),), {
                "of_expert": lambda self, expert: slice(0, self.slice_width)
            })(*right(model, granularity))  # fmt: skip

    monkeypatch.setattr(expert_tensors, name, wrong)
    words = ("--load", dense / "gpt2", "--save", tmp_path, *BASE, "--granularity", 2)
    words += ("--moe-router-pre-softmax",)
    code, text, _ = call(upcycle.main, *words)
    assert code == 1
    assert "NOT KEPT" in text
    assert not json.loads((tmp_path / upcycle_receipt.RECEIPT).read_text())["kept"]


def test_noise_is_told_as_what_changed_the_function(dense, call, tmp_path) -> None:
    words = ("--load", dense / "gpt2", "--save", tmp_path, *BASE, "--noise", 0.01)
    code, text, _ = call(upcycle.main, *words)
    assert code == 0
    assert "changed by --noise 0.01" in text


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--num-expert", 4], "did you mean --num-experts"),
        ([], "--num-experts is missing"),
        (["--num-experts", 4, "--moe-router-topk", 5], "must lie between 1 and --num-experts 4"),
        (["--num-experts", 4, "--drop", 1.5], "--drop 1.5 must lie between 0 and 1"),
        (["--num-experts", 4, "--noise", -1], "--noise -1.0 must be 0 or more"),
        (["--num-experts", 4, "--granularity", 3], "3 must divide --num-experts 4"),
        (["--num-experts", 4, "--moe-ffn-hidden-size", 90], "--moe-ffn-hidden-size 96, not 90"),
        (
            ["--num-experts", 5, "--granularity", 5, "--moe-router-topk", 5],
            "which --moe-upcycling-granularity 5 cannot share out evenly",
        ),
        (["--num-experts", 4, "--hidden-size", 4], "--hidden-size"),
        (["--only-receipt", "--num-experts", 4], "--only-receipt makes nothing"),
        (["--num-experts", 4, "--router-std", 0], "--router-std 0.0 must be above 0"),
    ],
)
def test_mistakes_are_told(words, told, dense, call, tmp_path) -> None:
    base = ("--load", dense / "gpt2", "--save", tmp_path / "moe")
    code, _, errors = call(upcycle.main, *base, *words)
    assert code == 2
    assert told in errors
    assert not (tmp_path / "moe").exists()


def test_only_a_dense_model_is_upcycled_and_only_once(dense, call, tmp_path) -> None:
    words = ("--load", dense / "gpt2", "--save", tmp_path / "a", "--num-experts", 4)
    assert call(upcycle.main, *words, "--no-receipt")[0] == 0
    code, _, errors = call(upcycle.main, *words, "--no-receipt")
    assert code == 2
    assert "holds checkpoints already (newest: iteration 0)" in errors
    words = ("--load", tmp_path / "a", "--save", tmp_path / "b", "--num-experts", 8)
    code, _, errors = call(upcycle.main, *words)
    assert code == 2
    assert "the checkpoint has --num-experts 4 already" in errors


def test_a_folder_of_hugging_faces_is_a_source_too(dense, call, tmp_path) -> None:
    export_checkpoint(dense / "llama", tmp_path / "hf", family="llama")
    words = ("--load", tmp_path / "hf", "--save", tmp_path / "moe", *BASE)
    code, text, errors = call(upcycle.main, *words)
    assert (code, errors) == (0, "")
    assert "kept to rounding" in text
    old, new = StoredCheckpoint.open(dense / "llama"), StoredCheckpoint.open(tmp_path / "moe")
    assert new.common["upcycling"]["dense"] == str(tmp_path / "hf")
    name = "linear_fc2.weight"
    for expert in range(4):
        want = old.read(MLP.format(1) + name)
        assert torch.equal(new.read(EXPERT.format(1, expert) + name), want)
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left == ["hf", "moe"], "what was imported is gone"
    export_checkpoint(tmp_path / "moe", tmp_path / "mixtral", family="mixtral")
    assert json.loads((tmp_path / "mixtral/config.json").read_text())["num_local_experts"] == 4
