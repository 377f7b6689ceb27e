"""The drawing tool as a user runs it: the page's drawings are its output, mistakes get one line."""

import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from megatron.core.pipeline_parallel.schedule_plan import SCHEDULES, build_schedule
from megatron.core.pipeline_parallel.schedule_simulator import simulate
from tools import show_schedule
from tools.schedules.text import drawing

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/schedules.md").read_text()
BLOCKS = re.findall(r"```\n\$ python tools/show_schedule\.py ([^\n]*)\n(.*?)```", PAGE, re.DOTALL)
SIZES = "--pp 4 --microbatches 8"
SVG = "{http://www.w3.org/2000/svg}"


@pytest.mark.parametrize(("line", "output"), BLOCKS, ids=[line for line, _ in BLOCKS])
def test_the_drawings_of_the_page_are_what_the_tool_prints(line, output, capsys):
    show_schedule.main(line.split())
    assert capsys.readouterr().out == output


def test_the_page_draws_every_kind_of_schedule():
    assert len(BLOCKS) == 5


def test_a_row_shows_when_each_step_runs():
    schedule = build_schedule("1f1b", pp=2, num_microbatches=2)
    assert drawing(schedule, simulate(schedule), width=80).splitlines()[1:] == [
        "rank 0 F0 F1 ......B0--- ...B1---",
        "rank 1 ...F0 B0--- F1 B1--- ......",
    ]


def test_long_rows_are_broken_at_the_width(capsys):
    show_schedule.main(f"{SIZES} --vpp 2 --width 60".split())
    lines = capsys.readouterr().out.splitlines()
    rows = [line for line in lines if line.startswith("rank 0")]
    assert len(rows) > 2
    assert max(map(len, lines)) <= 90
    assert max(map(len, rows)) <= 60
    assert sum(row.count("F0a") for row in rows) == 1


def test_bubble_and_activations_of_each_rank_are_told(capsys):
    show_schedule.main(["--pp", "4", "--microbatches", "9", "--costs", "1,1,1"])
    output = capsys.readouterr().out
    assert "time 36, bubble 25.0 %" in output
    numbers = re.findall(r"^(\d)  +27  +9  +25\.0  +(\d)  +\d$", output, re.MULTILINE)
    assert numbers == [("0", "4"), ("1", "3"), ("2", "2"), ("3", "1")]


def test_costs_and_sends_change_the_drawing(capsys):
    outputs = set()
    for options in ("", "--costs 1,2,1", "--costs 1,1,1,0.5", "--costs 1,1,1,0.5 --sends blocking",
                    "--stage-shares 1,1,1,2"):  # fmt: skip
        show_schedule.main([*SIZES.split(), *options.split()])
        outputs.add(capsys.readouterr().out)
    assert len(outputs) == 5


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_svg_has_a_bar_for_each_step_where_it_runs(name, tmp_path, capsys):
    path = tmp_path / "schedule.svg"
    vpp = "--vpp 3" if name == "interleaved" else ""
    show_schedule.main(f"--schedule {name} {SIZES} {vpp} --svg {path}".split())
    assert f"wrote {path}" in capsys.readouterr().out
    page = ET.parse(path).getroot()
    titles = [title.text for title in page.iter(f"{SVG}title")]
    schedule = build_schedule(name, pp=4, num_microbatches=8, vpp=3 if vpp else None)
    wide = float(page.get("width"))
    assert len(titles) >= sum(map(len, schedule.steps))
    assert "forward, microbatch 7, chunk 0" in " ".join(titles)
    for bar in page.iter(f"{SVG}rect"):
        if bar.find(f"{SVG}title") is not None:
            assert 0 < float(bar.get("x")) < float(bar.get("x")) + float(bar.get("width")) < wide


