"""The metrics of a run on its own disk: what the tracking server has, and what is still to be sent."""

import json
import sqlite3
import threading
import time
from collections.abc import Iterable
from contextlib import closing, suppress
from pathlib import Path
from typing import Any, NamedTuple

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
        self._database = sqlite3.connect(path, check_same_thread=False, isolation_level=None)
        self._database.executescript(
            """
            pragma journal_mode=wal;
            pragma synchronous=normal;
            create table if not exists points (
                name text, step integer, value real, timestamp integer, sent integer, primary key (name, step)
            ) without rowid;
            create index if not exists waiting on points (sent, timestamp, step, name) where not sent;
            create table if not exists calls (number integer primary key, what text, content text);
            create table if not exists facts (key text primary key, value text);
            """
        )

    def add(self, metrics: dict[str, float], step: int) -> None:
        """Keeps a value of each metric to be sent."""
        now = time.time_ns() // 1_000_000
        self._add((Point(name, value, now, step) for name, value in metrics.items()), sent=False)
        if self.num_waiting > self._limit:
            self._thin()

    def add_sent(self, points: Iterable[Point]) -> None:
        """Notes what the server has; its timestamps are the ones that count."""
        self._add(points, sent=True)

    def waiting(self, limit: int) -> list[Point]:
        """Returns the oldest points that are still to be sent."""
        asked = "select name, value, timestamp, step from points where not sent order by timestamp, step, name limit ?"
        with self._lock:
            return [Point(*row) for row in self._database.execute(asked, (limit,))]

    @property
    def num_waiting(self) -> int:
        """How many points are still to be sent."""
        with self._lock:
            count: int = self._database.execute("select count(*) from points where not sent").fetchone()[0]
        return count

    def mark_sent(self, points: Iterable[Point]) -> None:
        """Notes that the server has these."""
        change = "update points set sent = 1 where name = ? and step = ?"
        self._change(change, [(point.name, point.step) for point in points])

    def add_call(self, what: str, content: Any) -> None:
        """Keeps something else to be told."""
        self._change("insert into calls (what, content) values (?, ?)", [(what, json.dumps(content))])

    def next_call(self) -> Call | None:
        """Returns the oldest of what else is still to be told."""
        with self._lock:
            row = self._database.execute("select number, what, content from calls order by number limit 1").fetchone()
        return Call(row[0], row[1], json.loads(row[2])) if row else None

    def drop(self, call: Call) -> None:
        """Notes that the server was told, or refuses to be."""
        self._change("delete from calls where number = ?", [(call.number,)])

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
        """Returns what an outbox that may be in use has under a key."""
        with suppress(sqlite3.Error), _reading(path) as database:
            row = database.execute("select value from facts where key = ?", (key,)).fetchone()
            return str(row[0]) if row else None
        return None

    def note(self, **facts: str) -> None:
        """Notes facts about the run, over those of the same keys."""
        with self._lock:
            self._database.executemany("insert or replace into facts values (?, ?)", facts.items())

    def close(self) -> None:
        """Closes the database."""
        with self._lock:
            self._database.close()

    def _add(self, points: Iterable[Point], *, sent: bool) -> None:
        rows = [(point.name, point.step, point.value, point.timestamp, sent) for point in points]
        change = "insert or replace" if sent else "insert or ignore"
        self._change(f"{change} into points values (?, ?, ?, ?, ?)", rows)

    def _change(self, statement: str, rows: Iterable[tuple[Any, ...]]) -> None:
        """Changes all rows or, where the disk is full, none."""
        with self._lock, self._database:  # which commits or rolls back
            self._database.execute("begin")
            self._database.executemany(statement, rows)

    def _thin(self) -> None:
        """Drops every other waiting point of each series."""
        self.thinned = True
        numbered = (
            "select name, step, row_number() over (partition by name order by step) as k from points where not sent"
        )
        with self._lock:
            self._database.execute(
                f"delete from points where (name, step) in (select name, step from ({numbered}) where k % 2 = 0)"
            )


def _reading(path: Path) -> closing[sqlite3.Connection]:
    """Opens an outbox to be read; one that nobody writes to wants no lock, for which a folder may lack the right."""
    in_use = path.with_name(f"{path.name}-wal").exists()
    return closing(sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro" + "&immutable=1" * (not in_use), uri=True))


def _series(database: sqlite3.Connection) -> dict[str, list[tuple[int, float]]]:
    found: dict[str, list[tuple[int, float]]] = {}
    for name, step, value in database.execute("select name, step, value from points order by name, step"):
        found.setdefault(name, []).append((step, value))
    return found
