"""The configuration of a run: its types, how it is composed, how two of them differ.

The values live in `conf/` as Hydra groups. They are composed once, by the launcher, checked
against the classes below, and frozen into the run folder; ranks read the frozen file.
"""

import dataclasses
import difflib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from planaria.errors import ConfigError

CONF_MODULE = "planaria.launch.conf"

#: Keys that decide how a run is carried out, not what it computes: a resumed run may change them.
FREE_KEYS = ("launcher.", "elastic.", "log_every", "checkpoint.mirror")
#: What decides the bits of a session, though.
_SESSION_KEYS = ("elastic.zero_stage", "elastic.consistency", "elastic.group")


def _require(ok: bool, key: str, value: Any, what: str) -> None:
    if not ok:
        raise ConfigError(f"{key}={value!r}: must be {what}")


@dataclass
class ModelConf:
    """Shape of the default job's transformer, see `planaria.launch.demo.model.ModelConfig`."""

    dim: int = 128
    layers: int = 4
    heads: int = 4
    ffn_dim: int = 384
    dropout: float = 0.0
    tie_embeddings: bool = True

    def __post_init__(self) -> None:
        for name in ("dim", "layers", "heads", "ffn_dim"):
            value = getattr(self, name)
            _require(value >= 1, f"model.{name}", value, "at least 1")
        _require(
            self.dim % (2 * self.heads) == 0,
            "model.dim",
            self.dim,
            f"a multiple of {2 * self.heads}, for {self.heads} heads of even width",
        )
        _require(0 <= self.dropout < 1, "model.dropout", self.dropout, "at least 0 and below 1")


@dataclass
class DataConf:
    """Text, batch and sequence length; sizes are of the global batch, whatever the ranks."""

    paths: list[str] | None = None
    max_bytes: int | None = None
    seq_len: int = 128
    batch_size: int = 16
    micro_batch_size: int = 4

    def __post_init__(self) -> None:
        for name in ("seq_len", "batch_size", "micro_batch_size"):
            value = getattr(self, name)
            _require(value >= 1, f"data.{name}", value, "at least 1")
        if self.max_bytes is not None:
            _require(self.max_bytes >= 1, "data.max_bytes", self.max_bytes, "at least 1 or null")
        _require(
            self.batch_size % self.micro_batch_size == 0,
            "data.batch_size",
            self.batch_size,
            f"a multiple of data.micro_batch_size ({self.micro_batch_size})",
        )


@dataclass
class OptimConf:
    """AdamW with a linear warm-up and a cosine decay."""

    lr: float = 3e-3
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    warmup_steps: int = 20
    decay_steps: int | None = None
    min_lr_ratio: float = 0.1
    clip_grad_norm: float | None = 1.0

    def __post_init__(self) -> None:
        _require(self.lr > 0, "optim.lr", self.lr, "positive")
        for name in ("beta1", "beta2", "min_lr_ratio"):
            value = getattr(self, name)
            _require(0 <= value < 1, f"optim.{name}", value, "at least 0 and below 1")
        _require(self.eps > 0, "optim.eps", self.eps, "positive")
        _require(self.weight_decay >= 0, "optim.weight_decay", self.weight_decay, "at least 0")
        _require(self.warmup_steps >= 0, "optim.warmup_steps", self.warmup_steps, "at least 0")
        if self.decay_steps is not None:
            _require(self.decay_steps > 0, "optim.decay_steps", self.decay_steps, "positive")
        if self.clip_grad_norm is not None:
            _require(
                self.clip_grad_norm > 0,
                "optim.clip_grad_norm",
                self.clip_grad_norm,
                "positive or null",
            )


