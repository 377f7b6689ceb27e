"""The command line is read whole: values, notices and every problem."""

import pytest

from megatron.training.config.flags import build_parser, help_page, read_command_line
from megatron.training.config.options import options_of
from megatron.training.config.run_config import RunConfig

OPTIONS = options_of(RunConfig)


def _read(line):
    return read_command_line(line.split(), OPTIONS)


def test_only_what_is_given_is_returned():
    given = _read("--num-experts 8 --bf16 --disable-bias-linear --moe-layer-freq [0]*2+[1]*2")
    assert given.values == {
        "num_moe_experts": 8,
        "bf16": True,
        "add_bias_linear": False,
        "moe_layer_freq": [0, 0, 1, 1],
    }
    assert not given.problems
    assert not given.notices


def test_lists_equals_signs_and_negative_numbers():
    given = _read("--data-path 0.3 a 0.7 b --lr=1e-3 --min-lr -1 --num-layers 2 --num-layers 3")
    assert given.values["data_path"] == ["0.3", "a", "0.7", "b"]
    assert given.values["lr"] == 1e-3
    assert given.values["min_lr"] == -1, "the range is checked later"
    assert given.values["num_layers"] == 3, "the last one holds"


def test_a_switch_is_set_back():
    assert _read("--bf16 --no-bf16 --add-bias-linear").values == {
        "bf16": False,
        "add_bias_linear": True,
    }


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("--moe-rooter-topk 2", "--moe-rooter-topk is unknown; did you mean --moe-router-topk?"),
        ("--moe-router-top 2", "--moe-router-top is unknown; did you mean --moe-router-topk?"),
        ("--qqq", "--qqq is unknown; see --help"),
        ("--num-layers two", "--num-layers two: must be a whole number"),
        ("--num-layers", "--num-layers: needs a value"),
        ("--num-layers 1 2", "--num-layers 1 2: takes one value, not 2"),
        ("--bf16 true", "--bf16 true: takes no value, but true follows it"),
        ("--normalization rmsnorm", "one of LayerNorm, RMSNorm; did you mean RMSNorm?"),
        ("word --bf16", "'word' stands before the first flag"),
        ("--moe-paged-stash", "--moe-paged-stash is a Megatron-LM flag not offered here"),
        ("--fp16-lm-cross-entropy", "the loss is always computed in fp32"),
        ("--attention-backend flsh", "did you mean flash?"),
        ("--attention-backend flash", "not offered, only auto"),
        ("--transformer-impl transformer_engine", "leave it out, or give local"),
        ("--yaml-cfg", "--yaml-cfg needs one value"),
        ("--lr nan", "finite"),
        ("--moe-layer-freq eval(1)", "only whole numbers"),
    ],
)
def test_problems_say_what_to_do(line, problem):
    problems = _read(line).problems
    assert len(problems) == 1
    assert problem in problems[0]


@pytest.mark.parametrize(
    "line",
    [
        "--use-mcore-models",
        "--local-rank 0",
        "--local_rank=0",
        "--no-position-embedding",
        "--transformer-impl local",
        "--exit-signal-handler",
        "--dataloader-type single",
    ],
)
def test_flags_that_change_nothing_are_accepted_with_a_notice(line):
    given = _read(line)
    assert not given.problems
    assert len(given.notices) == 1
    assert "has no effect" in given.notices[0]


def test_all_problems_are_found_at_once():
    assert len(_read("--num-layerz 2 --lr x --spec 1 --bf16 1 --normalization z").problems) == 5


def test_flags_whose_value_is_unknown_are_doubtful():
    assert _read("--num-layerz 2").doubtful == {"--num-layers"}
    assert _read("--lr x").doubtful == {"--lr"}


def test_help_names_every_flag_whole_and_its_default():
    page = help_page(OPTIONS)
    for option in OPTIONS.values():
        assert option.flags[0] in page
    assert "(default: 2)" in page
    assert "Turn off: Give linear layers a bias." in page
    assert all(len(line) <= 100 for line in page.splitlines())


def test_the_parser_takes_no_abbreviations():
    with pytest.raises(SystemExit):
        build_parser(OPTIONS).parse_args(["--num-lay", "2"])
