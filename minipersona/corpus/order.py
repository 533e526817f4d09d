"""Which rows a step sees: a seeded permutation an epoch, dealt in batches."""

from __future__ import annotations

import numpy as np


class RowOrder:
    """Rows of step k (from 1): entries (k-1) * batch to k * batch of permutation after permutation.

    The first epoch is ``numpy.random.Generator(PCG64(seed)).permutation(rows)``; later ones continue the generator.
    A pure function of (rows, batch, seed, step): resuming needs no position but the step.
    """

    def __init__(self, rows: int, batch: int, seed: int) -> None:
        assert rows > 0 and batch > 0
        self.rows, self.batch = rows, batch
        self._generator = np.random.Generator(np.random.PCG64(seed))
        self._epochs: list[np.ndarray] = []

    def step(self, step: int) -> list[int]:
        """The row indices of a step, in order."""
        first = (step - 1) * self.batch
        return [self._row(k) for k in range(first, first + self.batch)]

    def _row(self, position: int) -> int:
        epoch, offset = divmod(position, self.rows)
        while len(self._epochs) <= epoch:
            self._epochs.append(self._generator.permutation(self.rows))
        return int(self._epochs[epoch][offset])
