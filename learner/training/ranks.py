"""Data-parallel ranks of the learner: each works on its share of a batch, and all take the same step.

    rank r:  rows r/N .. (r+1)/N of the batch ──► gradients, weighted by the rows' share ──► sum over ranks ──► step

Every rank holds all adapters and starts from the same ones; the sum is the same on all to the bit, so they stay equal.
Only gradients of adapters travel, once per network and iteration: few enough for gloo, by way of the CPU. It notices a
dead rank at once, where a GPU's collective would wait for its watchdog, and several ranks may share a GPU.

Plain torch.distributed, without Ray. Nothing here pickles: a rank is named by numbers, and tensors travel as they are.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
from torch import Tensor, distributed
from torch.nn import Parameter

from common.errors import RankError


@dataclass(frozen=True)
class Ranks:
    """This process among `count`; one rank alone talks to nobody.

    Attributes:
        sharded: whether each holds a part of the base only, see `common/backbones/device/sharding.py`.
    """

    index: int = 0
    count: int = 1
    sharded: bool = False

    def share(self, total: int) -> slice:
        """The rows of a batch that are this rank's: as equal parts as can be, in order."""
        return slice(self.index * total // self.count, (self.index + 1) * total // self.count)

    @contextmanager
    def summing(self, network: str, parameters: Collection[Parameter]) -> Iterator[None]:
        """At the end of this block every rank holds the sum of all ranks' gradients in its own.

        A rank that fails inside the block says so to the others instead, so that none waits for it forever. Where the
        base is sharded it cannot, since they wait for its weights: there the end of its process tells them.

        Raises:
            RankError: another rank failed, or is gone; no gradient has changed then.
        """
        if self.count == 1:
            yield
            return
        try:
            with lost_ranks_named(f"the update of the {network}"):
                yield
        except BaseException:
            if not self.sharded:
                self._sum(network, parameters, failed=True)
            raise
        if self._sum(network, parameters, failed=False):
            raise RankError(f"another rank of the learner failed in its update of the {network}")

    def _sum(self, network: str, parameters: Collection[Parameter], *, failed: bool) -> bool:
        """Whether any rank failed; the gradients are left as they are then."""
        found = any(parameter.grad is not None for parameter in parameters)
        own = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        # One message; a failed rank's gradients may be half done, which nobody will use.
        message = torch.cat(
            [torch.tensor([float(failed), float(found)]), *(part.flatten().float().cpu() for part in own)]
        )
        with lost_ranks_named(f"the update of the {network}"):
            distributed.all_reduce(message)
        failures, gradients = message[:2].tolist()
        if failures > 0:
            return True
        if gradients > 0:
            _write_gradients(parameters, message[2:])
        return False


@contextmanager
def lost_ranks_named(work: str) -> Iterator[None]:
    """In this block a lost connection to another rank is a RankError; torch has no class of error for it."""
    try:
        yield
    except RuntimeError as error:
        if "/gloo/" not in str(error) and not isinstance(error, distributed.DistError):
            raise
        reason = str(error).partition("\n")[0]
        raise RankError(f"a rank of the learner is gone ({reason}) in {work}: continue with --resume") from error


def _write_gradients(parameters: Collection[Parameter], flat: Tensor) -> None:
    for parameter, part in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
        parameter.grad = part.view_as(parameter).to(parameter)


ALONE = Ranks()


@dataclass(frozen=True)
class Meeting:
    """Where one rank finds the others.

    Attributes:
        point: a URL of torch.distributed, the same for all: file:///... on one machine, tcp://host:port on several.
        patience_s: how long a rank may keep the others waiting, e.g. for a reward server that is out.
        sharded: whether the base is to be sharded: its weights, unlike gradients, go from GPU to GPU.
    """

    index: int
    count: int
    point: str
    patience_s: float
    sharded: bool = False

    def join(self) -> Ranks:
        """Wait until all ranks are there."""
        if self.point.startswith("file:"):
            # Ranks that meet on one machine talk on loopback: neither has a password.
            os.environ |= {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"}
        distributed.init_process_group(
            "cpu:gloo,cuda:nccl" if self.sharded and torch.cuda.is_available() else "gloo",
            init_method=self.point,
            rank=self.index,
            world_size=self.count,
            timeout=timedelta(seconds=self.patience_s),
        )
        return Ranks(self.index, self.count, self.sharded)
