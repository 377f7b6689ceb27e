"""`make bench` as a whole: every bench gets its turn, whatever becomes of the one before."""

import importlib.util
import json
from pathlib import Path

import pytest

from tools.bench import run_all, summary
from tools.bench.run_all import FIRST, Outcome, benches, run_each, words_of
from tools.bench.summary import write_summary

GOOD = """
import json, os, sys
from pathlib import Path


def main() -> None:
    folder = Path(sys.argv[sys.argv.index("--output") + 1])
    rows = [{"what": "a|b", "ms": 1234.5, "words": len(sys.argv)}, {"what": "c", "more": 0.25}]
    (folder / "good.json").write_text(json.dumps({"rows": rows}))
    print("threads", os.environ["OMP_NUM_THREADS"])


main()
"""
BAD = """
def main() -> None:
    raise SystemExit(3)


main()
"""
SLOW = """
import time


def main() -> None:
    time.sleep(60)


main()
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    made = tmp_path / "benches"
    made.mkdir()
    monkeypatch.setattr(run_all, "FOLDER", made)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    return made


def _run(folder: Path, output: Path, monkeypatch, limit_s: int = 30) -> int:
    monkeypatch.setattr(run_all, "LIMIT_S", limit_s)
    monkeypatch.setattr("sys.argv", ["run_all.py", "--output", str(output)])
    return run_all.main()


def test_a_failing_bench_is_named_and_the_others_run(folder, tmp_path, monkeypatch, capsys):
    (folder / "bad.py").write_text(BAD)
    (folder / "good.py").write_text(GOOD)
    (folder / "helper.py").write_text("")
    output = tmp_path / "out"
    assert _run(folder, output, monkeypatch) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("[1/2] bad ... ")
    assert "FAILED, exit code 3" in lines[0]
    assert lines[1].startswith("[2/2] good ... ")
    assert lines[-1].endswith("1 of 2 benches failed: bad")
    assert (output / "good.log").read_text() == "threads 1\n"
    page = (output / summary.PAGE).read_text()
    assert "| bad | " in page
    assert "| what | ms | words | more |" in page
    assert "| a/b | 1234 | 3 |  |" in page  # rounds to even


def test_a_bench_that_does_not_end_is_ended(folder, tmp_path, monkeypatch, capsys):
    (folder / "slow.py").write_text(SLOW)
    assert _run(folder, tmp_path / "out", monkeypatch, limit_s=1) == 1
    assert "took longer than 1 s" in capsys.readouterr().out


def test_tables_of_an_earlier_run_are_gone(folder, tmp_path, monkeypatch):
    (folder / "good.py").write_text(BAD)
    output = tmp_path / "out"
    output.mkdir()
    (output / "good.json").write_text("{}")
    run_each(benches(), output, quick=False, full=False, limit_s=30)
    assert not (output / "good.json").exists()


def test_every_bench_has_a_quick_size():
    names = {bench.stem: bench for bench in benches()}
    assert set(run_all.QUICK) <= set(names) | {"startup"}
    for name, bench in names.items():
        assert words_of(bench, quick=True, full=False), f"{name} has no options for --quick"
        assert words_of(bench, quick=False, full=True) == []
    assert next(iter(names)) == FIRST[0]


def _table(folder: Path, name: str, rows: list[dict[str, object]]) -> None:
    (folder / f"{name}.json").write_text(json.dumps({"rows": rows}))


def _step_tables(folder: Path) -> None:
    step = {"dtype": "fp32", "step_ms": 2.0, "low_ms": 1.0, "high_ms": 3.0, "tokens_per_s": 10.0}
    _table(folder, "step", [step | {"what": "ours"}, step | {"what": "textbook"}])
    limit = {"dtype": "fp32", "part": "sum", "peak_ms": 1.0, "own_shape_ms": 1.5}
    _table(folder, "step_roofline", [limit])


@pytest.mark.skipif(importlib.util.find_spec("matplotlib") is None, reason="no matplotlib")
def test_the_step_is_drawn(tmp_path):
    _step_tables(tmp_path)
    page = write_summary(tmp_path, [Outcome("step", 1.0, "")], is_quick=True)
    assert (tmp_path / "step.png").read_bytes().startswith(b"\x89PNG")
    assert "(step.png)" in page.read_text()
    assert "figures mean nothing" in page.read_text()


def test_without_matplotlib_the_page_says_so(tmp_path, monkeypatch, capsys):
    _step_tables(tmp_path)
    monkeypatch.setattr(summary.importlib.util, "find_spec", lambda name: None)
    page = write_summary(tmp_path, [], is_quick=False)
    assert "No picture: matplotlib is not installed." in page.read_text()
    assert "no picture" in capsys.readouterr().out
    assert not (tmp_path / "step.png").exists()
