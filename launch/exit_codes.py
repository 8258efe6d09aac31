"""What the exit code of every `planaria` command means.

| code | meaning |
|---|---|
| 0 | done |
| 1 | failed |
| 2 | the configuration or the command line is wrong; nothing was touched |
| 3 | stored state is corrupt or cannot be read |
| 4 | a check has found something: `diff` and `chaos` a difference, `doctor` something wrong |
| 75 | preempted, resumable: the same command goes on where it stopped |
| 130 | a command other than `run` was interrupted |
"""

from planaria.errors import ConfigError, CorruptError, FormatError, MismatchError

DONE = 0
FAILED = 1
CONFIG = 2
CORRUPT = 3
FOUND = 4
#: EX_TEMPFAIL of sysexits.h: schedulers know it as "try again".
PREEMPTED = 75
INTERRUPTED = 130


def exit_code_of(error: BaseException) -> int:
    """The exit code that tells of an error."""
    if isinstance(error, ConfigError | MismatchError):
        return CONFIG
    if isinstance(error, CorruptError | FormatError):
        return CORRUPT
    return FAILED
