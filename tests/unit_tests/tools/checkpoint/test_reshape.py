import tracemalloc
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megatron.core.dist_checkpointing.index import TensorFacts
from megatron.core.dist_checkpointing.offline import OfflineWriter, StoredCheckpoint, shared_out
from megatron.core.errors import ConfigError
from megatron.training.checkpoint_model import load_trained_model
from megatron.training.config.run_config import RunConfig
from tests.helpers.live_bytes import LiveBytes
from tests.helpers.ranks import run_ranks
from tests.helpers.small_runs import loaded
from tests.unit_tests.tools.checkpoint.conftest import FLAGS
from tools.checkpoint import inspect, number_format, reshape
from tools.checkpoint.keys import parts_of

TP, PP, EP = (f"--target-{name}-parallel-size" for name in ("tensor", "pipeline", "expert"))
ETP = "--target-expert-tensor-parallel-size"


def files_of(checkpoint: StoredCheckpoint) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for key, tensor in checkpoint.index.items():
        for block in tensor.blocks:
            found.setdefault(block.file, set()).add(key)
    return found


@pytest.mark.parametrize(
    ("words", "files"),
    [
        (("--files", 5), 5),
        ((TP, 2), 2),
        ((EP, 4), 4),
        ((TP, 2, EP, 2, ETP, 1), 2),
        ((PP, 3), 3),
        ((TP, 2, PP, 3, EP, 2), 12),
        ((EP, 2, "--target-world-size", 4), 4),
    ],
)
def test_every_tensor_is_bit_equal_in_other_files(run_folder, tmp_path, call, words, files) -> None:
    code, text, errors = call(reshape.main, "--load", run_folder, "--save", tmp_path, *words)
    assert (code, errors) == (0, "")
    assert f"in {files} files" in text
    assert call(inspect.main, "--diff", run_folder, tmp_path)[0] == 0
    assert call(inspect.main, tmp_path, "--verify")[0] == 0
    assert len(files_of(StoredCheckpoint.open(tmp_path))) == files


