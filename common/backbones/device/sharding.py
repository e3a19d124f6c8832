"""Sharding of a frozen base over the learner's ranks (FSDP2), for a base that does not fit on one rank's GPU.

Each rank keeps its part of every block's weights. A block is whole only while it computes, forward and backward, so all
ranks must run the same networks in the same order. Adapters are added later and stay whole on every rank.
"""

from __future__ import annotations

import torch
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from common.backbones.device.blocks import blocks


def shard(base: nn.Module, device: torch.device) -> None:
    """Shard the weights over all processes of torch.distributed, and put this process's part on its device.

    This works block by block, from the CPU: the device never holds all weights.
    """
    if device.type == "cuda":
        # Otherwise the mesh would choose a device by the rank's number, but Ray shows each rank only its own.
        torch.cuda.set_device(device.index or 0)
        torch.cuda.current_stream()  # initialises CUDA
    mesh = init_device_mesh(device.type, (distributed.get_world_size(),))
    for block in blocks(base):
        fully_shard(block, mesh=mesh)
    # The embeddings and all other modules outside the blocks.
    fully_shard(base, mesh=mesh)
