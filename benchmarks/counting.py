"""Counts what a GPU would do for a computation on torch's meta device: kernels, bytes, FLOPs, copies and waits.

Tensors there have a shape and a dtype but no values, so a full-size model needs neither a GPU nor its weights. A kernel
takes LAUNCH_S, and the longer of its arithmetic at RATES and its memory traffic at BANDWIDTH. Views and allocations are
no kernels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

aten = torch.ops.aten
DEVICE = torch.device("meta")
"""Stands for a GPU; the CPU is the host."""
LAUNCH_S = 2.5e-6
BANDWIDTH = 2.6e12
"""Bytes per second of an H100's memory that an element-wise kernel reaches."""
RATES = {"product": 620e12, "convolution": 400e12, "attention": 330e12}
"""FLOP per second that an H100 reaches in bfloat16, by kind of kernel."""
PRODUCTS = {aten.mm, aten.addmm, aten.addmm_, aten.bmm, aten.baddbmm}
ALLOCATIONS = {aten.empty, aten.empty_like, aten.empty_strided, aten.new_empty, aten.new_empty_strided}
NO_KERNEL = ALLOCATIONS | {aten._unsafe_view, aten.lift_fresh, aten.lift, aten.alias, aten._reshape_alias}
OVERWRITING = {aten.copy_, aten.fill_, aten.zero_}


@dataclass(frozen=True)
class Kernel:
    """One kernel.

    Attributes:
        moved: bytes read and written.
        elementwise: all of these, if the kernel is neither a product nor a convolution nor attention; otherwise those
            of its output, if memory bounds it, as it does a product of a low rank; else 0.
    """

    name: str
    moved: int
    elementwise: int
    flops: int
    seconds: float


@dataclass(frozen=True)
class Copy:
    """A copy between host and device, or a number read from the device; `waits` if the host waits for the device."""

    name: str
    waits: bool
    moved: int = 0


@dataclass(frozen=True)
class Counts:
    """Sums over a computation; `waits` are those after its first kernel and before its last.

    `copied_mb` goes between host and device, in both directions.
    """

    kernels: int
    elementwise_gb: float
    tflop: float
    modelled_ms: float
    copies: int
    waits: int
    copied_mb: float = 0.0


class Counter(TorchDispatchMode):
    """Records the kernels and copies of what runs inside `with`, in order."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.events: list[Kernel | Copy] = []
        self._pinned: set[int] = set()
        self._kept: list[Tensor] = []

    def counts(self) -> Counts:
        kernels = [event for event in self.events if isinstance(event, Kernel)]
        places = [place for place, event in enumerate(self.events) if isinstance(event, Kernel)]
        inside = self.events[places[0] : places[-1]]
        return Counts(
            kernels=len(kernels),
            elementwise_gb=sum(kernel.elementwise for kernel in kernels) / 1e9,
            tflop=sum(kernel.flops for kernel in kernels) / 1e12,
            modelled_ms=sum(kernel.seconds for kernel in kernels) * 1e3,
            copies=sum(isinstance(event, Copy) for event in self.events),
            waits=sum(isinstance(event, Copy) and event.waits for event in inside),
            copied_mb=sum(event.moved for event in self.events if isinstance(event, Copy)) / 1e6,
        )

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        packet = func.overloadpacket
        if packet is aten._local_scalar_dense:
            return self._read(args[0])
        if packet is aten.is_pinned:
            return id(args[0]) in self._pinned
        if packet is aten._pin_memory:
            return self._pin(args[0])
        if packet is aten._to_copy and _leaves_device(args[0], kwargs):
            self._copied(packet, args[0], None, kwargs.get("non_blocking", False))
            return torch.zeros(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)
        result = func(*args, **kwargs)
        written = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        read = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if not written or func.is_view or packet in NO_KERNEL:
            return result
        places = {tensor.device.type for tensor in (*read, *written) if tensor.ndim or packet is aten._to_copy}
        if packet in {aten._to_copy, aten.copy_} and len(places) > 1:
            self._copied(packet, read[-1], written[0], kwargs.get("non_blocking", args[2:] == (True,)))
        elif DEVICE.type in places:
            self.events.append(_kernel(func, args, kwargs, read, written, result))
        return result

    def _read(self, tensor: Tensor) -> bool | float:
        """A stand-in for the number that a fake tensor does not have: true, so that checks pass."""
        if tensor.device.type == DEVICE.type:
            self.events.append(Copy("read a number", waits=True))
        return True if tensor.dtype == torch.bool else 1.0

    def _pin(self, tensor: Tensor) -> Tensor:
        pinned = tensor.clone()
        self._kept.append(pinned)  # so that its id stays its own
        self._pinned.add(id(pinned))
        return pinned

    def _copied(self, packet: Any, source: Tensor, target: Tensor | None, non_blocking: bool) -> None:
        """Count a copy; without a target it goes to new memory of the host."""
        to_device = target is not None and target.device.type == DEVICE.type
        free = non_blocking and (not to_device or id(source) in self._pinned)
        name = f"{packet} to the {'device' if to_device else 'host'}"
        self.events.append(Copy(name, waits=not free, moved=_bytes(source)))


def _leaves_device(tensor: Tensor, options: dict[str, Any]) -> bool:
    """Whether a copy with these options is the host's; a stand-in has no values that could be copied."""
    return tensor.device.type == DEVICE.type and torch.device(options.get("device") or DEVICE).type != DEVICE.type


