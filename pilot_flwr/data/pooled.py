"""The training data of all clients in one place, which no federation has.

It is what `strategy.trained_by=pooled` trains on, in a simulation: the model of all data is what a
federation is measured against.
"""

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import accumulate
from typing import overload

from pilot_flwr.data.examples import Example


class PooledExamples(Sequence[Example]):
    """The examples of several clients, one client after the other, read when they are asked for.

    An example's id is ``<client>/<its own id>``, because two clients may use the same one.

    Parameters
    ----------
    parts : Mapping[str, Sequence[Example]]
        Client → its examples.
    """

    def __init__(self, parts: Mapping[str, Sequence[Example]]) -> None:
        self._parts = list(parts.items())
        self._ends = list(accumulate(len(examples) for _, examples in self._parts))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Example]: ...
    def __getitem__(self, index: int | slice) -> Example | Sequence[Example]:
        if isinstance(index, slice):
            return [self[position] for position in range(*index.indices(len(self)))]
        position = range(len(self))[index]
        part = bisect_right(self._ends, position)
        client, examples = self._parts[part]
        example = examples[position - (self._ends[part] - len(examples))]
        return replace(example, id=f"{client}/{example.id}")
