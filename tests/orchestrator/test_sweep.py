"""What a start leaves alone until the sweep is its own."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from orchestrator import sweep
from orchestrator.driver_lock import AtWork
from orchestrator.versions import GIT_DIFF_FILE
from tests.orchestrator.bucket_world import bucket_in


@pytest.mark.parametrize("with_git_diff", [True, False])
def test_the_git_diff_of_a_driver_at_work_on_another_machine_stays(
    with_git_diff: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(ledger: object, seconds_before: float) -> None:
        raise AtWork("process 1 on another", plan.storage.shown(plan.folder))

    bucket, _ = bucket_in(tmp_path, monkeypatch)
    folder = bucket.root / "l1"
    bucket.write(folder / GIT_DIFF_FILE, b"of another")
    resources = SimpleNamespace(pack=None)
    config = SimpleNamespace(resources=resources)
    plan = SimpleNamespace(
        storage=bucket, folder=folder, config=config, fresh=False, lost_line=None, change_lines=[], trainings_left=0
    )
    monkeypatch.setattr(sweep, "make_plan", lambda config, fresh: plan)
    monkeypatch.setattr(sweep, "replace", lambda plan, **changes: plan)
    monkeypatch.setattr(sweep, "ask_cluster", lambda *place: None)
    monkeypatch.setattr(sweep, "check_plan", lambda plan, say: SimpleNamespace(plan=plan, measured=None))
    monkeypatch.setattr(sweep, "place_of", lambda config, folder: None)
    monkeypatch.setattr(sweep, "Ledger", lambda place: None)
    monkeypatch.setattr(sweep, "Lease", refuse)
    with pytest.raises(AtWork, match=r"s3://bucket/runs/l1"):
        sweep.run_sweep(plan, SimpleNamespace(say=print), with_git_diff)
    assert bucket.read(folder / GIT_DIFF_FILE) == b"of another"
