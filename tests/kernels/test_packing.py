"""Packing of padded tensors."""

import pytest
import torch

from agro_kernels.packing import pack_sequences

MASK = torch.tensor([[False, True, True], [False, False, False], [True, False, True]])


def test_packs_every_tensor_in_order() -> None:
    tokens = torch.arange(9).view(3, 3)
    hidden = torch.arange(18.0).view(3, 3, 2)
    (packed_tokens, packed_hidden), cu_seqlens = pack_sequences(MASK, tokens, hidden)
    assert packed_tokens.tolist() == [1, 2, 6, 8]
    assert torch.equal(packed_hidden, hidden.view(9, 2)[[1, 2, 6, 8]])
    assert cu_seqlens.tolist() == [0, 2, 2, 4]
    assert cu_seqlens.dtype == torch.int32
    assert packed_tokens.dtype == torch.int64


def test_gradients_reach_counted_tokens_only() -> None:
    logprobs = torch.zeros(3, 3, requires_grad=True)
    (packed,), _ = pack_sequences(MASK, logprobs)
    packed.sum().backward()
    assert torch.equal(logprobs.grad, MASK.float())


def test_nothing_to_pack() -> None:
    packed, cu_seqlens = pack_sequences(torch.zeros(2, 0, dtype=torch.bool), torch.zeros(2, 0))
    assert packed[0].shape == (0,)
    assert cu_seqlens.tolist() == [0, 0, 0]
    packed, cu_seqlens = pack_sequences(torch.zeros(0, 4, dtype=torch.bool))
    assert packed == ()
    assert cu_seqlens.tolist() == [0]


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(TypeError, match="completion_mask: expected bool, got torch.int64"):
        pack_sequences(MASK.long())
    with pytest.raises(ValueError, match=r"completion_mask: expected shape \(B, T\), got \(9,\)"):
        pack_sequences(MASK.flatten())
    with pytest.raises(ValueError, match=r"tensors\[1\]: expected shape .*\(3, 3\), got \(3, 2\)"):
        pack_sequences(MASK, MASK, MASK[:, :2])
