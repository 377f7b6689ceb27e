"""--moe-use-upcycling against a dense checkpoint on the disk: told before torch is loaded."""

import json
from pathlib import Path

import pytest

from megatron.core.errors import ConfigError
from megatron.training.arguments import parse_args
from megatron.training.resume_rules import config_data

DENSE = "--num-layers 2 --hidden-size 32 --num-attention-heads 4 --ffn-hidden-size 48 --mock-data"
MOE = f"{DENSE} --num-experts 8 --moe-router-topk 4 --moe-use-upcycling"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Looks like checkpoints of a dense run and of a mixture."""
    for name, line in {"dense": DENSE, "moe": f"{DENSE} --num-experts 4"}.items():
        checkpoint = tmp_path / name / "iter_0000007"
        checkpoint.mkdir(parents=True)
        facts = {"config": config_data(parse_args(line.split(), world_size=1))}
        (checkpoint / "common.json").write_text(json.dumps(facts))
        (checkpoint / "manifest.json").write_text("{}")
    return tmp_path


def problems(folder: Path, words: str) -> list[str]:
    line = f"{MOE} --load {folder}/dense --save {folder}/new {words}"
    with pytest.raises(ConfigError) as error:
        parse_args(line.split(), world_size=1)
    return list(error.value.problems)


def test_what_fits_passes(folder) -> None:
    base = f"{MOE} --load {folder}/dense --save {folder}/new"
    for words in (
        "",
        "--moe-upcycling-granularity 2 --moe-ffn-hidden-size 24",
        "--moe-upcycling-granularity 2 --ffn-hidden-size 24",  # as Megatron-LM says it
        "--moe-upcycling-granularity 4 --moe-ffn-hidden-size 10 "
        "--moe-shared-expert-intermediate-size 8",
        "--finetune --no-load-optim --no-load-rng",
    ):
        try:
            parse_args(f"{base} {words}".split(), world_size=1)
        except ConfigError as error:
            assert "have no effect with --finetune" in str(error), words  # noqa: PT017


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("--moe-upcycling-granularity 3 --moe-ffn-hidden-size 16", "3 must divide --num-experts 8"),
        ("--moe-upcycling-granularity 2", "give --moe-ffn-hidden-size 24, not 48"),
        (
            "--moe-upcycling-granularity 2 --ffn-hidden-size 24 --moe-layer-freq ([0]+[1])",
            "--ffn-hidden-size is 48 in the checkpoint and 24 in this run, which has dense layers",
        ),
        ("--num-layers 3", "--num-layers is 2 in the checkpoint and 3 in this run"),
        ("--swiglu", "--swiglu is False in the checkpoint and True in this run"),
        ("--bf16", "number format (--bf16, --fp16, --fp64) is float32 in the checkpoint"),
        ("--moe-router-type expert_choice", "cannot begin as the dense model"),
    ],
)
def test_what_cannot_grow_out_of_the_checkpoint_is_named(folder, words, told) -> None:
    found = problems(folder, words)
    assert len(found) == 1
    assert found[0].startswith("--moe-use-upcycling: ")
    assert told in found[0]


def test_a_mixture_is_not_upcycled(folder) -> None:
    found = problems(folder, f"--load {folder}/moe")
    assert found[0].startswith("--moe-use-upcycling: the checkpoint has --num-experts 4 already")
    assert len(found) == 1


def test_a_model_is_upcycled_once(folder) -> None:
    found = problems(folder, f"--save {folder}/moe")
    assert len(found) == 1
    assert "give --load in the place of --moe-use-upcycling" in found[0]


def test_later_starts_of_one_command_line_go_on_from_their_own(folder) -> None:
    words = f"--pretrained-checkpoint {folder}/dense --load {folder}/own --save {folder}/own"
    parse_args(f"{MOE} {words}".split(), world_size=1)
    (folder / "moe").rename(folder / "own")
    parse_args(f"{MOE} {words} --num-experts 4".split(), world_size=1)
