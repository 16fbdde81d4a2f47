"""A folder of results: one small JSON file a finished run, and locks so that several processes can share it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from hf_clars.records.files import RecordError, from_json, to_json, write_complete


class ResultsFolder:
    """Results by the key of their settings.

    A claim is a lock that the operating system takes back when its process ends, however it ends: a run that was killed
    is free again at once, and a finished one is never run again.

    Args:
        path: The folder; made if absent.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._cache: dict[str, dict[str, Any]] = {}
        for folder in (path / "runs", path / "locks", path / "logs"):
            folder.mkdir(parents=True, exist_ok=True)

    def get(self, key: str) -> dict[str, Any] | None:
        """The result of a run, or None when it has none yet.

        Args:
            key: Of its settings.

        Returns:
            What `put` was given.

        Raises:
            RecordError: If the file is damaged.
        """
        if key not in self._cache:
            file = self._file(key)
            try:
                text = file.read_text(encoding="utf-8")
            except FileNotFoundError:
                return None
            result = from_json(text, str(file))
            if not isinstance(result, dict) or result.get("key") != key:
                raise RecordError(f"{file} is not the result of run {key}: delete it, and the run is done again.")
            self._cache[key] = result
        return self._cache[key]

    def put(self, key: str, result: dict[str, Any]) -> None:
        """Keep a result: the file is there whole, or not at all.

        Args:
            key: Of the run's settings.
            result: JSON-able; its "key" is set.
        """
        text = to_json({**result, "key": key}, f"The result of run {key}")

        def write(temporary: Path) -> None:
            temporary.write_text(text, encoding="utf-8")

        write_complete(self._file(key), write)

    @contextmanager
    def claim(self, key: str) -> Iterator[bool]:
        """Hold a run while it is done.

        Args:
            key: Of its settings.

        Yields:
            False when another process holds it, or it has been finished.
        """
        lock = FileLock(self.path / "locks" / f"{key}.lock")
        try:
            lock.acquire(blocking=False)
        except Timeout:
            yield False
            return
        try:
            yield self.get(key) is None
        finally:
            lock.release()

    def log_folder(self, key: str) -> Path:
        """Where the layer-rate log of a run is."""
        return self.path / "logs" / key

    def fresh_log_folder(self, key: str) -> Path:
        """The same, without what a killed run left there; for whoever holds the claim."""
        folder = self.log_folder(key)
        shutil.rmtree(folder, ignore_errors=True)
        return folder

    def _file(self, key: str) -> Path:
        return self.path / "runs" / f"{key}.json"


def finite_or_none(values: list[float]) -> list[float | None]:
    """JSON has no word for infinity."""
    return [json.loads(json.dumps(v)) if abs(v) < float("inf") else None for v in values]
