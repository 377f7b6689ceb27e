"""tools/generate.py as a user would call it: text from a checkpoint, whatever layout saved it."""

import importlib.util
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import sentencepiece
import torch
import torch.distributed as dist

from megatron.core.dist_checkpointing.index import read_index
from megatron.core.inference import generate as generation
from megatron.core.inference.kv_cache import KVCache
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.weight_init import init_weights
from megatron.core.tokenizers.build_tokenizer import TokenizerSettings, build_tokenizer
from megatron.training import checkpoint_model
from megatron.training.checkpoint_state import TrainState
from megatron.training.checkpointing import save_checkpoint
from megatron.training.config.run_config import RunConfig
from tests.helpers.ranks import run_ranks
from tools.preprocessing import command_line

SCRIPT = Path(__file__).resolve().parents[2] / "tools" / "generate.py"
PROMPTS = ("--prompt", "def f(x):", "--prompt", "import this, and more")


def _save(folder: str, ep: int, tokenizer_flags: dict, model_flags: dict) -> None:
    """Save an untrained MoE model as pretrain_gpt.py would."""
    tokenizer = build_tokenizer(TokenizerSettings(**tokenizer_flags))
    options = {
        "num_layers": 2,
        "hidden_size": 32,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
        "num_moe_experts": 4,
        "init_method_std": 0.3,
        "expert_model_parallel_size": ep,
        "lr": 1e-3,
        "train_iters": 1,
        "global_batch_size": 2,
    }
    config = RunConfig.from_flat(options | tokenizer_flags | model_flags)
    layout = config.model.layout(dist.get_world_size())
    model = GPTModel(
        config.model,
        get_gpt_decoder_block_spec(config.model),
        vocab_size=384,
        max_sequence_length=64,
        pg_collection=ProcessGroupCollection.create(layout),
    )
    init_weights(model, 1234)
    result = save_checkpoint(
        folder,
        TrainState(iteration=3, consumed_samples=6, dropout_seed=1),
        config=config,
        model=model,
        optimizer=None,
        tokenizer=tokenizer,
    )
    assert result.error == ""


def save(folder: Path, ep: int = 1, tokenizer: dict | None = None, **model_flags: object) -> None:
    byte = {"tokenizer_type": "ByteTokenizer"}
    run_ranks(_save, ep, str(folder), ep, tokenizer or byte, model_flags)


@pytest.fixture
def generate(capsys: pytest.CaptureFixture[str]):
    """Call the tool in this process; returns (exit code, standard output, standard error)."""
    spec = importlib.util.spec_from_file_location("generate_tool", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)

    def call(*words: object) -> tuple[int, str, str]:
        code = 0
        try:
            command_line.run_tool(lambda: tool.main([*map(str, words)]))
        except SystemExit as end:
            code = end.code
        finally:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
        if dist.is_initialized():  # tests that fork ranks must find no group
            dist.destroy_process_group()
        return code, *capsys.readouterr()

    return call


