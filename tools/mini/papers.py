"""Run the ablations of a paper in miniature, each one sweep, and write a page that says which findings are seen.

    python -m tools.mini.papers mm1_5
    python -m tools.mini.papers idefics2 --only splitting neftune --seeds 1 2 3

The same command goes on where it stopped, as `jvlm sweep` does.
"""

from __future__ import annotations

import argparse
import dataclasses
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import jinja2

from jvlm.sweep import page, results
from jvlm.sweep.results import RunResult, Setting
from jvlm.sweep.runner import DONE, State, SweepConfig
from jvlm.sweep.trials import Trial, Vary, trials_of


@dataclasses.dataclass(frozen=True)
class Finding:
    """What a paper found: of two settings of an ablation, one does better by a metric, or neither does.

    Attributes:
      text: the finding, and where the paper has it.
      metric: by which it is looked for here; tasks as "score/ocr".
      other: number of the setting, from 1, that is compared with the first one.
      expected: "better" or "worse" of that setting against the first, or "equal".
    """

    text: str
    metric: str
    other: int
    expected: str

    def verdict(self, settings: Sequence[Setting]) -> str:
        """Return whether it is seen, in a sentence; "not run" where a setting is missing."""
        if len(settings) <= self.other:
            return "not run"
        setting = settings[self.other]
        if setting.change is None:
            return f"cannot be told from one run of each: {setting.mean:.3f} against {settings[0].mean:.3f}"
        if "score/" in self.metric and max(settings[0].mean, setting.mean) < _FLOOR:
            return f"cannot be told: no setting answers more than {100 * _FLOOR:.0f} % right in so few steps"
        found, more = setting.change, results.more_is_better(self.metric)
        low, high = found.interval.low, found.interval.high
        measured = f"{found.interval.value:+.3f} [{low:+.3f}, {high:+.3f}] over {found.over}"
        risen = "better" if (found.interval.value > 0) == more else "worse"
        way = "equal" if low <= 0 <= high else risen
        if self.expected == "equal":
            seen = f"no difference is seen, as in the paper; one of {found.detectable:.3f} would show"
            return f"{seen if way == 'equal' else 'not seen: ' + way} ({measured})"
        if way == "equal":
            return f"not seen at this size: no difference ({measured}; one of {found.detectable:.3f} would show)"
        return f"{'seen' if way == self.expected else 'the opposite is seen'} ({measured})"


@dataclasses.dataclass(frozen=True)
class Ablation:
    """One sweep, and the findings that are looked for in it.

    Attributes:
      vary, together: of `jvlm sweep`.
      fields: command-line words of all its trials.
    """

    name: str
    title: str
    config: str
    vary: tuple[str, ...]
    findings: tuple[Finding, ...]
    together: bool = False
    fields: tuple[str, ...] = ()


_FLOOR = 0.05  # of a score; where no setting is above it, none has learnt what is asked


def _without(member: str, *names: str) -> tuple[str, ...]:
    """Return the words that leave members of a mixture out."""
    return tuple(word for name in names for word in (f"--data.mixture.members.{member}{name}.weight", "0"))


def _asking(*tasks: str) -> tuple[str, ...]:
    """Return the words that ask some tasks alone."""
    return ("--evaluation.data", *(f"mini_data/test_{task}.arrayrecord" for task in tasks))


def _losses_of(*tasks: str) -> tuple[str, ...]:
    """Return the words that measure the held-out loss of some tasks at the end: it tells settings apart sooner."""
    return ("--validation.data", *(f"mini_data/validation_{task}.arrayrecord" for task in tasks))


# A thing is learned in the few steps of an ablation only where little else is asked: its mixture has what it varies,
# and what that is said to change.
_KINDS = ("text_rich", "refer_ground", "math", "code", "science")


def _general_and(kind: str, *asked: str) -> tuple[str, ...]:
    """Return the words that leave general questions and one kind of single images, and ask some tasks."""
    others = _without("single.members.", *(name for name in _KINDS if name != kind))
    return (*others, *_without("", "multi", "text"), *_asking(*asked))


