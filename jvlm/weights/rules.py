"""Lines of weight tables that many architectures share."""

from __future__ import annotations

from jvlm.models.decoders.transformer import TransformerConfig
from jvlm.weights.table import Rule

TRANSPOSED = "o i -> i o"


def linear(name: str, path: str, *, bias: bool, first: int = 0, step: int = 1) -> list[Rule]:
    """Return a torch ``Linear`` as our `jvlm.models.layers.Linear`."""
    rules = [Rule(f"{name}.weight", f"{path}.kernel", TRANSPOSED, first, step)]
    return [*rules, Rule(f"{name}.bias", f"{path}.bias", None, first, step)] if bias else rules


def norm(name: str, path: str, *, bias: bool = False, first: int = 0, step: int = 1) -> list[Rule]:
    """Return an RMSNorm, or with ``bias`` a LayerNorm."""
    rules = [Rule(f"{name}.weight", f"{path}.scale", None, first, step)]
    return [*rules, Rule(f"{name}.bias", f"{path}.bias", None, first, step)] if bias else rules


def swiglu(name: str, path: str, *, bias: bool, first: int = 0, step: int = 1) -> list[Rule]:
    """Return the three maps of a gated MLP, under Llama's names."""
    parts = ("gate", "up", "down")
    return [r for p in parts for r in linear(f"{name}.{p}_proj", f"{path}.{p}", bias=bias, first=first, step=step)]


def transformer(config: TransformerConfig, name: str = "model", head: str = "lm_head") -> list[Rule]:
    """Return a language model under Llama's names, which Mistral and Qwen use too; other MLPs have no rules here."""
    rules = [Rule(f"{name}.embed_tokens.weight", "decoder.embedding")]
    for index in range(config.pattern_length):
        layer, path = f"{name}.layers.{{i}}", "decoder.blocks.layer"
        path = path if config.pattern_length == 1 else f"{path}.pattern.{index}"
        at = {"first": index, "step": config.pattern_length}
        for part in "qkv":
            to = f"{path}.attention.{part}"
            rules += linear(f"{layer}.self_attn.{part}_proj", to, bias=config.qkv_bias, **at)
        rules += linear(f"{layer}.self_attn.o_proj", f"{path}.attention.out", bias=False, **at)
        if config.qk_norm:
            rules += norm(f"{layer}.self_attn.q_norm", f"{path}.attention.q_norm", **at)
            rules += norm(f"{layer}.self_attn.k_norm", f"{path}.attention.k_norm", **at)
        if not config.has_mlp(index):
            rules += swiglu(f"{layer}.mlp", f"{path}.mlp", bias=False, **at)
        rules += norm(f"{layer}.input_layernorm", f"{path}.norm1", **at)
        rules += norm(f"{layer}.post_attention_layernorm", f"{path}.norm2", **at)
    rules += norm(f"{name}.norm", "decoder.norm")
    if config.labels:
        return [*rules, *linear("score", "decoder.score", bias=False)]
    return rules if config.tie_word_embeddings else [*rules, *linear(head, "decoder.head", bias=False)]