def test_the_tool_prints_prompts_with_their_continuation(tmp_path: Path) -> None:
    save(tmp_path, ep=2)
    words = [SCRIPT, "--load", tmp_path, *PROMPTS, "--greedy", "--max-new-tokens", 12]
    done = subprocess.run(
        [sys.executable, *map(str, words)], capture_output=True, check=False, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr.decode()
    assert done.stderr == b""
    first, second = done.stdout.split(b"-" * 40 + b"\n")
    assert first.startswith(b"def f(x):")
    assert second.startswith(b"import this, and more")
    assert len(first) > len(b"def f(x):\n")


@pytest.mark.parametrize("flags", [{}, {"bf16": True}, {"position_embedding_type": "rope"}])
def test_ep_1_and_ep_2_checkpoints_give_the_same_tokens(tmp_path: Path, generate, flags) -> None:
    outputs = []
    for ep in (1, 2):
        save(tmp_path / str(ep), ep=ep, **flags)
        for choice in (["--greedy"], ["--temperature", 2.0, "--seed", 5]):
            words = ("--load", tmp_path / str(ep), *PROMPTS, *choice, "--max-new-tokens", 12)
            outputs.append(generate(*words))
    assert [code for code, _, _ in outputs] == [0] * 4
    assert outputs[:2] == outputs[2:]
    assert outputs[0] != outputs[1]


def test_the_seed_decides_the_draws(tmp_path: Path, generate) -> None:
    save(tmp_path)
    words = ("--load", tmp_path, *PROMPTS, "--top-k", 50, "--top-p", 0.9, "--max-new-tokens", 12)
    first = generate(*words)
    assert first[0] == 0
    assert generate(*words) == first
    assert generate(*words, "--seed", 99) != first


def test_the_tokenizer_travels_with_the_checkpoint(tmp_path: Path, generate) -> None:
    (tmp_path / "text").write_text("the quick brown fox jumps over the lazy dog\n" * 20)
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "text"),
        model_prefix=str(tmp_path / "words"),
        vocab_size=30,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    model = tmp_path / "words.model"
    files = {"tokenizer_type": "SentencePieceTokenizer", "tokenizer_model": str(model)}
    save(tmp_path / "run", tokenizer=files)
    model.unlink()
    (tmp_path / "run").rename(tmp_path / "moved")
    code, text, errors = generate("--load", tmp_path / "moved", "--prompt", "the quick")
    assert (code, errors) == (0, "")
    assert text.startswith("the quick")
    assert " " in text.removeprefix("the quick")


def test_one_checkpoint_of_the_folder_can_be_named(tmp_path: Path, generate) -> None:
    save(tmp_path)
    expected = generate("--load", tmp_path, *PROMPTS)
    assert generate("--load", tmp_path / "iter_0000003", *PROMPTS) == expected
    assert generate("--load", tmp_path, "--ckpt-step", 3, *PROMPTS) == expected


def test_cached_latents_give_the_same_tokens(tmp_path: Path, generate, monkeypatch) -> None:
    latents = {"kv_lora_rank": 8, "qk_head_dim": 6, "qk_pos_emb_head_dim": 4, "v_head_dim": 5}
    latents |= {"multi_latent_attention": True, "position_embedding_type": "rope"}
    save(tmp_path, fp64=True, **latents)
    widths = []
    right = generation.make_cache

    def noted(*args: object) -> KVCache:
        cache = right(*args)
        widths.append((cache.keys.shape[-1], cache.values.shape[-1]))
        return cache

    monkeypatch.setattr(generation, "make_cache", noted)
    words = ("--load", tmp_path, *PROMPTS, "--greedy", "--max-new-tokens", 12)
    plain, cached = generate(*words), generate(*words, "--cache-mla-latents")
    assert plain == cached
    assert plain[0] == 0
    assert widths == [(10, 5), (12, 0)]


def test_prompts_are_read_from_a_file(tmp_path: Path, generate) -> None:
    save(tmp_path)
    (tmp_path / "prompts").write_text("one\n\ntwo\n")
    code, text, _ = generate(
        "--load", tmp_path, "--prompt-file", tmp_path / "prompts", "--max-new-tokens", 0
    )
    assert (code, text) == (0, f"one\n{'-' * 40}\ntwo\n")


