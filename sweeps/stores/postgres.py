"""PostgreSQL under a sweep: studies in Optuna's tables, claims as advisory locks of living sessions.

A server that goes away (restart, failover, network) is waited for, with a line now and then. What was under
way is done again where that is safe, and looked up first where it may have happened already.
"""

import functools
import hashlib
import random
import sys
import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import psycopg
import sqlalchemy.exc
from optuna.exceptions import StorageInternalError
from optuna.storages import RDBStorage
from optuna.trial import FrozenTrial, TrialState

from sweeps.endings import DatabaseGone

T = TypeVar("T")

# A host that vanishes without a word: its session, and with it its locks, ends within about a minute.
SESSION = {
    "connect_timeout": 10,
    "keepalives_idle": 20,
    "keepalives_interval": 10,
    "keepalives_count": 3,
    "options": "-c tcp_keepalives_idle=20 -c tcp_keepalives_interval=10 -c tcp_keepalives_count=3",
}
CONNECTION_LOST = (psycopg.OperationalError, psycopg.InterfaceError, sqlalchemy.exc.DBAPIError)
SAY_SECONDS = 10.0
TRY_LOCK = "SELECT pg_try_advisory_lock(%s)"


def connect(uri: str, **options: Any) -> psycopg.Connection:
    return psycopg.connect(_libpq(uri), **SESSION, **options)  # type: ignore[arg-type]


def require_reachable(uri: str) -> None:
    """Raises ValueError (one line) if the database does not answer now."""
    try:
        connect(uri).close()
    except psycopg.Error as error:
        raise ValueError(
            f"storage.uri={shown(uri)}: {_one_line(error)}; start the server or mend the URL"
        ) from None


def shown(uri: str) -> str:
    """The URL without its password."""
    head, separator, tail = uri.rpartition("@")
    scheme, slashes, user = head.partition("://")
    return f"{scheme}{slashes}{user.partition(':')[0]}{separator}{tail}"


@dataclass(frozen=True)
class Patience:
    """How long a lost database is waited for; `stop` ends the waiting early."""

    uri: str
    seconds: float
    stop: Callable[[], bool] = lambda: False

    def call(self, call: Callable[[], T]) -> T:
        """`call()`, again and again while it fails for want of a connection. Raises DatabaseGone."""
        began = said = time.monotonic()
        pause = 0.1
        while True:
            try:
                result = call()
            except (StorageInternalError, *CONNECTION_LOST) as error:
                if not is_lost(error):
                    raise
                waited = time.monotonic() - began
                if waited > self.seconds or self.stop():
                    message = f"{shown(self.uri)} has not answered for {waited:.0f} s ({_one_line(error)})"
                    raise DatabaseGone(message) from None
                if pause == 0.1 or time.monotonic() - said > SAY_SECONDS:
                    said = time.monotonic()
                    left = f"for {self.seconds - waited:.0f} s more"
                    _say(f"{shown(self.uri)} does not answer ({_one_line(error)}); trying again, {left}")
                time.sleep(pause * random.uniform(0.5, 1.0))
                pause = min(5.0, 2 * pause)
                continue
            if pause > 0.1:
                _say(f"{shown(self.uri)} answers again")
            return result


def _say(text: str) -> None:
    print(f"storage: {text}", file=sys.stderr, flush=True)


def is_lost(error: BaseException | None) -> bool:
    """Whether an error (or what it came from) says that the connection is gone, not that a query is wrong."""
    while error is not None:
        if isinstance(error, psycopg.OperationalError | psycopg.InterfaceError):
            return True
        if isinstance(error, sqlalchemy.exc.PendingRollbackError):  # the query after the one that lost it
            return True
        if isinstance(error, sqlalchemy.exc.DBAPIError) and error.connection_invalidated:
            return True
        error = error.__cause__ or getattr(error, "orig", None)
    return False


class PatientStorage(RDBStorage):
    """Optuna's storage on a PostgreSQL that may go away for a while."""

    def __init__(self, patience: Patience, *, create: bool) -> None:
        """create: make the tables where they are missing; else they are there."""
        self.patience = patience
        super().__init__(
            _sqlalchemy(patience.uri),
            engine_kwargs={"pool_pre_ping": True, "pool_size": 1, "connect_args": dict(SESSION)},
            skip_table_creation=not create,
            skip_compatibility_check=not create,
        )
        weakref.finalize(self, self.engine.dispose)

    def create_new_study(self, *arguments: Any, **named: Any) -> int:
        return self.patience.call(functools.partial(super().create_new_study, *arguments, **named))

    def _create_new_trial(self, study_id: int, template_trial: FrozenTrial | None = None) -> FrozenTrial:
        """Each queued trial once: one whose commit was not answered is looked for before the next attempt."""
        create = super()._create_new_trial
        attempts = 0

        def attempt() -> FrozenTrial:
            nonlocal attempts
            attempts += 1
            if attempts > 1 and template_trial is not None:
                wanted = template_trial.user_attrs
                for trial in self.get_all_trials(study_id, deepcopy=False):
                    if {name: trial.user_attrs.get(name) for name in wanted} == wanted:
                        return trial
            return create(study_id, template_trial)

        return self.patience.call(attempt)

    def set_trial_state_values(
        self, trial_id: int, state: TrialState, values: Sequence[float] | None = None
    ) -> bool:
        """An end that was recorded without an answer counts; a start does not: a claim takes it over."""
        write = super().set_trial_state_values
        attempts = 0

        def attempt() -> bool:
            nonlocal attempts
            attempts += 1
            if attempts > 1:
                now = self.get_trial(trial_id).state
                if now == state:
                    return state != TrialState.RUNNING
            return write(trial_id, state, values)

        return self.patience.call(attempt)


