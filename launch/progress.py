"""Shows what rank 0 does while a run goes on: a live line on a terminal, plain lines elsewhere."""

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.text import Text

from planaria import telemetry
from planaria.launch.metrics import MetricsFollower, StepRecord
from planaria.launch.output import size

_POLL_S = 0.2


class Progress:
    """Follows a run's metrics and telemetry in a thread of its own; a context manager.

    Args:
        console: Where to show it.
        metrics: The run's `metrics.jsonl`.
        telemetry_folder: The run's telemetry.
        output: Returns a log file whose lines are shown as well; None for no log.
        steps: Steps of the run.
        log_every: Steps between two plain lines.
        on_step: Called with each new record, in the thread.
        first: The rank whose checkpoints are told of; None for whichever tells of one first.
    """

    def __init__(
        self,
        console: Console,
        *,
        metrics: Path,
        telemetry_folder: Path,
        output: Callable[[], Path] | None = None,
        steps: int,
        log_every: int,
        on_step: Callable[[StepRecord], None] = lambda record: None,
        first: int | None = 0,
    ) -> None:
        self._console = console
        self._metrics = MetricsFollower(metrics, from_end=True)
        self._telemetry = telemetry.follow(telemetry_folder)
        self._output = output
        self._shown: dict[Path, int] = {}
        self._since = time.time()
        self._steps = steps
        self._log_every = log_every
        self._on_step = on_step
        self._first = first
        self._told: set[tuple[Any, ...]] = set()
        self._checkpoint = ""
        self._last: StepRecord | None = None
        self._printed = 0
        self._notes: list[str] = []
        self._lock = threading.Lock()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="progress", daemon=True)
        self._live = Live(console=console, auto_refresh=False, transient=True)

    def expect(self, steps: int, log_every: int) -> None:
        """Takes over how long the run is, where that is known only once it is under way."""
        self._steps, self._log_every = steps, log_every

    def __enter__(self) -> "Progress":
        if self._console.is_terminal:
            self._live.start()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join(timeout=10)
        if self._console.is_terminal:
            self._live.stop()

    def note(self, text: str) -> None:
        """Shows a line; may be called from a signal handler, as it only leaves it to the thread."""
        self._notes.append(text)

    def _follow(self) -> None:
        told = False
        while True:
            last = self._done.wait(_POLL_S)
            try:
                self._update()
            except Exception as error:  # the run goes on without its picture
                if not told:
                    self._console.print(f"progress: {error}", markup=False, soft_wrap=True)
                told = True
            if last:
                return

    def _update(self) -> None:
        while self._notes:
            self._console.print(self._notes.pop(0), highlight=False, markup=False)
        for line in self._new_output():
            self._console.out(line, highlight=False)
        for event in self._telemetry.poll():
            if event["t"] >= self._since and self._is_news(event):
                self._take_event(event)
        for record in self._metrics.poll():
            self._last = record
            self._on_step(record)
            if not self._console.is_terminal and self._is_due(record):
                self._console.print(self._line(record), highlight=False, soft_wrap=True)
        if self._console.is_terminal and self._last is not None:
            line = self._line(self._last)
            if line != self._live.renderable:
                self._live.update(line, refresh=True)

    def _is_news(self, event: dict[str, Any]) -> bool:
        if self._first is not None:
            return event.get("rank") == self._first
        key = event.get("name"), event.get("step"), event.get("ok")
        if key[1] is None or key in self._told:
            return False
        self._told.add(key)
        return True

    def _take_event(self, event: dict[str, Any]) -> None:
        step = event.get("step")
        if step is None:
            return
        match event.get("name"):
            case "checkpoint.restore":
                tier = event.get("tier", "durable")
                where = "" if tier == "durable" else f" from the {tier}"
                self._console.print(
                    f"restored step {step}{where} ({size(event.get('bytes', 0))} on rank 0, "
                    f"{event.get('dur', 0.0):.2f} s)"
                )
                if damaged := event.get("damaged"):
                    steps = ", ".join(map(str, damaged))
                    self._console.print(
                        f"damaged: step {steps}; rank 0's log and planaria verify say how",
                        soft_wrap=True,
                    )
            case "checkpoint.heal" if event.get("files"):
                self._console.print(f"step {step} is whole again, from its mirror")
            case "checkpoint.call":
                self._checkpoint = f"checkpoint {step} is being written"
            case "checkpoint.persist":
                self._checkpoint = (
                    f"checkpoint {step} {'committed' if event.get('ok') else 'FAILED'}"
                )

    def _new_output(self) -> list[str]:
        if self._output is None:
            return []
        path = self._output()
        try:
            with path.open("rb") as file:
                file.seek(self._shown.get(path, 0))
                data = file.read()
        except FileNotFoundError:
            return []
        if not self._done.is_set():
            data = data[: data.rfind(b"\n") + 1]
        self._shown[path] = self._shown.get(path, 0) + len(data)
        return data.decode(errors="replace").splitlines()

    def _is_due(self, record: StepRecord) -> bool:
        return record.step % self._log_every == 0 or record.step in (1, self._steps)

    def _line(self, record: StepRecord) -> Text:
        width = len(str(self._steps))
        speed = record.tokens / record.seconds if record.seconds else 0.0
        text = Text.assemble(
            "step ",
            (f"{record.step:>{width}}", "bold"),
            f"/{self._steps}  loss ",
            (f"{record.loss:.4f}", "bold"),
            f"  {speed:,.0f} tokens/s",
        )
        if self._checkpoint:
            text.append(f"  {self._checkpoint}", style="green")
        return text
