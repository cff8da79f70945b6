"""Messages while a program compiles."""

import time

import pytest

from engram_jax import progress
from engram_jax.progress import say_at_first


@pytest.mark.parametrize(("seconds", "said"), [(0.3, 1), (0.0, 0)])
def test_only_a_slow_first_call_is_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], seconds: float, said: int
) -> None:
    monkeypatch.setattr(progress, "PATIENCE", 0.1)

    def work(number: int) -> int:
        time.sleep(seconds)
        if number < 0:
            raise ValueError
        return number + 1

    with pytest.raises(ValueError):
        say_at_first(work, "Failing.")(-1)
    told = say_at_first(work, "Compiling.")
    assert [told(1), told(number=2)] == [2, 3]
    assert capsys.readouterr().err.splitlines() == ["Failing.", "Compiling."][: 2 * said]
