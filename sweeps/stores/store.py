"""Where the studies of a sweep live, and the locks that say who works on what.

Without storage.uri: a journal file in the study directory, and flocks beside it. With a PostgreSQL URL:
Optuna's tables there, and for each lock an advisory lock of a living session as well as the file, so that two
hosts whose shared file system has no locks still exclude each other. Either lock ends with its holder.
"""

import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import optuna
from optuna.storages import BaseStorage, JournalStorage
from optuna.study import Study

from conf.objectives import Direction
from conf.sweep_schema import SweepConfig
from lightning_modules.run_dir import write_text
from sweeps.stores.locks import ProcessLock

if TYPE_CHECKING:
    from sweeps.stores import postgres

optuna.logging.set_verbosity(optuna.logging.ERROR)

ID_ATTRIBUTE = "sweep_id"


class Lock(Protocol):
    """Held from a successful acquire until `release`, or until its holder has died."""

    def try_acquire(self) -> bool: ...
    def acquire(self) -> bool: ...
    def release(self) -> None: ...
    def keep(self, wait: bool) -> bool: ...


class Store:
    """The studies of one sweep and its locks."""

    def __init__(
        self,
        study_dir: Path,
        config: SweepConfig,
        *,
        create: bool = False,
        repair: bool = False,
        wait: bool = False,
        stop: Callable[[], bool] = lambda: False,
    ) -> None:
        """create: make the tables of a fresh database; one process does, before it starts others.
        repair: cut a damaged journal where it is damaged; `repairs` says what was done.
        wait: for a database that does not answer now, as for one that goes away later.
        stop: ends the waiting.

        Raises ValueError (one line) if the database does not answer.
        """
        self.study_dir, self.config = study_dir, config
        self.repairs: list[str] = []
        self._session: postgres.Session | None = None
        uri = config.storage.uri
        self.storage: BaseStorage
        if uri is None:
            from sweeps.stores.journal import Journal, mend_journal

            path = study_dir.resolve() / "journal.log"
            self.repairs = mend_journal(path) if repair else []
            self.storage = JournalStorage(Journal(path, config.storage.patience, stop))
        else:
            from sweeps.stores.postgres import Patience, PatientStorage, Session, require_reachable

            if not wait:
                require_reachable(uri)
            patience = Patience(uri, config.storage.patience, stop)
            self._session = Session(patience)
            with self._creating() if create else nullcontext():
                backend = patience.call(lambda: PatientStorage(patience, create=create))
            self.storage = optuna.storages.get_storage(backend)

    @property
    def id(self) -> str:
        """Names this study directory in a database that others share; made once."""
        file = self.study_dir / "sweep.id"
        if not file.exists():
            write_text(file, uuid.uuid4().hex + "\n")
        return file.read_text().strip()

    def full_name(self, name: str) -> str:
        """What a stage's study is called in the storage: a database holds those of many sweeps."""
        return name if self.config.storage.uri is None else f"{self.config.name}/{name}"

    def make_study(self, name: str, directions: list[Direction]) -> Study:
        """Create the study, or find the one that is there. Raises ValueError if it is another sweep's."""
        study = optuna.create_study(
            study_name=self.full_name(name), storage=self.storage, directions=directions, load_if_exists=True
        )
        if self.config.storage.uri is not None:
            owner = study.user_attrs.get(ID_ATTRIBUTE)
            if owner is None:
                study.set_user_attr(ID_ATTRIBUTE, self.id)
                study.set_user_attr("study_dir", str(self.study_dir.resolve()))
            elif owner != self.id:
                raise ValueError(
                    f"name={self.config.name}: the database holds a sweep of this name, made in "
                    f"{study.user_attrs['study_dir']}; use another name="
                )
        return study

    def load_studies(self) -> list[Study]:
        """All studies of this sweep in the order of their making, but one that is still being made."""
        names = [study.study_name for study in self.storage.get_all_studies()]
        studies = [
            optuna.load_study(study_name=name, storage=self.storage)
            for name in names
            if name == self.full_name(local_name(name))
        ]
        if self.config.storage.uri is not None:
            studies = [study for study in studies if study.user_attrs.get(ID_ATTRIBUTE) == self.id]
        studies = [study for study in studies if "stage" in study.user_attrs]  # set last
        return sorted(studies, key=lambda study: study._study_id)

    def lock(self, name: str) -> Lock:
        file = ProcessLock(self.study_dir / "locks" / f"{name}.lock")
        if self._session is None:
            return file
        from sweeps.stores.postgres import AdvisoryLock

        return BothLocks(file, AdvisoryLock(self._session, f"{self.id}/{name}"))

    @contextmanager
    def holding(self, name: str) -> Iterator[None]:
        """Run the block while holding the lock."""
        lock = self.lock(name)
        lock.acquire()
        try:
            yield
        finally:
            lock.release()

    def require_sole_sweep(self) -> None:
        """With a database: be the one sweeps.run of this sweep on any host, until this process ends.

        Raises ValueError (one line) if another is at work.
        """
        if self._session is None:
            return
        from sweeps.stores.postgres import AdvisoryLock

        if not AdvisoryLock(self._session, f"{self.id}/sole-sweep").try_acquire():
            raise ValueError(
                f"study_dir={self.study_dir}: another sweeps.run is at work there, on another host; "
                "wait for it or stop it"
            )

    @contextmanager
    def _creating(self) -> Iterator[None]:
        """One sweep at a time creates the tables: they race."""
        from sweeps.stores.postgres import AdvisoryLock

        assert self._session is not None
        lock = AdvisoryLock(self._session, "create")
        lock.acquire()
        try:
            yield
        finally:
            lock.release()

    def trial_lock(self, study: Study, number: int) -> Lock:
        return self.lock(f"{stage_name(study)}-{number:04d}")

    def run_dir(self, study: Study, number: int) -> Path:
        return run_directory(self.study_dir, study, number)


class BothLocks:
    """A file's lock and the database's: the first keeps processes of a host apart even while the database is
    away, the second those of hosts."""

    def __init__(self, file: ProcessLock, advisory: Lock) -> None:
        self.file, self.advisory = file, advisory

    def try_acquire(self) -> bool:
        if not self.file.try_acquire():
            return False
        try:
            held = self.advisory.try_acquire()
        except BaseException:
            self.file.release()
            raise
        if not held:
            self.file.release()
        return held

    def acquire(self) -> bool:
        self.file.acquire()
        try:
            return self.advisory.acquire()
        except BaseException:
            self.file.release()
            raise

    def release(self) -> None:
        try:
            self.advisory.release()
        finally:
            self.file.release()

    def keep(self, wait: bool) -> bool:
        return self.advisory.keep(wait)


def local_name(full_name: str) -> str:
    return full_name.rpartition("/")[2]


def stage_name(study: Study) -> str:
    """`train`, `mitigation-0003`: the study's folder in the study directory."""
    return local_name(study.study_name)


def run_directory(study_dir: Path, study: Study, number: int) -> Path:
    return study_dir / stage_name(study) / f"trial-{number:04d}"
