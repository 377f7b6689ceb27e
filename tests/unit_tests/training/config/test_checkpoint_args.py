"""--use-checkpoint-args: the command line, then YAML, then the checkpoint, then defaults."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from megatron.core.errors import ConfigError
from megatron.training.arguments import parse_args
from megatron.training.config.checkpoint_args import LAYOUT, MODEL, OF_THIS_RUN
from megatron.training.config.options import options_of
from megatron.training.config.run_config import RunConfig
from megatron.training.resume_rules import architecture, architecture_problems
from tests.helpers.stored_checkpoints import store_run
from tests.helpers.tiny_tokenizers import sentencepiece_model

DATA = "--mock-data --global-batch-size 4 --train-iters 6 --lr 1e-3"
SHAPE = (
    "--num-layers 4 --hidden-size 48 --num-attention-heads 8 --group-query-attention "
    "--num-query-groups 2 --seq-length 32 --num-experts 4 --moe-router-topk-per-layer [2,1,2,1] "
    "--moe-layer-freq [1]*4 --moe-router-score-function sigmoid --disable-bias-linear --fp64 "
    "--moe-router-load-balancing-type seq_aux_loss --moe-aux-loss-coeff 0.02 --hidden-dropout 0.25 "
    "--normalization RMSNorm --norm-epsilon 1e-6 --moe-expert-capacity-factor 1.5 "
    "--moe-token-drop-policy position --tokenizer-type ByteTokenizer"
)
SPREAD = (
    "--tensor-model-parallel-size 2 --pipeline-model-parallel-size 2 --sequence-parallel "
    "--num-virtual-stages-per-pipeline-rank 2"
)


def parsed(words: str, world_size: int = 1) -> RunConfig:
    return parse_args(words.split(), world_size=world_size)


def from_checkpoint(folder: Path, words: str = "", world_size: int = 1) -> RunConfig:
    return parsed(f"{DATA} --load {folder} --use-checkpoint-args {words}", world_size)


def problems(folder: Path, words: str = "") -> tuple[str, ...]:
    with pytest.raises(ConfigError) as error:
        from_checkpoint(folder, words)
    return error.value.problems


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    store_run(tmp_path / "run", 10, f"{DATA} {SHAPE} {SPREAD}", world_size=4)
    return tmp_path / "run"


def test_every_option_of_the_model_is_taken_or_known_to_be_of_this_run() -> None:
    options = options_of(RunConfig)
    model = {name for name, option in options.items() if option.section == "model"}
    taken = {name for group in MODEL for name in group}
    layout = {name for group in LAYOUT for name in group}
    for name in model:
        assert [name in taken, name in layout, name in OF_THIS_RUN].count(True) == 1, name
    vocabulary = {"padded_vocab_size", "unpadded_vocab_size", "make_vocab_size_divisible_by"}
    of_other_sections = {"seq_length", *vocabulary}
    assert taken - model - {"fp16"} == of_other_sections
    assert layout | OF_THIS_RUN <= model


def test_the_model_and_the_tokenizer_need_not_be_said_again(saved: Path) -> None:
    config = from_checkpoint(saved)
    wanted = parsed(f"{DATA} {SHAPE}")
    there = architecture(wanted.model)
    assert list(architecture_problems(there, architecture(config.model))) == []
    values, same = config.flat(), wanted.flat()
    differing = {name for name in values if values[name] != same[name]}
    # padded for two ranks; the rest says where the options came from
    assert differing == {"padded_vocab_size", "load", "use_checkpoint_args"}
    assert values["padded_vocab_size"] == 512
    assert config.sources["num_layers"] == "checkpoint"
    assert not config.given("num_layers")
    (line,) = [n for n in config.notices if n.startswith("--use-checkpoint-args: taken from")]
    assert str(saved / "iter_0000010") in line
    for text in ("--num-layers 4", "--fp64", "--moe-aux-loss-coeff 0.02", "ByteTokenizer"):
        assert text in line


def test_what_the_command_line_says_goes_before_and_is_told(saved: Path, tmp_path: Path) -> None:
    (tmp_path / "options.yaml").write_text("hidden-dropout: 0.5\nattention-dropout: 0.3\n")
    config = from_checkpoint(
        saved, f"--hidden-size 96 --attention-dropout 0 --yaml-cfg {tmp_path / 'options.yaml'}"
    )
    assert config.model.hidden_size == 96
    assert config.model.hidden_dropout == 0.5
    assert config.model.attention_dropout == 0
    assert config.model.num_layers == 4
    notices = config.notices
    assert "--hidden-size 96 from the command line replaces 48 of the checkpoint" in notices
    assert "--hidden-dropout 0.5 from --yaml-cfg replaces 0.25 of the checkpoint" in notices
    assert "--attention-dropout 0 from the command line replaces 0.3 of --yaml-cfg" in notices
    (line,) = [n for n in notices if "taken from" in n]
    assert "--hidden-size" not in line
    there = architecture(parsed(f"{DATA} {SHAPE}").model)
    refused = list(architecture_problems(there, architecture(config.model)))
    assert "--hidden-size is 48 in the checkpoint and 96 in this run" in refused


def test_options_that_belong_together_are_taken_together_or_not_at_all(saved: Path) -> None:
    config = from_checkpoint(saved, "--moe-router-load-balancing-type aux_loss seq_aux_loss")
    assert config.model.moe_aux_loss_coeff == [0.01, 0.01]
    other = from_checkpoint(saved, "--bf16 --moe-router-topk 3")
    assert (other.model.bf16, other.model.fp64) == (True, False)
    assert other.model.moe_router_topk_per_layer is None
    assert "--moe-router-topk 3 from the command line replaces 2 of the checkpoint" in other.notices


def test_the_layout_is_this_runs_unless_asked_for(saved: Path) -> None:
    assert from_checkpoint(saved, "", 2).model.tensor_model_parallel_size == 1
    words = "--use-mp-args-from-checkpoint-args"
    model = from_checkpoint(saved, words, 4).model
    assert (model.tensor_model_parallel_size, model.pipeline_model_parallel_size) == (2, 2)
    assert (model.sequence_parallel, model.num_virtual_stages_per_pipeline_rank) == (True, 2)
    own = from_checkpoint(saved, f"{words} --pipeline-model-parallel-size 1", 4).model
    assert (own.tensor_model_parallel_size, own.pipeline_model_parallel_size) == (2, 1)
    assert own.num_virtual_stages_per_pipeline_rank is None


def test_the_step_that_is_asked_for_is_the_one_that_is_read(saved: Path) -> None:
    store_run(saved, 20, f"{DATA} --num-layers 2 --hidden-size 32")
    assert from_checkpoint(saved).model.num_layers == 2
    assert from_checkpoint(saved, "--ckpt-step 10").model.num_layers == 4
    assert problems(saved, "--ckpt-step 7") == (
        f"{saved} has no complete checkpoint of iteration 7; complete here: 10, 20",
    )


def test_the_first_start_of_a_job_that_resumes_itself_takes_nothing(tmp_path: Path) -> None:
    (problem,) = problems(tmp_path)
    assert f"--load {tmp_path} has no checkpoint to take options from" in problem
    config = from_checkpoint(tmp_path, "--allow-fresh-start --num-layers 2 --hidden-size 32")
    assert any("holds no checkpoint yet, so nothing is taken" in n for n in config.notices)
    with pytest.raises(ConfigError, match="--num-layers is missing"):
        from_checkpoint(tmp_path, "--allow-fresh-start")


def test_a_pretrained_checkpoint_gives_its_options_until_there_is_an_own_one(
    saved: Path, tmp_path: Path
) -> None:
    own = tmp_path / "own"
    words = f"{DATA} --use-checkpoint-args --load {own} --pretrained-checkpoint {saved}"
    assert parsed(words).model.num_layers == 4
    store_run(own, 5, f"{DATA} --num-layers 2 --hidden-size 32")
    assert parsed(words).model.num_layers == 2


@pytest.mark.parametrize("text", ["{", "[]", '{"config": 3}'])
def test_a_damaged_file_is_named(saved: Path, text: str) -> None:
    (saved / "iter_0000010" / "common.json").write_text(text)
    (problem,) = problems(saved)
    assert f"{saved}/iter_0000010/common.json is damaged" in problem


def test_a_value_that_no_flag_could_have_is_named(saved: Path) -> None:
    file = saved / "iter_0000010" / "common.json"
    facts = json.loads(file.read_text())
    facts["config"]["model"]["num_layers"] = "many"
    file.write_text(json.dumps(facts))
    (problem,) = problems(saved)
    assert problem == f"{saved}/iter_0000010: num_layers many must be a whole number"


@pytest.fixture
def with_file(tmp_path: Path) -> Path:
    """A run whose tokenizer lies in words.model."""
    sentencepiece_model(tmp_path / "words.model")
    flags = f"--tokenizer-type SentencePieceTokenizer --tokenizer-model {tmp_path / 'words.model'}"
    store_run(tmp_path / "run", 10, f"{DATA} --num-layers 2 --hidden-size 32 {flags}")
    return tmp_path / "run"


def test_the_tokenizers_file_is_taken_from_where_it_was(with_file: Path, tmp_path: Path) -> None:
    options = from_checkpoint(with_file).tokenizer
    assert options.tokenizer_type == "SentencePieceTokenizer"
    assert options.tokenizer_model == str(tmp_path / "words.model")


def test_a_tokenizer_that_is_gone_is_taken_from_the_checkpoint(
    with_file: Path, tmp_path: Path
) -> None:
    (tmp_path / "words.model").unlink()
    copy = with_file / "iter_0000010" / "tokenizer" / "tokenizer_model" / "words.model"
    assert from_checkpoint(with_file).tokenizer.tokenizer_model == str(copy)
    saving = f"--save {with_file} --save-interval 2"
    assert from_checkpoint(with_file, saving).tokenizer.tokenizer_model == str(copy)
    (problem,) = problems(with_file, f"{saving} --keep-last 2")
    assert f"its copy {copy} would go with old checkpoints" in problem
    copy.unlink()
    (problem,) = problems(with_file)
    assert "is gone and" in problem
    assert "give --tokenizer-model" in problem


def test_another_tokenizer_replaces_all_of_the_checkpoints(with_file: Path) -> None:
    config = from_checkpoint(with_file, "--tokenizer-type ByteTokenizer")
    assert config.tokenizer.tokenizer_model is None
    told = "--tokenizer-type ByteTokenizer from the command line replaces SentencePieceTokenizer of"
    assert any(told in notice for notice in config.notices)


def test_the_tokenizers_file_is_left_where_it_is_not_wanted(
    with_file: Path, tmp_path: Path
) -> None:
    words = "--no-use-tokenizer-model-from-checkpoint-args"
    there = from_checkpoint(with_file, f"{words} --vocab-size 300").tokenizer
    assert there.tokenizer_type == "NullTokenizer"  # of --mock-data, as if nothing had been taken
    sentencepiece_model(tmp_path / "moved.model")
    own = from_checkpoint(with_file, f"{words} --tokenizer-model {tmp_path / 'moved.model'}")
    assert own.tokenizer.tokenizer_type == "SentencePieceTokenizer"
    assert own.tokenizer.tokenizer_model == str(tmp_path / "moved.model")


def test_options_are_taken_before_torch_is_loaded(saved: Path) -> None:
    code = (
        "import sys; from megatron.training.arguments import parse_args\n"
        f"config = parse_args('{DATA} --load {saved} --use-checkpoint-args'.split())\n"
        "assert config.model.num_layers == 4 and 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
