"""A process's part of the batches."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Shaped


class BatchPart(NamedTuple):
    """One process's part of every micro-batch: one of equal parts of B, and one of T.

    Attributes:
        process: number of the process.
        processes: number of processes.
        sharing: number of consecutive processes that have the same rows of B, each with another
            part of T.
    """

    process: int = 0
    processes: int = 1
    sharing: int = 1

    @property
    def groups(self) -> int:
        """Number of groups of processes that share rows: the number of parts of B."""
        return self.processes // self.sharing

    def rows(self, array: Shaped[np.ndarray, "A B ..."]) -> Shaped[np.ndarray, "A own ..."]:
        """The process's part of B, with all of T."""
        return _cut(array, 1, self.process // self.sharing, self.groups)

    def positions(
        self, array: Shaped[np.ndarray, "A B T ..."]
    ) -> Shaped[np.ndarray, "A B own ..."]:
        """The process's part of T."""
        return _cut(array, 2, self.process % self.sharing, self.sharing)

    def tokens(self, array: Shaped[np.ndarray, "A B T ..."]) -> Shaped[np.ndarray, "A b t ..."]:
        """The process's part of B and T."""
        return self.positions(self.rows(array))

    def shards(self, array: Shaped[np.ndarray, "S ..."]) -> Shaped[np.ndarray, "own ..."]:
        """Of all devices, those of the process."""
        return _cut(array, 0, self.process, self.processes)


WHOLE = BatchPart()  # of one process


def _cut(
    array: Shaped[np.ndarray, "..."], axis: int, part: int, parts: int
) -> Shaped[np.ndarray, "..."]:
    size = array.shape[axis] // parts
    return array[(slice(None),) * axis + (slice(part * size, (part + 1) * size),)]
