"""Sharing bytes between channels and layers, and quantisers fitted to what is cached."""

from __future__ import annotations

from itertools import pairwise, product

import pytest
import torch
from calibrate_cases import beside_present, make_layer, target
from scipy.stats import laplace

from mlaconvert.config.packing import packed_bytes
from mlaconvert.conversion.calibration.bits import fit_quantizer, in_runs, quantised, share_bits
from mlaconvert.conversion.calibration.measure import layer_moments
from mlaconvert.conversion.calibration.newest import attention_error

# What b bits leave of the variance of Laplace's distribution, with the best steps of all (Max 1960; Paez and Glisson,
# "Minimum mean-squared-error quantization in speech PCM and DPCM systems", 1972, table I).
BEST_OF_LAPLACE = {1: 0.5, 2: 0.1762, 3: 0.0545, 4: 0.0154, 5: 0.00414}


def left(bits: int) -> float:
    """About what is left of a channel's error."""
    return (1.0, 0.5, 0.19, 0.054)[bits] if bits < 4 else 4.0 ** (1 - bits)


def error(energies: list[list[float]], bits: list[list[int]]) -> float:
    rows = [[*row, *[0] * (len(channels) - len(row))] for row, channels in zip(bits, energies, strict=True)]
    pairs = (pair for channels, row in zip(energies, rows, strict=True) for pair in zip(channels, row, strict=True))
    return sum(energy * left(b) for energy, b in pairs)


@pytest.mark.parametrize("budget", [2, 3, 4, 6])
def test_bytes_go_where_they_take_most_of_the_error(budget: int) -> None:
    energies = [[9.0, 2.0, 0.1], [40.0, 3.0]]
    found = share_bits(energies, budget)
    assert sum(map(packed_bytes, found)) <= budget
    every = (
        [[*a], [*b]]
        for *a, x, y in product(range(7), repeat=5)
        for b in [(x, y)]
        if packed_bytes([v for v in a if v]) + packed_bytes([v for v in b if v]) <= budget and a[0] and x
    )
    # Whole bytes make some splits impossible; what is found bit by bit is within half a bit of the best.
    assert error(energies, found) <= 2 * min(error(energies, bits) for bits in every)


def test_a_layer_that_matters_more_gets_more_and_worthless_channels_none() -> None:
    falling = [4.0**-i for i in range(20)]
    small, large = share_bits([falling, [1e4 * e for e in falling]], 2 * 9, beside=[8])
    assert sum(large) > sum(small) > 0
    assert len(large) > len(small)
    for bits in (small, large):
        assert bits == sorted(bits, reverse=True)
        # A quarter of the energy is worth one bit less; the last ones fill up bytes that are begun.
        assert all(a - b in (0, 1, 2) for a, b in pairwise(bits))
    assert packed_bytes([*small, 8]) + packed_bytes([*large, 8]) <= 18
    assert share_bits([[1.0, 0.0]], 1)[0][0] >= 1


def test_no_channel_gets_more_than_twelve_bits() -> None:
    assert share_bits([[1.0, 1e-9]], 50) == [[12, 12]]
    assert in_runs([12, 12, 5, 8]) == ((12, 2), (5, 1), (8, 1))


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5])
def test_a_fitted_quantiser_is_near_the_best_of_all(bits: int) -> None:
    """Of values with long tails, of any size and centre; a channel of other bits beside it changes nothing."""
    grid = (torch.arange(6001, dtype=torch.float64) + 0.5) / 6001
    unit = torch.from_numpy(laplace.ppf(grid.numpy(), scale=0.5**0.5))
    x = torch.stack((unit, 300 + 25 * unit), 1)
    made = fit_quantizer(x, [bits, bits])
    lost = (made(x)[0] - x).square().mean(0) / x.var(0)
    torch.testing.assert_close(lost[0], lost[1], rtol=0.05, atol=0)
    assert lost.max() < 1.12 * BEST_OF_LAPLACE[bits]
    assert lost.min() > 0.8 * BEST_OF_LAPLACE[bits]  # the grid cuts the tails off


def test_more_bits_lose_less_of_a_layer() -> None:
    layer = beside_present(make_layer(3))
    made = target("token", rope="head", v_dim=14, present="exact")
    student = made.convert(layer, made.layer(11, ()), layer_moments(layer))
    exact, losses = attention_error(layer, student), []
    for bits in (1, 3, 6, 12):
        shape = made.layer(11, ())
        in_bits = quantised(layer, student, type(shape)(**(shape.__dict__ | {"cache_bits": ((bits, 11), (8, 1))})))
        losses.append(attention_error(layer, in_bits))
    assert losses == sorted(losses, reverse=True)
    assert losses[0] > 1.2 * exact
    assert losses[-1] == pytest.approx(exact, rel=1e-3)
    assert student.kv_quantizer is None  # it is as it was
