"""The list of planted omissions does not rot; `make planted-resume` runs it."""

import json
import subprocess
from pathlib import Path

import pytest

from tests.planted import plants, run_resume
from tests.planted.omissions import OMISSIONS
from tools.resume.items import ITEMS

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("omission", OMISSIONS, ids=lambda one: one.name)
def test_an_omission_can_be_planted(omission):
    text = (ROOT / omission.file).read_text()
    changed = plants.planted(text, omission)
    assert changed != text
    compile(changed, omission.file, "exec")


def test_names_are_distinct_and_items_are_those_of_the_tool():
    assert len({one.name for one in OMISSIONS}) == len(OMISSIONS) >= 8
    assert {one.item for one in OMISSIONS} <= {item.name for item in ITEMS}
    assert {
        "random generators",
        "sample ids",
        "first moment",
        "second moment",
        "expert bias",
        "learning rate",
        "experts",
        "loss scale",
    } <= {one.item for one in OMISSIONS}


def test_what_the_tool_does_not_say_is_told(tmp_path):
    omission = OMISSIONS[0]

    def unsaid(code, causes, said):
        (tmp_path / "report.json").write_text(json.dumps({"causes": causes}))
        done = subprocess.CompletedProcess([], code, stdout=said, stderr="")
        return run_resume.unsaid(tmp_path, omission, done)

    cause = [{"item": omission.item}]
    assert unsaid(1, cause, f"first: {omission.words}\n") == []
    assert len(unsaid(1, cause, f"said elsewhere: {omission.words}\n")) == 1
    assert len(unsaid(1, [*cause, {"item": "weights"}], f"likely: {omission.words}")) == 1
    assert unsaid(0, cause, omission.words) == ["wanted: exit code 1, not 0"]
