"""What routing costs on the wires: token copies per link, counted from real routing decisions.

Experts lie spread over nodes, and a node's experts over its GPUs. A token is dispatched in two hops (paper
§3.2.2): over InfiniBand **once** to each node that holds an expert of it, however many are there, and from
where it arrived over NVLink to each of that node's GPUs that it needs. Combining is the same way back: a node
adds up what its experts answer and sends one vector home. So InfiniBand carries a copy per *node*, NVLink one
per *GPU*, and limiting the nodes of a token (M = 4) limits the slow wire.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from ..config import ModelConfig
from ..errors import ConfigError, InputError

INFINIBAND_GB_PER_S = 50.0
"""H800 cluster, per GPU (§3.2.2)."""
NVLINK_GB_PER_S = 160.0
"""The same: 3.2 times InfiniBand."""


@dataclass(frozen=True)
class Cluster:
    """Where the experts lie: expert e on GPU e // (experts per GPU), GPUs in order on their nodes.

    Args:
        experts: routed experts of one layer. nodes: machines; V3's routing groups are nodes (8).
        gpus_per_node: GPUs in each (8: EP64).

    Raises:
        ConfigError: the experts do not divide among nodes and GPUs.
    """

    experts: int
    nodes: int
    gpus_per_node: int = 1

    def __post_init__(self) -> None:
        for name in ("experts", "nodes", "gpus_per_node"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}: {getattr(self, name)}, expected at least 1")
        if self.experts % (self.nodes * self.gpus_per_node):
            raise ConfigError(
                f"nodes x gpus_per_node: {self.nodes} x {self.gpus_per_node}, expected a divisor of the "
                f"{self.experts} experts, so that each GPU holds as many"
            )

    @classmethod
    def of(cls, config: ModelConfig, gpus_per_node: int = 1) -> Cluster:
        """The cluster that node-limited routing has in mind: one group is one node."""
        return cls(config.n_routed_experts, config.n_group, gpus_per_node)


@dataclass(frozen=True)
class Traffic:
    """Token copies on the links of one layer, in one direction; combining takes the same links back.

    Attributes:
        infiniband: copies from node to node, each node once a token, Int64 [nodes, nodes], 0 on the diagonal.
        visits: copies if each expert got its own, the same shape: what sending without the two hops would cost.
        nvlink: copies handed to GPUs inside each node, once a token and GPU, Int64 [nodes, gpus_per_node].
        nodes_per_token: nodes that hold an expert of the token, its own node counted, Int64 [N].
        dropped: visits that no GPU received; always 0, and counted all the same.
    """

    infiniband: Int[Tensor, "nodes nodes"]
    visits: Int[Tensor, "nodes nodes"]
    nvlink: Int[Tensor, "nodes gpus"]
    nodes_per_token: Int[Tensor, " N"]
    dropped: int

    def dispatch_bytes(self, hidden_size: int) -> int:
        """Bytes over InfiniBand on the way out: FP8 values and an FP32 scale for each 128 of them (§3.3.3)."""
        return int(self.infiniband.sum()) * (hidden_size + 4 * -(-hidden_size // 128))

    def combine_bytes(self, hidden_size: int) -> int:
        """Bytes over InfiniBand on the way back, in BF16."""
        return int(self.infiniband.sum()) * 2 * hidden_size

    def nvlink_is_hidden(
        self, infiniband: float = INFINIBAND_GB_PER_S, nvlink: float = NVLINK_GB_PER_S
    ) -> bool:
        """Whether NVLink has its copies delivered by the time InfiniBand has: then they cost nothing more.

        Args:
            infiniband, nvlink: GB/s of one GPU.
        """
        return float(self.nvlink.sum()) / nvlink <= float(self.infiniband.sum()) / infiniband


def count_traffic(
    indices: Int[Tensor, "N A"], cluster: Cluster, home: Int[Tensor, " N"] | None = None
) -> Traffic:
    """Count one layer's copies.

    Args:
        indices: chosen experts of each token. cluster: where they lie.
        home: each token's node; by default a node beyond the cluster's, so that every copy crosses InfiniBand
            (the worst case, which the paper reckons with). It then stands in the row of node 0.

    Raises:
        InputError: an index or a home is none of the cluster's.
    """
    if indices.numel() and not 0 <= int(indices.min()) <= int(indices.max()) < cluster.experts:
        raise InputError(f"indices: {int(indices.max())} found, expected experts in [0, {cluster.experts})")
    if home is not None and home.numel() and not 0 <= int(home.min()) <= int(home.max()) < cluster.nodes:
        raise InputError(f"home: {int(home.max())} found, expected nodes in [0, {cluster.nodes})")
    n_tokens, n_gpus = indices.shape[0], cluster.nodes * cluster.gpus_per_node
    gpu = indices // (cluster.experts // n_gpus)
    node = gpu // cluster.gpus_per_node
    to_gpu = torch.zeros(n_tokens, n_gpus, dtype=torch.bool).scatter_(1, gpu.cpu(), True)
    to_node = to_gpu.unflatten(1, (cluster.nodes, -1)).any(-1)
    per_node = torch.zeros(n_tokens, cluster.nodes, dtype=torch.int64)
    per_node.scatter_add_(1, node.cpu(), torch.ones_like(node.cpu()))
    source = torch.zeros(n_tokens, dtype=torch.int64) if home is None else home.cpu()
    links = torch.zeros(cluster.nodes, cluster.nodes, dtype=torch.int64)
    copies, visits = (links.index_add(0, source, t.long()) for t in (to_node, per_node))
    if home is not None:
        copies, visits = copies.fill_diagonal_(0), visits.fill_diagonal_(0)
    return Traffic(
        infiniband=copies,
        visits=visits,
        nvlink=to_gpu.sum(0).view(cluster.nodes, -1),
        nodes_per_token=to_node.sum(1),
        dropped=indices.numel() - int(per_node.sum()),
    )
