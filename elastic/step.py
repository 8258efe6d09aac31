"""One step of a session, as the loop sees it."""

from collections.abc import Generator
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, SupportsFloat

from planaria import telemetry
from planaria.core import points
from planaria.elastic.engine import Engine
from planaria.elastic.rng import micro_batch_rng
from planaria.errors import CollectiveError, ConfigError, DeadlineError

if TYPE_CHECKING:
    import torch

    from planaria.elastic.session import Session

FORWARD = points.declare("elastic.session.forward", "before a micro-batch is computed")
BACKWARD = points.declare("elastic.session.backward", "before a micro-batch's backward pass")
COMPUTED = points.declare("elastic.session.computed", "all micro-batches of a rank are computed")


class Step:
    """One try at one step. Leaving the block of `with step:` sums, agrees and applies.

    Attributes:
        number: Number of the step, from 0.
        attempt: How often it was tried before.
        committed: Whether it counts; known when the block is left.
        applied: Whether it changed the model: not where its gradient was not finite, and such
            steps are left out.
        metrics: Means over all micro-batches of all ranks, the same bits on all of them: "loss",
            "grad_norm" (before clipping), and what :meth:`log` was given.
        open: Whether it has not been carried out yet.
        failed: What ended it that is no loss of ranks, most often an error of the loop's, as text:
            the error itself would keep all that it refers to. Empty where nothing did.
    """

    def __init__(self, session: "Session", engine: Engine, number: int, attempt: int) -> None:
        self._session, self._engine = session, engine
        self.number, self.attempt = number, attempt
        self.committed = self.applied = False
        self.metrics: dict[str, float] = {}
        self.open = True
        self.failed = ""
        self._order: list[int] = []
        self._rows: list[dict[str, float]] = []
        self._batches: Generator[Any, None, None] | None = None
        self._backward_done = True
        self._lost: Exception | None = None

    def __enter__(self) -> Self:
        if not self.open:
            raise ConfigError(f"step {self.number} was carried out already")
        self.open = False
        self._session.frozen.check()
        self._session.user_state.begin()
        try:
            self._order = self._engine.begin()
        except (CollectiveError, DeadlineError) as error:
            self._lost = error
        return self

    def micro_batches(self) -> Generator[Any, None, None]:
        """Yields this rank's micro-batches; each is computed before the next one is asked for.

        A rank that has just joined has none in its first step.

        Raises:
            ConfigError: They were asked for twice, or one had no `backward`.
        """
        if self._batches is not None:
            raise ConfigError("micro_batches() once a step, within `with step:`")
        self._batches = self._compute()
        return self._batches

    def backward(self, loss: "torch.Tensor", weight: float = 1.0) -> None:
        """Adds a micro-batch's gradient to the step's, once for each micro-batch.

        Args:
            loss: The mean loss of the micro-batch, a scalar.
            weight: What it counts, such as its number of tokens: gradients and metrics are means
                that are weighted so over all micro-batches of all ranks.

        Raises:
            ConfigError: There is no micro-batch under way, or it had its backward already; or the
                loss is not one number.
            CollectiveError: Ranks are lost; leaving `with step:` goes on with the others.
        """
        if self._backward_done:
            raise ConfigError("backward() once for each batch of micro_batches(), on a scalar loss")
        if loss.numel() != 1:
            raise ConfigError(
                f"backward() takes the mean loss of the micro-batch, one number, and not a tensor "
                f"of shape {list(loss.shape)}: add .mean()"
            )
        self._backward_done = True
        points.point(BACKWARD, step=self.number)
        self._look_up()
        self._rows[-1]["loss"] = float(loss.detach())
        self._engine.reducer.weigh(weight)
        scale = self._session.scale
        if weight != 1.0:
            loss = loss * weight
        if scale is not None:
            loss = loss * scale.value
        try:
            loss.backward()
        except CollectiveError as error:  # the reducer has looked up meanwhile
            self._lost = error
            raise
        except BaseException:
            # What is summed of it is a part: a loop that catches this must not go on with it.
            self._backward_done = False
            raise

    def log(self, **values: SupportsFloat) -> None:
        """Records numbers of the micro-batch under way; `metrics` has their weighted means.

        Raises:
            ConfigError: There is no micro-batch under way.
        """
        if not self._rows or self._batches is None:
            raise ConfigError("log() within the loop over micro_batches()")
        self._rows[-1].update({name: float(value) for name, value in values.items()})

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> bool:
        if self._batches is not None:
            self._batches.close()
        if error is not None and error is not self._lost:
            self.failed = _said(error)
            return False
        lost, self._lost = self._lost, None
        if error is not None:
            # What it refers to keeps connections open, and other ranks wait for those to break.
            error.__traceback__ = None
        try:
            if lost is None:
                self._check()
                self._session.user_state.check()
                self._engine.commit(self._rows, stop=self._session._stop)
        except (CollectiveError, DeadlineError) as caught:
            lost = caught
        except BaseException as caught:
            self.failed = _said(caught)
            raise
        if lost is not None:
            lost.__traceback__ = None
            state = self._session.user_state
            changed = state.put_back()
            try:
                self._engine.generations.recover(lost)
            except BaseException as caught:
                self.failed = _said(caught)
                raise
            finally:
                if self._engine.step > self.number:  # others knew that it counts
                    state.put(changed)
        self._conclude()
        return error is not None

    def _compute(self) -> Generator[Any, None, None]:
        engine, session = self._engine, self._session
        reducer, guard = engine.reducer, session.buffers
        full = session.data.micro_batches(self.number, order=self._order) if self._order else None
        found = next(full, None) if full is not None else None
        guard.begin()
        for index in self._order:
            self._look_up()
            points.point(FORWARD, step=self.number)
            self._rows.append({})
            if found is None or found[0] != index:  # no samples: a short last step
                with reducer.micro_batch(index, 0.0):
                    continue
            engine.phase("compute")
            with (
                telemetry.span("elastic.compute", step=self.number, micro_batch=index),
                reducer.micro_batch(index),
                micro_batch_rng(session.seed, self.number, index),
            ):
                self._backward_done = False
                yield found[1]
                if not self._backward_done:
                    raise ConfigError(
                        f"micro-batch {index} of step {self.number} had no step.backward(loss), or "
                        "one that failed: that error is not to be caught within `with step:`"
                    )
            guard.check()
            engine.phase("data")
            found = next(full, None) if full is not None else None
        points.point(COMPUTED, step=self.number)

    def _look_up(self) -> None:
        """Gives the step up where ranks are lost. Data that does not come is no such loss."""
        try:
            self._engine.check()
        except CollectiveError as error:
            self._lost = error
            raise

    def _check(self) -> None:
        if len(self._rows) != len(self._order) or not self._backward_done:
            raise ConfigError(
                f"{len(self._rows)} of the {len(self._order)} micro-batches of step {self.number} "
                "were computed: go through all of step.micro_batches()"
            )

    def _conclude(self) -> None:
        """What became of the step, as all ranks know it now."""
        decision = self._engine.decision
        self.committed = self._engine.step > self.number
        if self.committed and decision is not None and decision.step == self.number:
            self.applied = self._engine.applied
            self.metrics = {**decision.metrics, "grad_norm": self._engine.norm}


def _said(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".rstrip(": ")[:300]
