"""Folders of Hugging Face's to checkpoints of ours and back: every bit, and little memory."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron.core.dist_checkpointing.offline import StoredCheckpoint
from megatron.core.errors import CheckpointError, ConfigError
from megatron.core.models.huggingface.exchange import our_tensor
from megatron.core.models.huggingface.family import family_of
from megatron.core.models.huggingface.options import model_options
from megatron.core.models.huggingface.weight_plan import weight_plan
from megatron.training import huggingface
from megatron.training.huggingface import export_checkpoint, import_checkpoint
from megatron.training.huggingface_family import config_of
from megatron.training.huggingface_flags import flags_of
from megatron.training.huggingface_model import model_facts
from tests.helpers.hf_cases import CASES, VOCAB
from tests.helpers.hf_tiny import (
    BUILT,
    options_of,
    plan_of,
    random_tensors,
    tiny_folder,
    write_folder,
)
from tests.helpers.tiny_tokenizers import huggingface_file

pytest.importorskip("safetensors")


def tensors_in(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    files = sorted(folder.glob("*.safetensors"))
    return {key: tensor for file in files for key, tensor in load_file(file).items()}


def assert_same_bits(first: Path, second: Path) -> None:
    one, two = tensors_in(first), tensors_in(second)
    assert one.keys() == two.keys()
    for key, tensor in one.items():
        assert tensor.dtype == two[key].dtype
        assert torch.equal(tensor, two[key]), key


@pytest.mark.parametrize("name", BUILT)
def test_a_plan_makes_exactly_the_tensors_of_the_model(name: str) -> None:
    options = options_of(name)
    facts = model_facts(config_of(options), options["padded_vocab_size"])
    plan = plan_of(name)
    assert {key: fact.shape for key, fact in facts.items()} == dict(plan.shapes)
    wide = {key for key in plan.shapes if facts[key].dtype == torch.float32}
    assert wide >= plan.fp32_keys


@pytest.mark.parametrize("name", ["gpt2", "llama3-tied", "mixtral", "granite-moe", "gpt-oss"])
def test_out_is_what_came_in(tmp_path: Path, name: str) -> None:
    source = tiny_folder(tmp_path / "theirs", name)
    done = import_checkpoint(source, tmp_path / "ours", make_vocab_size_divisible_by=64)
    assert done.options["padded_vocab_size"] == 128
    assert done.path == tmp_path / "ours/iter_0000000"
    stored = StoredCheckpoint.open(tmp_path / "ours")
    assert stored.common["iteration"] == 0
    assert stored.verify() == []
    assert not stored.read("model.embedding.word_embeddings.weight")[VOCAB:].any()
    back = export_checkpoint(tmp_path / "ours", tmp_path / "again")
    assert back.family.name == CASES[name].family
    assert_same_bits(source, tmp_path / "again")
    config = json.loads((tmp_path / "again/config.json").read_text())
    for field, value in CASES[name].config.items():
        if field not in ("rope_parameters", "n_inner"):
            assert config[field] == value, field


def test_small_files_are_written_and_read_by_their_index(tmp_path: Path) -> None:
    source = tiny_folder(tmp_path / "theirs", "llama2")
    import_checkpoint(source, tmp_path / "ours")
    export_checkpoint(tmp_path / "ours", tmp_path / "again", max_shard_bytes=20_000)
    files = sorted((tmp_path / "again").glob("*.safetensors"))
    assert len(files) > 3
    assert all(file.stat().st_size < 25_000 for file in files)
    index = json.loads((tmp_path / "again/model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == plan_of("llama2").hf_shapes.keys()
    assert index["metadata"]["total_size"] == sum(
        4 * t.numel() for t in tensors_in(source).values()
    )
    assert_same_bits(source, tmp_path / "again")
    import_checkpoint(tmp_path / "again", tmp_path / "ours2")


def test_number_formats_are_kept_or_asked_for(tmp_path: Path) -> None:
    source = tiny_folder(tmp_path / "theirs", "mixtral", torch.bfloat16)
    import_checkpoint(source, tmp_path / "ours")
    stored = StoredCheckpoint.open(tmp_path / "ours")
    assert stored.common["config"]["model"]["bf16"]
    export_checkpoint(tmp_path / "ours", tmp_path / "again")
    assert_same_bits(source, tmp_path / "again")
    export_checkpoint(tmp_path / "ours", tmp_path / "wide", dtype="fp32")
    wide = tensors_in(tmp_path / "wide")
    for key, tensor in tensors_in(source).items():
        assert torch.equal(wide[key], tensor.float())
    import_checkpoint(source, tmp_path / "ours_fp32", dtype="fp32")
    key = "model.decoder.final_layernorm.weight"
    assert StoredCheckpoint.open(tmp_path / "ours_fp32").facts(key).dtype == torch.float32


def test_a_family_is_found_and_another_one_refused(tmp_path: Path) -> None:
    import_checkpoint(tiny_folder(tmp_path / "theirs", "mixtral"), tmp_path / "ours")
    with pytest.raises(ConfigError, match="as llama: --num-experts is 8, and a llama has None"):
        export_checkpoint(tmp_path / "ours", tmp_path / "x", family="llama")
    done = export_checkpoint(tmp_path / "ours", tmp_path / "x", family="granitemoe")
    assert done.family.name == "granitemoe"
    assert not (tmp_path / ".x.tmp").exists()


def test_a_tied_layer_that_differs_is_refused(tmp_path: Path) -> None:
    tensors = random_tensors(plan_of("llama3-tied"))
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    folder = write_folder(tmp_path / "same", CASES["llama3-tied"].config, tensors)
    import_checkpoint(folder, tmp_path / "ours")
    tensors["lm_head.weight"][3, 2] += 1
    folder = write_folder(tmp_path / "other", CASES["llama3-tied"].config, tensors)
    with pytest.raises(CheckpointError, match=r"lm_head\.weight is not model\.embed_tokens"):
        import_checkpoint(folder, tmp_path / "ours2")


def test_nothing_is_left_of_what_fails_half_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tiny_folder(tmp_path / "theirs", "llama2")
    made = []

    def full(*args: object) -> torch.Tensor:
        if len(made) == 5:
            raise OSError(28, "No space left on device")
        made.append(our_tensor(*args))  # type: ignore[arg-type]
        return made[-1]

    with monkeypatch.context() as patch:
        patch.setattr(huggingface, "our_tensor", full)
        with pytest.raises(OSError, match="No space"):
            import_checkpoint(source, tmp_path / "ours")
    assert list((tmp_path / "ours").iterdir()) == []
    import_checkpoint(source, tmp_path / "ours")
    monkeypatch.setattr(huggingface, "hf_tensor", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        export_checkpoint(tmp_path / "ours", tmp_path / "again")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["ours", "theirs"]


def test_an_export_reads_its_own_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import_checkpoint(tiny_folder(tmp_path / "theirs", "llama2"), tmp_path / "ours")
    right = huggingface.hf_tensor

    def wrong(*args: object) -> torch.Tensor:
        made = right(*args)  # type: ignore[arg-type]
        if args[1] == "model.layers.1.self_attn.k_proj.weight":
            made[0, 0] = torch.nextafter(made[0, 0], torch.tensor(9.0))
        return made

    monkeypatch.setattr(huggingface, "hf_tensor", wrong)
    with pytest.raises(CheckpointError, match=r"1\.self_attention\.linear_qkv\.weight reads"):
        export_checkpoint(tmp_path / "ours", tmp_path / "again")
    assert {file.name for file in tmp_path.iterdir()} == {"theirs", "ours"}


def test_targets_that_hold_something_are_left_alone(tmp_path: Path) -> None:
    source = tiny_folder(tmp_path / "theirs", "llama2")
    import_checkpoint(source, tmp_path / "ours")
    with pytest.raises(CheckpointError, match="iter_0000000 is there already"):
        import_checkpoint(source, tmp_path / "ours")
    with pytest.raises(CheckpointError, match="is there already and not empty"):
        export_checkpoint(tmp_path / "ours", source)


def test_tokenizer_and_generation_settings_come_back(tmp_path: Path) -> None:
    source = tiny_folder(tmp_path / "theirs", "llama2")
    huggingface_file(source)
    (source / "generation_config.json").write_text('{"temperature": 0.5}')
    (source / "special_tokens_map.json").write_text("{}")
    import_checkpoint(source, tmp_path / "ours")
    stored = StoredCheckpoint.open(tmp_path / "ours")
    assert stored.common["tokenizer"]["type"] == "HuggingFaceTokenizer"
    export_checkpoint(tmp_path / "ours", tmp_path / "again")
    names = ("tokenizer.json", "generation_config.json", "special_tokens_map.json")
    for name in names:
        assert (tmp_path / "again" / name).read_bytes() == (source / name).read_bytes()
    (source / "generation_config.json").write_text('{"temperature": 0.7}')
    export_checkpoint(tmp_path / "ours", tmp_path / "third", reference=source)
    assert "0.7" in (tmp_path / "third/generation_config.json").read_text()


def test_flags_are_ready_to_paste() -> None:
    shown = flags_of({"num_layers": 4, "softmax_scale": 1 / 3, "moe_layer_freq": [0, 1, 1, 1]})
    assert shown == "--num-layers 4 --softmax-scale 0.3333333333333333 --moe-layer-freq '[0,1,1,1]'"


_MEASURED = """
import sys, threading
from pathlib import Path
import megatron.training.huggingface as exchange

