"""A frozen base spread over the learner's ranks (FSDP2), for one that does not fit a rank's GPU.

Each rank keeps its part of every block's weights; a block is whole only while it computes, forward and backward. So all
ranks must run the same networks in the same order. Adapters are added later and stay whole on every rank.
"""

from __future__ import annotations

import torch
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from common.backbones.device.blocks import blocks


def shard(base: nn.Module, device: torch.device) -> None:
    """Spread the weights over all processes of torch.distributed, and put this one's part on its device.

    Block by block, from the CPU: the device never holds all of them.
    """
    if device.type == "cuda":
        # Or the mesh would choose one by the rank's number; Ray shows each rank its own alone.
        torch.cuda.set_device(device.index or 0)
        torch.cuda.current_stream()  # initialises CUDA
    mesh = init_device_mesh(device.type, (distributed.get_world_size(),))
    for block in blocks(base):
        fully_shard(block, mesh=mesh)
    # Embeddings, and what else is in no block.
    fully_shard(base, mesh=mesh)
