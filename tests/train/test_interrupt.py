"""Ctrl-C and SIGTERM: raised at once, or noted; the second one ends the process."""

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from agro_train.interrupt import SIGNALS, Interrupted, Interrupts

ROOT = Path(__file__).parents[2]


def send(number: int) -> None:
    os.kill(os.getpid(), number)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_first_signal_is_raised_with_the_status_that_shells_expect(
    number: int, status: int
) -> None:
    before = [signal.getsignal(each) for each in SIGNALS]
    name = signal.Signals(number).name
    with pytest.raises(Interrupted, match=f"interrupted by {name}") as error, Interrupts():
        send(number)
    assert error.value.status == status
    assert [signal.getsignal(each) for each in SIGNALS] == before


def test_noted_signal_waits_for_what_may_be_dropped(capfd: pytest.CaptureFixture[str]) -> None:
    done = []
    with Interrupts() as interrupts, interrupts.noted():
        with interrupts.raised():
            done.append("nothing came yet")
        send(signal.SIGTERM)
        send(signal.SIGTERM)  # a launcher sends it to the process, and to its group
        done.append("finished")
        assert interrupts.received == signal.SIGTERM
        with pytest.raises(Interrupted), interrupts.raised():
            done.append("never")
    assert done == ["nothing came yet", "finished"]
    said = capfd.readouterr().err
    assert said.count("SIGTERM: the step in hand is finished and saved; once more ends it") == 1


def test_signal_in_what_may_be_dropped_is_raised_at_once() -> None:
    done = []
    with pytest.raises(Interrupted), Interrupts() as interrupts, interrupts.noted():
        with interrupts.raised():
            send(signal.SIGINT)
            done.append("never")
        done.append("nor this")
    assert not done


def test_without_its_block_it_notes_nothing() -> None:
    interrupts = Interrupts()
    with pytest.raises(KeyboardInterrupt), interrupts.noted():
        send(signal.SIGINT)
    assert interrupts.received is None


def test_no_handler_is_set_from_another_thread() -> None:
    before = signal.getsignal(signal.SIGTERM)
    seen = []

    def enter() -> None:
        with Interrupts():
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert seen == [before]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_second_signal_ends_the_process_at_once(number: int) -> None:
    program = (
        "import os, sys, time\n"
        "from agro_train.interrupt import SAME_S, Interrupts\n"
        "with Interrupts() as interrupts, interrupts.noted():\n"
        f"    os.kill(os.getpid(), {int(number)})\n"
        "    time.sleep(SAME_S + 0.1)\n"
        "    print('still here', flush=True)\n"
        f"    os.kill(os.getpid(), {int(number)})\n"
        "    print('not reached', flush=True)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == -number
    assert done.stdout == "still here\n"


def test_fork_ends_as_if_there_were_no_block() -> None:
    with Interrupts():
        if (child := os.fork()) == 0:
            send(signal.SIGTERM)
            os._exit(0)
        _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == -signal.SIGTERM


def test_signal_that_is_ignored_stays_so() -> None:
    """As SIGINT is for a job in the background of a script."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with Interrupts() as interrupts:
            send(signal.SIGINT)
            assert interrupts.received is None
    finally:
        signal.signal(signal.SIGINT, before)
