"""One code and the number of its part."""

from __future__ import annotations

import torch

from splitquant_plugins.checkpoints.disjoint_parts import joined, parted


def codes_of(k, seed, bits=2):
    """Codes of k parts with disjoint supports, and a code of zero for each row of each."""
    generator = torch.Generator().manual_seed(seed)
    zeros = [torch.randint(2**bits, (6, 1), generator=generator, dtype=torch.uint8) for _ in range(k)]
    whole = torch.randint(2**bits, (6, 9), generator=generator, dtype=torch.uint8)
    owner = torch.randint(k, (6, 9), generator=generator)
    return [torch.where(owner == number, whole, zero) for number, zero in enumerate(zeros)], zeros


def test_parts_come_back():
    for k in (1, 2, 3, 4):
        for seed in range(20):
            codes, zeros = codes_of(k, seed)
            found = joined(codes, zeros)
            assert found is not None
            for part, again in zip(codes, parted(*found, zeros), strict=True):
                assert torch.equal(part, again)


def test_overlapping_parts_are_not_joined():
    codes, zeros = codes_of(3, 0)
    codes[0][2, 3], codes[1][2, 3] = zeros[0][2, 0] ^ 1, zeros[1][2, 0] ^ 1
    assert joined(codes, zeros) is None


def test_signed_codes_come_back():
    codes = [torch.tensor([[-3, 0, 0]], dtype=torch.int8), torch.tensor([[0, 0, 127]], dtype=torch.int8)]
    zeros = [torch.zeros(1, 1, dtype=torch.int8)] * 2
    found = joined(codes, zeros)
    assert found is not None
    assert found[1].tolist() == [[0, 0, 1]]
    assert all(map(torch.equal, codes, parted(*found, zeros)))
