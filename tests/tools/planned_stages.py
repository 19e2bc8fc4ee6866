"""Run by test_plan.py with both compilers: the shards of each MiMo-VL stage on its pods, not compiled."""

import json
import sys

from jvlm import configs
from jvlm.planning.chips import Topology
from jvlm.planning.measure import available_memory, bytes_of, devices_of
from jvlm.training import compiled_step


def main() -> None:
    found = {}
    for stage in (1, 2, 3, 4):
        experiment = configs.load(f"mimo_vl/stage{stage}", [])
        for name in experiment.topologies:
            topology = Topology.parse(name)
            devices = devices_of(topology)
            planned = compiled_step.compile_step(experiment, devices)
            parts = {"state": planned.state.split()[0], "frozen": planned.state.frozen, "batches": planned.batches}
            sizes = {part: bytes_of(tree) for part, tree in parts.items()}
            limit = available_memory(topology, devices[0])
            found[f"stage{stage} {name}"] = {**sizes, "limit": limit, "chips": len(devices)}
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
