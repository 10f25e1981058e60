"""SQLite database in the folder of a run with its metrics, and everything that is still to be sent to MLflow."""

import json
import math
import sqlite3
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import Any, NamedTuple

from ffdist.storage.files import file_in

OUTBOX = "metrics.db"
"""File name of the outbox in the folder of a run."""
RECOVERIES, ORIGIN = "recoveries", "origin"
"""Keys of the facts that hold the recoveries of the run, and the run whose weights it started from."""
STATUS, REASON = "status", "reason"
"""Keys of the facts that hold the final MLflow status of a run, and why it failed."""
POINT_BYTES = 100
"""Approximate size of a point in the database."""


class Point(NamedTuple):
    """One value of a metric."""

    name: str
    value: float
    timestamp: int
    """Time of the first logging, in milliseconds since 1970. It never changes, so that the server merges duplicates."""
    step: int
    """Number of samples seen."""


class Call(NamedTuple):
    """A pending MLflow call other than a metric: parameters, tags, a dataset, an artifact or a model."""

    number: int
    """Calls are made in the order of their numbers."""
    kind: str
    """Key of `sync.HANDLERS`."""
    content: Any
    """JSON value."""


class Outbox:
    """Stores all points of a run, its pending calls, and facts about it (key-value pairs).

    A stored point is not overwritten by `add`, because a recovered run logs the same points again. All methods are
    thread-safe.

    Args:
        path: The database; created if it does not exist.
        limit_bytes: Approximate limit on pending points. Beyond it every other pending point is dropped.
        is_sent: Whether its content is sent to MLflow. Otherwise nothing is pending, and calls are dropped.

    Raises:
        UnsafeFile: One of the database's files leads out of the folder.
        sqlite3.DatabaseError: The database is damaged.
    """

    def __init__(self, path: Path, limit_bytes: int, *, is_sent: bool = True) -> None:
        self._max_pending, self._lock, self._is_sent = limit_bytes // POINT_BYTES, threading.Lock(), is_sent
        self.has_dropped_points = False
        self.programs: dict[str, Path] = {}
        """Programs that this process has exported, by the name of a network's folder. Those in a folder that may come
        from another person could hold code, so they are never uploaded."""
        self.folder = path.parent
        """Folder of the run."""
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
        self._database.execute("select name, step, value, timestamp, sent from points limit 0")  # another schema fails
        self._num_pending = self._count()

    def add(self, metrics: dict[str, float], step: int) -> None:
        """Adds a pending point to each metric."""
        now = time.time_ns() // 1_000_000
        self._add((Point(name, value, now, step) for name, value in metrics.items()), sent=not self._is_sent)
        if self._num_pending > self._max_pending:
            self._drop_points()

    def add_sent(self, points: Iterable[Point]) -> None:
        """Adds points that the server has. They replace stored ones: the server's timestamps take precedence."""
        self._add(points, sent=True)
        with self._lock:
            self._num_pending = self._count()

    def pending_points(self, limit: int) -> list[Point]:
        """Returns the oldest pending points, at most `limit`."""
        query = "select name, value, timestamp, step from points where not sent order by timestamp, step, name limit ?"
        with self._lock:
            return [_point(*row) for row in self._database.execute(query, (limit,))]

    def points_at(self, step: int, prefix: str) -> list[Point]:
        """Returns the points of the metrics with a prefix at a step."""
        query = "select name, value, timestamp, step from points where step = ? and substr(name, 1, ?) = ?"
        with self._lock:
            return [_point(*row) for row in self._database.execute(query, (step, len(prefix), prefix))]

    def points_after(self, steps: dict[str, int]) -> Iterator[list[Point]]:
        """Yields the points of each metric after its step in `steps`; all points of a metric that is not in it."""
        query = "select name, value, timestamp, step from points where name = ? and step > ? order by step"
        with self._lock:
            names = [name for (name,) in self._database.execute("select distinct name from points order by name")]
        for name in names:
            with self._lock:
                rows = self._database.execute(query, (name, steps.get(name, -1))).fetchall()
            if rows:
                yield [_point(*row) for row in rows]

    @property
    def num_pending(self) -> int:
        """Number of pending points."""
        with self._lock:
            return self._count()

    def _count(self) -> int:
        count: int = self._database.execute("select count(*) from points where not sent").fetchone()[0]
        return count

    def mark_sent(self, points: Iterable[Point]) -> None:
        """Marks points as sent."""
        change = "update points set sent = 1 where name = ? and step = ? and not sent"
        self._change(change, [(point.name, point.step) for point in points], pending_change=-1)

    def reject_points(self, points: Iterable[Point], reason: str) -> None:
        """Records that the server rejected points. They are not sent again, but stay in the history."""
        points = list(points)
        self.mark_sent(points)
        self._reject("points", sorted({point.name for point in points}), reason)

    def add_call(self, kind: str, content: Any) -> None:
        """Adds a pending call."""
        if not self._is_sent:
            return
        self._change("insert into calls (what, content) values (?, ?)", [(kind, json.dumps(content))])

    def calls(self) -> list[Call]:
        """Returns the pending calls in order; content that is not valid JSON is None."""
        with self._lock:
            rows = self._database.execute("select number, what, content from calls order by number").fetchall()
        calls = []
        for number, kind, content in rows:
            try:
                calls.append(Call(number, str(kind), json.loads(content)))
            except (TypeError, ValueError, RecursionError):
                calls.append(Call(number, str(kind), None))
        return calls

    def drop(self, call: Call) -> None:
        """Removes a call, after it succeeded or was rejected."""
        self._change("delete from calls where number = ?", [(call.number,)])

    def postpone(self, call: Call) -> None:
        """Moves a call to the end, so that it does not block the others."""
        last = "select max(number) + 1 from calls"
        self._change(f"update calls set number = ({last}) where number = ?", [(call.number,)])

    def reject(self, call: Call, reason: str) -> None:
        """Removes a call that can never succeed, and records the reason."""
        self._reject(call.kind, call.content, reason)
        self.drop(call)

    def rejected(self) -> list[str]:
        """Returns a text for each rejected upload, with the reason, oldest first."""
        with self._lock:
            rows = self._database.execute("select what, content, reason from rejected order by number").fetchall()
        return [f"{kind} {str(content)[:100]}: {reason}" for kind, content, reason in rows]

    @property
    def num_calls(self) -> int:
        """Number of pending calls."""
        with self._lock:
            count: int = self._database.execute("select count(*) from calls").fetchone()[0]
        return count

    def history(self) -> dict[str, list[tuple[int, float]]]:
        """Returns the (step, value) pairs of each metric, in order of steps."""
        with self._lock:
            return _read_series(self._database)

    @staticmethod
    def history_of(path: Path) -> dict[str, list[tuple[int, float]]]:
        """Returns the same as `history`, for the outbox of a run that has ended."""
        with _open_readonly(path) as database:
            return _read_series(database)

    def fact(self, key: str) -> str | None:
        """Returns the fact under a key, or None if there is none."""
        with self._lock:
            row = self._database.execute("select value from facts where key = ?", (key,)).fetchone()
        return row[0] if row else None

    @staticmethod
    def fact_of(path: Path, key: str) -> str | None:
        """Returns a fact from an outbox that may be in use; None if there is none or the outbox cannot be read."""
        with suppress(sqlite3.Error, OSError, ValueError), _open_readonly(path) as database:
            row = database.execute("select value from facts where key = ?", (key,)).fetchone()
            return str(row[0]) if row else None
        return None

    @staticmethod
    def is_pending(path: Path) -> bool:
        """Returns whether anything is pending, without writing to the folder; True if the outbox cannot be read."""
        with suppress(sqlite3.Error, OSError, ValueError), _open_readonly(path) as database:
            (pending,) = database.execute(
                "select exists (select 1 from points where not sent) or exists (select 1 from calls) "
                "or exists (select 1 from facts where key = 'left' and value != '')"
            ).fetchone()
            return bool(pending)
        return True

    def set_facts(self, **facts: str) -> None:
        """Stores facts about the run; existing keys are overwritten."""
        with self._lock:
            self._database.executemany("insert or replace into facts values (?, ?)", facts.items())

    def close(self) -> None:
        """Checkpoints the WAL and closes the database: its file is complete even while another process reads it."""
        with self._lock, closing(self._database), suppress(sqlite3.Error):
            self._database.execute("pragma wal_checkpoint(truncate)")

    def _reject(self, kind: str, content: Any, reason: str) -> None:
        row = (kind, json.dumps(content), reason)
        self._change("insert into rejected (what, content, reason) values (?, ?, ?)", [row])

    def _add(self, points: Iterable[Point], *, sent: bool) -> None:
        rows = [(point.name, point.step, point.value, point.timestamp, sent) for point in points]
        change = "insert or replace" if sent else "insert or ignore"
        self._change(f"{change} into points values (?, ?, ?, ?, ?)", rows, pending_change=not sent)

    def _change(self, statement: str, rows: Iterable[tuple[Any, ...]], *, pending_change: int = 0) -> None:
        """Executes a statement for each row in one transaction, so that a full disk changes nothing.

        Args:
            statement: SQL statement.
            rows: Parameters of each execution.
            pending_change: Change of the number of pending points by each changed row.
        """
        with self._lock, self._database:  # commits or rolls back
            self._database.execute("begin")
            self._num_pending += pending_change * self._database.executemany(statement, rows).rowcount

    def _drop_points(self) -> None:
        """Drops every other pending point of each metric, if there are too many."""
        numbered = (
            "select name, step, row_number() over (partition by name order by step) as k from points where not sent"
        )
        with self._lock:
            if self._count() > self._max_pending:
                self.has_dropped_points = True
                self._database.execute(
                    f"delete from points where (name, step) in (select name, step from ({numbered}) where k % 2 = 0)"
                )
            self._num_pending = self._count()