_READING = (
    *_general_and("text_rich", "ocr", "lines"),
    *_without("single.members.", "general"),
    *_losses_of("lines"),
    *("--steps", "300"),
)
_WEIGHT = "data.mixture.members.single.members.{}.weight={}"
MM1_5 = (
    Ablation(
        "text_rich",
        "Share of text-rich pictures",
        "mini/mm1_5_sft",
        (_WEIGHT.format("text_rich", "3.3,0"),),
        (Finding("Text-rich data lifts reading: without it reading is worse.", "score/ocr", 1, "worse"),),
        fields=(*_general_and("text_rich", "qa", "ocr"), "--steps", "300"),
    ),
    Ablation(
        "refer_ground",
        "Share of referring and grounding",
        "mini/mm1_5_sft",
        (_WEIGHT.format("refer_ground", "2.0,0"),),
        (
            Finding(
                "Referring and grounding data lifts places: without it they are not found.",
                "score/grounding",
                1,
                "worse",
            ),
            Finding(
                "It slightly hurts the rest: in as many steps without it, questions are answered a little better.",
                "score/qa",
                1,
                "better",
            ),
        ),
        fields=_general_and("refer_ground", "qa", "grounding", "where"),
    ),
    Ablation(
        "science",
        "Share of science",
        "mini/mm1_5_sft",
        (_WEIGHT.format("science", "0.1,0.5"),),
        (
            Finding(
                "A share of 0.1 is what the paper settled on: five times as much changes nothing elsewhere.",
                "score/qa",
                1,
                "equal",
            ),
        ),
        fields=_general_and("science", "qa", "science"),
    ),
    Ablation(
        "kinds",
        "Single images, several images, text: 80:10:10 against 100:0:0",
        "mini/mm1_5_sft",
        (
            "data.mixture.members.single.weight=0.8,1.0",
            "data.mixture.members.multi.weight=0.1,0",
            "data.mixture.members.text.weight=0.1,0",
        ),
        (
            Finding(
                "Data of several images lifts questions about several: without it they are answered worse.",
                "score/multi",
                1,
                "worse",
            ),
            Finding("The tasks of single images hardly change.", "score/qa", 1, "equal"),
        ),
        together=True,
        fields=(*_without("single.members.", *_KINDS), *_asking("qa", "multi")),
    ),
    Ablation(
        "splitting",
        "Dynamic against static splitting",
        "mini/mm1_5_sft",
        ("processor.image.splitting=dynamic,static",),
        (
            Finding("Dynamic splitting reads better than static.", "eval_loss", 1, "worse"),
            Finding("It reads more words whole.", "score/lines", 1, "worse"),
        ),
        fields=_READING,
    ),
    Ablation(
        "tiles",
        "Number of tiles",
        "mini/mm1_5_sft",
        ("processor.image.max_tiles=4,1", "data.batch_size=8,4"),
        (
            Finding("More tiles read better (tables 1 and 2): with one tile strips suffer.", "eval_loss", 1, "worse"),
            Finding("And so do single words.", "score/ocr", 1, "worse"),
        ),
        together=True,  # as a picture of one tile is a fifth as long, half the sequences hold as many
        fields=_READING,
    ),
    Ablation(
        "experts",
        "Dense against experts",
        "mini/mm1_5_sft",
        ("config=mini/mm1_5_sft,mini/mm1_5_moe",),
        (Finding("Experts do better than the dense model.", "accuracy", 1, "better"),),
    ),
)
IDEFICS2 = (
    Ablation(
        "pretraining",
        "Stage 2 of pre-training: all parameters, LoRA, DoRA",
        "mini/idefics2_stage2",
        ("config=mini/idefics2_stage2,mini/idefics2_stage2_lora,mini/idefics2_stage2_dora",),
        (
            Finding(
                "LoRA is no worse than training all, which diverged in the paper (section 3.2).",
                "eval_loss",
                1,
                "equal",
            ),
            Finding("Nor is DoRA.", "eval_loss", 2, "equal"),
        ),
    ),
    Ablation(
        "adapters",
        "All parameters, LoRA, DoRA",
        "mini/idefics2_sft",
        ("config=mini/idefics2_sft,mini/idefics2_sft_lora,mini/idefics2_sft_dora",),
        (
            Finding(
                "LoRA is no worse than training all, which diverged in the paper (section 3.2).", "accuracy", 1, "equal"
            ),
            Finding("Nor is DoRA, with which Idefics2 was fine-tuned.", "accuracy", 2, "equal"),
        ),
    ),
    Ablation(
        "neftune",
        "NEFTune's noise",
        "mini/idefics2_sft",
        ("task.neftune_alpha=5,0",),
        (Finding("Noise on the embeddings, which Idefics2 was fine-tuned with, helps.", "accuracy", 1, "worse"),),
    ),
    Ablation(
        "architecture",
        "Trained whole from the start: fully autoregressive, cross-attention at equal parameters, 16 latents for 4",
        "mini/idefics2_from_start",
        ("config=mini/idefics2_from_start,mini/idefics2_cross_attention,mini/idefics2_more_latents",),
        (
            Finding(
                "Trained whole, the autoregressive form answers better than cross-attention (table 3).",
                "accuracy",
                1,
                "worse",
            ),
            Finding("And it finds places better.", "mean_iou", 1, "worse"),
            Finding(
                "More than 64 latents bring nothing (table 4); here 4 stand for 64, and 16 for more.",
                "accuracy",
                2,
                "equal",
            ),
            Finding("Nor do they where places are asked for.", "mean_iou", 2, "equal"),
        ),
        fields=(
            *_without("", "ocr", "lines", "math", "instruction"),
            *_asking("qa", "counting", "grounding", "where"),
            # so that patches bound a sequence, of which each form has as many, and not tokens, of which it has not
            *("--data.max_patches", "256", "--data.seq_len", "176"),
        ),
    ),
    Ablation(
        "splitting",
        "Pictures split into four and themselves",
        "mini/idefics2_sft",
        ("processor.image.split=False,True", "data.batch_size=4,8"),
        (
            Finding("Splitting makes reading better (TextVQA 70.4 to 73.0): strips.", "eval_loss", 1, "better"),
            Finding("More of them are read whole.", "score/lines", 1, "better"),
            Finding("So are single words.", "score/ocr", 1, "better"),
        ),
        together=True,  # as a picture that is split is twice as long, twice the sequences hold as many
        fields=(
            *_without("", "qa", "grounding", "counting", "math", "instruction"),
            *_asking("ocr", "lines"),
            *_losses_of("lines"),
            *("--data.max_patches", "576", "--steps", "300"),
        ),
    ),
    Ablation(
        "chatty",
        "Instruction tuning alone, and the chatty stage after it",
        "mini/idefics2_sft",
        ("config=mini/idefics2_sft,mini/idefics2_chatty",),
        (
            Finding(
                "People prefer the model after it: here, more answers of dialogues are right.",
                "score/dialogue",
                1,
                "better",
            ),
            Finding(
                "Benchmarks, which want short answers, do not: questions are answered worse.", "score/qa", 1, "worse"
            ),
        ),
        fields=(
            *_asking("qa", "ocr", "counting", "math", "dialogue", "descriptions"),
            "--evaluation.max_new_tokens",
            "96",
        ),
    ),
)
PAPERS = {"mm1_5": ("MM1.5 in miniature", MM1_5), "idefics2": ("Idefics2 in miniature", IDEFICS2)}


