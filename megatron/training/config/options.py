"""The table of all options: every field of every section of ``RunConfig``, ready for any surface.

The command line, the YAML file, ``--help``, docs/flags.md and the error messages are all made
from it. A new option is a field; nothing here or there is edited for it.
"""

import ast
import difflib
import functools
import inspect
import itertools
import math
import sys
import types
import typing
from collections.abc import Callable, Iterable, Iterator
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, NamedTuple

from megatron.core.config_field import FLAG_KEY, Flag
from megatron.training.config.flag_answers import CHOICES


@dataclass(frozen=True, kw_only=True)
class Option:
    """One option of a run.

    Laws: ``flags`` and ``inverse`` of all options are distinct; ``default`` is a fresh value.
    """

    name: str
    section: str
    group: str
    """First line of the docstring of the class that declares the field: the group in --help."""
    module: str
    """Dotted name of the module that declares it."""
    flags: tuple[str, ...]
    """What sets it. Of a bool, what changes it from its default."""
    inverse: tuple[str, ...]
    """Of a bool: what sets it back to its default, for values from a YAML file. Not in --help."""
    kind: type
    """``bool``, ``int``, ``float`` or ``str``; of one element where ``is_list``."""
    is_list: bool
    choices: tuple[str, ...] | None
    optional: bool
    make_default: Callable[[], Any]
    parse: Callable[[str], Any] | None
    help: str

    @property
    def flag(self) -> str:
        """The flag that messages call it by."""
        return self.flags[0]

    @property
    def default(self) -> Any:
        """Value when nothing is said; None where it is derived or absent."""
        return self.make_default()

    def show(self, value: Any) -> str:
        """Write the option as a user would type it: ``--num-layers 12``, ``--bf16``."""
        if self.kind is bool:
            return self.flag if value is not self.default else (self.inverse or self.flags)[0]
        return f"{self.flag} {self.text(value)}"

    def text(self, value: Any) -> str:
        """Write a value of it as it stands on a command line."""
        if isinstance(value, list):
            if self.parse is not None:
                return str(value).replace(" ", "")
            return " ".join(map(str, value))
        if isinstance(value, float) and float(f"{value:g}") == value:
            return f"{value:g}"
        return str(value)

    def from_texts(self, texts: list[str]) -> Any:
        """Turn the words after the flag into its value.

        Raises:
            ValueError: They do not fit; the message completes ``--flag WORDS``.
        """
        if self.kind is bool:
            if texts:
                raise ValueError(f"takes no value, but {' '.join(texts)} follows it")
            return not self.default
        if self.is_list and self.parse is None:
            if not texts and self.name not in _MAY_BE_EMPTY:
                raise ValueError("needs at least one value")
            return [self._element(text) for text in texts]
        if len(texts) != 1:
            raise ValueError("needs a value" if not texts else f"takes one value, not {len(texts)}")
        return self._element(texts[0])

    def from_data(self, value: Any) -> Any:
        """Turn a value of a YAML file into the option's value, with the same checks.

        Raises:
            ValueError: It does not fit; the message completes ``key: value``.
        """
        if value is None and (self.optional or self.default is None):
            return None
        if self.kind is bool:
            if not isinstance(value, bool):
                raise ValueError("must be true or false")
            return value
        if isinstance(value, bool | dict):
            raise ValueError(f"must be {self.wants()}")
        if self.parse is not None:
            return self.parse(str(value))
        if self.is_list:
            return [self._element(str(v)) for v in (value if isinstance(value, list) else [value])]
        if isinstance(value, list):
            raise ValueError(f"must be {self.wants()}, not a list")
        return self._element(str(value))

    def wants(self) -> str:
        """Say in words what a value must be."""
        if self.choices:
            return "one of " + ", ".join(self.choices)
        return {int: "a whole number", float: "a number", str: "a text", bool: "a switch"}[
            self.kind
        ]

    def _element(self, text: str) -> Any:
        if self.parse is not None:
            return self.parse(text)
        if self.choices is not None:
            if text not in self.choices:
                answer = CHOICES.get((self.name, text))
                hint = f"; {answer}" if answer else did_you_mean(text, self.choices)
                raise ValueError(f"must be {self.wants()}{hint}")
            return text
        try:
            value = self.kind(text)
        except ValueError as error:
            raise ValueError(f"must be {self.wants()}") from error
        if self.kind is float and not math.isfinite(value):
            raise ValueError("must be a finite number")
        return value


