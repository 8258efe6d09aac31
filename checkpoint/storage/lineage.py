"""What a checkpoint folder remembers of its mirror: which one it is, and what is left of its past.

::

    <root>/mirror.json      {"id": ..., "rewound_to": ...}

Two runs must not be mixed in one mirror, and a mirror that was out of reach when the run was
rewound must not bring back the past that was left. Both have to outlive this process.
"""

import json
import threading
from dataclasses import dataclass

from planaria.checkpoint.storage.base import Storage

NAME = "mirror.json"


@dataclass(frozen=True, slots=True)
class Lineage:
    """What is remembered.

    Attributes:
        id: Of the mirror that holds this run's past, None if there is none yet.
        rewound_to: The mirror's steps after this one belong to a past that was left, and are not
            set aside there yet; None if all are.
    """

    id: str | None = None
    rewound_to: int | None = None


class LineageFile:
    """Keeps it in a checkpoint folder.

    Args:
        storage: The folder.
    """

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        self._lock = threading.Lock()

    def read(self) -> Lineage:
        """What is remembered; nothing if the file is not there or makes no sense."""
        try:
            data = json.loads(self._storage.read(NAME))
            mirror, step = data["id"], data["rewound_to"]
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            return Lineage()
        return Lineage(
            mirror if isinstance(mirror, str) else None, step if type(step) is int else None
        )

    def adopt(self, mirror: str | None) -> None:
        """Remembers that the mirror of this id holds the run's past."""
        with self._lock:
            old = self.read()
            if mirror is not None and old.id != mirror:
                self._write(Lineage(mirror, old.rewound_to))

    def rewind(self, step: int) -> None:
        """Remembers that the run goes on from a step; what the mirror has after it is left."""
        with self._lock:
            old = self.read()
            if old.rewound_to is None or old.rewound_to > step:
                self._write(Lineage(old.id, step))

    def set_aside(self, step: int) -> None:
        """Forgets a rewind: the mirror knows of it."""
        with self._lock:
            old = self.read()
            if old.rewound_to == step:
                self._write(Lineage(old.id))

    def _write(self, new: Lineage) -> None:
        self._storage.put(NAME, json.dumps({"id": new.id, "rewound_to": new.rewound_to}).encode())
