"""R10, R11: what any layout saved goes on at any other; see `tools/verify_reshard.py`."""

import re
from pathlib import Path

import pytest
import torch

from megatron.core.param_role import LogicalShard
from tools import verify_reshard
from tools.reshard import table
from tools.reshard.differences import first_other_bit, of_bits, of_keys, of_numbers, of_values
from tools.reshard.layouts import AXES, MODELS, QUICK, TIED, sizes_of, unchanged_axes
from tools.reshard.proof import Outcome, Proof, Saved
from tools.reshard.refusals import Refusal, refused, tried_loads

SLOW = pytest.mark.slow
SIZES = {layout.name: sizes_of(TIED.config(layout), layout.ranks) for layout in TIED.layouts}


@pytest.mark.parametrize(
    "model", ["tied", pytest.param("untied", marks=SLOW), pytest.param("bf16", marks=SLOW)]
)
def test_pairs_that_change_every_axis_go_on_as_one_process(model: str, tmp_path: Path) -> None:
    proof = Proof(MODELS[model], tmp_path, pairs=QUICK[model])
    told = list(proof.run())
    assert proof.problems == []
    assert {(one.source, one.target) for one in proof.outcomes} == set(QUICK[model])
    assert len(told) == len(proof.saved) + len({target for _, target in QUICK[model]})
    assert 0.0 < proof.worst[0] < 1e-12 or not MODELS[model].is_exact


@SLOW
@pytest.mark.parametrize("model", MODELS)
def test_all_pairs_go_on_as_one_process(model: str, tmp_path: Path) -> None:
    proof = Proof(MODELS[model], tmp_path)
    list(proof.run())
    assert proof.problems == []
    assert len(proof.outcomes) == len(MODELS[model].layouts) ** 2


def test_the_quick_pairs_change_every_axis_in_both_directions() -> None:
    assert unchanged_axes(SIZES, QUICK["tied"]) == []
    assert "cp" in unchanged_axes(SIZES, QUICK["tied"][:4])
    assert unchanged_axes(SIZES, QUICK["tied"][:1]) == list(AXES)
    assert set(AXES) == set(SIZES["one"])


def test_layouts_are_many_and_all_different() -> None:
    assert len(TIED.layouts) >= 12
    assert len({repr(sizes) for sizes in SIZES.values()}) == len(SIZES)
    assert max(layout.ranks for layout in TIED.layouts) == 8
    assert {sizes["zero"] for sizes in SIZES.values()} == {0, 1, 3}


def test_what_no_layout_may_change_is_refused_by_name(tmp_path: Path) -> None:
    said = {one.what: one.said for one in tried_loads(tmp_path)}
    assert "--untie-embeddings-and-output-weights" in said["tied embeddings -> untied embeddings"]
    assert "--untie-embeddings-and-output-weights" in said["untied embeddings -> tied embeddings"]
    assert "--padded-vocab-size 128" in said["another padded vocabulary -> tied embeddings"]
    assert "--bf16" in said["another number format -> tied embeddings"]
    assert all("--use-torch-fsdp2" in one.said for one in refused())


def _block(values: list[float], offset: int = 2) -> LogicalShard:
    return LogicalShard("w", torch.tensor(values, dtype=torch.float64), (5,), (offset,))


WHOLE = {"w": torch.tensor([0.0, 1.0, 2.0, 3.0, 0.0], dtype=torch.float64)}


def test_one_bit_is_told_with_its_place_and_both_values() -> None:
    assert list(of_bits("now", [("w", _block([2.0, 3.0]))], WHOLE)) == []
    (found,) = of_bits("now", [("w", _block([2.0, 3.0000000000000004]))], WHOLE)
    assert str(found) == "now: w[3] is 3.0000000000000004, must be 3.0"
    (found,) = of_bits("now", [("w", _block([2.0, 3.0, -0.0]))], WHOLE)
    assert str(found) == "now: w[4] is -0.0, must be 0.0"
    (found,) = of_bits("now", [("v", _block([2.0]))], WHOLE)
    assert str(found) == "now: v is there, must be missing"
    (found,) = of_bits("now", [("w", _block([2.0])._replace(shape=(6,)))], WHOLE)
    assert str(found) == "now: w is float64 [6], must be float64 [5]"
    assert first_other_bit(torch.tensor(float("nan")), torch.tensor(float("nan"))) is None