@dataclass
class CheckpointConf:
    """What the default job hands to `Checkpointer`; `planaria.launch.policies` puts it together.

    A step is saved where any of the first four says so, and kept if any of the `keep` ones wants
    it.
    """

    every: int | None = 20
    every_seconds: float | None = None
    adaptive: float | None = None
    on_signal: str | None = None
    keep: int | None = 3
    keep_every: int | None = None
    keep_best: str | None = None
    keep_best_count: int = 1
    keep_best_mode: str = "min"
    on_failure: str = "retry"
    writer: str = "trainer"
    mirror: str | None = None
    mirror_bytes_per_s: float | None = None
    dedup: bool = False
    audit: bool = False

    def __post_init__(self) -> None:
        for name in ("every", "keep", "keep_every", "mirror_bytes_per_s"):
            value = getattr(self, name)
            if value is not None:
                _require(value >= 1, f"checkpoint.{name}", value, "at least 1 or null")
        # What the policies themselves refuse is refused here, before anything is touched.
        from planaria.launch import policies as made

        conf: Any = self
        made.save_policy(conf)
        made.keep_policy(conf)
        policies = ("fatal", "retry", "degrade")
        _require(
            self.on_failure in policies,
            "checkpoint.on_failure",
            self.on_failure,
            f"one of {', '.join(policies)}",
        )
        writers = ("trainer", "snapshot")
        _require(
            self.writer in writers, "checkpoint.writer", self.writer, f"one of {', '.join(writers)}"
        )


@dataclass
class ElasticConf:
    """What happens when ranks are lost.

    The first half is for ``warm``, see `planaria.launch.warm`; the second one for ``session``, see
    `planaria.elastic.Session` and `planaria.elastic.agent`.
    """

    mode: str = "off"
    max_restarts: int = 3
    budget: int | None = None
    losses: int = 1
    group_size: int = 16
    every: int = 1
    nodes: int = 1
    host: str | None = None
    port: int = 0
    policy: str = "shrink_then_replace"
    min_world: int = 1
    max_world: int | None = None
    redundancy: int = 1
    zero_stage: int = 2
    consistency: str = "bitwise"
    group: int = 1
    recovery_s: float = 60.0
    hang_s: float = 30.0
    notice_file: str | None = None
    notice_url: str | None = None

    def __post_init__(self) -> None:
        choices = {
            "mode": ("off", "warm", "session"),
            "policy": ("shrink", "replace", "replace_then_shrink", "shrink_then_replace"),
            "zero_stage": (0, 1, 2),
            "consistency": ("bitwise", "fast"),
        }
        for name, known in choices.items():
            value = getattr(self, name)
            _require(
                value in known, f"elastic.{name}", value, f"one of {', '.join(map(str, known))}"
            )
        for name in ("min_world", "group"):
            value = getattr(self, name)
            _require(value >= 1, f"elastic.{name}", value, "at least 1")
        _require(self.redundancy >= 0, "elastic.redundancy", self.redundancy, "at least 0")
        for name in ("recovery_s", "hang_s"):
            value = getattr(self, name)
            _require(value > 0, f"elastic.{name}", value, "positive, in seconds")
        _require(0 <= self.port < 65536, "elastic.port", self.port, "from 0 to 65535")
        if self.max_world is not None:
            _require(
                self.max_world >= self.min_world,
                "elastic.max_world",
                self.max_world,
                f"elastic.min_world ({self.min_world}) or more, or null",
            )
        for name in ("max_restarts", "losses"):
            value = getattr(self, name)
            _require(value >= 0, f"elastic.{name}", value, "at least 0")
        for name in ("group_size", "every", "nodes"):
            value = getattr(self, name)
            _require(value >= 1, f"elastic.{name}", value, "at least 1")
        if self.budget is not None:
            _require(self.budget >= 1 << 16, "elastic.budget", self.budget, "at least 65536")
        _require(
            self.losses < self.group_size,
            "elastic.losses",
            self.losses,
            f"below elastic.group_size ({self.group_size})",
        )


@dataclass
class LauncherConf:
    """How ranks are started and stopped."""

    nproc: int = 2
    nnodes: int = 1
    rdzv: str | None = None
    max_restarts: int = 0
    grace_s: float = 60.0
    fence_s: float = 5.0
    join_timeout_s: float = 600.0
    collective_timeout_s: float = 600.0

    def __post_init__(self) -> None:
        for name in ("nproc", "nnodes"):
            value = getattr(self, name)
            _require(value >= 1, f"launcher.{name}", value, "at least 1")
        _require(self.max_restarts >= 0, "launcher.max_restarts", self.max_restarts, "at least 0")
        for name in ("grace_s", "fence_s", "join_timeout_s", "collective_timeout_s"):
            value = getattr(self, name)
            _require(value > 0, f"launcher.{name}", value, "positive, in seconds")
        if self.nnodes > 1 and self.rdzv is None:
            raise ConfigError(
                f"launcher.nnodes={self.nnodes} needs --rdzv HOST:PORT, the address on which the "
                "first node listens"
            )
        if self.rdzv is not None:
            parse_endpoint(self.rdzv)