def _make_patient(name: str) -> Any:
    original = getattr(RDBStorage, name)

    @functools.wraps(original)
    def method(self: PatientStorage, *arguments: Any, **named: Any) -> Any:
        return self.patience.call(functools.partial(original, self, *arguments, **named))

    return method


# Reads, and writes that may be done twice. The private ones are what Optuna's cache calls.
for _name in (
    *("get_study_id_from_name", "get_study_name_from_id", "get_study_directions", "get_all_studies"),
    *("get_study_user_attrs", "get_study_system_attrs", "get_trial", "get_all_trials", "_get_trials"),
    *("get_trial_id_from_study_id_trial_number", "_get_best_trial_id"),
    *("set_study_user_attr", "set_study_system_attr", "set_trial_user_attr", "set_trial_system_attr"),
    *("set_trial_param", "_set_trial_param", "set_trial_intermediate_value"),
):
    setattr(PatientStorage, _name, _make_patient(_name))


class Session:
    """One connection of this process that holds advisory locks. When it breaks, the locks are gone.

    `generation` counts the connections: a lock taken on an earlier one is no longer held.
    """

    def __init__(self, patience: Patience) -> None:
        self.patience = patience
        self.generation = 0
        self._connection: psycopg.Connection | None = None

    def __del__(self) -> None:
        if self._connection is not None:
            self._connection.close()

    def ask(self, query: str, key: int) -> bool:
        """Run a locking function; after a broken connection on a new one. Raises DatabaseGone."""
        return self.patience.call(lambda: self.ask_once(query, key))

    def ask_once(self, query: str, key: int) -> bool:
        """Likewise, but raises psycopg.Error at once where the database does not answer."""
        if self._connection is None or self._connection.closed:
            self._connection = connect(self.patience.uri, autocommit=True)
            self.generation += 1
        try:
            row = self._connection.execute(query, (key,)).fetchone()
        except psycopg.Error:
            self._connection.close()
            raise
        return bool(row and row[0] is not False)

    def is_alive(self) -> bool:
        """Whether the connection of the present generation still stands, asked of the server."""
        try:
            return self._connection is not None and bool(self._connection.execute("SELECT 1"))
        except psycopg.Error:
            assert self._connection is not None
            self._connection.close()
            return False


class AdvisoryLock:
    """A lock in the database, held until `release` or until the session ends, however it ends."""

    def __init__(self, session: Session, name: str) -> None:
        self.session, self.name = session, name
        self.key = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big", signed=True)
        self._generation: int | None = None

    def try_acquire(self) -> bool:
        assert self._generation is None, f"{self.name}: already held"
        if not self.session.ask(TRY_LOCK, self.key):
            return False
        self._generation = self.session.generation
        return True

    def acquire(self) -> bool:
        assert self._generation is None, f"{self.name}: already held"
        # Polled: a session that waits in the server keeps waiting there after its process has died.
        while not self.session.ask(TRY_LOCK, self.key):
            time.sleep(random.uniform(0.01, 0.05))
        self._generation = self.session.generation
        return True

    def release(self) -> None:
        if self._generation == self.session.generation and self.session.is_alive():
            self.session.ask("SELECT pg_advisory_unlock(%s)", self.key)
        self._generation = None

    def keep(self, wait: bool) -> bool:
        """Whether nobody else has it: after a lost connection it is taken anew.

        wait: for a database that does not answer; else such a lock counts as held for the time being.
        """
        if self._generation == self.session.generation and self.session.is_alive():
            return True
        ask = self.session.ask if wait else self.session.ask_once
        try:
            held = ask(TRY_LOCK, self.key)
        except psycopg.Error:
            return True
        self._generation = self.session.generation if held else None
        return held


def _libpq(uri: str) -> str:
    return uri.replace("postgresql+psycopg://", "postgresql://", 1)


def _sqlalchemy(uri: str) -> str:
    return _libpq(uri).replace("postgresql://", "postgresql+psycopg://", 1)


def _one_line(error: BaseException) -> str:
    if isinstance(error.__cause__, sqlalchemy.exc.PendingRollbackError):
        return "the connection was lost"
    cause = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    lines = [line for line in str(getattr(cause, "orig", None) or cause).splitlines() if line.strip()]
    return (lines[0] if lines else type(cause).__name__)[:160]
