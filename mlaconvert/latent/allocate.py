"""Sharing a budget between layers by what a scalar buys."""

from __future__ import annotations

from collections.abc import Callable, Sequence


def allocate(curves: Sequence[Callable[[int], float]], total: int, *, bounds: tuple[int, int]) -> list[int]:
    """Scalars of each layer, `total` in all and within `bounds` each, that minimise the sum of errors.

    `curves` give each layer's error at a budget. Greedy: the next scalars go where they buy most (errors fall ever
    more slowly with the budget, and looking ahead by a whole rotary component steps over the kinks). Raises ValueError
    when `total` does not fit the bounds.
    """
    low, high = bounds
    if not low * len(curves) <= total <= high * len(curves):
        raise ValueError(f"{total} scalars do not fit {len(curves)} layers of {low} to {high}")
    errors = [[curve(budget) for budget in range(low, high + 1)] for curve in curves]
    chosen = [low] * len(curves)
    left = total - sum(chosen)
    while left:
        gains = []
        for layer, curve in enumerate(errors):
            at = chosen[layer] - low
            for step in range(1, min(3, left, len(curve) - 1 - at) + 1):
                gains.append(((curve[at] - curve[at + step]) / step, step, layer))
        _, step, layer = max(gains)
        chosen[layer] += step
        left -= step
    return chosen