@dataclasses.dataclass(frozen=True)
class Done:
    """What an ablation gave: its plots, one of each metric, and (finding, verdict)."""

    ablation: Ablation
    plots: tuple[page.Plot, ...]
    verdicts: tuple[tuple[str, str, str], ...]
    runs: int
    folder: str


def sweep_of(paper: str, ablation: Ablation, seeds: Sequence[int], fields: Sequence[str]) -> tuple[SweepConfig, list]:
    """Return the sweep of an ablation and its trials."""
    varied = [*map(Vary.parse, ablation.vary), Vary("seed", tuple(map(str, seeds)))]
    trials = trials_of(ablation.config, varied, together=ablation.together)
    return SweepConfig(f"{paper}_mini_{ablation.name}", "runs", (*ablation.fields, *fields)), trials


def command(paper: str, ablation: Ablation, seeds: Sequence[int], fields: Sequence[str]) -> list[str]:
    """Return the words of the command that runs an ablation."""
    seed = f"seed={','.join(map(str, seeds))}"
    together = ["--together"] if ablation.together else []
    words = ["sweep", ablation.config, "--vary", *ablation.vary, seed, "--name", f"{paper}_mini_{ablation.name}"]
    return [sys.executable, "-m", "jvlm.cli", *words, *together, *ablation.fields, *fields]


