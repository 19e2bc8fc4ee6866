"""Count the blocks of scores that segment attention computes on packed sequences of real lengths. Nothing is timed.

    python tools/kernel_work.py                         # the demo's sequences
    python tools/kernel_work.py --data FOLDER           # and real data sets, packed to 8,192 and 32,768 tokens

One line of the table is one attention on one kind of packed sequence; its counts are means over the sequences, for one
head.

- length: of a sequence, in tokens (decoder) or patches (ViT); used: share of it that is not padding.
- computed: blocks that `jvlm_kernels` computes; empty: steps in which the TPU kernel only writes zeros, one for each
  block of queries that attends to nothing.
- ideal: blocks with at least one visible score; with empty: steps of the TPU kernel over ideal blocks.
- area/visible: scores in computed blocks over visible ones (the sum of squared segment lengths, about half if causal).
- splash: blocks that JAX's public splash attention computes at the same block sizes. Its mask is static and segment
  ids are compared inside a block, so it computes every block that a causal mask leaves; all of them if not causal.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import runpy
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jvlm_kernels.attention import block_pairs, tuning
from jvlm_kernels.attention.api import AttentionSpec
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from jvlm import families
from jvlm.data import packing, pipeline
from jvlm.data.encode import image_patch_limit
from jvlm.data.errors import Origin
from jvlm.data.examples import parse_example
from jvlm.data.packing import Example
from jvlm.data.processor import Processor
from jvlm.models.vlm import VLMConfig

DEMO = Path(__file__).parents[1] / "configs/mimo_vl/easy_vqa.py"
LENGTHS = (8192, 32768)
# Conversations packed together: 128 at 8,192 tokens, and in proportion.
WINDOW = 128 / 8192


@dataclasses.dataclass(frozen=True)
class Sequences:
    """Segment ids of packed sequences: tokens [B, S]; images and windows [B, P], of patches."""

    name: str
    model: VLMConfig
    tokens: np.ndarray
    images: np.ndarray
    windows: np.ndarray
    max_segment_length: int | None
    max_image_patches: int | None


@dataclasses.dataclass(frozen=True)
class Work:
    """Counts of one attention, summed over ``sequences`` of ``length`` each; blocks are those of one head."""

    name: str
    attention: str
    sequences: int
    length: int
    used: int
    segments: int
    block_q: int
    block_kv: int
    computed: int
    empty: int
    ideal: int
    visible: int
    splash: int

    @property
    def excess(self) -> float:
        """Computed blocks over ideal ones."""
        return self.computed / self.ideal

    @property
    def excess_with_empty(self) -> float:
        """Steps of the kernel over ideal blocks."""
        return (self.computed + self.empty) / self.ideal


def intervals(segments_S: np.ndarray) -> list[tuple[int, int]]:
    """Return (begin, end) of each segment of a sequence.

    Raises:
      ValueError: a segment in two parts.
    """
    edges = np.flatnonzero(np.diff(segments_S, prepend=-1, append=-1))
    ids = segments_S[edges[:-1]]
    if len(np.unique(ids[ids > 0])) != (ids > 0).sum():
        raise ValueError("a segment lies in two parts")
    return [(int(a), int(b)) for a, b, n in zip(edges[:-1], edges[1:], ids, strict=True) if n > 0]


def visible_scores(segments_S: np.ndarray, *, causal: bool) -> int:
    """Return how many pairs of a query and a key are visible."""
    lengths = [end - begin for begin, end in intervals(segments_S)]
    return sum(n * (n + 1) // 2 if causal else n * n for n in lengths)


def ideal_blocks(segments_S: np.ndarray, *, causal: bool, block_q: int, block_kv: int) -> int:
    """Return how many blocks have a visible score, segment by segment, without comparing id ranges as kernels do."""
    S = len(segments_S)
    needed = np.zeros((-(-S // block_q), -(-S // block_kv)), bool)
    for begin, end in intervals(segments_S):
        for i in range(begin // block_q, (end - 1) // block_q + 1):
            last = min(end, (i + 1) * block_q) - 1 if causal else end - 1
            needed[i, begin // block_kv : last // block_kv + 1] = True
    return int(needed.sum())


def splash_blocks(S: int, *, causal: bool, block_q: int, block_kv: int) -> int:
    """Return how many blocks a static mask leaves to splash attention, for a sequence padded to whole blocks."""
    last_query = (np.arange(-(-S // block_q)) + 1) * block_q - 1
    first_key = np.arange(-(-S // block_kv)) * block_kv
    return int((first_key <= last_query[:, None]).sum()) if causal else len(last_query) * len(first_key)


@functools.partial(jax.jit, static_argnums=(0, 2, 3))
def _count_blocks(spec: AttentionSpec, segments_S, block_q: int, block_kv: int):
    """Return (computed blocks, blocks of queries without any)."""
    ids, offset = segments_S[None], jnp.zeros(1, jnp.int32)
    needed, _ = block_pairs.block_mask(spec, ids, ids, offset, block_q, block_kv)
    return needed.sum(), (~needed.any(-1)).sum()


def count(
    sequences: Sequences,
    attention: str,
    segments_BS: np.ndarray,
    spec: AttentionSpec,
    platform: str,
    heads: tuple[int, int, int],
) -> Work:
    """Return the work of one attention; ``heads`` are query heads, key heads and head size."""
    H, K, D = heads
    B, S = segments_BS.shape
    q, k = (jax.ShapeDtypeStruct((B, S, heads, D), sequences.model.precision.compute_dtype) for heads in (H, K))
    sizes = tuning.tpu_blocks(spec, q, k) if platform == "tpu" else tuning.cuda_blocks(spec, q, k, "forward")
    blocks = {"causal": spec.causal, "block_q": sizes.q, "block_kv": sizes.kv}
    counts = [_count_blocks(spec, jnp.asarray(ids), sizes.q, sizes.kv) for ids in segments_BS]
    return Work(
        sequences.name,
        attention,
        sequences=B,
        length=S,
        used=int((segments_BS > 0).sum()),
        segments=sum(len(intervals(ids)) for ids in segments_BS),
        block_q=sizes.q,
        block_kv=sizes.kv,
        computed=sum(int(computed) for computed, _ in counts),
        empty=sum(int(empty) for _, empty in counts) if platform == "tpu" else 0,
        ideal=sum(ideal_blocks(ids, **blocks) for ids in segments_BS),
        visible=sum(visible_scores(ids, causal=spec.causal) for ids in segments_BS),
        splash=B * splash_blocks(S, **blocks),
    )


def measure(sequences: Sequences, platform: str = "tpu") -> Iterator[Work]:
    """Yield the three attentions of a model as it calls them: decoder, ViT within windows, ViT within images."""
    encoder, decoder = sequences.model.encoder, sequences.model.decoder
    text = decoder.num_heads, decoder.num_kv_heads, decoder.head_size
    vision = encoder.num_heads, encoder.num_heads, encoder.head_dim

    def spec(causal: bool, head_size: int, reach: int | None) -> AttentionSpec:
        return AttentionSpec(causal, None, head_size**-0.5, reach)

    yield count(
        sequences, "decoder", sequences.tokens, spec(True, text[2], sequences.max_segment_length), platform, text
    )
    within = spec(False, vision[2], encoder.window_patches)
    yield count(sequences, "ViT, windows", sequences.windows, within, platform, vision)
    yield count(
        sequences,
        "ViT, images",
        sequences.images,
        spec(False, vision[2], sequences.max_image_patches),
        platform,
        vision,
    )


def demo_sequences(batches: int | None = None) -> Sequences:
    """Return the demo's packed sequences from its own pipeline: an epoch, or the first batches of it."""
    experiment = runpy.run_path(str(DEMO))["get_config"]()
    tokenizer = AutoTokenizer.from_pretrained(experiment.tokenizer, local_files_only=True)
    processor = Processor(tokenizer, experiment.model, experiment.processor)
    stream, _ = pipeline.training_data(processor, experiment.data, seed=experiment.seed, epochs=1)
    chosen = [packed.batch for _, packed in zip(range(batches or 10**9), stream, strict=False)]
    ids = {
        "tokens": np.concatenate([b.segment_ids for b in chosen]),
        "images": np.concatenate([b.patch_segment_ids for b in chosen]),
        "windows": np.concatenate([b.patch_window_ids for b in chosen]),
    }
    limits = chosen[0].max_segment_length, chosen[0].max_image_patches
    return Sequences("demo", experiment.model, **ids, max_segment_length=limits[0], max_image_patches=limits[1])


