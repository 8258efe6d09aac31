"""Every error that Planaria raises on purpose, in one tree.

::

    PlanariaError
    ├── ConfigError                bad argument, option or environment; nothing was touched
    │   └── NotSupportedError      a valid request that this version cannot serve
    ├── StateError                 the training state cannot be saved or restored as it is
    │   ├── MismatchError          names, shapes or dtypes differ between checkpoint and target
    │   ├── TornCaptureError       state changed while it was being captured
    │   └── CertificateError       after a change of members something has no owner, or several
    ├── StorageError               reading or writing failed
    │   ├── RootError              the checkpoint folder is not ours to use
    │   │   └── RootLockedError    another live job owns it
    │   ├── CorruptError           stored bytes are not what was written
    │   ├── FormatError            written by a newer or unknown version
    │   └── NotCommittedError      the step asked for does not exist, or was never committed
    ├── SaveFailedError            a checkpoint was not committed; says on which rank and why
    │   └── MemoryBudgetError      the memory for snapshots has no room for it
    ├── SyncError                  rollout weights could not be brought to a version
    │   └── StaleError             the weights that are served are older than allowed
    ├── CollectiveError            ranks could not agree, or one of them is gone
    │   └── StoppedError           the job is over for this rank: it cannot go on as it is
    ├── WireError                  a malformed, oversized or unauthenticated message
    │   └── PeerClosedError        the other side closed the connection between two messages
    ├── DeadlineError              a wait ended without what it waited for
    └── FaultError                 a fault that was injected on purpose, see planaria.core.points

Each message says what is wrong, where, and what to do about it.
"""


class PlanariaError(Exception):
    """Base of every error that Planaria raises on purpose."""


class ConfigError(PlanariaError, ValueError):
    """A bad argument, option or environment variable; nothing was touched."""


class NotSupportedError(ConfigError):
    """A valid request that this version cannot serve."""


class StateError(PlanariaError):
    """The training state cannot be saved or restored as it is."""


class MismatchError(StateError):
    """Names, shapes or dtypes differ between a checkpoint and its target."""


class TornCaptureError(StateError):
    """State changed while it was being captured; the checkpoint was abandoned."""


class CertificateError(StateError):
    """After a change of members something has no owner, or several, or members disagree."""


class StorageError(PlanariaError):
    """Reading or writing failed."""


class RootError(StorageError):
    """The checkpoint folder cannot be used."""


class RootLockedError(RootError):
    """Another live job owns the checkpoint folder."""


class CorruptError(StorageError):
    """Stored bytes are not what was written."""


class FormatError(StorageError):
    """The data was written by a newer or an unknown version of the format."""


class NotCommittedError(StorageError):
    """The step asked for does not exist or was never committed."""


class SaveFailedError(PlanariaError):
    """A checkpoint was not committed."""


class MemoryBudgetError(SaveFailedError):
    """The memory that is set aside for snapshots has no room for this one."""


class SyncError(PlanariaError):
    """Rollout weights could not be brought to a version; what was served still is."""


class StaleError(SyncError):
    """The weights that are served are older than allowed."""


class CollectiveError(PlanariaError):
    """Ranks could not agree, or one of them is gone."""


class StoppedError(CollectiveError):
    """The job is over for this rank: too few are left, it has no quorum, or it was left out."""


class WireError(PlanariaError):
    """A malformed, oversized or unauthenticated message."""


class PeerClosedError(WireError):
    """The other side closed the connection between two messages."""


class DeadlineError(PlanariaError, TimeoutError):
    """A wait ended without what it waited for."""


class FaultError(PlanariaError):
    """A fault that was injected on purpose, by a ``raise`` clause at a fault point."""
