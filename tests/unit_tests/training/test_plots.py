import json
import math
from pathlib import Path

import numpy as np
import pytest

from megatron.training.plots import draw, plot_run, read_history, smooth


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


def test_layers_of_different_experts_are_drawn_as_load_over_their_own_mean(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    _history(tmp_path, 6, experts=True)
    path = tmp_path / "expert_load.jsonl"
    path.write_text(path.read_text().replace("[[4, 4], [8, 0]]", "[[3, 1, 0, 4], [6, 2]]"))
    history = read_history(tmp_path)
    assert history.tokens_per_expert.shape == (2, 2, 4)
    assert np.isnan(history.tokens_per_expert[:, 1, 2:]).all()
    figure = draw(history, title="a run", vocab_size=8192)
    figure.canvas.draw()
    (image,) = [
        image for axes in figure.axes for image in axes.images if image.get_array().ndim == 2
    ]
    assert image.get_array()[0].tolist() == [1.5, 0.5, 0.0, 2.0]
    assert image.get_array()[1, :2].tolist() == [1.5, 0.5]
    assert np.isnan(np.ma.filled(image.get_array(), np.nan)[1, 2:]).all()


@pytest.mark.parametrize("steps", [6, 200])
def test_names_hide_no_curve_and_iterations_are_whole(steps: int, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    _history(tmp_path, steps, experts=True)
    figure = draw(read_history(tmp_path), title="a run", vocab_size=8192)
    figure.canvas.draw()
    loss, _, _, violation = figure.axes
    assert not loss.texts
    for axes in (loss, violation):
        assert all(tick == round(tick) for tick in axes.get_xticks())
        names = axes.get_legend().get_window_extent()
        assert names.y0 >= axes.get_window_extent().y1
        assert names.y1 <= axes._left_title.get_window_extent().y0
        assert names.x1 <= figure.bbox.x1
    texts = [text.get_text() for text in loss.get_legend().get_texts()]
    assert "validation, last 8.500 (0.51 nats below guessing)" in texts


def test_a_single_iteration_has_whole_marks(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    _history(tmp_path, 2, experts=True)
    (tmp_path / "evaluation.jsonl").write_text("")
    load = (tmp_path / "expert_load.jsonl").read_text().splitlines()[0]
    (tmp_path / "expert_load.jsonl").write_text(load + "\n")
    figure = draw(read_history(tmp_path), title="a run", vocab_size=8192)
    for axes in (figure.axes[0], figure.axes[3]):
        assert {0, 1, 2} <= {*axes.get_xticks().tolist()}
        assert all(tick == round(tick) for tick in axes.get_xticks())


def test_without_matplotlib_one_line_says_so(tmp_path: Path, monkeypatch, caplog) -> None:
    monkeypatch.setattr("megatron.training.plots.importlib.util.find_spec", lambda name: None)
    with caplog.at_level("INFO"):
        assert plot_run(tmp_path, title="a run", vocab_size=8192) is None
    assert "matplotlib is not installed" in caplog.text


def test_a_run_without_steps_has_no_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    assert plot_run(tmp_path, title="a run", vocab_size=8192) is None
