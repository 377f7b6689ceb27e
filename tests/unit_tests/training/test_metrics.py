import json
from pathlib import Path

import pytest

from megatron.training.config.logging import LoggingConfig
from megatron.training.metrics import STEPS, JsonLines, MetricsWriter, log_folder, read_lines


def _write(path: Path, iterations: range, resumed_from: int = 0) -> None:
    lines = JsonLines(path, resumed_from)
    for iteration in iterations:
        lines.write({"iteration": iteration, "lm_loss": 0.1 * iteration})
    lines.close()


def test_a_resumed_run_goes_on_after_its_step(tmp_path: Path) -> None:
    path = tmp_path / STEPS
    _write(path, range(1, 8))
    _write(path, range(6, 10), resumed_from=5)
    assert [line["iteration"] for line in read_lines(path)] == list(range(1, 10))


def test_truncation_keeps_the_bytes_of_earlier_lines(tmp_path: Path) -> None:
    path = tmp_path / STEPS
    _write(path, range(1, 8))
    first = path.read_text().splitlines()[:5]
    JsonLines(path, 5).close()
    assert path.read_text().splitlines() == first


def test_a_line_cut_short_by_a_crash_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / STEPS
    _write(path, range(1, 4))
    with path.open("a") as file:
        file.write('{"iteration": 4, "lm_l')
    _write(path, range(4, 6), resumed_from=3)
    assert [line["iteration"] for line in read_lines(path)] == [1, 2, 3, 4, 5]


def test_a_fresh_run_keeps_the_file_of_the_run_before(tmp_path: Path) -> None:
    path = tmp_path / STEPS
    _write(path, range(1, 4))
    _write(path, range(1, 2))
    assert len(list(read_lines(path))) == 1
    assert len((tmp_path / "metrics.jsonl.previous").read_text().splitlines()) == 3


def test_numbers_that_are_not_finite_become_null(tmp_path: Path) -> None:
    lines = JsonLines(tmp_path / STEPS, 0)
    lines.write({"iteration": 1, "lm_loss": float("nan"), "grad_norm": float("inf")})
    lines.close()
    text = (tmp_path / STEPS).read_text()
    assert json.loads(text) == {"iteration": 1, "lm_loss": None, "grad_norm": None}


def test_a_full_disk_ends_the_file_and_not_the_run(tmp_path: Path, caplog) -> None:
    writer = MetricsWriter(LoggingConfig(), tmp_path, 0)
    for iteration in range(1, 4):
        writer.line(STEPS, {"iteration": iteration})
        if iteration == 1:
            writer._files[STEPS]._file = open("/dev/full", "a")  # noqa: SIM115
    writer.close()
    assert [line["iteration"] for line in read_lines(tmp_path / STEPS)] == [1]
    assert caplog.text.count("metrics.jsonl cannot be written any more") == 1


def test_without_a_folder_nothing_is_written(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    writer = MetricsWriter(LoggingConfig(), None, 0)
    writer.line(STEPS, {"iteration": 1})
    writer.scalars(1, {"lm loss": 1.0})
    writer.close()
    assert list(tmp_path.iterdir()) == []


def test_the_log_folder_is_log_dir_then_save() -> None:
    assert log_folder(LoggingConfig(log_dir="a"), "b") == Path("a")
    assert log_folder(LoggingConfig(), "b") == Path("b")
    assert log_folder(LoggingConfig(), None) is None


@pytest.mark.slow
def test_tensorboard_gets_the_scalars_of_its_interval(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = LoggingConfig(tensorboard_dir=str(tmp_path), tensorboard_log_interval=2)
    writer = MetricsWriter(config, None, 0)
    for iteration in range(1, 5):
        writer.scalars(iteration, {"lm loss": float(iteration)})
    writer.close()
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("lm loss")] == [(2, 2.0), (4, 4.0)]
