"""Spectra from Gram matrices and thin QRs against torch's float64 SVD."""

import math

import pytest
import torch

from mlaconvert.errors import ConfigError
from mlaconvert.latent import spectrum

SPECTRA = {
    "flat": torch.ones,
    "power": lambda n: torch.arange(1, n + 1).pow(-0.7),
    "steep": lambda n: torch.exp(-torch.arange(n) / 4.0),
    "low_rank_and_noise": lambda n: torch.cat((torch.full((9,), 5.0), torch.full((n - 9,), 0.05))),
}


def matrix(rows: int, columns: int, values: torch.Tensor, seed: int) -> torch.Tensor:
    """A float64 [rows, columns] matrix with these singular values and random directions."""
    generator = torch.Generator().manual_seed(seed)
    n = len(values)
    left = torch.linalg.qr(torch.randn(rows, n, dtype=torch.float64, generator=generator)).Q
    right = torch.linalg.qr(torch.randn(columns, n, dtype=torch.float64, generator=generator)).Q
    return (left * values.to(torch.float64)) @ right.T


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", SPECTRA)
def test_stacked_spectrum_equals_the_svd(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spectrum, "_GRAM_ROWS", 23)  # several blocks, the last one shorter
    key = matrix(97, 61, SPECTRA[name](61), seed=1).to(dtype)
    value = matrix(75, 61, 0.3 * SPECTRA[name](61), seed=2).to(dtype)
    reference = torch.linalg.svdvals(torch.cat((key, value)).to(torch.float64))

    found = spectrum.singular_values_from_gram(spectrum.gram(key, value))

    assert found.dtype == torch.float64
    torch.testing.assert_close(found, reference, rtol=0, atol=1e-7 * float(reference[0]))
    energy = reference.square()
    for threshold in (0.5, 0.9, 0.99):
        wanted = next(r for r in range(1, 62) if energy[:r].sum() / energy.sum() >= threshold)
        assert spectrum.effective_rank(found, threshold) == wanted
    for rank in (0, 1, 17, 60):
        left, s, right = torch.linalg.svd(torch.cat((key, value)).to(torch.float64), full_matrices=False)
        truncated = (left[:, :rank] * s[:rank]) @ right[:rank]
        full = torch.cat((key, value)).to(torch.float64)
        error = float((full - truncated).norm() / full.norm())
        assert spectrum.relative_error(found, rank) == pytest.approx(error, rel=1e-6, abs=1e-7)
        assert spectrum.energy_at(found, rank) == pytest.approx(1 - error**2, abs=1e-12)


def test_gram_adds_and_keeps_float64_of_low_precision_sources() -> None:
    key, value = torch.randn(5, 8).bfloat16(), torch.randn(11, 8)
    both = spectrum.gram(key, value)
    wanted = key.double().T @ key.double() + value.double().T @ value.double()
    torch.testing.assert_close(both, wanted, rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(both, spectrum.gram(key) + spectrum.gram(value), rtol=1e-14, atol=1e-14)


def test_fewer_rows_than_columns_leaves_zeros() -> None:
    wide = matrix(4, 9, torch.tensor([4.0, 3.0, 2.0, 1.0]), seed=3)
    found = spectrum.singular_values_from_gram(spectrum.gram(wide))
    assert found.shape == (9,)
    torch.testing.assert_close(found[:4], torch.tensor([4.0, 3.0, 2.0, 1.0]).double(), rtol=1e-12, atol=0)
    assert float(found[4:].max()) < 1e-7
    assert not found.isnan().any()


@pytest.mark.parametrize(("rows", "rank", "columns"), [(53, 7, 31), (6, 17, 40), (50, 33, 20)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_product_spectrum_equals_the_svd_of_the_product(rows: int, rank: int, columns: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(4)
    up = (torch.randn(rows, rank, generator=generator) * torch.logspace(0, -3, rank)).to(dtype)
    down = torch.randn(rank, columns, generator=generator).to(dtype)
    smallest = min(rows, rank, columns)
    reference = torch.linalg.svdvals(up.double() @ down.double())[:smallest]

    found = spectrum.product_singular_values(up, down)

    assert found.shape == (smallest,)
    torch.testing.assert_close(found, reference, rtol=1e-9, atol=1e-12 * float(reference[0]))


def test_effective_rank_and_energy_by_hand() -> None:
    values = torch.tensor([4.0, 2.0, 2.0, 1.0])  # energies 16, 4, 4, 1 of 25
    assert [spectrum.effective_rank(values, t) for t in (0.5, 0.65, 0.9, 0.97)] == [1, 2, 3, 4]
    assert spectrum.cumulative_energy(values).tolist() == pytest.approx([0.64, 0.8, 0.96, 1.0])
    assert [spectrum.energy_at(values, r) for r in range(5)] == pytest.approx([0, 0.64, 0.8, 0.96, 1.0])
    assert [spectrum.relative_error(values, r) for r in (0, 1, 3, 4)] == pytest.approx([1, 0.6, 0.2, 0])
    assert spectrum.effective_rank(1e-9 * values, 0.9) == 3  # scale does not matter


def test_small_errors_do_not_cancel() -> None:
    values = torch.tensor([1.0, 1e-12], dtype=torch.float64)
    assert spectrum.relative_error(values, 1) == pytest.approx(1e-12, rel=1e-9)


def test_a_zero_matrix_has_no_rank_and_nothing_to_lose() -> None:
    values = spectrum.singular_values_from_gram(spectrum.gram(torch.zeros(7, 5)))
    assert spectrum.effective_rank(values) == 0
    assert spectrum.energy_at(values, 0) == 1
    assert spectrum.relative_error(values, 2) == 0
    assert spectrum.cumulative_energy(values).tolist() == [1.0] * 5


@pytest.mark.parametrize("threshold", [0.0, 1.0, -0.1, 99, math.nan, math.inf])
def test_a_threshold_must_be_a_share(threshold: float) -> None:
    with pytest.raises(ConfigError, match=f"threshold is {threshold}"):
        spectrum.effective_rank(torch.ones(3), threshold)


@pytest.mark.parametrize("rank", [-1, 4])
def test_a_rank_must_fit(rank: int) -> None:
    with pytest.raises(ConfigError, match=rf"rank {rank} .* 3 singular values"):
        spectrum.energy_at(torch.ones(3), rank)


@pytest.mark.parametrize(("rank", "share"), [(64, 0.984), (128, 0.984), (256, 0.969), (512, 0.939)])
def test_random_baseline_of_the_paper_shapes(rank: int, share: float) -> None:
    # Wan2.1-1.3B: 12 heads of 96 content-key and 128 value rows over the latent, 1536 inputs.
    found = spectrum.random_rank_baseline(12 * (96 + 128), rank, 1536)
    assert found / rank == pytest.approx(share, abs=0.0025)


def test_random_baseline_is_seeded_and_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = spectrum.random_rank_baseline(40, 16, 24, 0.9, seed=11)
    assert torch.equal(before, torch.get_rng_state())
    spectrum.random_rank_baseline.cache_clear()
    assert spectrum.random_rank_baseline(40, 16, 24, 0.9, seed=11) == first
    assert 1 <= first < spectrum.random_rank_baseline(40, 16, 24, 0.99, seed=11) <= 16
