"""The rounding noise: a function of (seed, id, step, element) alone, uniform and independent."""

from __future__ import annotations

import pytest
import torch

from q_galore_torch import ops, reference
from q_galore_torch.reference.formats import philox_4x32_10


def test_noise_philox_known_answers():
    """Random123's published vectors for philox4x32-10, which the key schedule is built on."""
    assert philox_4x32_10([0] * 4, [0] * 2) == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    ones = 0xFFFFFFFF
    assert philox_4x32_10([ones] * 4, [ones] * 2) == [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]
    pi = [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344], [0xA4093822, 0x299F31D0]
    assert philox_4x32_10(*pi) == [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1]


@pytest.mark.parametrize("level", ops.simd_levels())
@pytest.mark.parametrize(
    "seed, id, step, start",
    [(0, 0, 0, 0), (1, 2, 3, 5), (-1, 2**32 - 1, 2**40, 2**32 - 100), (2**62, 7, 1, 2**33 + 11)],
)
def test_noise_equals_reference(level, seed, id, step, start):
    ops.set_simd_level(level)
    for count in (0, 1, 5, 64, 1000):
        assert torch.equal(ops.noise(seed, id, step, start, count), reference.noise(seed, id, step, start, count))


def test_noise_is_made_on_the_device_that_is_asked_for():
    made = ops.noise(3, 1, 2, 0, 10, device="meta")
    assert made.device.type == "meta" and made.shape == (10,) and made.dtype == torch.int32
    assert ops.subspace_random(3, 10, 0, 0, 0, device="meta").device.type == "meta"


def test_noise_does_not_depend_on_chunks_or_threads():
    whole = ops.noise(3, 1, 2, 0, 100_000)
    torch.set_num_threads(1)
    assert torch.equal(whole, ops.noise(3, 1, 2, 0, 100_000))
    assert torch.equal(whole[777:2000], ops.noise(3, 1, 2, 777, 1223))


@pytest.mark.parametrize("axis", ["element", "step", "id", "seed"])
def test_noise_is_uniform_and_uncorrelated(axis):
    """Chi-square over 64 bins, mean, and correlation of neighbours, along each argument (5 sigma)."""
    n = 20_000
    if axis == "element":
        draws = ops.noise(1, 0, 1, 0, n)
    else:
        start = {"seed": 5, "id": 6, "step": 7}
        draws = torch.cat([ops.noise(**{**start, axis: i}, start=123, count=1) for i in range(n)])
    u = (draws.double() + 0.5) / 2**24
    assert draws.min() >= 0 and draws.max() < 2**24
    assert abs(u.mean() - 0.5) < 5 / (12 * n) ** 0.5
    expected = n / 64
    chi2 = ((torch.histc(u, 64, 0, 1) - expected) ** 2 / expected).sum().item()
    assert abs(chi2 - 63) < 5 * (2 * 63) ** 0.5
    low_bits = torch.bincount(draws & 63, minlength=64).double()
    assert abs(((low_bits - expected) ** 2 / expected).sum().item() - 63) < 5 * (2 * 63) ** 0.5
    centred = u - 0.5
    for lag in (1, 2, 256):
        correlation = (centred[lag:] * centred[:-lag]).mean() * 12
        assert abs(correlation) < 5 / n**0.5


def test_noise_of_neighbouring_steps_is_independent():
    """The joint histogram of one element's draws in steps t and t + 1."""
    a, b = (ops.noise(1, 0, step, 0, 50_000).long() >> 21 for step in (10, 11))
    counts = torch.bincount(a * 8 + b, minlength=64).double()
    expected = 50_000 / 64
    assert abs(((counts - expected) ** 2 / expected).sum().item() - 63) < 5 * (2 * 63) ** 0.5