def _cases() -> Iterator[tuple[list[object], str]]:
    yield ["--prompt", "x", "--ckpt-step", 9], "no complete checkpoint of iteration 9"
    yield [], "nothing to continue"
    yield ["--prompt", ""], "prompt 1 is empty"
    yield ["--prompt", "x", "--max-new-tokens", 64], "need 65 positions; the model has 64"
    yield ["--prompt", "x", "--greedy", "--top-k", 3], "no effect on greedy"
    yield ["--prompt", "x", "--greedy", "--temperature", 0.5], "contradict each other"
    yield ["--prompt", "x", "--top-p", 2.0], "--top-p 2.0 must lie between 0 and 1"
    yield ["--prompt", "x", "--top-k", -1], "--top-k -1 must be 0 (all tokens) or more"
    yield ["--prompt", "x", "--temperature", -1.0], "--temperature -1.0 must be 0 (greedy) or more"
    yield ["--prompt", "x", "--temperature", "nan"], "--temperature nan must be 0 (greedy) or more"
    yield ["--prompt", "x", "--max-new-tokens", -1], "--max-new-tokens -1 must be 0 or more"
    yield ["--prompt-file", "/nowhere/prompts"], "--prompt-file /nowhere/prompts is not a file"
    yield ["--prompt", "x", "--device", "cuda"], "no CUDA device found"
    yield ["--prompt", "x", "--cache-mla-latents"], "without --multi-latent-attention; leave it out"
    yield ["--prompt", "x", "--bogus"], "error: unknown: --bogus"
    yield ["--prompt", "x", "--topk", 3], "did you mean --top-k?"
    yield ["--prompt", "x", "--top-k", "many"], "argument --top-k: invalid int value: 'many'"


@pytest.mark.parametrize(("words", "message"), list(_cases()))
def test_mistakes_end_with_code_2_and_one_message(
    tmp_path_factory: pytest.TempPathFactory, generate, words: list[object], message: str
) -> None:
    if "cuda" in words and torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    folder = tmp_path_factory.getbasetemp() / "saved_for_mistakes"
    if not folder.exists():
        save(folder)
    code, text, errors = generate("--load", folder, *words)
    assert (code, text) == (2, "")
    assert message in errors
    assert "Traceback" not in errors
    assert "Errno" not in errors


PROGRAM = """
import runpy, sys
sys.argv = sys.argv[1:]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    sys.stderr.write("TORCH" if "torch" in sys.modules else "")
"""


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["--help"], 0, "Continue text with a trained model."),
        (["--prompt", "x", "--top-p", "2", "--top-k", "-1"], 2, "--top-k -1 must"),
        (["--prompt-file", "/nowhere"], 2, "--prompt-file /nowhere is not a file"),
        (["--prompt", "x", "--topk", "1"], 2, "did you mean --top-k?"),
    ],
)
def test_help_and_mistakes_load_no_torch(
    tmp_path: Path, words: list[str], code: int, message: str
) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, SCRIPT, "--load", tmp_path, *words],
        capture_output=True,
        check=False,
        text=True,
    )
    assert done.returncode == code
    assert message in (done.stderr if code else done.stdout)
    assert "TORCH" not in done.stderr
    assert done.stderr.count("\n") == (1 if code else 0)


def test_an_empty_folder_and_a_missing_one_are_named(tmp_path: Path, generate) -> None:
    assert (
        f"--load {tmp_path} holds no checkpoint" in generate("--load", tmp_path, "--prompt", "x")[2]
    )
    assert "is not a folder" in generate("--load", tmp_path / "no", "--prompt", "x")[2]


def test_a_damaged_checkpoint_names_the_file(tmp_path: Path, generate) -> None:
    save(tmp_path)
    path = tmp_path / "iter_0000003"
    key = "model.decoder.final_layernorm.weight"
    with (path / "tensors_00000.safetensors").open("r+b") as file:
        file.seek(read_index(path)[key].blocks[0].facts.begin)
        file.write(b"\xff\xfe\xfd")
    code, _, errors = generate("--load", tmp_path, "--prompt", "x")
    assert code == 2
    assert f"{key} (in tensors_00000.safetensors) is not what was written" in errors


def test_a_package_that_only_training_had_is_not_needed(tmp_path: Path, generate, monkeypatch):
    save(tmp_path)
    words = ("--load", tmp_path, *PROMPTS, "--greedy", "--max-new-tokens", 4)
    want = generate(*words)
    assert want[0] == 0
    read = checkpoint_model.config_from_data

    def trained_with_package(data: dict) -> RunConfig:
        config = read(data)
        config.model.moe_grouped_mm_backend = "grouped_gemm"
        return config

    monkeypatch.setattr(checkpoint_model, "config_from_data", trained_with_package)
    assert generate(*words) == want
