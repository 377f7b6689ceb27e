"""Flags keep Megatron-LM's names, types and defaults, and have help, an effect and a page."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from megatron.training.config.flag_answers import GROUPS, NO_EFFECT, PREFIXES, SUBSTITUTES
from megatron.training.config.megatron_flags import MegatronFlag, answer, megatron_flags
from megatron.training.config.options import Option, options_of
from megatron.training.config.ranges import RANGES
from megatron.training.config.run_config import RunConfig
from tools import write_docs

ROOT = Path(__file__).parents[2]
OPTIONS = options_of(RunConfig)
OURS = {flag for option in OPTIONS.values() for flag in option.flags}
# read only to derive another option, in config/defaults.py
ONLY_DERIVES = {"make_vocab_size_divisible_by": "padded_vocab_size"}
# decided before the run, by a rule alone
ONLY_RULES = {"allow_fresh_start"}
# decided when options are read: what is taken from a checkpoint
ONLY_TAKES = {
    "use_checkpoint_args",
    "use_mp_args_from_checkpoint_args",
    "use_tokenizer_model_from_checkpoint_args",
    "use_checkpoint_opt_param_scheduler",
}
NO_READERS = ("training/config/", "training/resume_rules.py")


def _row_of(option: Option) -> MegatronFlag | None:
    rows = [megatron_flags()[flag] for flag in option.flags if flag in megatron_flags()]
    return rows[0] if rows else None


def differences(option: Option, row: MegatronFlag) -> dict[str, tuple[str, str]]:
    """Return what differs -> (Megatron-LM's, ours), as docs/differences.md writes it."""
    found = {}
    is_switch = row.type in ("flag", "flag(off)")
    theirs_type = "flag" if is_switch else _plain_type(row)
    ours_type = "flag" if option.kind is bool else _our_type(option)
    if theirs_type != ours_type:
        found["type"] = (theirs_type, ours_type)
    theirs, ours = _one(_literal(row.default)), _one(option.default)
    if theirs != ours and not (is_switch and not theirs and not ours):
        found["default"] = (str(theirs), str(ours))
    if set(row.choices) != set(option.choices or ()):
        found["choices"] = (", ".join(row.choices), ", ".join(option.choices or ()))
    return found


def _plain_type(row: MegatronFlag) -> str:
    kind = "pattern" if row.type == "moe_freq_type" else row.type or "str"
    return f"{kind} list" if row.nargs in ("+", "*") else kind


def _our_type(option: Option) -> str:
    if option.parse is not None:
        return "pattern"
    return f"{option.kind.__name__} list" if option.is_list else option.kind.__name__


def _literal(text: str) -> object:
    return ast.literal_eval(text)


def _one(value: object) -> object:
    """A list of one is that one: argparse's nargs make the difference, not the meaning."""
    return value[0] if isinstance(value, list) and len(value) == 1 else value


def _table(heading: str) -> dict[tuple[str, ...], list[str]]:
    """Map the leading `code` cells of each row under a heading to its other cells."""
    text = (ROOT / "docs" / "differences.md").read_text()
    section = re.search(rf"^## {re.escape(heading)}\n(.*?)(?=^## |\Z)", text, re.M | re.S)
    assert section, f"docs/differences.md has no heading {heading!r}"
    rows = [line.strip("| ").split(" | ") for line in section[1].splitlines() if "| `--" in line]
    return {(cells[0].strip("`"), cells[1]): cells[2:] for cells in rows}


def test_names_types_and_defaults_are_megatrons_or_named_as_differences():
    expected = {
        (row_flag, what): list(pair)
        for option in OPTIONS.values()
        if (row := _row_of(option)) is not None
        for row_flag in [next(flag for flag in option.flags if flag in megatron_flags())]
        for what, pair in differences(option, row).items()
    }
    documented = {key: cells[:2] for key, cells in _table("Options that differ").items()}
    assert documented == expected


def test_each_difference_has_a_reason():
    for heading in ("Options that differ", "Options that only this project has"):
        for key, cells in _table(heading).items():
            assert len(cells[-1]) > 10, f"{key} needs a reason"


def test_options_that_megatron_does_not_have_are_named():
    new = {option.flag for option in OPTIONS.values() if _row_of(option) is None}
    assert {flag for flag, _ in _table("Options that only this project has")} == new


def test_a_changed_default_is_caught():
    row = megatron_flags()["--moe-router-topk"]
    option = OPTIONS["moe_router_topk"]
    assert differences(option, row) == {}
    other = MegatronFlag(**(vars(row) | {"default": "3"}))
    assert differences(option, other) == {"default": ("3", "2")}


@pytest.mark.parametrize("option", OPTIONS.values(), ids=list(OPTIONS))
def test_every_option_has_help_that_is_a_sentence(option):
    assert option.help.endswith(".") or option.help.endswith("...")
    assert option.help[0].isupper()


def test_every_megatron_flag_gets_an_answer():
    assert len(megatron_flags()) > 800
    for flag in megatron_flags().keys() - OURS:
        assert answer(flag, []) is not None, flag


def test_answers_are_about_flags_that_exist_and_are_not_options():
    spelt = set(megatron_flags())
    assert set(SUBSTITUTES) <= spelt - OURS
    assert set(NO_EFFECT) - {"--local_rank"} <= spelt - OURS
    assert not set(SUBSTITUTES) & set(NO_EFFECT)
    for prefix, _ in PREFIXES:
        assert any(flag.startswith(prefix) for flag in spelt - OURS), f"{prefix} answers nothing"
    assert {row.group for row in megatron_flags().values()} == set(GROUPS)


def test_substitutes_name_options_that_exist():
    known = OURS | set(megatron_flags())
    other = {"--max-restarts", "--help", "--nproc-per-node", "--no-"}
    for text in [*SUBSTITUTES.values(), *GROUPS.values(), *(why for _, why in PREFIXES)]:
        for flag in re.findall(r"--[\w-]+", text):
            assert flag in OURS | other or flag not in known, f"{flag} in {text!r}"


def test_numbers_have_a_range():
    numbers = {o.name for o in OPTIONS.values() if o.kind in (int, float) and o.parse is None}
    assert set(RANGES) == numbers


def test_the_page_of_flags_is_up_to_date():
    assert write_docs.main(["--check"]) == 0, "run: python tools/write_docs.py"


# what a config or a section of it is called where an option is read
HOLDERS = re.compile(
    r"(^|_)(config|options|settings|wanted|args|self|model|training|scheduler|schedule|data|"
    r"tokenizer|checkpoint|validation|logging|distributed|ddp)$"
)


def _attributes_read(path: Path) -> set[str]:
    """Attributes that a file reads of something called a config, so that str.split is none."""
    return {
        node.attr
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute)
        and isinstance(node.ctx, ast.Load)
        and HOLDERS.search(_last_name(node.value))
    }


