"""Recomputed MLP products: the same bits, less kept, no matrix product twice."""

import copy

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

from agro_kernels.model_head import UNASKED
from agro_train.policy.activations import recompute_mlp_products
from tests.kernels.small_models import TEXT, build

TOKENS = 24
LAYERS, INNER = TEXT["num_hidden_layers"], TEXT["intermediate_size"]


def loss_of(model: PreTrainedModel) -> Tensor:
    ids = torch.arange(3, 3 + TOKENS)[None]
    loss: Tensor = model.base_model(input_ids=ids, use_cache=False).last_hidden_state.square().sum()
    return loss


def kept_numbers(model: PreTrainedModel) -> int:
    """Elements of all that the forward pass keeps for the backward, weights left out."""
    kept = {}  # by address: a tensor that two nodes keep is one; alive, so that no address recurs

    def keep(tensor: Tensor) -> Tensor:
        of_a_weight = tensor.is_leaf or (tensor._base is not None and tensor._base.is_leaf)
        if not of_a_weight:
            kept[tensor.data_ptr()] = tensor
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        loss_of(model).backward()
    return sum(tensor.numel() for tensor in kept.values())


@pytest.mark.parametrize("family", UNASKED)
def test_every_family_has_the_same_bits(family: str) -> None:
    plain = build(family, tied=False)
    lean = copy.deepcopy(plain)
    assert recompute_mlp_products(lean) == LAYERS
    losses = [loss_of(model) for model in (plain, lean)]
    assert torch.equal(*losses)
    for loss in losses:
        loss.backward()
    for (name, left), right in zip(plain.named_parameters(), lean.parameters(), strict=True):
        if left.grad is None:
            assert right.grad is None, name
        else:
            assert torch.equal(left.grad, right.grad), name
    with torch.no_grad():
        assert torch.equal(loss_of(plain), loss_of(lean))


def test_a_copy_computes_with_its_own_weights() -> None:
    lean = build("llama", tied=False)
    recompute_mlp_products(lean)
    copied = copy.deepcopy(lean)
    before = loss_of(copied)
    with torch.no_grad():
        for parameter in lean.parameters():
            parameter.zero_()
    assert torch.equal(loss_of(copied), before)


def test_no_matrix_product_is_made_again_and_two_tensors_a_layer_are_not_kept() -> None:
    plain = build("llama", tied=False)
    lean = copy.deepcopy(plain)
    recompute_mlp_products(lean)
    flops = []
    for model in (plain, lean):
        with FlopCounterMode(display=False) as counter:
            loss_of(model).backward()
        flops.append(counter.get_total_flops())
    assert flops[0] == flops[1] > 0
    less = kept_numbers(plain) - kept_numbers(lean)
    assert less == 2 * TOKENS * INNER * LAYERS
