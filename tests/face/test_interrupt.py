"""Ctrl-C held back: noted once, obeyed the second time, and everything put back."""

import signal
import threading

import pytest

from purelm.interrupt import held_back


def press() -> None:
    signal.raise_signal(signal.SIGINT)


def test_the_first_is_noted_and_the_second_interrupts(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(KeyboardInterrupt), held_back() as interrupted:
        assert not interrupted()
        press()
        assert interrupted()
        assert "Ctrl-C again" in capfd.readouterr().err
        press()
        pytest.fail("went on")
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    with pytest.raises(KeyboardInterrupt):
        press()


def test_somebody_elses_handler_is_left_alone() -> None:
    seen: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: seen.append(number))
    try:
        with held_back() as interrupted:
            press()
            assert seen == [signal.SIGINT] and not interrupted()
    finally:
        signal.signal(signal.SIGINT, before)


def test_another_thread_changes_nothing() -> None:
    found: list[bool] = []

    def work() -> None:
        with held_back() as interrupted:
            found.append(interrupted())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [False]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