_MAY_BE_EMPTY = ("data_path", "train_data_path", "valid_data_path", "test_data_path")


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return ``; did you mean X?``, or nothing when no known word is near."""
    found = close_words(word, known)
    return f"; did you mean {' or '.join(found)}?" if found else ""


def close_words(word: str, known: Iterable[str], most: int = 2) -> list[str]:
    """Return the known words nearest to ``word``, whatever their case, best first."""
    by_lower = {name.lower(): name for name in known}
    near = difflib.get_close_matches(word.lower(), by_lower, most, 0.7)
    scores = [difflib.SequenceMatcher(None, w, word.lower()).ratio() for w in near]
    return [by_lower[w] for w, score in zip(near, scores, strict=True) if score > scores[0] - 0.05]


def options_of(run_config_cls: type) -> dict[str, Option]:
    """Map each field name of each section of ``run_config_cls`` to its option, in --help's order.

    Raises:
        AssertionError: Two sections share a field name or a flag.
    """
    found: dict[str, Option] = {}
    sections = typing.get_type_hints(run_config_cls)
    for section in fields(run_config_cls):
        if is_dataclass(sections[section.name]):
            for option in _section_options(section.name, sections[section.name]):
                assert option.name not in found, f"two sections have a field {option.name}"
                found[option.name] = option
    flags = [flag for option in found.values() for flag in option.flags + option.inverse]
    assert len(flags) == len(set(flags)), f"a flag is used twice: {sorted(flags)}"
    return found


def _section_options(section: str, config_cls: type) -> Iterator[Option]:
    hints, docs = typing.get_type_hints(config_cls), field_docs(config_cls)
    for field in _own_fields_first(config_cls):
        spec: Flag = field.metadata.get(FLAG_KEY, Flag())
        if spec.hidden:
            continue
        doc = docs[field.name]
        kind, is_list, choices, optional = _unwrap(hints[field.name], spec)
        names = spec.names or _derived_names(field)
        yield Option(
            name=field.name,
            section=section,
            group=doc.group,
            module=doc.module,
            flags=names,
            inverse=_inverse(field, names) if kind is bool else (),
            kind=kind,
            is_list=is_list,
            choices=choices,
            optional=optional,
            make_default=_default_maker(field),
            parse=spec.parse,
            help=doc.text,
        )


def _own_fields_first(config_cls: type) -> list[Field]:
    """List the fields by the class that declares them, the derived class before its bases."""
    place = {
        name: depth
        for depth, cls in reversed(list(enumerate(config_cls.__mro__)))
        for name in inspect.get_annotations(cls)
    }
    return sorted(fields(config_cls), key=lambda field: place[field.name])


class FieldDoc(NamedTuple):
    """Where a field is declared, and the string under it."""

    group: str
    """First line of its class's docstring."""
    module: str
    text: str


def field_docs(config_cls: type) -> dict[str, FieldDoc]:
    """Map each field that has a string under it to its documentation."""
    docs: dict[str, FieldDoc] = {}
    for cls in reversed(config_cls.__mro__[:-1]):
        title = inspect.getdoc(cls) or ""
        for name, text in _class_docs(cls.__module__).get(cls.__name__, {}).items():
            docs[name] = FieldDoc(title.splitlines()[0].rstrip("."), cls.__module__, text)
    return docs


@functools.cache
def _class_docs(module: str) -> dict[str, dict[str, str]]:
    """Map class -> field -> the string under it, for all classes at the top of a module."""
    path = sys.modules[module].__file__
    assert path is not None, f"{module} has no source file"
    tree = ast.parse(Path(path).read_text(encoding="utf-8"))
    return {node.name: dict(_docs_in(node)) for node in tree.body if isinstance(node, ast.ClassDef)}


def _docs_in(node: ast.ClassDef) -> Iterator[tuple[str, str]]:
    for here, after in itertools.pairwise(node.body):
        match here, after:
            case (
                ast.AnnAssign(target=ast.Name(id=name)),
                ast.Expr(value=ast.Constant(value=str() as doc)),
            ):
                yield name, " ".join(doc.split())


def _derived_names(field: Field) -> tuple[str, ...]:
    name = field.name.replace("_", "-")
    return (f"--no-{name}", f"--disable-{name}") if field.default is True else (f"--{name}",)


def _inverse(field: Field, names: tuple[str, ...]) -> tuple[str, ...]:
    """Name the flag that sets a bool back: ``--no-bf16``; ``--add-bias-linear``."""
    if field.default is True:
        return (f"--{field.name.replace('_', '-')}",)
    first = names[0]
    return (f"--{first[5:]}",) if first.startswith("--no-") else (f"--no-{first[2:]}",)


def _default_maker(field: Field) -> Callable[[], Any]:
    if field.default_factory is not MISSING:
        return field.default_factory
    assert field.default is not MISSING, f"option {field.name} needs a default"
    value = field.default
    return lambda: value


def _unwrap(hint: Any, spec: Flag) -> tuple[type, bool, tuple[str, ...] | None, bool]:
    """Return (element type, is a list, choices, may be None) of a field's type."""
    optional = False
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        parts = [part for part in typing.get_args(hint) if part is not type(None)]
        optional = len(parts) < len(typing.get_args(hint))
        assert len(parts) == 1 or spec.parse, f"{hint} needs flag(parse=...)"
        hint = parts[0]
    is_list = typing.get_origin(hint) is list
    if is_list:
        hint = typing.get_args(hint)[0]
    choices = None
    if typing.get_origin(hint) is typing.Literal:
        choices = typing.get_args(hint)
        hint = str
    assert hint in (bool, int, float, str), f"an option holds plain data, not {hint}"
    return hint, is_list, choices, optional