def anonymous():
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("RssAnon")).split()[1]) * 1024

def measured(run, *paths):
    before, peak, done = anonymous(), [0], threading.Event()
    def watch():
        while not done.wait(0.004):
            peak[0] = max(peak[0], anonymous())
    watcher = threading.Thread(target=watch)
    watcher.start()
    run(*paths)
    done.set()
    watcher.join()
    return peak[0] - before

theirs, ours, again = map(Path, sys.argv[1:])
print(measured(exchange.import_checkpoint, theirs, ours))
print(measured(exchange.export_checkpoint, ours, again))
"""


def test_one_tensor_is_in_memory_at_a_time(tmp_path: Path) -> None:
    wide = {"hidden_size": 256, "intermediate_size": 4096, "num_hidden_layers": 6, "head_dim": 64}
    config = CASES["llama2"].config | wide
    plan = weight_plan(family_of(config), model_options(config))
    source = write_folder(tmp_path / "theirs", config, random_tensors(plan))
    largest, whole = 4 * 256 * 4096, (source / "model.safetensors").stat().st_size
    assert whole > 17 * largest
    # glibc else keeps freed memory of such sizes for itself, some of it, and the figure would vary
    measured = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    paths = [str(tmp_path / name) for name in ("theirs", "ours", "again")]
    words = [sys.executable, "-c", _MEASURED, *paths]
    found = subprocess.run(words, check=True, capture_output=True, text=True, env=measured)
    for peak in map(int, found.stdout.split()):
        assert peak < 2 * largest + (12 << 20), found.stdout


def test_modules_of_multi_token_prediction_come_in_and_go_out(tmp_path: Path) -> None:
    config = CASES["deepseek-v3"].config | {"num_nextn_predict_layers": 2}
    plan = weight_plan(family_of(config), model_options(config, with_mtp=True))
    tensors = random_tensors(plan)
    for name, original in plan.repeats.items():
        tensors[name] = tensors[original].clone()
    assert tensors["model.layers.4.eh_proj.weight"].shape == (32, 64)
    assert "model.layers.5.shared_head.head.weight" in tensors
    source = write_folder(tmp_path / "theirs", config, tensors)
    import_checkpoint(source, tmp_path / "ours", with_mtp=True)
    export_checkpoint(tmp_path / "ours", tmp_path / "again")
    assert_same_bits(source, tmp_path / "again")
    without = import_checkpoint(source, tmp_path / "without")
    assert len(without.ignored) == sum("layers.4." in key or "layers.5." in key for key in tensors)
    tensors["model.layers.5.embed_tokens.weight"][0, 0] += 1
    source = write_folder(tmp_path / "other", config, tensors)
    with pytest.raises(CheckpointError, match=r"layers\.5\.embed_tokens\.weight is not model\."):
        import_checkpoint(source, tmp_path / "x", with_mtp=True)