def _last_name(node: ast.expr) -> str:
    return getattr(node, "attr", "") or getattr(node, "id", "")


def _properties(path: Path) -> dict[str, set[str]]:
    """Map each method or property of the classes in a config file to what it reads of self."""
    return {
        item.name: {
            node.attr
            for node in ast.walk(item)
            if isinstance(node, ast.Attribute) and getattr(node.value, "id", "") == "self"
        }
        for item in ast.walk(ast.parse(path.read_text()))
        if isinstance(item, ast.FunctionDef) and not item.name.endswith("_problems")
    }


def _options_with_effect() -> set[str]:
    """Options that the program reads, directly or through a property of their config."""
    declaring = {ROOT / f"{option.module.replace('.', '/')}.py" for option in OPTIONS.values()}
    sources = [ROOT / "pretrain_gpt.py", *(ROOT / "tools").rglob("*.py")]
    sources += [
        path
        for path in (ROOT / "megatron").rglob("*.py")
        if path not in declaring and not any(part in path.as_posix() for part in NO_READERS)
    ]
    read = set().union(*(_attributes_read(path) for path in sources if path.exists()))
    properties = {k: v for path in declaring for k, v in _properties(path).items()}
    while more := set().union(*(properties[p] for p in read & set(properties))) - read:
        read |= more
    return read


def test_every_option_is_read_by_the_program():
    elsewhere = {*ONLY_DERIVES, *ONLY_RULES, *ONLY_TAKES}
    unread = set(OPTIONS) - _options_with_effect() - elsewhere
    assert unread == set(), "options without effect: remove them, or use them"


def test_options_that_only_derive_others_do():
    text = (ROOT / "megatron/training/config/defaults.py").read_text()
    for name, made in ONLY_DERIVES.items():
        assert f'get("{name}")' in text
        assert f'use("{made}"' in text
    rules = (ROOT / "megatron/training/config/run_rules.py").read_text()
    assert all(f".{name}" in rules for name in ONLY_RULES)
    config = ROOT / "megatron/training/config"
    takers = [config / f"checkpoint_{what}.py" for what in ("args", "schedule")]
    text = "".join(path.read_text() for path in takers)
    assert all(f".{name}" in text for name in ONLY_TAKES)


def test_importing_the_arguments_does_not_import_torch():
    code = "import megatron.training.arguments, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
