import pytest

from megatron.core.errors import ConfigError
from megatron.training import user_errors
from megatron.training.user_errors import exit_on_user_error


@pytest.mark.parametrize(("rank", "told"), [("0", "no such layout\n"), ("1", "")])
def test_rank_0_tells_and_all_exit_with_2(rank: str, told: str, monkeypatch, capsys) -> None:
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setattr(user_errors, "OTHER_RANKS_WAIT_SECONDS", 0.0)
    with pytest.raises(SystemExit) as caught, exit_on_user_error():
        raise ConfigError("no such layout")
    assert caught.value.code == 2
    assert capsys.readouterr().err == told


def test_a_bug_keeps_its_traceback() -> None:
    with pytest.raises(KeyError), exit_on_user_error():
        raise KeyError("bug")
