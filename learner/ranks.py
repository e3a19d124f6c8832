"""Data-parallel ranks of the learner: each works on its share of a batch, and all take the same step.

    rank r:  rows r/N .. (r+1)/N of the batch ──► gradients, weighted by the rows' share ──► sum over ranks ──► step

Every rank holds all weights and starts from the same ones; the sum is the same on all to the bit, so they stay equal.
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
    """This process among `count`; one rank alone talks to nobody."""

    index: int = 0
    count: int = 1

    def share(self, total: int) -> slice:
        """The rows of a batch that are this rank's: as equal parts as can be, in order."""
        return slice(self.index * total // self.count, (self.index + 1) * total // self.count)

    @contextmanager
    def summing(self, network: str, parameters: Collection[Parameter]) -> Iterator[None]:
        """At the end of this block every rank holds the sum of all ranks' gradients in its own.

        A rank that fails inside the block says so to the others instead, so that none waits for it forever.

        Raises:
            RankError: another rank failed, or is gone; no gradient has changed then.
        """
        if self.count == 1:
            yield
            return
        try:
            yield
        except BaseException:
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
        try:
            distributed.all_reduce(message)
        except RuntimeError as error:
            raise RankError(
                f"a rank of the learner is gone ({str(error).splitlines()[0]}) in the update of the {network}: "
                "continue with --resume"
            ) from error
        failures, gradients = message[:2].tolist()
        if failures > 0:
            return True
        if gradients > 0:
            _write_gradients(parameters, message[2:])
        return False


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
    """

    index: int
    count: int
    point: str
    patience_s: float

    def join(self) -> Ranks:
        """Wait until all ranks are there."""
        if self.point.startswith("file:"):
            # Ranks that meet on one machine talk on loopback: gloo has no password.
            os.environ["GLOO_SOCKET_IFNAME"] = "lo"
        distributed.init_process_group(
            "gloo",
            init_method=self.point,
            rank=self.index,
            world_size=self.count,
            timeout=timedelta(seconds=self.patience_s),
        )
        return Ranks(self.index, self.count)
