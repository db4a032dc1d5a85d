"""Floating point operations where torch has no formula, or refuses."""

import torch

from memfit.planner.flops import flops_of


def test_flops_of_cpu_attention_are_those_of_its_two_products() -> None:
    q = torch.zeros(2, 4, 16, 8)
    func = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
    assert flops_of(func, (q, q, q), {}, None) == 2 * (2 * 2 * 4 * 16 * 16 * 8)


def test_flops_of_attention_count_a_head_of_keys_for_each_of_queries() -> None:
    q, k = torch.zeros(2, 4, 16, 8), torch.zeros(2, 2, 16, 8)
    func = torch.ops.aten._scaled_dot_product_flash_attention.default
    assert flops_of(func, (q, k, k), {}, None) == flops_of(func, (q, q, q), {}, None)
    backward = torch.ops.aten._scaled_dot_product_flash_attention_backward.default
    assert flops_of(backward, (q, q, k, k), {}, None) == 5 * (2 * 2 * 4 * 16 * 16 * 8)