def read(paper: str, ablation: Ablation, seeds: Sequence[int], fields: Sequence[str]) -> Done | None:
    """Return what of an ablation is finished; None if nothing is."""
    sweep, trials = sweep_of(paper, ablation, seeds, fields)
    state = State(sweep.folder)
    found: dict[str, RunResult] = {
        trial.slug: results.read_run(sweep.run_folder(trial)) for trial in trials if state.status(trial) in DONE
    }
    return None if not found else _done(ablation, found, trials, str(sweep.folder))


def _done(ablation: Ablation, found: dict[str, RunResult], trials: Sequence[Trial], folder: str) -> Done:
    shown = dict.fromkeys([*(one.metric for one in ablation.findings), "accuracy", "mean_iou"])
    every = {metric: results.settings_of(found, trials, metric) for metric in results.metrics_of(found)}
    plots = tuple(page.plot(metric, every[metric]) for metric in shown if every.get(metric))
    verdicts = tuple((one.text, one.metric, one.verdict(every.get(one.metric, []))) for one in ablation.findings)
    return Done(ablation, plots, verdicts, len(found), folder)


def markdown(done: Sequence[Done]) -> str:
    """Return tables of all ablations and what is seen."""
    lines: list[str] = []
    for one in done:
        lines += [
            f"**{one.ablation.title}** ({one.runs} runs)",
            "",
            "| setting |" + "".join(f" {p.metric} |" for p in one.plots),
        ]
        lines.append("| --- |" + " ---: |" * len(one.plots))
        for row in zip(*(plot.bars for plot in one.plots), strict=True):
            cells = [
                f"{bar.mean:.3f}" + (f" [{bar.interval.low:.3f}, {bar.interval.high:.3f}]" if bar.interval else "")
                for bar in row
            ]
            lines.append(f"| {row[0].name} | {' | '.join(cells)} |")
        lines += ["", *(f"- {text} By {metric}: **{said}**" for text, metric, said in one.verdicts), ""]
    return "\n".join(lines)


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paper", choices=PAPERS)
    parser.add_argument("--only", nargs="*", default=[], help="names of ablations; all without it")
    parser.add_argument("--seeds", nargs="*", type=int, default=[1, 2, 3])
    parser.add_argument("--compare", action="store_true", help="run nothing; write the page of what is finished")
    options, fields = parser.parse_known_args(words)
    title, ablations = PAPERS[options.paper]
    unknown = sorted(set(options.only) - {one.name for one in ablations})
    if unknown:
        parser.error(f"no ablation {', '.join(unknown)}; there are {', '.join(one.name for one in ablations)}")
    status = 0
    chosen = [one for one in ablations if not options.only or one.name in options.only]
    for ablation in chosen if not options.compare else ():
        print(f"== {ablation.title}", flush=True)
        status = subprocess.run(command(options.paper, ablation, options.seeds, fields), check=False).returncode
        if status:
            break
    done = [one for ablation in ablations if (one := read(options.paper, ablation, options.seeds, fields))]
    print(markdown(done))
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=jinja2.StrictUndefined
    )
    path = Path("runs") / f"{options.paper}_mini.html"
    path.parent.mkdir(exist_ok=True)
    path.write_text(environment.get_template("papers.html.jinja").render(title=title, done=done))
    print(f"page: {path}")
    return status


if __name__ == "__main__":
    raise SystemExit(main())
