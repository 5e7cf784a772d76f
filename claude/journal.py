"""The journal of the batches that were sent: without it, answers that were paid for cannot be fetched.

JSON lines, one per batch, rewritten atomically: {"batch_id", "purpose", "created_at", "custom_ids"}. The last line may
be an intent: a batch that may or may not have been created. It has no batch_id, but "intended_at" and "seen", the
newest batches the API listed then.
"""

import contextlib
import fcntl
import json
import os
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from claude.answers import answer_paths
from pipeline.errors import InputError
from pipeline.files import atomic_path, require_writable

if TYPE_CHECKING:
    from anthropic.types.messages import MessageBatch


class Journal:
    """The batches of one purpose, in a file. `batches`: a dict per batch, the last of which may still lack its id."""

    def __init__(self, path: Path, purpose: str | None = None):
        self.path, self.purpose = path, purpose
        self.batches = read_batches(path)
        others = {batch["purpose"] for batch in self.batches} - {purpose}
        if purpose and others:
            raise InputError(f"{path} holds batches for {sorted(others)[0]!r}, not for {purpose!r}; name another file.")

    def save(self) -> None:
        """Write the file; it is on disk when this returns."""
        with atomic_path(self.path) as temporary:
            lines = (json.dumps(batch, ensure_ascii=False) + "\n" for batch in self.batches)
            temporary.write_text("".join(lines), encoding="utf-8")
        folder = os.open(self.path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)

    def intend(self, custom_ids: list[str], seen: "list[MessageBatch]") -> None:
        """Record that a batch will be created. seen: the newest batches the API lists now."""
        self.batches.append(
            {
                "batch_id": None,
                "purpose": self.purpose,
                "intended_at": datetime.now(UTC).isoformat(),
                "seen": {batch.id: batch.created_at.isoformat() for batch in seen},
                "custom_ids": custom_ids,
            }
        )
        self.save()

    def created(self, batch: "MessageBatch") -> None:
        """Record the id of the intended batch."""
        intent = self.batches[-1]
        self.batches[-1] = {
            "batch_id": batch.id,
            "purpose": intent["purpose"],
            "created_at": batch.created_at.isoformat(),
            "custom_ids": intent["custom_ids"],
        }
        self.save()

    def forget(self) -> None:
        """Remove the intended batch: it was not created."""
        self.batches.pop()
        self.save()

    def unclear(self) -> dict[str, Any] | None:
        """The intended batch, if it is unclear whether it was created."""
        return self.batches[-1] if self.batches and self.batches[-1]["batch_id"] is None else None

    def pending(self, response_dir: str | Path) -> set[str]:
        """The custom_ids in batches whose answers are not in the folder yet."""
        stored = {path.stem for path in answer_paths(response_dir)}
        return {i for batch in self.batches if batch["batch_id"] not in stored for i in batch["custom_ids"]}


def read_batches(path: Path) -> list[dict[str, Any]]:
    """The lines of a journal; none if there is no file. Raises InputError for a broken one."""
    if not path.exists():
        return []
    try:
        batches = [json.loads(line) for line in path.open(encoding="utf-8")]
        for batch in batches:
            kinds = {"batch_id": str | None, "purpose": str | None, "custom_ids": list}
            for name, kind in kinds.items():
                if name not in batch or not isinstance(batch[name], kind):
                    raise ValueError(f"a line has no valid {name}")
    except (OSError, ValueError, AttributeError) as error:
        raise InputError(
            f"{path} is not a journal of batches ({error}); restore it from a copy: without it, paid answers are lost."
        ) from None
    return batches


@contextlib.contextmanager
def open_journal(path: str | Path, purpose: str) -> Iterator[Journal]:
    """A journal to write to, for this process alone. Raises InputError if another process has it open."""
    path = Path(path)
    require_writable(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.with_name(f".{path.name}.lock"), "ab") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"{path} is in use by another process; wait for it to end.") from None
        yield Journal(path, purpose)