def _point(name: str, value: float | None, timestamp: int, step: int) -> Point:
    return Point(name, math.nan if value is None else value, timestamp, step)  # SQLite stores NaN as null


def _open_readonly(path: Path) -> closing[sqlite3.Connection]:
    """Opens an outbox for reading; without a lock if no process writes to it, because the folder may be read-only."""
    _check_files(path)
    is_open = path.with_name(f"{path.name}-wal").exists()
    return closing(sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro" + "&immutable=1" * (not is_open), uri=True))


def _read_series(database: sqlite3.Connection) -> dict[str, list[tuple[int, float]]]:
    series: dict[str, list[tuple[int, float]]] = {}
    for name, step, value in database.execute("select name, step, value from points order by name, step"):
        if not (isinstance(name, str) and isinstance(step, int) and isinstance(value, float | int | None)):
            raise sqlite3.DataError(f"a point has the wrong types ({name!r:.50}, {step!r:.50}, {value!r:.50})")
        series.setdefault(name, []).append((step, math.nan if value is None else float(value)))
    return series


def _check_files(path: Path) -> None:
    """Checks that the database and SQLite's auxiliary files are in the folder of the run.

    Raises:
        UnsafeFile: One of them leads out of it.
    """
    for suffix in ("", "-wal", "-shm", "-journal"):
        file_in(path.parent, path.name + suffix)
