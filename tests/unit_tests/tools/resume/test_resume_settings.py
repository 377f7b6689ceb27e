"""The user's flags become runs of the proof: his schedule, the tool's folders."""

from pathlib import Path

import pytest

from megatron.core.errors import ConfigError
from megatron.training.config.options import options_of
from megatron.training.config.run_config import RunConfig
from tools.resume.layouts import asked, parse, propose
from tools.resume.record import load_script
from tools.resume.settings import _PART_OF_A_RUN, REPLACED, config_of, left_out, read_flags
from tools.verify_resume import _parser, split_words

_DENSE = """
    --mock-data --num-layers 4 --hidden-size 32 --num-attention-heads 4 --seq-length 32
    --micro-batch-size 2 --global-batch-size 8 --train-iters 50 --lr 1e-3 --device cpu
"""
DENSE = _DENSE.split()
WORDS = [*DENSE, "--num-experts", "4", "--expert-model-parallel-size", "2"]


def test_the_tool_takes_the_place_of_folders_and_ends_and_leaves_the_schedule() -> None:
    words = [*WORDS, "--save", "mine", "--save-interval", "7", "--exit-interval", "9"]
    config = config_of(words, {"save": "its", "exit_interval": 4}, 2)
    assert (config.checkpoint.save, config.checkpoint.save_interval) == ("its", None)
    assert (config.training.exit_interval, config.training.train_iters) == (4, 50)
    assert left_out(read_flags(words)) == ["--save", "--save-interval", "--exit-interval"]


def test_options_of_saving_stay_where_something_is_saved() -> None:
    words = [*WORDS, "--async-save"]
    assert config_of(words, {"save": "its"}, 2).checkpoint.async_save
    assert not config_of(words, {}, 2).checkpoint.async_save


def test_a_yaml_file_is_read_and_its_folders_are_replaced_too(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("num-layers: 2\nhidden-size: 32\nmock-data: true\nsave: mine\nlr: 0.5\n")
    config = config_of(["--yaml-cfg", str(path), "--lr", "0.25"], {}, 1)
    assert (config.checkpoint.save, config.optimizer.lr) == (None, 0.25)


def test_none_is_as_if_the_user_had_not_given_it() -> None:
    assert config_of(WORDS, {"expert_model_parallel_size": None}, 1).model.moe_layers
    with pytest.raises(ConfigError, match="does not divide"):
        config_of(WORDS, {}, 1)


@pytest.mark.parametrize("flag", ["--no-save-optim", "--no-load-rng", "--finetune", "--help"])
def test_flags_that_make_a_proof_pointless_are_refused_all_at_once(flag: str) -> None:
    with pytest.raises(ConfigError) as error:
        read_flags([*WORDS, flag, "--skip-train", "--num-lyers", "3"])
    for said in (flag, "--skip-train", "--num-lyers"):
        assert said in str(error.value)


def test_options_whose_place_is_taken_exist_and_no_folder_is_forgotten() -> None:
    options = options_of(RunConfig)
    assert options.keys() >= REPLACED
    of_checkpoints = {name for name, option in options.items() if option.section == "checkpoint"}
    kept = {"async_save", "pretrained_checkpoint", "moe_upcycling_granularity"}
    kept |= set(_PART_OF_A_RUN)
    assert of_checkpoints - REPLACED <= kept, "a new option: replaced, refused or kept?"


def test_half_and_double_the_ranks_and_each_axis_are_proposed() -> None:
    own = asked(WORDS, read_flags(WORDS), 2)
    found = {other.text: other for other in propose(own, 4)}
    assert [text.partition(" ")[0] for text in found] == ["1", "4", "2", "2", "2", "2"]
    changed = " ".join(found)
    for axis in ("EP 1", "TP 2", "PP 2", "CP 2"):
        assert axis in changed
    for other in found.values():
        config = config_of(WORDS, other.values, other.world_size)
        assert config.training.global_batch_size == 8
    assert all(other.world_size <= 2 for other in propose(own, 2))


def test_a_run_of_one_rank_has_no_half() -> None:
    own = asked(DENSE, read_flags(DENSE), 1)
    assert [other.world_size for other in propose(own, 1)] == []
    assert 2 in {other.world_size for other in propose(own, 2)}


def test_options_of_an_axis_go_with_it() -> None:
    words = [*DENSE, "--tensor-model-parallel-size", "2", "--sequence-parallel"]
    own = asked(words, read_flags(words), 2)
    other = parse(own, "2,tp=1")
    assert not config_of(words, other.values, 2).model.sequence_parallel
    pipeline = [*DENSE, "--pipeline-model-parallel-size", "2", "--pipeline-schedule", "zb-h1"]
    own = asked(pipeline, read_flags(pipeline), 2)
    assert config_of(pipeline, parse(own, "2,pp=1").values, 2).model.pipeline_schedule != "zb-h1"


@pytest.mark.parametrize("layout", ["4,tp=2", "1,ep=1", "2,pp=2,ep=1"])
def test_batches_and_the_vocabulary_stay_those_of_the_users_layout(layout: str) -> None:
    """Of a microbatch there is one balance loss, so that its size must stay."""
    words = [word for word in WORDS if word not in ("--global-batch-size", "8")]
    own = asked(words, read_flags(words), 2)
    other = parse(own, layout)
    config = config_of(words, other.values, other.world_size)
    assert config.training.global_batch_size == own.config.training.global_batch_size
    assert config.training.micro_batch_size == own.config.training.micro_batch_size
    assert config.tokenizer.padded_vocab_size == own.config.tokenizer.padded_vocab_size


def test_layouts_are_read_and_wrong_ones_refused() -> None:
    own = asked(WORDS, read_flags(WORDS), 2)
    assert parse(own, "1").world_size == 1  # as near as one rank can be
    assert parse(own, "4,tp=2,ep=1").text == "4 ranks, TP 2 EP 1 DP 2"
    for text, said in {
        "two": "write the number of ranks",
        "4,xp=2": "axes are tp, cp, pp, ep, etp",
        "4,tp=0": "write the number of ranks",
        "3,ep=2": "does not divide",
    }.items():
        with pytest.raises(ConfigError, match=said):
            parse(own, text)


def test_the_tools_options_come_first() -> None:
    parser = _parser()
    assert split_words(["--nproc", "2", "--", "--seed", "3"], parser) == (
        ["--nproc", "2"],
        ["--seed", "3"],
    )
    assert split_words(["--seed=4", "--layouts", "1", "2", "--num-layers", "2"], parser) == (
        ["--seed=4", "--layouts", "1", "2"],
        ["--num-layers", "2"],
    )
    assert split_words(["--nproc", "2"], parser) == (["--nproc", "2"], [])


def test_a_script_must_have_the_three_functions(tmp_path: Path) -> None:
    script = tmp_path / "my_script_for_verify_resume.py"
    script.write_text("def model_provider(config, pg_collection): ...\n")
    with pytest.raises(ConfigError, match="no train_valid_test_datasets_provider and no for"):
        load_script(script)
    with pytest.raises(ConfigError, match="no such Python file"):
        load_script(tmp_path / "gone.py")
