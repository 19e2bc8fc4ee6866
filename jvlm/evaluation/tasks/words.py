"""What is said after questions, and how long answers are, for tasks of the same kind."""

from jvlm.evaluation.task import Decoding

SHORT = "Answer the question using a single word or phrase."
LETTER = "Answer with the option's letter from the given choices directly."
COUNT = "Answer with a single number."
# MiMo-VL's own
BOXED_COUNT = "Please count the objects by grounding. Put your answer in \\boxed{}."
BOXED_LETTER = "Answer the question with option letter from given choices. Put your final answer within \\boxed{}."

BRIEF = Decoding(max_new_tokens=256)
LONG = Decoding(max_new_tokens=1024)
REASONING = Decoding(max_new_tokens=32768)
SAMPLED = Decoding(max_new_tokens=32768, temperature=0.6, top_p=0.95)


def mimo(rl: float, sft: float, qwen: float | None = None, *, size: str = "7B") -> dict[str, float]:
    """Return MiMo-VL's published scores, and Qwen2.5-VL's as MiMo-VL's report gives them (arXiv 2506.03569)."""
    scores = {"MiMo-VL-7B-RL": rl, "MiMo-VL-7B-SFT": sft}
    return scores if qwen is None else scores | {f"Qwen2.5-VL-{size}": qwen}