def test_a_long_svg_is_broken_into_lines_that_show_all_of_the_time(tmp_path):
    path = tmp_path / "schedule.svg"
    show_schedule.main(f"--pp 2 --vpp 2 --microbatches 64 --svg {path}".split())
    page = ET.parse(path).getroot()
    assert float(page.get("width")) < 2000
    bars = [bar for bar in page.iter(f"{SVG}rect") if bar.find(f"{SVG}title") is not None]
    names = {bar.find(f"{SVG}title").text.partition(":")[0] for bar in bars}
    # Both ranks have every (kind, microbatch, chunk); a bar at the end of a line is cut in two.
    assert len(names) == 2 * 64 * 2
    assert len(bars) >= 2 * len(names)
    ranks = [text.text for text in page.iter(f"{SVG}text") if text.text == "rank 0"]
    assert len(ranks) > 2


def test_the_table_compares_all_schedules(capsys):
    show_schedule.main(["--compare", "--pp", "4", "--microbatches", "16"])
    rows = {line.split()[0]: line.split()[1:] for line in capsys.readouterr().out.splitlines()}
    assert set(SCHEDULES) <= set(rows)
    bubbles = [float(rows[name][2]) for name in ("1f1b", "interleaved", "zb-h1", "dualpipev")]
    assert bubbles == sorted(bubbles, reverse=True)
    assert rows["zb-h2"][3] == "0.0"


def test_the_list_of_a_rank_has_its_sends_and_receives(capsys):
    show_schedule.main(["--pp", "2", "--microbatches", "1", "--actions", "0", "1"])
    assert capsys.readouterr().out.split("rank 0 walks:\n")[1].splitlines() == [
        "  F0.0",
        "  send activation of microbatch 0, stage 0, to rank 1",
        "  recv gradient of microbatch 0, stage 1, from rank 1",
        "  B0.0",
        "",
        "rank 1 walks:",
        "  recv activation of microbatch 0, stage 0, from rank 0",
        "  F0.0",
        "  B0.0",
        "  send gradient of microbatch 0, stage 1, to rank 0",
    ]


@pytest.mark.parametrize(
    ("line", "wanted"),
    [
        ("--pp 4", "--microbatches"),
        ("--pp 0 --microbatches 4", "0 must be 1 or more"),
        ("--pp x --microbatches 4", "invalid positive value: 'x'"),
        (f"{SIZES} --schedule gpipe", "invalid choice: 'gpipe'"),
        (f"{SIZES} --schedule zb-h1 --vpp 2", "zb-h1 has 1 virtual stage(s) a rank, not 2"),
        (f"{SIZES} --group-size 4", "group size 4 needs at least 2 virtual stages"),
        (f"{SIZES} --vpp 2 --group-size 3", "group size 3 must be at least"),
        (f"{SIZES} --costs 1,2", "'1,2' must be F,I,W or F,I,W,COMM"),
        (f"{SIZES} --costs 1,0,1", "with F, I, W > 0"),
        (f"{SIZES} --costs 1,x,1", "'1,x,1' is no list of numbers"),
        (f"{SIZES} --costs 1,1,nan", "numbers of at least 0"),
        (f"{SIZES} --stage-shares 1,2", "--stage-shares has 2 number(s), but 4 ranks"),
        (f"{SIZES} --stage-shares 1,1,1,0", "shares must be more than 0"),
        (f"{SIZES} --actions 4", "--actions 4: ranks are 0 to 3"),
        (f"{SIZES} --compare --svg x.svg", "--svg is for one schedule: leave out --compare"),
        (f"{SIZES} --width 3", "at least 40"),
        (f"{SIZES} --svg /nonexistent/x.svg", "/nonexistent/x.svg: No such file"),
        (f"{SIZES} --microbach 3", "did you mean --microbatches?"),
        ("--pp 512 --microbatches 4096", "more than 50000 forwards"),
    ],
)
def test_mistakes_are_answered_in_one_line_with_exit_code_2(line, wanted):
    result = subprocess.run(
        [sys.executable, "tools/show_schedule.py", *line.split()],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={"PYTHONPATH": str(ROOT)},
    )
    assert result.returncode == 2, result.stdout + result.stderr
    assert wanted in result.stderr
    assert "Traceback" not in result.stderr
    assert sum("error:" in text for text in result.stderr.splitlines()) == 1


def test_the_tool_starts_without_torch():
    code = "import sys, tools.show_schedule; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
