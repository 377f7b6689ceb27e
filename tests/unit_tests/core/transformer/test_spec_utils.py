"""Specs build what they name."""

from megatron.core.transformer.spec_utils import ModuleSpec, build_module


class _Recorder:
    def __init__(self, *args: object, **kwargs: object) -> None:
        self.args, self.kwargs = args, kwargs


def test_bare_class_is_built_with_the_arguments() -> None:
    built = build_module(_Recorder, 1, a=2)
    assert (built.args, built.kwargs) == ((1,), {"a": 2})


def test_spec_adds_its_submodules_and_params_and_the_caller_wins() -> None:
    spec = ModuleSpec(_Recorder, submodules="slots", params={"a": 1, "b": 1})
    built = build_module(spec, b=2)
    assert built.kwargs == {"submodules": "slots", "a": 1, "b": 2}


def test_spec_without_submodules_passes_none_on() -> None:
    assert "submodules" not in build_module(ModuleSpec(_Recorder)).kwargs
