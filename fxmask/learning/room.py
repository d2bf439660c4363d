"""How many bytes learning may take, and what it does to stay within them.

What grows with the number of steps T is held as little as possible, whatever the room: the values that a step may read are
computed again where they are needed (``Student.states``), and only samples and predictions are kept for all steps. What is
left depends on the room: how many states a backward pass keeps (``reversal``), and where cached values lie while other
trajectories have their turn (``Elsewhere``).
"""

from __future__ import annotations

import itertools
import logging
import os
import shutil
import tempfile
import weakref
from collections.abc import Iterator, MutableMapping
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import fx

from fxmask.errors import InputError
from fxmask.ir.forecast import Slot
from fxmask.ir.graph import is_view

logger = logging.getLogger(__name__)
SHARE = 0.5  # of what is free
VALUES = 0.9  # of the bytes are planned with; the rest is for what the shapes of values do not say
UNKNOWN = 4 << 30  # bytes, where the system does not say what is free
CGROUPS = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
)


class Room:
    """Bytes that learning may take; without bound, if none are given.

    Args:
        size: bytes.
        asked: whether the user gave them, for messages.

    Attributes:
        given: bytes.
        size: those of them that values may take.
        said: what was chosen so far, each once.
    """

    def __init__(self, size: int | None = None, asked: bool = False) -> None:
        self.given = size
        self.size = None if size is None else int(VALUES * size)
        self.asked = asked
        self._taken = 0
        self.said: set[str] = set()
        self._folder: _Folder | None = None

    @classmethod
    def of(cls, max_learning_bytes: int | None, device: torch.device) -> Room:
        """What the user allows, else half of what is free.

        Raises:
            InputError: no whole number, or below 1.
        """
        given = max_learning_bytes
        if given is not None and (isinstance(given, bool) or not isinstance(given, int) or given < 1):
            raise InputError(f"max_learning_bytes={given!r} must be a whole number of bytes, at least 1")
        return cls(given if given is not None else int(SHARE * free_bytes(device)), given is not None)

    def holds(self, size: int) -> bool:
        """Whether so many bytes are within it."""
        return self.size is None or size <= self.size

    def require(self, size: int, what: str, remedy: str = "") -> None:
        """Refuse work of which the smallest part takes more.

        Args:
            size: bytes of its values.
            what: the part.
            remedy: what else helps.

        Raises:
            InputError: says how many bytes are needed, and what to do.
        """
        if not self.holds(size):
            needed = 1 + int((size + self._taken) / VALUES)
            source = "max_learning_bytes" if self.asked else "half of the free memory, where max_learning_bytes is not given,"
            raise InputError(
                f"learning needs about {needed:,} bytes at once for {what}, and {source} is {self.given:,}. Record runs of a "
                f"smaller batch (fxmask.record(batch_size=...)){remedy}, or allow max_learning_bytes={needed} or more"
            )

    def take(self, size: int) -> None:
        """Less room, for something that is there all the time."""
        if self.size is not None:
            self.size = max(1, self.size - size)
            self._taken += size

    def say(self, text: str) -> None:
        """Log what was chosen, once."""
        if text not in self.said:
            self.said.add(text)
            logger.info("learning within %s bytes: %s", f"{self.given:,}" if self.given is not None else "any", text)

    def elsewhere(self, device: torch.device) -> Elsewhere:
        """An empty cache whose values do not lie where the model computes."""
        if device.type == "cpu" and self._folder is None:
            self._folder = _Folder()
        return Elsewhere(self._folder if device.type == "cpu" else None)


class Elsewhere(MutableMapping[Slot, torch.Tensor]):
    """Cached values in host memory, or in files where the model itself computes in host memory; read anew at each access.

    Args:
        folder: for files; ``None`` for host memory.
    """

    _numbers = itertools.count()

    def __init__(self, folder: _Folder | None) -> None:
        self._folder = folder
        self._kept: dict[Slot, Any] = {}

    def __setitem__(self, slot: Slot, value: torch.Tensor) -> None:
        if self._folder is None:
            self._kept[slot] = (value.to("cpu"), value.device)
        else:
            self._kept[slot] = _File(self._folder.path / str(next(self._numbers)), value)

    def __getitem__(self, slot: Slot) -> torch.Tensor:
        kept = self._kept[slot]
        if isinstance(kept, _File):
            return kept.read()
        value: torch.Tensor = kept[0].to(kept[1])
        return value

    def __delitem__(self, slot: Slot) -> None:
        del self._kept[slot]

    def __iter__(self) -> Iterator[Slot]:
        return iter(self._kept)

    def __len__(self) -> int:
        return len(self._kept)

    def share(self, other: Elsewhere) -> None:
        """Take the values of another one, without moving them."""
        self._kept.update(other._kept)


