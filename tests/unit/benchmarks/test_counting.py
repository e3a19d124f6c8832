"""The counter's figures by hand."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from benchmarks.counting import BANDWIDTH, DEVICE, LAUNCH_S, Counts, counted


def on_device(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device=DEVICE)


def test_an_elementwise_kernel_reads_and_writes_its_tensors() -> None:
    x, y = on_device(100, 50), on_device(100, 50)
    found = counted(lambda: x + y)
    moved = 3 * 100 * 50 * 4
    assert found.kernels == 1
    assert found.elementwise_gb == pytest.approx(moved / 1e9)
    assert found.modelled_ms == pytest.approx((LAUNCH_S + moved / BANDWIDTH) * 1e3)
    assert (found.tflop, found.copies, found.waits) == (0, 0, 0)


def test_in_place_the_output_is_read_too_unless_it_is_overwritten() -> None:
    x, y = on_device(1000), on_device(1000)
    assert counted(lambda: x.add_(y)).elementwise_gb == pytest.approx(12e-6)
    assert counted(lambda: x.copy_(y)).elementwise_gb == pytest.approx(8e-6)


def test_an_expanded_tensor_is_read_once() -> None:
    x, y = on_device(100, 50), on_device(1, 50).expand(100, 50)
    assert counted(lambda: x + y).elementwise_gb == pytest.approx((2 * 100 * 50 + 50) * 4 / 1e9)


def test_views_and_allocations_are_no_kernels() -> None:
    x = on_device(4, 6)
    found = counted(lambda: (x.view(24), x.t(), x[0], x.chunk(2), torch.empty_like(x), x.exp()))
    assert found.kernels == 1


def test_a_product_bounded_by_arithmetic_moves_nothing_elementwise() -> None:
    x, weight = on_device(4096, 4096, dtype=torch.bfloat16), on_device(4096, 4096, dtype=torch.bfloat16)
    found = counted(lambda: functional.linear(x, weight))
    assert found == Counts(1, 0.0, pytest.approx(2 * 4096**3 / 1e12), pytest.approx(found.modelled_ms), 0, 0)
    assert found.modelled_ms == pytest.approx((LAUNCH_S + 2 * 4096**3 / 620e12) * 1e3)


def test_a_product_of_a_low_rank_that_is_added_in_place_reads_and_writes_its_output() -> None:
    out = on_device(4096, 4096, dtype=torch.bfloat16)
    low, b = on_device(4096, 64, dtype=torch.bfloat16), on_device(64, 4096, dtype=torch.bfloat16)
    found = counted(lambda: out.addmm_(low, b))
    assert found.elementwise_gb == pytest.approx(2 * 2 * 4096**2 / 1e9)
    assert found.tflop == pytest.approx(2 * 4096 * 64 * 4096 / 1e12)
    moved = 2 * (2 * 4096**2 + 2 * 4096 * 64)
    assert found.modelled_ms == pytest.approx((LAUNCH_S + moved / BANDWIDTH) * 1e3)


def test_attention_and_norm_are_a_kernel_each_as_on_a_gpu() -> None:
    x = on_device(2, 3, 256, 64, dtype=torch.bfloat16)
    attention = counted(lambda: functional.scaled_dot_product_attention(x, x, x))
    assert (attention.kernels, attention.elementwise_gb) == (1, 0)
    assert attention.tflop == pytest.approx(2 * 2 * 2 * 3 * 256 * 256 * 64 / 1e12)
    assert counted(lambda: functional.rms_norm(x, (64,), on_device(64, dtype=torch.bfloat16))).kernels == 1


def test_the_host_waits_for_reads_and_for_copies_from_pageable_memory() -> None:
    x, host = on_device(3), torch.ones(3)
    work = {
        "read": lambda: bool((x > 0).all()),
        "pageable": lambda: host.to(DEVICE),
        "pageable, not blocking": lambda: host.to(DEVICE, non_blocking=True),
        "pinned": lambda: host.pin_memory().to(DEVICE),
        "pinned, not blocking": lambda: host.pin_memory().to(DEVICE, non_blocking=True),
    }
    waits = {name: counted(lambda part=part: (x.exp(), part(), x.exp())).waits for name, part in work.items()}
    assert waits == {
        "read": 1,
        "pageable": 1,
        "pageable, not blocking": 1,
        "pinned": 1,
        "pinned, not blocking": 0,
    }


def test_waits_before_the_first_kernel_and_after_the_last_delay_nothing() -> None:
    x, host = on_device(3), torch.ones(3)
    found = counted(lambda: (host.to(DEVICE), x.exp(), host.to(DEVICE)))
    assert (found.copies, found.waits) == (2, 0)


def test_copies_are_summed_in_both_directions() -> None:
    x, host = on_device(1000), torch.ones(500)
    work = (x.exp, lambda: x.to("cpu", non_blocking=True), lambda: host.pin_memory().to(DEVICE, non_blocking=True))
    found = counted(lambda: [part() for part in work])
    assert (found.copies, found.copied_mb) == (2, pytest.approx(6e-3))
