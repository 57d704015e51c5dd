"""Objects of different size in batches of about the same number of voxels."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

_OPEN = 8  # batches that are filled at once


class Packing:
    """Which objects each item has, so that its voxels stay within a budget; a function of (seed, item) alone.

    In every pass each object comes once, in an order of its own.

    Args:
        lengths: voxels of every object; those above the budget are left out.
        budget: most voxels of an item.
        most: most objects of an item.
        seed: of the orders.
    """

    def __init__(self, lengths: Sequence[int] | np.ndarray, budget: int, most: int, seed: int) -> None:
        self.lengths = np.asarray(lengths)
        self.budget, self.most, self.seed = budget, most, seed
        self.fitting = np.flatnonzero(self.lengths <= budget)
        self._starts = [0]  # first item of every pass whose items were counted, and of the next
        self._passes: dict[int, list[np.ndarray]] = {}

    def __getitem__(self, item: int) -> np.ndarray:
        """Numbers of the objects of an item."""
        while self._starts[-1] <= item:
            self._starts.append(self._starts[-1] + len(self._pass(len(self._starts) - 1)))
        number = int(np.searchsorted(self._starts, item, side="right")) - 1
        return self._pass(number)[item - self._starts[number]]

    def _pass(self, number: int) -> list[np.ndarray]:
        kept = self._passes.get(number)
        if kept is None:
            order = np.random.default_rng([self.seed, number, 7]).permutation(self.fitting)
            kept = pack(order, self.lengths, self.budget, self.most)
            self._passes = {k: v for k, v in self._passes.items() if abs(k - number) < 3} | {number: kept}
        return kept


def pack(order: np.ndarray, lengths: np.ndarray, budget: int, most: int) -> list[np.ndarray]:
    """Objects in the given order, each in the first of a few open batches that has room; a full one is closed."""
    closed: list[list[int]] = []
    opened: list[list[int]] = []
    room: list[int] = []
    for number in order.tolist():
        length = int(lengths[number])
        place = next((k for k, left in enumerate(room) if left >= length), None)
        if place is None:
            if len(opened) == _OPEN:
                fullest = room.index(min(room))
                closed.append(opened.pop(fullest))
                room.pop(fullest)
            opened.append([])
            room.append(budget)
            place = len(opened) - 1
        opened[place].append(number)
        room[place] -= length
        if len(opened[place]) == most:
            closed.append(opened.pop(place))
            room.pop(place)
    return [np.array(batch) for batch in closed + opened]
