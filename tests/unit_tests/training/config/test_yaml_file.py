"""--yaml-cfg: the same options, checked the same way, below the command line."""

import pytest

from megatron.core.errors import ConfigError
from megatron.training.arguments import parse_args
from megatron.training.config.options import options_of
from megatron.training.config.run_config import RunConfig
from megatron.training.config.yaml_file import read_yaml_file

OPTIONS = options_of(RunConfig)


@pytest.fixture
def read(tmp_path):
    def read_text(text):
        path = tmp_path / "run.yaml"
        path.write_text(text)
        return read_yaml_file(path, OPTIONS)

    return read_text


def test_keys_are_field_names_or_flags_flat_or_in_sections(read):
    given = read(
        """
        num_layers: 4
        num-experts: 8
        disable-bias-linear: true
        model:
          hidden_size: 64
          moe_layer_freq: "[0,1]*2"
        optimizer: {lr: 1e-3, optimizer: sgd}
        data_path: [a, b]
        seq_length:
        """
    )
    assert given.problems == []
    assert given.values == {
        "num_layers": 4,
        "num_moe_experts": 8,
        "add_bias_linear": False,
        "hidden_size": 64,
        "moe_layer_freq": [0, 1, 0, 1],
        "lr": 1e-3,
        "optimizer": "sgd",
        "data_path": ["a", "b"],
    }


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("num_layerz: 4", "did you mean --num-layers?"),
        ("num_layers: many", "num_layers: many must be a whole number"),
        ("num_layers: true", "must be a whole number"),
        ("bf16: 1", "must be true or false"),
        ("fp16_lm_cross_entropy: true", "Megatron-LM flag not offered here: the loss is"),
        ("normalization: rmsnorm", "did you mean RMSNorm?"),
        ("- a\n- b", "key: value"),
        ("a: [", "is no YAML: line 1, column 5: while parsing a flow node, expected the node"),
        ("a: \x01", "is no YAML: special characters are not allowed"),
        ("lr: 1\nlr: 2", "lr (line 1) and lr (line 2) set the same; keep one"),
        ("num_layers: 4\nnum-layers: 4", "num_layers (line 1) and num-layers (line 2) set"),
        ("lr: 1\noptimizer:\n  lr: 1", "lr (line 1) and lr (line 3) set the same"),
        ("model: {num_layers: 4}\nmodel: {hidden_size: 8}", "model (line 1) and model (line 2)"),
        ("optimizer: {lr: 1}\noptimizer: sgd", "optimizer (line 1) and optimizer (line 2)"),
        ("add_bias_linear: true\ndisable-bias-linear: true", "(line 2) set the same"),
    ],
)
def test_problems_name_the_file(read, text, problem):
    problems = read(text).problems
    assert len(problems) == 1
    assert problem in problems[0]
    assert "run.yaml" in problems[0]
    assert "<unicode string>" not in problems[0]


def test_a_missing_file_is_a_problem(tmp_path):
    assert "cannot be read" in read_yaml_file(tmp_path / "no.yaml", OPTIONS).problems[0]


@pytest.mark.parametrize("text", [None, "a: [", "- a", "\xff"])
def test_what_an_unreadable_file_may_say_is_not_called_missing(tmp_path, text):
    path = tmp_path / "run.yaml"
    if text is not None:
        path.write_text(text, encoding="latin-1")
    with pytest.raises(ConfigError) as error:
        parse_args(["--yaml-cfg", str(path), "--lr", "fast"], world_size=1)
    problems = str(error.value).splitlines()[1:]
    assert len(problems) == 2
    assert str(path) in problems[0]
    assert "--lr fast" in problems[1]


def test_flags_without_effect_are_noticed(read):
    given = read("use-mcore-models: true")
    assert given.problems == []
    assert "has no effect" in given.notices[0]


def test_command_line_goes_before_yaml_and_yaml_before_default(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("num_layers: 4\nhidden_size: 128\nlr: 0.1\nmock_data: true\nbf16: true\n")
    config = parse_args(["--yaml-cfg", str(path), "--lr", "0.2", "--no-bf16"], world_size=1)
    assert (config.model.num_layers, config.optimizer.lr, config.model.bf16) == (4, 0.2, False)
    sources = [config.sources[name] for name in ("num_layers", "lr", "train_iters", "clip_grad")]
    assert sources == ["yaml", "cli", "derived", "default"]
    assert "--lr 0.2 from the command line replaces 0.1 of --yaml-cfg" in config.notices
