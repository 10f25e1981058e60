"""The metrics of a run on its own disk: what the tracking server has, and what is still to be sent."""

import json
import math
import sqlite3
import threading
import time
from collections.abc import Iterable
from contextlib import closing, suppress
from pathlib import Path
from typing import Any, NamedTuple

from ffdist.files import file_in

OUTBOX = "metrics.db"
"""In the folder of a run."""
RECOVERIES, ORIGIN = "recoveries", "origin"
"""The facts that tell what the run recovered from, and whose weights it started from."""
POINT_BYTES = 100
"""What a point takes, roughly."""


class Point(NamedTuple):
    """One value of a metric."""

    name: str
    value: float
    timestamp: int
    """When it was first seen, in milliseconds; sent unchanged however often, so that the server knows it again."""
    step: int
    """Samples seen."""


class Call(NamedTuple):
    """Something else that the server is to be told about the run."""

    number: int
    """In the order in which they came."""
    what: str
    content: Any
    """As JSON holds it."""


class Outbox:
    """All points of a run, each once, with whether they are sent; what else is to be told; and facts about the run.

    A point that is there stays as it is: after a recovery the same ones come again.

    Args:
        path: The database; made where it is missing.
        limit_bytes: About how much may wait to be sent. Beyond it every other point that waits is dropped.
    """

    def __init__(self, path: Path, limit_bytes: int) -> None:
        self._limit, self._lock, self.thinned = limit_bytes // POINT_BYTES, threading.Lock(), False
        self.folder = path.parent
        """The run's."""
        _check_files(path)
        self._database = sqlite3.connect(path, check_same_thread=False, isolation_level=None)
        self._database.executescript(
            """
            pragma trusted_schema=off;
            pragma journal_mode=wal;
            pragma synchronous=normal;
            create table if not exists points (
                name text, step integer, value real, timestamp integer, sent integer, primary key (name, step)
            ) without rowid;
            create index if not exists waiting on points (sent, timestamp, step, name) where not sent;
            create table if not exists calls (number integer primary key, what text, content text);
            create table if not exists facts (key text primary key, value text);
            create table if not exists rejected (number integer primary key, what text, content text, reason text);
            """
        )
        self._database.execute("select name, step, value, timestamp, sent from points limit 0")  # another's may differ
        self._waiting = self._count()

    def add(self, metrics: dict[str, float], step: int) -> None:
        """Keeps a value of each metric to be sent."""
        now = time.time_ns() // 1_000_000
        self._add((Point(name, value, now, step) for name, value in metrics.items()), sent=False)
        if self._waiting > self._limit:
            self._thin()

    def add_sent(self, points: Iterable[Point]) -> None:
        """Notes what the server has; its timestamps are the ones that count."""
        self._add(points, sent=True)
        with self._lock:
            self._waiting = self._count()

    def waiting(self, limit: int) -> list[Point]:
        """Returns the oldest points that are still to be sent."""
        asked = "select name, value, timestamp, step from points where not sent order by timestamp, step, name limit ?"
        with self._lock:
            return [Point(*row) for row in self._database.execute(asked, (limit,))]

    @property
    def num_waiting(self) -> int:
        """How many points are still to be sent."""
        with self._lock:
            return self._count()

    def _count(self) -> int:
        count: int = self._database.execute("select count(*) from points where not sent").fetchone()[0]
        return count

    def mark_sent(self, points: Iterable[Point]) -> None:
        """Notes that the server has these."""
        change = "update points set sent = 1 where name = ? and step = ? and not sent"
        self._change(change, [(point.name, point.step) for point in points], waiting=-1)

    def reject_points(self, points: Iterable[Point], reason: str) -> None:
        """Notes that the server will never take these; they stay in the history."""
        points = list(points)
        self.mark_sent(points)
        self._reject("points", sorted({point.name for point in points}), reason)

    def add_call(self, what: str, content: Any) -> None:
        """Keeps something else to be told."""
        self._change("insert into calls (what, content) values (?, ?)", [(what, json.dumps(content))])

    def calls(self) -> list[Call]:
        """Returns what else is still to be told, oldest first; content that is no JSON is None."""
        with self._lock:
            rows = self._database.execute("select number, what, content from calls order by number").fetchall()
        calls = []
        for number, what, content in rows:
            try:
                calls.append(Call(number, str(what), json.loads(content)))
            except (TypeError, ValueError, RecursionError):
                calls.append(Call(number, str(what), None))
        return calls

    def drop(self, call: Call) -> None:
        """Notes that the server was told."""
        self._change("delete from calls where number = ?", [(call.number,)])

    def postpone(self, call: Call) -> None:
        """Puts a call behind all others, so that it does not hold them up."""
        last = "select max(number) + 1 from calls"
        self._change(f"update calls set number = ({last}) where number = ?", [(call.number,)])

    def reject(self, call: Call, reason: str) -> None:
        """Drops a call that can never succeed, and keeps why."""
        self._reject(call.what, call.content, reason)
        self.drop(call)

    def rejected(self) -> list[str]:
        """Returns what was dropped and why, oldest first."""
        with self._lock:
            rows = self._database.execute("select what, content, reason from rejected order by number").fetchall()
        return [f"{what} {str(content)[:100]}: {reason}" for what, content, reason in rows]

    @property
    def num_calls(self) -> int:
        """How much else is still to be told."""
        with self._lock:
            count: int = self._database.execute("select count(*) from calls").fetchone()[0]
        return count

    def history(self) -> dict[str, list[tuple[int, float]]]:
        """Returns all points by metric, as step and value, in order."""
        with self._lock:
            return _series(self._database)

    @staticmethod
    def history_of(path: Path) -> dict[str, list[tuple[int, float]]]:
        """Returns all points of an outbox that is no longer written to, as `history` does."""
        with _reading(path) as database:
            return _series(database)

    def fact(self, key: str) -> str | None:
        """Returns what was noted under a key."""
        with self._lock:
            row = self._database.execute("select value from facts where key = ?", (key,)).fetchone()
        return row[0] if row else None

    @staticmethod
    def fact_of(path: Path, key: str) -> str | None:
        """Returns what an outbox that may be in use has under a key; None where it cannot be read."""
        with suppress(sqlite3.Error, OSError, ValueError), _reading(path) as database:
            row = database.execute("select value from facts where key = ?", (key,)).fetchone()
            return str(row[0]) if row else None
        return None

    @staticmethod
    def is_pending(path: Path) -> bool:
        """Says whether something is still to be sent, without writing to the folder; True where it cannot be read."""
        with suppress(sqlite3.Error, OSError, ValueError), _reading(path) as database:
            (pending,) = database.execute(
                "select exists (select 1 from points where not sent) or exists (select 1 from calls) "
                "or exists (select 1 from facts where key = 'left' and value != '')"
            ).fetchone()
            return bool(pending)
        return True

    def note(self, **facts: str) -> None:
        """Notes facts about the run, over those of the same keys."""
        with self._lock:
            self._database.executemany("insert or replace into facts values (?, ?)", facts.items())

    def close(self) -> None:
        """Writes the log back and closes the database, so that the one file is complete even if others read it."""
        with self._lock, closing(self._database), suppress(sqlite3.Error):
            self._database.execute("pragma wal_checkpoint(truncate)")

    def _reject(self, what: str, content: Any, reason: str) -> None:
        row = (what, json.dumps(content), reason)
        self._change("insert into rejected (what, content, reason) values (?, ?, ?)", [row])

    def _add(self, points: Iterable[Point], *, sent: bool) -> None:
        rows = [(point.name, point.step, point.value, point.timestamp, sent) for point in points]
        change = "insert or replace" if sent else "insert or ignore"
        self._change(f"{change} into points values (?, ?, ?, ?, ?)", rows, waiting=not sent)

    def _change(self, statement: str, rows: Iterable[tuple[Any, ...]], *, waiting: int = 0) -> None:
        """Changes all rows or, where the disk is full, none.

        Args:
            statement: SQL statement.
            rows: Parameters of each execution.
            waiting: What each changed row adds to the number of waiting points.
        """
        with self._lock, self._database:  # which commits or rolls back
            self._database.execute("begin")
            self._waiting += waiting * self._database.executemany(statement, rows).rowcount

    def _thin(self) -> None:
        """Drops every other waiting point of each series, if there are too many."""
        numbered = (
            "select name, step, row_number() over (partition by name order by step) as k from points where not sent"
        )
        with self._lock:
            if self._count() > self._limit:
                self.thinned = True
                self._database.execute(
                    f"delete from points where (name, step) in (select name, step from ({numbered}) where k % 2 = 0)"
                )
            self._waiting = self._count()


def _reading(path: Path) -> closing[sqlite3.Connection]:
    """Opens an outbox to be read; one that nobody writes to wants no lock, for which a folder may lack the right."""
    _check_files(path)
    in_use = path.with_name(f"{path.name}-wal").exists()
    return closing(sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro" + "&immutable=1" * (not in_use), uri=True))


def _series(database: sqlite3.Connection) -> dict[str, list[tuple[int, float]]]:
    found: dict[str, list[tuple[int, float]]] = {}
    for name, step, value in database.execute("select name, step, value from points order by name, step"):
        if not (isinstance(name, str) and isinstance(step, int) and isinstance(value, float | int | None)):
            raise sqlite3.DataError(f"a point is of the wrong type ({name!r:.50}, {step!r:.50}, {value!r:.50})")
        found.setdefault(name, []).append((step, math.nan if value is None else float(value)))
    return found


def _check_files(path: Path) -> None:
    """Makes sure that the database and what SQLite keeps beside it lie in the run's folder.

    Raises:
        UnsafeFile: One of them does not.
    """
    for suffix in ("", "-wal", "-shm", "-journal"):
        file_in(path.parent, path.name + suffix)