@dataclass
class RunConf:
    """All that `planaria run` needs to know."""

    name: str = "demo"
    steps: int = 200
    seed: int = 0
    threads: int = 1
    device: str = "auto"
    log_every: int = 10
    script: list[str] | None = None
    model: ModelConf = field(default_factory=ModelConf)
    data: DataConf = field(default_factory=DataConf)
    optim: OptimConf = field(default_factory=OptimConf)
    checkpoint: CheckpointConf = field(default_factory=CheckpointConf)
    elastic: ElasticConf = field(default_factory=ElasticConf)
    launcher: LauncherConf = field(default_factory=LauncherConf)

    def __post_init__(self) -> None:
        _require(
            re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", self.name) is not None,
            "name",
            self.name,
            "letters, digits, '.', '_' and '-', as it names the run's folder",
        )
        for name in ("steps", "threads", "log_every"):
            value = getattr(self, name)
            _require(value >= 1, name, value, "at least 1")
        _require(0 <= self.seed < 2**63, "seed", self.seed, "from 0 to 2**63 - 1")
        devices = ("auto", "cpu", "cuda")
        _require(self.device in devices, "device", self.device, f"one of {', '.join(devices)}")
        if self.checkpoint.writer == "snapshot" and self.elastic.mode != "warm":
            raise ConfigError(
                "checkpoint.writer=snapshot writes from snapshots in memory: add elastic=warm"
            )
        ranks = self.launcher.nproc * self.launcher.nnodes
        micro_batches = self.data.batch_size // self.data.micro_batch_size
        _require(
            self.script is not None or ranks <= micro_batches,
            "launcher.nproc",
            self.launcher.nproc,
            f"fewer, or data.micro_batch_size smaller: {ranks} ranks cannot share "
            f"{micro_batches} micro-batches",
        )


def parse_endpoint(text: str) -> tuple[str, int]:
    """Splits HOST:PORT; an IPv6 host stands in brackets.

    Raises:
        ConfigError: The text has another form, or the port is not from 1 to 65535.
    """
    match = re.fullmatch(r"(\[[0-9A-Fa-f:.]+\]|[^:\s]+):(\d{1,5})", text)
    if match is None or not 0 < int(match[2]) < 65536:
        raise ConfigError(f"--rdzv {text!r}: must be HOST:PORT, such as node0:29500")
    return match[1].strip("[]"), int(match[2])


def compose(overrides: Sequence[str], *, script: Sequence[str] | None = None) -> RunConf:
    """Composes the configuration from the groups in `conf/` and overrides in Hydra's grammar.

    Args:
        overrides: Such as ``steps=100``.
        script: A script of the user's with its arguments, in place of the default job.

    Raises:
        ConfigError: An override is malformed, names an unknown key or option, or has a value of
            the wrong type or out of range.
    """
    from hydra import compose as hydra_compose
    from hydra import initialize_config_module
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    try:
        with initialize_config_module(CONF_MODULE, version_base=None):
            composed = hydra_compose("config", overrides=list(overrides))
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(_explain(error, overrides)) from error
    return _typed(composed, list(script) if script is not None else None)


def load(path: Path) -> RunConf:
    """Reads a frozen configuration.

    Raises:
        ConfigError: The file is missing, is not YAML, or holds what this version does not know.
    """
    try:
        text = path.read_text()
    except FileNotFoundError as error:
        raise ConfigError(f"{path} is missing: {path.parent} is not the folder of a run") from error
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read ({error}); start again with --fresh") from error
    return parse(text, str(path))


