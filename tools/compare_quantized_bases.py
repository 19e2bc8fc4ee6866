"""LoRA on quantised bases against LoRA on the bfloat16 base, from the same seed: docs/results/quantized_bases.md.

    make demo                                            # the demo's model, runs/easy_vqa, once
    .venv/bin/python tools/compare_quantized_bases.py    # docs/results/quantized_bases.json, .png and the page's table

Each run is that of configs/finetune/white_cells.py with its base in another format. Runs are in --runs, and one that is
there is not trained again. A second seed of the bfloat16 base says how much of a difference is noise.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from jvlm import configs, job
from jvlm.models.vlm import VLMConfig
from jvlm.quantization.config import QuantizationConfig
from jvlm.training.config import Experiment, ExportConfig, ValidationConfig
from jvlm.weights import io

PAGE = Path(__file__).resolve().parent.parent / "docs" / "results" / "quantized_bases.md"
BEGIN, END = "<!-- table of tools/compare_quantized_bases.py -->", "<!-- end of the table -->"
BASES = {
    "bfloat16": None,
    "int8": QuantizationConfig("int8"),
    "fp8": QuantizationConfig("fp8"),
    "nf4": QuantizationConfig("nf4", double=False),
    "nf4, double": QuantizationConfig("nf4"),
}
COLOURS = ("#222222", "#3b6ea8", "#7fb069", "#b3541e", "#8a6bbf")


@dataclasses.dataclass(frozen=True)
class Curve:
    """What a run came to.

    Attributes:
      loss: step -> loss of the held-out photos.
      iou: mean overlap of its boxes with the true ones, after training.
    """

    loss: Mapping[int, float]
    iou: float

    @property
    def last(self) -> float:
        return self.loss[max(self.loss)]


def experiment(base: str, seed: int, start: str, runs: Path, steps: int) -> Experiment:
    """Return the white-cells experiment on a base in a format, with its loss on the test photos every 25 steps."""
    plain = configs.load("finetune/white_cells", [])
    return dataclasses.replace(
        plain,
        name=f"{base.replace(', ', '_')}_{seed}",
        output_root=str(runs),
        init_from=start,
        model=_in_bfloat16(start),
        quantize=BASES[base],
        validation=ValidationConfig(data=plain.evaluation.data, interval_steps=25),
        evaluation=dataclasses.replace(plain.evaluation, before_training=False, aim_iou=None),
        export=ExportConfig(enabled=False),
        steps=steps,
        seed=seed,
        log_interval_steps=25,
    )


def _in_bfloat16(start: str) -> VLMConfig:
    """Return the model's configuration with parameters in bfloat16; products are float32, which CPUs are quick at."""
    model = io.read_config(start)
    precision = dataclasses.replace(model.precision, param_dtype="bfloat16", compute_dtype="float32")
    return dataclasses.replace(model, precision=precision)


def curve(one: Experiment) -> Curve:
    """Train and score, where that has not been done."""
    folder = Path(one.output_root) / one.name
    if not (folder / job.SCORES).is_file():
        job.run(one)
    lines = [json.loads(line) for line in (folder / "logging.jsonl").read_text().splitlines()]
    loss = {line["step_number"]: line["eval_loss"] for line in lines if "eval_loss" in line}
    return Curve(loss, json.loads((folder / job.SCORES).read_text())["mean_iou"])


def table(curves: Mapping[str, Curve]) -> str:
    """Return the curves as Markdown; distances are those from the bfloat16 base, averaged over the evaluations."""
    steps = sorted(next(iter(curves.values())).loss)
    shown = sorted({steps[0], *(step for step in steps if step % 100 == 0), steps[-1]})
    reference = curves[next(iter(curves))]
    lines = [
        f"| base, seed | {' | '.join(f'step {step}' for step in shown)} | mean distance | largest | mean IoU |",
        "| --- |" + " ---: |" * (len(shown) + 3),
    ]
    for name, one in curves.items():
        away = [abs(one.loss[step] - reference.loss[step]) for step in steps]
        values = " | ".join(f"{one.loss[step]:.3f}" for step in shown)
        lines.append(f"| {name} | {values} | {sum(away) / len(away):.3f} | {max(away):.3f} | {one.iou:.3f} |")
    return "\n".join(lines)


def draw(path: Path, curves: Mapping[str, Curve]) -> None:
    """Write a PNG of the held-out losses over the steps."""
    wide, high, left, top = 900, 420, 60, 30
    image = Image.new("RGB", (wide, high), "white")
    canvas, font = ImageDraw.Draw(image), ImageFont.load_default(14)
    most = max(max(one.loss.values()) for one in curves.values())
    last = max(max(one.loss) for one in curves.values())
    width, height = wide - left - 200, high - top - 50

    def at(step: float, loss: float) -> tuple[float, float]:
        return left + width * step / last, top + height * (1 - loss / most)

    for part in range(5):
        x, y = at(0, most * part / 4)
        canvas.line((x, y, left + width, y), "#dddddd")
        canvas.text((8, y - 8), f"{most * part / 4:.2f}", "black", font)
        canvas.text((at(last * part / 4, 0)[0] - 10, high - 44), f"{last * part / 4:.0f}", "black", font)
    for index, (name, one) in enumerate(curves.items()):
        colour = COLOURS[index] if index < len(COLOURS) else "#aaaaaa"
        canvas.line([at(step, loss) for step, loss in sorted(one.loss.items())], colour, 2)
        canvas.text((left + width + 14, top + 22 * index), name, colour, font)
    canvas.text((left, high - 22), "step; loss of the held-out photos, nats a token", "black", font)
    image.save(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--start", default="runs/easy_vqa", help="run or folder of the demo's model")
    parser.add_argument("--runs", type=Path, default=Path("runs/quantized_bases"))
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, nargs=2, default=(42, 43), help="of all bases; of bfloat16 once more")
    args = parser.parse_args()
    first, second = args.seeds
    chosen = [(base, first) for base in BASES] + [("bfloat16", second)]
    curves = {
        f"{base}, {seed}": curve(experiment(base, seed, args.start, args.runs, args.steps)) for base, seed in chosen
    }
    PAGE.with_suffix(".json").write_text(json.dumps({n: dataclasses.asdict(c) for n, c in curves.items()}) + "\n")
    draw(PAGE.with_suffix(".png"), curves)
    before, _, rest = PAGE.read_text().partition(BEGIN)
    PAGE.write_text(f"{before}{BEGIN}\n\n{table(curves)}\n\n{END}{rest.partition(END)[2]}")
    print(table(curves))


if __name__ == "__main__":
    main()
