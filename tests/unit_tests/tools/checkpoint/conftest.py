from collections.abc import Callable
from pathlib import Path

import pytest

from tests.helpers.small_runs import alone_in_the_world, new_run, save, steps
from tools.preprocessing import command_line

FLAGS = (
    '--fp32 --num-layers 3 --moe-layer-freq "([0]+[1]*2)" --moe-router-score-function sigmoid '
    "--moe-router-enable-expert-bias --moe-router-bias-update-rate 0.002"
)


@pytest.fixture(scope="session")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints of iterations 2, 4 and 6: a dense layer and two of 4 experts, fp32, Adam."""
    folder = tmp_path_factory.mktemp("tools") / "run"
    with alone_in_the_world():
        run = new_run(FLAGS)
        for iteration in (2, 4, 6):
            steps(run, 2, first=iteration - 2)
            save(folder, run, iteration)
    return folder


@pytest.fixture(scope="session")
def bf16_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same in bf16, with main weights; iterations 2 and 4."""
    folder = tmp_path_factory.mktemp("tools") / "bf16"
    with alone_in_the_world():
        run = new_run(FLAGS.replace("--fp32", "--bf16"))
        for iteration in (2, 4):
            steps(run, 2, first=iteration - 2)
            save(folder, run, iteration)
    return folder


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    """Call a tool's main as its script does: (exit code, standard output, standard error)."""
    monkeypatch.setattr(command_line.signal, "signal", lambda *_: None)

    def run(main: Callable, *words: object) -> tuple[int, str, str]:
        code = 0
        try:
            command_line.run_tool(lambda: _left(main([*map(str, words)])))
        except SystemExit as end:
            code = end.code
        return code, *capsys.readouterr()

    return run


def _left(code: int | None) -> None:
    if code:
        raise SystemExit(code)
