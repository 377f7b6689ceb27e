"""A traced run on two ranks, and what ``tools/inspect_routing.py`` says of its trace."""

import re
import subprocess
from pathlib import Path

import numpy as np
import pytest

from megatron.core.errors import DataError
from megatron.core.transformer.moe.router_trace_files import (
    RoutingTrace,
    StepTrace,
    TraceIndex,
    rank_folder,
    start_name,
    write_index,
    write_step,
)
from tests.functional.test_pretrain_gpt import PYTHON, ROOT, TORCHRUN, _environment, _metrics, _run
from tools import inspect_routing

SAMPLES, LENGTH, EXPERTS = 6, 10, 4


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trace in which layer 0 sends id n to expert n % 4, and layer 2 agrees or is constant."""
    folder = tmp_path_factory.mktemp("trace")
    start = folder / start_name(1, 0)
    layers = {"moe_layers": [0, 2, 3], "num_experts": [EXPERTS, EXPERTS, 2], "topk": [1, 2, 1]}
    write_index(start, TraceIndex(first_step=0, world_size=1, **layers))
    rank_folder(start, 0).mkdir()
    for step in (1, 2, 3):
        tokens = np.arange(SAMPLES * LENGTH).reshape(SAMPLES, LENGTH) % 8
        chosen = (tokens % EXPERTS).astype(np.uint8)
        second = np.full_like(chosen, 255)
        padding = np.zeros(tokens.shape, dtype=np.bool_)
        padding[0, 5:] = True
        experts = {
            0: chosen[:, :, None],
            2: np.stack([(chosen + 1) % EXPERTS, second], axis=2),
            3: np.zeros_like(chosen)[:, :, None],
        }
        weights = {layer: np.full(ids.shape, 0.5, np.float16) for layer, ids in experts.items()}
        part = StepTrace(np.arange(SAMPLES), tokens.astype(np.uint16), padding, experts, weights)
        write_step(rank_folder(start, 0), step, part)
    return folder


def test_ids_of_an_expert_are_counted_without_padding(made: Path) -> None:
    trace = RoutingTrace(made)
    found = inspect_routing.expert_tokens(trace, [1, 2], 0)
    assert found.seen.sum() == 2 * (SAMPLES * LENGTH - 5)
    assert found.counts.sum(axis=0).tolist() == found.seen.tolist()
    top = found.top(1, 8)
    assert {number for number, _, _ in top} == {1, 5}
    assert all(share == 1.0 for _, _, share in top)
    assert inspect_routing.expert_tokens(trace, [1], 2).counts.sum() == SAMPLES * LENGTH - 5


def test_agreement_is_the_mutual_information_of_two_layers(made: Path) -> None:
    trace = RoutingTrace(made)
    counts = inspect_routing.load(trace, 1, 0)
    share = counts / counts.sum()
    entropy = -(share * np.log(share)).sum()
    assert inspect_routing.agreement(trace, [1, 2], 0, 2) == pytest.approx(entropy)
    assert inspect_routing.agreement(trace, [1, 2], 0, 3) == pytest.approx(0.0)


def test_places_name_step_sample_position_and_weight(made: Path) -> None:
    found = list(inspect_routing.places(RoutingTrace(made), [2], 0, 1))
    assert found[0] == (2, 0, 1, 1, 0.5)
    assert (2, 0, 5, 5, 0.5) not in found, "padding"
    assert (2, 1, 3, 5, 0.5) in found  # id 13 % 8


def test_the_tool_prints_experts_agreement_and_load(made: Path, capsys, tmp_path: Path) -> None:
    flags = ["--layer", "0", "--expert", "1", "--examples", "2", "--first-step", "2"]
    inspect_routing.main([str(made), *flags])
    out = capsys.readouterr().out
    assert "steps   2: 2 to 3" in out
    assert re.search(r"expert   1 +\d+\.\d%  \d x\d+ \(100%\)  \d x\d+ \(100%\)\n", out)
    assert "step 2 sample 0 position 1: 1 weight 0.500" in out
    assert re.search(r"layers 0 and 2: 1\.3\d\d of 1\.386 nats", out)
    assert re.search(r"layer 3 +\+100\.0% +\+100\.0%", out)
    bytes_flags = ["--layer", "0", "--tokenizer-type", "ByteTokenizer"]
    inspect_routing.main([str(made), *bytes_flags])
    assert "'\\x01'" in capsys.readouterr().out
    pytest.importorskip("matplotlib")
    inspect_routing.main([str(made), "--plot", str(tmp_path / "load.png")])
    assert (tmp_path / "load.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--layer", "1"], r"layer 1 has no experts; MoE layers are \[0, 2, 3\]"),
        (["--layer", "3", "--expert", "2"], "--expert 2: layer 3 has experts 0 to 1"),
        (["--first-step", "9"], "no step in that range; it has 3: 1 to 3"),
    ],
)
def test_what_is_not_in_the_trace_is_an_error(made: Path, flags, message) -> None:
    with pytest.raises(DataError, match=message):
        inspect_routing.main([str(made), *flags])


def test_a_run_on_two_ranks_is_traced_resumed_and_read(tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    flags = (
        f"--train-iters 4 --save {tmp_path} --load {tmp_path} --exit-interval 2 "
        f"--moe-routing-trace-path {trace} --moe-per-layer-logging --log-interval 1 "
        "--expert-model-parallel-size 2 --moe-router-score-function sigmoid "
        "--moe-router-enable-expert-bias --check-weight-hash-across-dp-replicas-interval 1"
    )
    code, out, err = _run(TORCHRUN, f"{flags} --allow-fresh-start")
    assert code == 0, err
    assert f"routing trace: {trace}/start_0001_from_00000000 (0 steps" in out
    code, out, err = _run(TORCHRUN, flags)
    assert code == 0, err
    assert f"routing trace: {trace}/start_0002_from_00000002 (2 steps" in out
    found = RoutingTrace(trace)
    assert found.steps == [1, 2, 3, 4]
    ids = [number for step in found.steps for number in found.read(step).sample_ids.tolist()]
    assert ids == list(range(32)), "each sample once, over ranks and the resume"
    lines = _metrics(tmp_path)
    assert [line["iteration"] for line in lines] == [1, 2, 3, 4]
    assert "moe/load_balancing_loss_layer_1" in lines[-1]
    assert lines[-1]["moe/expert_bias_max"] > 0
    tool = subprocess.run(
        [*PYTHON, "tools/inspect_routing.py", str(trace), "--top", "2"],
        cwd=ROOT, env=_environment(), capture_output=True, text=True,
    )  # fmt: skip
    assert tool.returncode == 0, tool.stderr
    assert "steps   4: 1 to 4" in tool.stdout