class _Folder:
    """A temporary folder, which goes when no cache has it any more."""

    def __init__(self) -> None:
        self.path = Path(tempfile.mkdtemp(prefix="fxmask-learning-"))
        weakref.finalize(self, shutil.rmtree, self.path, ignore_errors=True)


class _File:
    """A tensor in a file, which goes when nobody has it any more."""

    def __init__(self, path: Path, value: torch.Tensor) -> None:
        self.path, self.shape, self.dtype = path, value.shape, value.dtype
        try:
            value.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tofile(path)
        except OSError as error:
            raise InputError(
                f"learning puts cached values into files, as they do not fit max_learning_bytes, and that failed: {error}. Let "
                "TMPDIR be a folder with more room, or allow more bytes"
            ) from error

    def read(self) -> torch.Tensor:
        """The tensor."""
        flat = torch.from_numpy(numpy.fromfile(self.path, dtype=numpy.uint8))
        return flat.view(self.dtype).reshape(self.shape)

    def __del__(self) -> None:
        self.path.unlink(missing_ok=True)


def free_bytes(device: torch.device) -> int:
    """Free memory where a model computes: of the GPU, or of this machine and of the control group that it runs in."""
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # PyTorch's own, to be used again
        return int(torch.cuda.mem_get_info(device)[0]) + kept
    return min((x for x in (_available(), *_group_rooms()) if x is not None), default=UNKNOWN)


def _available() -> int | None:
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return 1024 * int(line.split()[1])
    except (OSError, ValueError, IndexError):
        pass
    try:
        return int(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES"))
    except (AttributeError, OSError, ValueError):  # neither is there on every system
        return None


def _group_rooms() -> Iterator[int]:
    for limit, used in CGROUPS:
        try:
            yield max(0, int(Path(limit).read_text()) - int(Path(used).read_text()))
        except (OSError, ValueError):  # no such group, or no limit ("max")
            continue


def all_bytes(graph: fx.Graph) -> int:
    """Bytes of all values that a graph makes, views of others aside: a bound of what a backward pass through it keeps."""
    return sum(map(node_bytes, graph.nodes))


def peak_bytes(graph: fx.Graph) -> int:
    """Most bytes of values at once when a graph runs without gradients and drops what nobody reads any more."""
    last: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        for source in node.all_input_nodes:
            last[source] = node
    ends: dict[fx.Node, list[fx.Node]] = {}
    for source, node in last.items():
        ends.setdefault(node, []).append(source)
    held: dict[fx.Node, int] = {}
    owners: dict[fx.Node, fx.Node] = {}
    users: dict[fx.Node, int] = {}
    now = most = 0
    for node in graph.nodes:
        owner = owners[node] = owners[node.all_input_nodes[0]] if is_view(node) else node
        users[owner] = users.get(owner, 0) + 1
        if owner is node:
            held[node] = node_bytes(node)
            now += held[node]
            most = max(most, now)
        for source in ends.get(node, ()):
            base = owners[source]
            users[base] -= 1
            if not users[base]:
                now -= held[base]
    return most


def node_bytes(node: fx.Node) -> int:
    """Bytes of a computed value; 0 for arguments, weights and views."""
    if node.op != "call_function" or is_view(node):
        return 0
    value = node.meta.get("val")
    return sum(tensor_bytes(x) for x in (value if isinstance(value, (list, tuple)) else [value]))


def tensor_bytes(x: Any) -> int:
    """Bytes of a tensor; 0 for anything else."""
    return int(x.numel()) * x.element_size() if isinstance(x, torch.Tensor) else 0
