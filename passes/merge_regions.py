"""Which neighbouring regions are merged: byte-pair encoding over the step graphs of a plan."""

from __future__ import annotations

import itertools
import operator
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from torch import fx

from fxmask.ir.graph import is_view
from fxmask.passes.split_regions import Region, Segment, build_regions, segments_of

# Compiling a region costs as much as this many nodes, whatever is in it.
COMPILATION_NODES = 30
T = TypeVar("T")
Token = int  # stands for the structure of a segment, or for a pair of tokens


class Vocabulary:
    """Which neighbouring segments are merged; chosen for the step graphs of one plan, applied to any.

    Args:
        overhead: what compiling a region costs besides its nodes, in nodes.
    """

    def __init__(self, overhead: int = COMPILATION_NODES) -> None:
        self._overhead = overhead
        self._merges: list[tuple[Token, Token, Token]] = []  # two neighbours, and what stands for both
        self._known: dict[Any, Token] = {}
        self._whole = False  # the graphs are so few that they need not be cut

    def _token(self, structure: Any) -> Token:
        return self._known.setdefault(structure, len(self._known))

    def uncut(self, graph_modules: Sequence[fx.GraphModule]) -> int:
        """What compiling whole step graphs costs, in nodes."""
        return sum(self._cost(sum(segments_of(module), ())) for module in graph_modules)

    def choose_merges(self, graph_modules: Sequence[fx.GraphModule], budget: int) -> int:
        """Choose merges such that the distinct regions have at most ``budget`` nodes to compile.

        Args:
            graph_modules: the distinct step graphs.
            budget: in nodes; each region counts ``overhead`` on top of its own.

        Returns:
            What compiling the distinct regions costs; more than the budget if they do without any merge.
        """
        whole = self.uncut(graph_modules)
        self._whole = whole <= budget
        if self._whole:
            return whole
        texts = []
        size: dict[Token, int] = {}
        for module in graph_modules:
            segments = segments_of(module)
            text = self._tokens(module, segments)
            for token, segment in zip(text, segments, strict=True):
                size[token] = self._cost(segment)
            texts.append(text)
        spent = sum(size.values())
        while True:
            pair = self._best(texts, size, budget - spent)
            if pair is None:
                return spent
            made = self._token(pair)
            self._merges.append((*pair, made))
            texts = [_merge(text, text, pair, lambda a, b, made=made: made) for text in texts]  # type: ignore[misc]
            size[made] = size[pair[0]] + size[pair[1]] - self._overhead
            spent = sum(size[token] for token in {token for text in texts for token in text})

    def _cost(self, segment: Segment) -> int:
        return self._overhead + sum(not is_view(node) for node in segment)

    def split(self, graph_module: fx.GraphModule) -> list[Region]:
        """The regions of a step graph."""
        segments = segments_of(graph_module)
        if self._whole:
            return build_regions(graph_module, [sum(segments, ())])
        text = self._tokens(graph_module, segments)
        for first, second, made in self._merges:
            segments = _merge(text, segments, (first, second), operator.add)
            text = _merge(text, text, (first, second), lambda a, b, made=made: made)  # type: ignore[misc]
        return build_regions(graph_module, segments)

    def _tokens(self, graph_module: fx.GraphModule, segments: Sequence[Segment]) -> list[Token]:
        regions = build_regions(graph_module, segments)
        keys = {region.outputs: region.key for region in regions}
        named = {name: region.outputs for region in regions for name in region.outputs}
        return [self._token(next((keys[named[n.name]] for n in segment if n.name in named), "")) for segment in segments]

    def _best(self, texts: Sequence[Sequence[Token]], size: Mapping[Token, int], left: int) -> tuple[Token, Token] | None:
        """The pair that saves most calls for what it adds to compile, or ``None``."""
        single = Counter(token for text in texts for token in text)
        pairs = Counter(pair for text in texts for pair in itertools.pairwise(text))
        best, most = None, 0.0
        for (a, b), count in pairs.items():
            if a == b:
                count = sum(len(text) - len(_merge(text, text, (a, b), operator.add)) for text in texts)
            used = {a: 2 * count} if a == b else {a: count, b: count}
            gone = sum(size[token] for token, n in used.items() if single[token] == n)
            added = size[a] + size[b] - self._overhead - gone
            gain = count / max(1, added)
            if added <= left and gain > most:
                best, most = (a, b), gain
        return best


def _merge(text: Sequence[Token], items: Sequence[T], pair: tuple[Token, Token], join: Callable[[T, T], T]) -> list[T]:
    """``items``, which belong to the tokens of ``text``, with those of every occurrence of ``pair`` joined."""
    merged: list[T] = []
    k = 0
    while k < len(text):
        if tuple(text[k : k + 2]) == pair:
            merged.append(join(items[k], items[k + 1]))
            k += 1
        else:
            merged.append(items[k])
        k += 1
    return merged