def parse(text: str, where: str) -> RunConf:
    """Reads the text of a frozen configuration; `where` says in errors whose it is.

    Raises:
        ConfigError: The text is not YAML, or holds what this version does not know.
    """
    try:
        data = yaml.safe_load(text)
    except yaml.YAMLError as error:
        first = str(error).splitlines()[0]
        raise ConfigError(f"{where} is damaged ({first}); start again with --fresh") from error
    if not isinstance(data, dict):
        raise ConfigError(f"{where} holds no configuration; start again with --fresh")
    script = data.pop("script", None)
    if script is not None and not (
        isinstance(script, list) and script and all(isinstance(part, str) for part in script)
    ):
        raise ConfigError(f"{where}: script is no list of words; start again with --fresh")
    return _typed(_literal(data), script)


def dump(conf: RunConf) -> str:
    """The configuration as YAML, every value resolved, keys in the order of the classes."""
    return yaml.safe_dump(dataclasses.asdict(conf), sort_keys=False)


def flatten(conf: RunConf) -> dict[str, Any]:
    """Every value under its dotted key, such as ``{"optim.lr": 0.001}``."""

    def walk(prefix: str, value: Any) -> Iterator[tuple[str, Any]]:
        if isinstance(value, dict):
            for key, inner in value.items():
                yield from walk(f"{prefix}.{key}" if prefix else key, inner)
        else:
            yield prefix, value

    return dict(walk("", dataclasses.asdict(conf)))


def computed(conf: RunConf) -> dict[str, Any]:
    """The values that decide what a run computes, under their dotted keys.

    Those of `FREE_KEYS` are left out, but for what decides the bits of a session: whether there is
    one, to begin with.
    """
    values = flatten(conf)
    session = conf.elastic.mode == "session"
    kept = {k: v for k, v in values.items() if not k.startswith(FREE_KEYS)}
    kept["elastic.mode"] = "session" if session else "off or warm"
    return kept | {k: values[k] for k in _SESSION_KEYS if session}


def differences(old: RunConf, new: RunConf) -> dict[str, tuple[Any, Any]]:
    """The dotted keys whose values differ, with the old and the new value.

    Keys in `FREE_KEYS` are left out, and so is `steps` where it grew: a run may be extended.
    """
    before, after = computed(old), computed(new)
    found = {}
    for key, value in after.items():
        if value == before.get(key):
            continue
        if key == "steps" and new.steps > old.steps:
            continue
        found[key] = (before.get(key), value)
    return found


def _typed(composed: Any, script: list[str] | None) -> RunConf:
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        merged = OmegaConf.merge(OmegaConf.structured(RunConf), composed)
        # The words of a script are the user's own: nothing in them is for OmegaConf to resolve.
        merged.script = None if script is None else ["script"]
        conf = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        raise ConfigError(_explain(error, [])) from error
    assert isinstance(conf, RunConf)
    conf.script = script
    return conf


def _literal(value: Any) -> Any:
    """The value, with every ``${`` in it taken as it stands: frozen means resolved."""
    if isinstance(value, str):
        return value.replace("${", r"\${")
    if isinstance(value, dict):
        return {key: _literal(inner) for key, inner in value.items()}
    return [_literal(inner) for inner in value] if isinstance(value, list) else value


def _explain(error: Exception, overrides: Sequence[str]) -> str:
    """One line for what Hydra and OmegaConf say in several, with the nearest known key."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    message = lines[0] if lines else type(error).__name__
    full_key = getattr(error, "full_key", None)
    if full_key and full_key not in message:
        message = f"{full_key}: {message}"
    unknown = re.match(r"Could not (?:override|append|delete)\D* '([^']+)'", message)
    if unknown:
        return _explain_unknown(unknown[1])
    if overrides and not any(o.partition("=")[0] in message for o in overrides):
        message += f" (in: {' '.join(overrides)})"
    return message


def _explain_unknown(key: str) -> str:
    known = list(flatten(RunConf()))
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.8)
    if near:
        return f"there is no key {key}; did you mean {near[0]}?"
    group, _, _ = key.rpartition(".")
    inside = [k.removeprefix(f"{group}.") for k in known if k.startswith(f"{group}.")]
    if inside:
        return f"there is no key {key}; {group} has {', '.join(inside)}"
    groups = dict.fromkeys(k.partition(".")[0] for k in known)
    return f"there is no key {key}; there are {', '.join(groups)}"
