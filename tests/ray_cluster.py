"""A Ray cluster of several nodes on this machine, in a process of its own: python -m tests.ray_cluster NODES CPUS

Says its address and the number of each node's raylet as JSON. Then a line of its input, ``lose N``, ends a node at
once, as a power cut would; the end of its input ends the cluster.
"""

from __future__ import annotations

import json
import os
import sys


def main(nodes: str, cpus: str) -> None:
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    from ray.cluster_utils import Cluster

    small = {"num_cpus": int(cpus), "object_store_memory": 80 << 20}
    cluster = Cluster(initialize_head=True, head_node_args={**small, "include_dashboard": False})
    others = [cluster.add_node(**small) for _ in range(int(nodes) - 1)]
    raylets = [node.all_processes["raylet"][0].process.pid for node in (cluster.head_node, *others)]
    print(json.dumps({"address": cluster.address, "raylets": raylets}), flush=True)
    try:
        for line in sys.stdin:
            cluster.remove_node(others[int(line.split()[1]) - 1], allow_graceful=False)
            print("lost", flush=True)
    finally:
        cluster.shutdown()


if __name__ == "__main__":
    main(*sys.argv[1:])
