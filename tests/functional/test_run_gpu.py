"""The unattended GPU run: what fails or takes too long is told, and does not stop the rest."""

import json
import sys
from pathlib import Path

import pytest

from tools.bench import run_gpu
from tools.bench.cards import peak_tflops
from tools.bench.gpu_mfu import layer_flops, model_flops, parse
from tools.bench.run_gpu import Part, Result, page, parts, run_part

FACTS = {
    "card": "Some Card",
    "date": "2026-01-01",
    "machine": {"torch": "2"},
    "before": {"clocks.sm": "1980 MHz"},
    "after": {"clocks.sm": "1755 MHz"},
}


def _part(code: str, seconds: float = 60.0) -> Part:
    return Part("some", [sys.executable, "-S", "-c", code], seconds)


@pytest.mark.parametrize(
    ("code", "seconds", "state"),
    [
        ("print('fine')", 60.0, "ok"),
        ("print('fine'); raise SystemExit(3)", 60.0, "failed: exit code 3"),
        ("print('fine', flush=True); import time; time.sleep(60)", 1.0, "too long"),
        ("print('fine')", 0.0, "left out"),
    ],
)
def test_each_end_of_a_part_is_told(tmp_path: Path, code, seconds, state):
    (tmp_path / "some.json").write_text(json.dumps({"rows": [{"ms": 2.0}]}))
    result = run_part(_part(code), tmp_path, seconds)
    assert result.state.startswith(state)
    if seconds:
        assert result.tail == ["fine"]
        assert result.rows == [{"ms": 2.0}]


def test_the_page_has_every_part_and_the_end_of_what_failed():
    results = [
        Result("tests", "ok", 3.0, [], ["9 passed"]),
        Result("one", "ok", 1.0, [{"who": "ours", "mfu": 0.4321, "peak": None}], ["quiet"]),
        Result("two", "failed: exit code 1", 1.0, [], ["it broke"]),
    ]
    text = page(FACTS, results)
    assert "| clocks.sm | 1980 MHz | 1755 MHz |" in text
    assert "| ours | 0.432 | - |" in text
    assert "9 passed" in text
    assert "it broke" in text
    assert "quiet" not in text


def test_tests_come_first_then_the_benches_of_a_gpu(tmp_path: Path):
    names = [part.name for part in parts(run_gpu.parse([]), tmp_path)]
    assert names[:2] == ["tests", "gpu_mfu"]
    assert {"gpu_kernels", "step"} < set(names)
    assert not {"sample_index", "slow_network", "run_all", "run_gpu"} & set(names)
    words = ["--no-tests", "--benches", "step", "--step", "--rounds 1"]
    (chosen,) = parts(run_gpu.parse(words), tmp_path)
    assert chosen.words[2:4] == ["--rounds", "1"]


def test_no_page_is_written_among_the_docs_without_a_gpu(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["run_gpu.py"])
    monkeypatch.setattr(run_gpu, "card_name", lambda: "cpu")
    assert run_gpu.main() == 1
    assert "there is no CUDA device" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989.0),
        ("NVIDIA H100 PCIe", 756.0),
        ("NVIDIA H200", 989.0),
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA L40S", 362.0),
        ("NVIDIA L4", 121.0),
        ("Some Card", None),
    ],
)
def test_a_card_is_known_by_its_name(name, peak):
    assert peak_tflops(name) == peak


def test_flops_are_those_of_active_weights_and_half_of_attention():
    args = parse([])
    expert = 3 * 4096 * 14336
    assert layer_flops(args) == 6 * (2 * expert + 4096 * 8)
    attention = 2 * 4096**2 + 2 * 4096 * 1024 + 4096 * 4096
    whole = 2 * (layer_flops(args) + 6 * attention) + 6 * 4096 * 32000
    assert model_flops(args) == pytest.approx(whole)
