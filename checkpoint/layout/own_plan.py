"""What one rank derives from a plan: worked out once, used until the layout changes."""

from collections.abc import Mapping
from functools import cached_property
from typing import Any

from planaria.checkpoint.capture.cutting import ChunkLayout, cut
from planaria.checkpoint.capture.file_sources import FileSources, KnownPlaces
from planaria.checkpoint.format.manifest import TensorInfo, tensors_to_json
from planaria.checkpoint.format.safetensors import FileEntry, Header, data_nbytes
from planaria.checkpoint.layout.plan import SavePlan, announce, digest
from planaria.checkpoint.state.entries import TensorEntry
from planaria.checkpoint.state.recall import Recalled, StateLayout


class OwnPlan:
    """A plan as one rank carries it out.

    Args:
        plan: The plan of all ranks.
        rank: This rank.
        chunk_nbytes: Length of a chunk.
    """

    def __init__(self, plan: SavePlan, rank: int, chunk_nbytes: int) -> None:
        self.plan, self.chunk_nbytes = plan, chunk_nbytes
        self.entries: list[FileEntry] = plan.entries.get(rank, [])
        self.nbytes = data_nbytes(self.entries)
        self._places: KnownPlaces | None = None
        self._infos: tuple[dict[int, int], dict[str, TensorInfo], str] | None = None

    @cached_property
    def header(self) -> Header:
        """Of this rank's file."""
        return Header(self.entries)

    @cached_property
    def chunks(self) -> list[ChunkLayout]:
        """Of this rank's file."""
        return cut(self.entries, self.chunk_nbytes)

    def sources(self, live: Mapping[str, TensorEntry]) -> FileSources:
        """What this rank's file is read from, in a save of these tensors."""
        if isinstance(live, Recalled) and (
            self._places is None or self._places.layout is not live.layout
        ):
            self._places = KnownPlaces(self.entries, live.layout)
        return FileSources(self.entries, live, self._places)

    def tensors(
        self, file_of_rank: dict[int, int], nan_names: set[str]
    ) -> tuple[dict[str, TensorInfo], str | None]:
        """See `SavePlan.tensors`; with it the same as JSON, where that is at hand."""
        if nan_names:
            return self.plan.tensors(file_of_rank, nan_names), None
        if self._infos is None or self._infos[0] != file_of_rank:
            infos = self.plan.tensors(file_of_rank, set())
            self._infos = file_of_rank, infos, tensors_to_json(infos)
        return self._infos[1:]


class Announcer:
    """Announces what this rank holds; the same as last time costs next to nothing."""

    def __init__(self) -> None:
        self._last: tuple[list[Any], list[Any], str] | None = None
        self._layout: StateLayout | None = None  # that the last one was of

    def __call__(self, live: Mapping[str, TensorEntry]) -> tuple[list[Any], str]:
        """The announcement and its digest: see `planaria.checkpoint.layout.plan`."""
        layout = live.layout if isinstance(live, Recalled) else None
        if self._last is not None and layout is not None and layout is self._layout:
            return self._last[1:]
        self._layout = layout
        entries = list(live.values())
        key = [(e.name, e.dtype, e.shape, e.box, e.alias_of, e.pinned_writer) for e in entries]
        if self._last is None or self._last[0] != key:
            mine = announce(entries)
            self._last = key, mine, digest(mine)
        return self._last[1:]