def ask(question: str, answer: str) -> list[dict[str, str]]:
    """Return a turn about one more image."""
    return [{"role": "user", "content": f"<image>{question}"}, {"role": "assistant", "content": answer}]


def _receipt(row: dict[str, Any]) -> list[dict[str, str]]:
    return ask("Read the receipt.", "\n".join(line["text"] for line in row["lines"]))


def _question(row: dict[str, Any]) -> list[dict[str, str]]:
    options = [f"\n- {option}" for option in row.get("choices") or row.get("options") or ()]
    return ask(row["question"].replace("<image1>", "").strip() + "".join(options), str(row["answer"]))


def _screen(row: dict[str, Any]) -> list[dict[str, str]]:
    return ask(f"{row['task']}: {row['subtask']}", f"{row['explanation']}\n{row['action']} {row['point']}".strip())


def _boxes(row: dict[str, Any]) -> list[dict[str, str]]:
    found = [{"bbox_2d": o["box"], "label": o["label"]} for o in row["objects"]]
    return ask("Find every cell.", json.dumps(found))


# For each distribution: folders under the data folder, and how their records become turns.
SETS = {
    "receipts": {"sroie_train": _receipt},
    "screens": {"screenagent": _screen},
    "questions": {"tabmwp_dev1k": _question, "scienceqa_a": _question, "mathvision_other": _question},
    "short": {
        "crohme_train": lambda row: ask("Write the formula.", row["latex"]),
        "sroie_lines_train": lambda row: ask("Read the line.", row["text"]),
        "nlvr_dev": lambda row: ask(f"True or false? {row['sentence']}", row["label"]),
        "openclipart": lambda row: ask("What is this?", row["title"]),
        "bccd_train": _boxes,
    },
}