def test_numbers_are_compared_as_far_as_rounding_goes() -> None:
    assert of_numbers("now", [("w", _block([2.0, 3.0 + 2e-12]))], WHOLE).first is None
    near = of_numbers("now", [("w", _block([2.0, 3.0 + 4e-12]))], WHOLE)
    assert near.first is not None
    assert near.first.place == (3,)
    assert of_numbers("now", [("w", _block([float("nan")]))], WHOLE).first is not None
    assert of_values("now", {"loss": None}, {"loss": None}, 0.0).first is None
    assert of_values("now", {"loss": 1.0 + 1e-15}, {"loss": 1.0}, 1e-12).first is None
    assert of_values("now", {"loss": 1.0 + 1e-15}, {"loss": 1.0}, 0.0).first is not None
    assert of_values("now", {"loss": None}, {"loss": 1.0}, 1e-12).first is not None


def test_keys_are_compared_both_ways() -> None:
    assert [str(one) for one in of_keys("now", ["a", "b"], ["b", "c"])] == [
        "now: a is there, must be missing",
        "now: c is missing, must be there",
    ]


def test_the_page_gets_a_mark_for_every_pair(tmp_path: Path) -> None:
    proof = Proof(TIED, tmp_path)
    one, two, three = (layout.name for layout in TIED.layouts[:3])
    proof.saved = [Saved(layout, 1.2e-15, "w", {}) for layout in TIED.layouts]
    proof.outcomes = [
        Outcome(one, one),
        Outcome(one, two, "", 2.4e-15, "w"),
        Outcome(two, one, "after loading: w[3] is 1.0, must be 2.0", 0.5, "w"),
    ]
    page = tmp_path / "page.md"
    places = [
        f"{table.BEGIN.format(name=name)}\nold {name}\n{table.END.format(name=name)}\n"
        for name in ("layouts", "tied", "bf16", "refused")
    ]
    page.write_text(f"before\n{''.join(places)}after\n")
    table.write_between_markers(page, table.sections([proof], [Refusal("a", "no | yes")]))
    text = page.read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert re.findall("old .*", text) == ["old bf16"]
    assert "| **A** | 1e-15 | = | 2e-15 |" in text
    assert "| **B** | 1e-15 | FAILS |" in text
    assert f"| C | {three} | 3 | `--use-torch-fsdp2` |" in text
    assert r"Et\|tt\|tL" in text
    assert "| a | no / yes |" in text
    assert "2 proved, 1 wrong" in text


def test_the_tool_ends_with_1_and_names_what_is_wrong(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--model", "tied", "--from", "one", "--to", "one"]
    assert verify_reshard.main(words) == 0
    assert "1 proved, 0 wrong" in capsys.readouterr().out

    def run(self: Proof) -> list[str]:
        self.outcomes.append(Outcome("a", "b", "after loading: w[3] is 1.0, must be 2.0"))
        return []

    monkeypatch.setattr(Proof, "run", run)
    monkeypatch.setattr("tools.reshard.refusals.tried_loads", lambda folder: [])
    assert verify_reshard.main(words) == 1
    assert "WRONG a -> b: after loading: w[3] is 1.0, must be 2.0" in capsys.readouterr().out


def test_tables_of_some_pairs_alone_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        verify_reshard.main(["--quick", "--markdown", "docs/checkpoint_format.md"])
    assert "--markdown needs all pairs" in capsys.readouterr().err