def test_a_file_has_what_a_rank_reads(run_folder: Path, tmp_path: Path, call) -> None:
    call(reshape.main, "--load", run_folder, "--save", tmp_path, PP, 3, EP, 2)
    files = files_of(StoredCheckpoint.open(tmp_path))
    assert len(files) == 6, "3 stages of one layer, each with 2 halves of the experts"
    for number, keys in enumerate(files[name] for name in sorted(files)):
        parts = [parts_of(key) for key in keys]
        assert {part.layer for part in parts} <= {number // 2, None}
        experts = {part.expert for part in parts} - {None}
        first = 2 * (number % 2)
        assert experts == (set() if number < 2 else {first, first + 1})


def test_ranks_cut_as_the_layout_does(run_folder: Path, tmp_path: Path, call) -> None:
    call(reshape.main, "--load", run_folder, "--save", tmp_path, TP, 2)
    index = StoredCheckpoint.open(tmp_path).index
    qkv = "decoder.layers.1.self_attention.linear_qkv.weight"
    for key in (f"model.{qkv}", f"optimizer.exp_avg_sq.{qkv}"):
        assert [block.shape for block in index[key].blocks] == [(24, 16), (24, 16)]
        assert len({block.file for block in index[key].blocks}) == 2


def _goes_on(folder: str) -> None:
    run = loaded(Path(folder), FLAGS)
    assert run.optimizer.step_count == 2


def test_training_goes_on_from_it(run_folder: Path, tmp_path: Path, call) -> None:
    words = ("--load", run_folder, "--ckpt-step", 2, "--save", tmp_path, TP, 2, EP, 2)
    assert call(reshape.main, *words)[0] == 0
    run_ranks(_goes_on, 1, str(tmp_path))


def test_without_the_optimizer_only_weights_stay(run_folder: Path, tmp_path: Path, call) -> None:
    code, text, _ = call(reshape.main, "--load", run_folder, "--save", tmp_path, "--no-optim")
    assert code == 0
    assert f"to train on: --load {tmp_path} --no-load-optim" in text
    new = StoredCheckpoint.open(tmp_path)
    assert {parts_of(key).kind for key in new.keys} == {"model", "rng"}
    assert new.common["optimizer"] is None


def test_fp32_to_bf16_and_back_loses_nothing(run_folder, tmp_path, call, monkeypatch) -> None:
    narrow, back = tmp_path / "bf16", tmp_path / "back"
    code, text, _ = call(reshape.main, "--load", run_folder, "--save", narrow, "--dtype", "bf16")
    assert code == 0
    assert "--bf16" in text.splitlines()[-1]
    new = StoredCheckpoint.open(narrow)
    bias = "model.decoder.layers.1.mlp.router.expert_bias"
    assert new.facts(bias).dtype == torch.float32, "never rounded"
    name = "decoder.layers.1.mlp.router.weight"
    source = StoredCheckpoint.open(run_folder).read(f"model.{name}")
    assert torch.equal(new.read(f"model.{name}"), source.bfloat16())
    assert torch.equal(new.read(f"optimizer.main_param.{name}"), source)
    assert call(reshape.main, "--load", narrow, "--save", back, "--dtype", "fp32")[0] == 0
    assert call(inspect.main, "--diff", run_folder, back)[0] == 0


def _loads_as_bf16(folder: str) -> None:
    run = loaded(Path(folder), FLAGS.replace("--fp32", "--bf16"))
    assert next(iter(run.model.trainable_parameters()))[1].dtype == torch.bfloat16


def test_a_bf16_run_goes_on_from_an_fp32_one(run_folder: Path, tmp_path: Path, call) -> None:
    words = ("--load", run_folder, "--ckpt-step", 2, "--save", tmp_path, "--dtype", "bf16")
    assert call(reshape.main, *words)[0] == 0
    run_ranks(_loads_as_bf16, 1, str(tmp_path))


def test_weights_in_fp32_are_the_main_weights(bf16_folder: Path, tmp_path: Path, call) -> None:
    words = ("--load", bf16_folder, "--save", tmp_path, "--dtype", "fp32", "--no-optim")
    assert call(reshape.main, *words)[0] == 0
    name = "decoder.layers.2.mlp.experts.local_experts.3.linear_fc1.up.weight"
    main = StoredCheckpoint.open(bf16_folder).read(f"optimizer.main_param.{name}")
    new = StoredCheckpoint.open(tmp_path)
    assert torch.equal(new.read(f"model.{name}"), main)
    assert not [key for key in new.keys if parts_of(key).is_optimizer]


def test_memory_is_bounded_by_the_largest_tensor(tmp_path: Path, run_folder: Path, call) -> None:
    big = {f"model.big{n}": TensorFacts((512, 1024), torch.float32) for n in range(12)}
    common = StoredCheckpoint.open(run_folder).common
    with OfflineWriter(tmp_path / "big", 1, shared_out(big, 3)) as writer:
        for key in writer.order:
            writer.add(key, torch.rand(512, 1024))
        writer.finish({**common, "iteration": 1}, {})
    tracemalloc.start()
    with LiveBytes() as live:
        words = ("--load", tmp_path / "big", "--save", tmp_path / "new", "--files", 4)
        assert call(reshape.main, *words)[0] == 0
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    largest = 2 << 20
    assert live.peak <= 2 * largest, "12 tensors went through"
    assert peak <= 16 << 20, "buffers of the files, and no tensor beside torch's"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "say what to change"),
        (["--files", 2, TP, 2], "--files and --target-tensor-parallel-size exclude each other"),
        (["--files", 0], "0 must be 1 or more"),
        ([EP, 3], "--expert-model-parallel-size 3 does not divide --num-experts 4"),
        ([PP, 2], "--num-layers 3 must be a multiple of --pipeline-model-parallel-size 2"),
        ([TP, 3], "--target-tensor-parallel-size 3 must divide the vocabulary 128"),
        ([TP, 2, "--target-world-size", 3], "world size 3"),
        (["--dtype", "fp32"], "--dtype fp32: the model is in float32 already"),
        (["--dtype", "fp16"], "invalid choice: 'fp16'"),
    ],
)
def test_mistakes_end_with_code_2(run_folder, tmp_path, call, words, message) -> None:
    code, text, errors = call(
        reshape.main, "--load", run_folder, "--save", tmp_path / "new", *words
    )
    assert (code, text) == (2, "")
    assert message in errors
    assert not (tmp_path / "new").exists()


def test_a_checkpoint_is_never_replaced(run_folder: Path, tmp_path: Path, call) -> None:
    words = ("--load", run_folder, "--save", tmp_path, "--files", 1)
    assert call(reshape.main, *words)[0] == 0
    assert "is there already" in call(reshape.main, *words)[2]


def test_fp64_moments_are_not_rounded() -> None:
    sizes = {"num_layers": 2, "hidden_size": 8, "num_attention_heads": 2}
    config = RunConfig.from_flat(sizes | {"fp64": True})
    with pytest.raises(ConfigError, match="--no-optim keeps the weights alone"):
        number_format.refuse_format(config, "bf16", optim=True)
    number_format.refuse_format(config, "bf16", optim=False)


def test_weights_alone_give_the_same_model(run_folder: Path, tmp_path: Path, call) -> None:
    call(reshape.main, "--load", run_folder, "--save", tmp_path, "--no-optim", EP, 4)
    models = (load_trained_model(folder).model for folder in (tmp_path, run_folder))
    got, want = (dict(model.named_parameters()) for model in models)
    assert got.keys() == want.keys()
    assert all(torch.equal(got[name], want[name]) for name in want)
    dist.destroy_process_group()
