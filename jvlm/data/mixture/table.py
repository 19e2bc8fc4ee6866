"""What a run will draw from each source of a mixture, as a table for the terminal."""

from __future__ import annotations

from jvlm.data.config import DataConfig
from jvlm.data.mixture.examples import Draws, mixture_of
from jvlm.data.mixture.shares import measured_unit

MANY_EPOCHS = 4


def table(draws: Draws, config: DataConfig) -> str:
    """Return a line for each source: its examples, its share of the run, passes over it, and examples that repeat.

    Where weights are shares of something measured, also its mean per example and its share of that. Sources that
    ``max_epochs`` holds back, and those that a run goes through more than four times, are told of below.
    """
    run = config.run_examples or draws.plan.examples_per_pass
    counts, unit = draws.plan.drawn(run).tolist(), measured_unit(mixture_of(config))
    head = f"{'source':<28}{'examples':>12}{'share':>9}{'epochs':>9}{'repeated':>12}"
    lines = [head + (f"{f'{unit} each':>22}{'share':>9}" if unit else "")]
    amounts = [count * mean for count, mean in zip(counts, config.measured, strict=True)] if unit else []
    notes = []
    for number, (name, examples) in enumerate(draws.examples.sizes().items()):
        count = counts[number]
        epochs, repeated = count / examples, max(count - examples, 0)
        line = f"{name:<28}{examples:>12,}{100 * count / run:>7.2f} %{epochs:>9.2f}{repeated:>12,}"
        if unit:
            line += f"{config.measured[number]:>22,.4g}{100 * amounts[number] / sum(amounts):>7.2f} %"
        lines.append(line)
        if epochs > MANY_EPOCHS:
            notes.append(f"warning: {name} is gone through {epochs:.1f} times; lower its weight, or set max_epochs")
    notes += [
        f"{one.source} gives {one.given:,} examples and not {one.asked:,}: max_epochs is {one.max_epochs:g}; others "
        "take over"
        for one in draws.plan.limited
    ]
    return "\n".join([*lines, *notes])
