import json
import math
from pathlib import Path

import numpy as np
import pytest

from megatron.training.plots import plot_run, read_history, smooth


def _history(folder: Path, steps: int, experts: bool) -> None:
    losses = [{"iteration": i, "lm_loss": None if i == 3 else 9 - 0.1 * i} for i in range(1, steps)]
    evaluations = [
        {"iteration": 4, "split": "validation", "lm_loss": 8.5},
        {"iteration": 4, "split": "test", "lm_loss": 8.4},
    ]
    load = [
        {"iteration": i, "moe_layers": [1, 3], "tokens_per_expert": [[4, 4], [8, 0]],
         "max_violation": [0.0, 1.0]}
        for i in (1, 4)
    ]  # fmt: skip
    files = {"metrics": losses, "evaluation": evaluations, "expert_load": load if experts else []}
    for name, lines in files.items():
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (folder / f"{name}.jsonl").write_text(text)


def test_the_files_of_a_run_are_read_back(tmp_path: Path) -> None:
    _history(tmp_path, 6, experts=True)
    history = read_history(tmp_path)
    assert history.steps.tolist() == [1, 2, 3, 4, 5]
    assert math.isnan(history.losses[2])
    assert history.valid_losses.tolist() == [8.5]
    assert history.tokens_per_expert.shape == (2, 2, 2)
    assert history.moe_layers == (1, 3)


def test_the_running_mean_is_centred_and_passes_over_nan() -> None:
    values = np.array([1.0, 2.0, math.nan, 4.0])
    assert smooth(values, 1).tolist() == [1.5, 1.5, 3.0, 4.0]
    assert math.isnan(smooth(np.array([math.nan]), 1)[0])


@pytest.mark.slow
@pytest.mark.parametrize("experts", [True, False])
@pytest.mark.parametrize("steps", [6, 200])
def test_a_picture_is_drawn(steps: int, experts: bool, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    _history(tmp_path, steps, experts)
    path = plot_run(tmp_path, title="a run", vocab_size=8192)
    assert path == tmp_path / "training.png"
    assert path.read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_one_line_says_so(tmp_path: Path, monkeypatch, caplog) -> None:
    monkeypatch.setattr("megatron.training.plots.importlib.util.find_spec", lambda name: None)
    with caplog.at_level("INFO"):
        assert plot_run(tmp_path, title="a run", vocab_size=8192) is None
    assert "matplotlib is not installed" in caplog.text


def test_a_run_without_steps_has_no_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    assert plot_run(tmp_path, title="a run", vocab_size=8192) is None