def conversations(folder: Path, turns, limit: int) -> Iterator[tuple[Origin, dict[str, Any]]]:
    """Yield the records of a set; those of one session are one conversation with an image a turn."""
    file = folder / "data.jsonl"
    grouped = defaultdict(list)
    for number, line in enumerate(file.read_text().splitlines(), 1):
        row = json.loads(line)
        grouped[row.get("session", number)].append((number, row))
    for members in list(grouped.values())[:limit]:
        messages = [message for _, row in members for message in turns(row)]
        yield Origin(str(file), members[0][0]), {"messages": messages, "images": [row["image"] for _, row in members]}


def encode(processor: Processor, origin: Origin, row: dict[str, Any]) -> Example:
    """Return an example without its pixels, which are not needed here."""
    example = processor.encode(parse_example(row, origin))
    return dataclasses.replace(example, patches=np.zeros((example.num_patches, 0), np.uint8))


def real_examples(data: Path, limit: int) -> tuple[Processor, dict[str, list[Example]]]:
    """Return examples of each distribution of `SETS`, and of all together, encoded as for MiMo-VL-7B."""
    folder = data / "tokenizers/qwen2_5_vl"
    template = (folder / "chat_template.jinja").read_text()
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), chat_template=template)
    processor = Processor(tokenizer, families.preset("mimo_vl_7b"))
    found = {}
    for name, sets in SETS.items():
        parts = [conversations(data / part, turns, limit) for part, turns in sets.items()]
        found[name] = [encode(processor, origin, row) for part in parts for origin, row in part]
    return processor, {**found, "all of these": [e for examples in found.values() for e in examples]}


def pack(name: str, examples: list[Example], seq_len: int, processor: Processor) -> Sequences:
    """Shuffle, truncate to whole turns, and pack best-fit a window at a time, as the pipeline does.

    A sequence has as many patches as the fullest one needs, rounded up to a multiple of 512.
    """
    group = processor.image_processor.patch_group
    order = np.random.default_rng(0).permutation(len(examples))
    fitting = [packing.truncate(examples[i], seq_len) if examples[i].length > seq_len else examples[i] for i in order]
    kept = [e for e in fitting if e is not None]
    cut, lost = sum(e.length > seq_len for e in examples), len(examples) - len(kept)
    if cut:
        print(f"{name}, {seq_len}: of {len(examples)} conversations {cut - lost} are cut and {lost} left out")
    rows: list[list[Example]] = []
    window = int(WINDOW * seq_len)
    for start in range(0, len(kept), window):
        part = kept[start : start + window]
        rows += [[part[i] for i in row] for row in packing.best_fit_decreasing(part, seq_len, group * seq_len)]
    max_patches = -(-max(sum(e.num_patches for e in row) for row in rows) // 512) * 512
    batch = packing.assemble(rows, seq_len, max_patches, patch_values=0, position_values=2)
    config = pipeline.DataConfig(seq_len=seq_len, max_patches=max_patches)
    return Sequences(
        name,
        processor.model,
        tokens=batch.segment_ids,
        images=batch.patch_segment_ids,
        windows=batch.patch_window_ids,
        max_segment_length=None,
        max_image_patches=image_patch_limit(processor.image_processor, processor.image_config, config),
    )


def table(works: list[Work]) -> str:
    """Return a Markdown table, one line for each `Work`."""
    head = "sequences of|attention|sequences|length|used|segments|block|computed|empty|ideal|splash"
    head += "|computed/ideal|with empty|area/visible|computed/splash"
    lines = [head.split("|"), ["---", "---", *["---:"] * 13]]
    for w in works:
        means = [f"{n / w.sequences:,.1f}" for n in (w.segments, w.computed, w.empty, w.ideal, w.splash)]
        area = w.computed * w.block_q * w.block_kv / w.visible
        line = [
            w.name,
            w.attention,
            f"{w.sequences}",
            f"{w.length:,}",
            f"{w.used / w.sequences / w.length:.0%}",
            means[0],
        ]
        line += [f"{w.block_q} x {w.block_kv}", *means[1:], f"{w.excess:.3f}", f"{w.excess_with_empty:.3f}"]
        lines.append([*line, f"{area:.2f}", f"{w.computed / w.splash:.3f}"])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder of real sets, and of the tokenizer they are read with")
    parser.add_argument("--limit", type=int, default=300, help="conversations of a set (default: 300)")
    parser.add_argument("--platform", choices=("tpu", "cuda"), default="tpu", help="whose block sizes (default: tpu)")
    options = parser.parse_args()
    works = list(measure(demo_sequences(), options.platform))
    if options.data is None or not options.data.is_dir():
        print(f"real sets are left out: {options.data or 'no --data'} is not a folder")
    else:
        processor, distributions = real_examples(options.data, options.limit)
        for name, examples in distributions.items():
            for length in LENGTHS:
                works += measure(pack(name, examples, length, processor), options.platform)
    print(table(works))


if __name__ == "__main__":
    main()
