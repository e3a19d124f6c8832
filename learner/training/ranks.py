"""Data-parallel ranks of the learner: each processes its share of a batch, and all take the same step.

    rank r:  rows r/N .. (r+1)/N of the batch ──► gradients, weighted by the rows' share ──► sum over ranks ──► step

Every rank holds all adapters and starts from the same ones; the sum is equal on all ranks to the bit, so they stay
equal. Only the adapters' gradients are exchanged, once per network and iteration: few enough for gloo, by the CPU.
gloo notices a dead rank at once, while a GPU's collective would wait for its watchdog. Several ranks may share a GPU.

Plain torch.distributed, without Ray. Nothing here is pickled: numbers identify a rank, and tensors are sent raw.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
from torch import Tensor, distributed

from common.backbones.flat_adapter import FlatAdapter
from common.errors import RankError, one_line
from common.progress import WAIT_FOR_RANKS, no_step


@dataclass(frozen=True)
class Ranks:
    """This process among `count` ranks; a single rank does not communicate.

    Attributes:
        sharded: whether each rank holds only a part of the base, see `common/backbones/device/sharding.py`.
        begin_step: told that this rank begins to wait for the others (`WAIT_FOR_RANKS`).
    """

    index: int = 0
    count: int = 1
    sharded: bool = False
    begin_step: Callable[[str], None] = no_step

    def share(self, total: int) -> slice:
        """The rows of a batch that belong to this rank: shares as equal as possible, in order."""
        return slice(self.index * total // self.count, (self.index + 1) * total // self.count)

    @contextmanager
    def summing(self, network: str, adapter: FlatAdapter) -> Iterator[None]:
        """At the end of this block every rank's gradients are replaced by the sum over all ranks.

        A parameter has a gradient then if any rank's passes reached it.

        A rank that fails inside the block notifies the others instead, so that none waits for it forever. With a
        sharded base it cannot, because they wait for its weights: there the end of its process notifies them.

        Raises:
            RankError: another rank failed or is gone; the gradients are of no use then.
        """
        if self.count == 1:
            yield
            return
        try:
            with lost_ranks_named(f"the update of the {network}"):
                yield
        except BaseException:
            if not self.sharded:
                self._sum(network, adapter, failed=True)
            raise
        if self._sum(network, adapter, failed=False):
            raise RankError(f"another rank of the learner failed in its update of the {network}")

    def total(self, tensor: Tensor) -> Tensor:
        """The sum of a tensor of the host over all ranks, on every one of them.

        Raises:
            RankError: another rank is gone.
        """
        if self.count == 1:
            return tensor
        summed = tensor.clone()
        self.begin_step(WAIT_FOR_RANKS)
        with lost_ranks_named("a sum over the ranks"):
            distributed.all_reduce(summed)
        return summed

    def total_of(self, work: str, numbers: int, compute: Callable[[], Tensor]) -> Tensor:
        """The sum over all ranks of what each computes: that many numbers, float32 on the host.

        A rank whose computation fails notifies the others; with a sharded base see `summing`.

        Raises:
            RankError: another rank failed or is gone.
        """
        if self.count == 1:
            return compute()
        try:
            with lost_ranks_named(work):
                own = torch.cat([torch.zeros(1), compute()])
        except BaseException:
            if not self.sharded:
                self.total(torch.cat([torch.ones(1), torch.zeros(numbers)]))
            raise
        failures, *_ = total = self.total(own)
        if failures > 0:
            raise RankError(f"another rank of the learner failed in {work}")
        return total[1:]

    def _sum(self, network: str, adapter: FlatAdapter, *, failed: bool) -> bool:
        """Sum the gradients over the ranks; return whether any rank failed. Then nothing is summed."""
        flags = torch.tensor([failed, *adapter.reached()], dtype=torch.float32)
        self.begin_step(WAIT_FOR_RANKS)
        with lost_ranks_named(f"the update of the {network}"):
            distributed.all_reduce(flags)
            failures, *reached = flags.tolist()
            if failures > 0:
                return True
            total_n = adapter.gradient_n.cpu()
            distributed.all_reduce(total_n)
        adapter.gradient_n.copy_(total_n)
        adapter.mark_reached([count > 0 for count in reached])
        return False


@contextmanager
def lost_ranks_named(work: str) -> Iterator[None]:
    """Turn a lost connection to another rank into a RankError; torch has no error class for it."""
    try:
        yield
    except RuntimeError as error:
        if "/gloo/" not in str(error) and not isinstance(error, distributed.DistError):
            raise
        raise RankError(f"a rank of the learner is gone ({one_line(error)}) in {work}") from error


ALONE = Ranks()


@dataclass(frozen=True)
class Meeting:
    """Meeting point of the ranks.

    Attributes:
        point: a URL for torch.distributed, the same for all: file:///... on one machine, tcp://host:port on several.
        patience_s: seconds that a rank may keep the others waiting, for example during a reward outage.
        sharded: whether the base will be sharded: its weights, unlike gradients, go from GPU to GPU.
    """

    index: int
    count: int
    point: str
    patience_s: float
    sharded: bool = False

    def join(self) -> Ranks:
        """Wait until all ranks have joined."""
        if self.point.startswith("file:"):
            # Ranks on one machine use loopback, because neither gloo nor NCCL has a password.
            os.environ |= {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"}
        distributed.init_process_group(
            "cpu:gloo,cuda:nccl" if self.sharded and torch.cuda.is_available() else "gloo",
            init_method=self.point,
            rank=self.index,
            world_size=self.count,
            timeout=timedelta(seconds=self.patience_s),
        )
        return Ranks(self.index, self.count, self.sharded)
