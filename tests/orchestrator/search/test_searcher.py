"""What Tune is told when it asks for a pack and there is none."""

from pathlib import Path

import pytest
from ray.tune.search import Searcher

from orchestrator.search.searcher import PackSearcher
from tests.orchestrator import pack_world


class NoNodeLeft(Exception):
    """What the watch raises here."""


def nothing_wrong() -> None:
    """A watch that never has anything to say."""


def no_node_left() -> None:
    raise NoNodeLeft


def test_where_no_pack_has_room_asking_for_one_says_why_the_sweep_cannot_go_on(tmp_path: Path) -> None:
    queue = pack_world.start(tmp_path).queue
    assert PackSearcher(queue, lambda: 0, tmp_path, nothing_wrong).suggest("trial") is None
    with pytest.raises(NoNodeLeft):
        PackSearcher(queue, lambda: 0, tmp_path, no_node_left).suggest("trial")


def test_a_queue_that_stops_is_finished_although_no_pack_has_room(tmp_path: Path) -> None:
    queue = pack_world.start(tmp_path).queue
    queue.stopping = True
    assert PackSearcher(queue, lambda: 0, tmp_path, nothing_wrong).suggest("trial") == Searcher.FINISHED


def test_storage_that_fails_while_a_pack_is_made_ends_the_sweep_at_the_next_question(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver = pack_world.start(tmp_path)
    searcher = PackSearcher(driver.queue, lambda: 1, tmp_path, nothing_wrong)

    def full_disk(*arguments: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(driver.ledger, "start", full_disk)
    assert searcher.suggest("first") is None
    with pytest.raises(OSError, match="no space left"):
        searcher.suggest("second")