def _kernel(func: Any, args: Any, kwargs: Any, read: list[Tensor], written: list[Tensor], result: Any) -> Kernel:
    packet = func.overloadpacket
    formula = flop_registry[aten.mm] if packet is aten.addmm_ else flop_registry.get(packet)
    factors, kwargs = (args[1:], {}) if packet is aten.addmm_ else (args, kwargs)
    flops = formula(*factors, **kwargs, out_val=result) if formula else 0
    sources = read[1:] if packet in OVERWRITING else read
    moved = sum(map(_bytes, sources)) + sum(map(_bytes, written))
    arithmetic_s, memory_s = flops / RATES[_kind(packet)], moved / BANDWIDTH
    if not flops:
        elementwise = moved
    else:
        output = _bytes(written[0]) * (2 if written[0] is args[0] else 1)
        elementwise = output if memory_s > arithmetic_s else 0
    return Kernel(str(func), moved, elementwise, flops, LAUNCH_S + max(arithmetic_s, memory_s))


def _kind(packet: Any) -> str:
    if packet in PRODUCTS:
        return "product"
    return "convolution" if "convolution" in str(packet) else "attention"


def _bytes(tensor: Tensor) -> int:
    """Bytes of the memory behind a tensor; an expanded axis is stored once."""
    numbers = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        numbers *= size if stride else 1
    return numbers * tensor.element_size()


class _FusedKernels(TorchFunctionMode):
    """Chooses the kernels of CUDA, where torch would compose these functions of others on this device."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is functional.scaled_dot_product_attention:
            query, key, value = args[:3] if args else (kwargs[name] for name in ("query", "key", "value"))
            return aten._scaled_dot_product_flash_attention(query, key, value)[0]
        if func is functional.rms_norm:
            return _rms_norm(*args, **kwargs)
        return func(*args, **kwargs)


def _rms_norm(inputs: Tensor, shape: list[int], weight: Tensor | None = None, eps: float | None = None) -> Tensor:
    """One kernel: layer norm's, which moves as much."""
    return functional.layer_norm(inputs, shape, weight, None, eps or 1e-6)


def counted(work: Callable[[], object]) -> Counts:
    """The counts of `work` on tensors of `DEVICE`, without gradients."""
    counter = Counter()
    with torch.no_grad(), _without_autocast(), _FusedKernels(), counter:
        work()
    return counter.counts()


def kept_bytes(work: Callable[[], object], weights: Iterable[Tensor]) -> int:
    """The bytes that `work` on tensors of `DEVICE` keeps for its backward pass, without those of `weights`."""
    known = {tensor.untyped_storage()._cdata for tensor in weights}
    kept: dict[int, torch.UntypedStorage] = {}  # holds them, so that none takes another's address

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in known:
            kept[storage._cdata] = storage
        return tensor

    with _without_autocast(), _FusedKernels(), saved_tensors_hooks(keep, lambda tensor: tensor):
        result = work()
    assert result is not None  # and with it its graph was alive until here
    return sum(storage.nbytes() for storage in kept.values())


def _without_autocast() -> AbstractContextManager[object]:
    """torch refuses to say whether autocast is on for this device."""
    return patch.object(torch, "is_autocast_enabled", lambda _: False)
