"""Pictures of benches hold what they were given, and are left out without matplotlib."""

import pytest

from tools.bench import plots
from tools.bench.plots import Bar, BarPanel, Curve, Panel, plot_bars, plot_curves

CURVES = [Panel("a", "x", "y", [Curve("one", [1, 2], [1.0, 2.0]), Curve("line", [1, 2], [1, 1])])]
BARS = [BarPanel("b", "ms", [Bar("ours", {"products": 2.0, "rest": 1.0}, "3 ms")], {"limit": 2.5})]


@pytest.mark.parametrize(("draw", "panels"), [(plot_curves, CURVES), (plot_bars, BARS)])
def test_a_picture_is_drawn(draw, panels, tmp_path) -> None:
    pytest.importorskip("matplotlib")
    assert draw(tmp_path / "x" / "plot.png", "title", panels)
    assert (tmp_path / "x" / "plot.png").read_bytes().startswith(b"\x89PNG")
    assert len(list((tmp_path / "x").iterdir())) == 1


def test_without_matplotlib_one_line_says_so(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(plots.importlib.util, "find_spec", lambda name: None)
    assert not plot_curves(tmp_path / "plot.png", "title", CURVES)
    assert not plot_bars(tmp_path / "plot.png", "title", BARS)
    assert "matplotlib is not installed" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())
