"""Metrics beside prometheus_client's own."""

import random

from prometheus_client import CollectorRegistry, Histogram, generate_latest
from prometheus_client.registry import Collector

from jvlm.server.metrics import StepHistogram


def test_the_histogram_of_steps_is_written_as_prometheus_clients_own():
    labels, buckets = {"model_name": "toy"}, (0.001, 0.5, 1, 2.5, 20)
    ours = StepHistogram("vllm:seconds", "Seconds", buckets)

    class Ours(Collector):
        def collect(self):
            yield ours.metric(labels)

    mine, theirs = CollectorRegistry(), CollectorRegistry()
    mine.register(Ours())
    oracle = Histogram("vllm:seconds", "Seconds", ["model_name"], buckets=buckets, registry=theirs).labels(**labels)
    rng = random.Random(0)
    for _ in range(50):
        values = [rng.choice([rng.expovariate(1), *buckets]) for _ in range(rng.randrange(5))]
        ours.add(values)
        for value in values:
            oracle.observe(value)

    def lines(registry):
        text = generate_latest(registry).decode().splitlines()
        return sorted(
            line for line in text if "_created" not in line and not line.startswith("#") and "_sum" not in line
        )

    assert lines(mine) == lines(theirs)
    total = [float(line.split(" ")[1]) for line in generate_latest(mine).decode().splitlines() if "_sum" in line]
    assert abs(total[0] - oracle._sum.get()) < 1e-9
