"""One driver at a time, also on two machines, without comparing clocks."""

import os
import subprocess
from datetime import UTC, datetime
from pathlib import Path

import pytest
from sqlalchemy import update

from orchestrator import starts
from orchestrator.ledger import Ledger
from orchestrator.ledger_place import place_in
from orchestrator.ledger_tables import StartRow
from orchestrator.starts import Lease, TakenOver, seconds_of_earlier_starts
from qkmodel.errors import InputError

# by a clock that since went backwards
LATER = datetime(2999, 1, 1, tzinfo=UTC)


@pytest.fixture
def ledger(sweep_folder: Path) -> Ledger:
    return Ledger(place_in(sweep_folder))


def on_another_machine(ledger: Ledger) -> None:
    with ledger.transaction() as session:
        session.execute(update(StartRow).values(host="elsewhere"))


def test_starts_are_numbered_and_one_that_ended_is_followed_at_once(ledger: Ledger) -> None:
    for number in (1, 2):
        lease = Lease(ledger, patience=60.0)
        assert lease.start == number
        lease.release()
        on_another_machine(ledger)


def test_a_living_driver_on_another_machine_is_not_driven_over(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(starts, "BEAT_SECONDS", 0.05)
    living = Lease(ledger)
    on_another_machine(ledger)
    with pytest.raises(InputError, match="on elsewhere is at work on the sweep"):
        Lease(ledger, patience=10.0)
    living.release()


def test_a_living_driver_of_this_machine_is_not_driven_over_where_no_lock_tells_of_it(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one in a copy of the folder."""
    monkeypatch.setattr(starts, "BEAT_SECONDS", 0.05)
    living = Lease(ledger)
    process = subprocess.Popen(["sleep", "600"])
    with ledger.transaction() as session:
        session.execute(update(StartRow).values(process=process.pid))
    with pytest.raises(InputError, match=f"process {process.pid} on .* is at work on the sweep"):
        Lease(ledger, patience=10.0)
    # nobody has taken its leave yet
    process.kill()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    following = Lease(ledger, patience=60.0)
    assert following.start == 2 and not living.is_latest
    with pytest.raises(TakenOver, match="another start of this sweep took over"):
        living.require_latest()
    process.wait()
    following.release()
    living.release()


def test_a_dead_driver_on_another_machine_is_followed_once_it_was_seen_to_stand_still(ledger: Ledger) -> None:
    with ledger.transaction() as session:
        session.add(StartRow(host="elsewhere", process=1, started=LATER, beat=30))
    lease = Lease(ledger, patience=0.2)
    assert lease.start == 2
    # what it had cost is known by its own count
    assert seconds_of_earlier_starts(ledger, lease.start) == 30 * starts.BEAT_SECONDS
    lease.release()


def test_of_two_drivers_that_found_the_same_start_dead_one_goes_on(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    look = starts.refuse_beside_living_driver

    def look_and_be_overtaken(*arguments: object) -> int:
        latest = look(*arguments)
        monkeypatch.setattr(starts, "refuse_beside_living_driver", look)
        overtaking.append(Lease(ledger))
        return latest

    overtaking: list[Lease] = []
    monkeypatch.setattr(starts, "refuse_beside_living_driver", look_and_be_overtaken)
    with pytest.raises(InputError, match="is at work on the sweep"):
        Lease(ledger)
    assert overtaking[0].start == 1 and overtaking[0].is_latest
    overtaking[0].release()


def test_what_a_start_took_before_its_packs_counts_as_its_time(ledger: Ledger) -> None:
    Lease(ledger, seconds_before=90.0).release()
    assert seconds_of_earlier_starts(ledger, 2) == pytest.approx(90.0, abs=starts.BEAT_SECONDS)
