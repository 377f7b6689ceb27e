import subprocess
import sys

import pytest


def test_megatron_training_and_the_options_import_no_torch() -> None:
    code = (
        "import sys, megatron.training, megatron.training.arguments, pretrain_gpt\n"
        "assert 'torch' not in sys.modules, 'torch was imported'\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_public_names_come_from_their_homes() -> None:
    import megatron.training as package

    for name in package.__all__:
        assert callable(getattr(package, name)), name
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = package.nothing


def test_the_getters_of_scripts_refuse_before_pretrain() -> None:
    from megatron.training import get_args

    with pytest.raises(AssertionError, match="before pretrain"):
        get_args()
