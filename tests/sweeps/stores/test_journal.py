"""The journal of a sweep survives half a line, damage, a full disk and a host's death."""

import errno
import os
from pathlib import Path

import pytest
from optuna.trial import TrialState

from sweeps.endings import DatabaseGone
from sweeps.reconcile import main, reconcile
from sweeps.stores import journal
from sweeps.stores.journal import Journal, mend_journal
from sweeps.stores.store import Store
from sweeps.stores.studies import open_store
from sweeps.trials.claims import claim, finish
from tests.sweeps.test_reconcile import begin, config, make, states, store, study  # noqa: F401

RECORDS = [{"op_code": 5, "worker_id": "w", "n": n} for n in range(4)]


@pytest.fixture
def storage_uri() -> None:
    """Of the fixtures above: a journal only."""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A journal of three records."""
    path = tmp_path / "journal.log"
    for record in RECORDS[:3]:
        Journal(path).append_logs([record])
    return path


def read(path: Path, number: int = 0) -> list[dict]:
    return list(Journal(path).read_logs(number))


@pytest.mark.parametrize("tail", [b'{"op_code":5,"wor', b"\0" * 5000], ids=["half a line", "zeros"])
def test_half_a_line_is_dropped_before_the_next_is_written(path, tail):
    with path.open("ab") as file:
        file.write(tail)
    assert read(path) == RECORDS[:3]
    Journal(path).append_logs([RECORDS[3]])
    assert read(path) == RECORDS
    assert mend_journal(path) == []


def test_readers_go_on_where_they_were(path):
    reader = Journal(path)
    assert list(reader.read_logs(0)) == RECORDS[:3]
    Journal(path).append_logs([RECORDS[3]])
    assert list(reader.read_logs(3)) == RECORDS[3:]
    assert read(path, 2) == RECORDS[2:]
    os.truncate(path, 10)
    with pytest.raises(DatabaseGone, match=r"journal.log was cut short under this process; start it again"):
        list(reader.read_logs(4))


def test_damage_is_named_and_cut_off_and_kept_aside(path):
    whole = path.read_bytes().replace(b'"n":1', b'"n":\xff')
    path.write_bytes(whole)
    with pytest.raises(
        ValueError, match=r"journal.log: line 2 is damaged: python -m sweeps.reconcile study="
    ):
        read(path)
    (line,) = mend_journal(path)
    assert line == "journal.log: line 2 is damaged; cut there, all of it is kept as journal.log.damaged"
    assert read(path) == RECORDS[:1]
    assert path.with_name("journal.log.damaged").read_bytes() == whole
    assert mend_journal(path) == []


def test_full_disk_is_waited_for_and_leaves_no_half_line(path, monkeypatch, capsys):
    monkeypatch.setattr(journal, "PAUSE_SECONDS", 0.0)
    before, refused = path.read_bytes(), []

    def fsync(descriptor: int) -> None:
        if len(refused) < 3:
            refused.append(path.stat().st_size)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(DatabaseGone, match=r"journal.log cannot be written \(No space left on device\)"):
        Journal(path).append_logs([RECORDS[3]])
    assert path.read_bytes() == before
    Journal(path, patience=60.0).append_logs([RECORDS[3]])
    assert (len(refused), read(path)) == (3, RECORDS)
    assert capsys.readouterr().err == f"storage: {path}: no space left; waiting for 60 s\n"


def test_journal_cut_anywhere_loses_no_finished_trial(tmp_path, store, study, capsys):  # noqa: F811
    """Whatever length is left, the sweep's next start has every result on record again, at the same point."""
    for _ in range(2):
        begin(store, study, die=False)
    done = {t.user_attrs["plan"]: (t.params, t.value) for t in study.get_trials()[:2]}
    whole = (tmp_path / "journal.log").read_bytes()
    ends = [i + 1 for i, byte in enumerate(whole) if byte == ord("\n")]
    for end in [0, *ends[2::16], *(end - 9 for end in ends[9::16])]:
        (tmp_path / "journal.log").write_bytes(whole[:end])
        assert main([f"study={tmp_path}"]) == 0  # by hand, before the sweep is started again
        again = Store(tmp_path, store.config, create=True, repair=True)
        reconcile(again)
        anew = make(again)
        reconcile(again)
        trials = {t.user_attrs["plan"]: t for t in anew.get_trials() if t.state == TrialState.COMPLETE}
        assert {plan: (t.params, t.value) for plan, t in trials.items()} == done, end
        assert len({t.user_attrs["plan"] for t in anew.get_trials()}) == len(anew.get_trials()) == 4
        assert reconcile(open_store(tmp_path)) == []
        assert not list(tmp_path.glob("orphans/*"))


def test_work_is_counted_by_a_clock_that_nobody_sets(store, study, monkeypatch):  # noqa: F811
    taken = claim(store, [study])
    assert taken is not None
    monkeypatch.setattr("time.time", lambda: 1e12)
    finish(taken, {"passkey/recent_exact_beyond": 1.0}, seconds=1.0)
    assert study.get_trials()[0].user_attrs["worked"] < 10
    assert states(study)[0] == TrialState.COMPLETE
