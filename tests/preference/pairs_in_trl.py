"""Runs in an environment with TRL: losses of its trainers on pairs of a small text model, as JSON.

    python pairs_in_trl.py MODEL PAIRS OUTPUT

MODEL is a folder of a causal language model with a chat template, in ``MODEL/policy`` and ``MODEL/reference``; PAIRS is
a JSONL of TRL's conversational pairs.
"""

import json
import sys
from pathlib import Path

import torch
import trl
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

CASES = {
    "dpo": {"loss_type": ["sigmoid"]},
    "ipo": {"loss_type": ["ipo"]},
    "discopop": {"loss_type": ["discopop"]},
    "aot": {"loss_type": ["aot"]},
    "aot_unpaired": {"loss_type": ["aot_unpaired"]},
    "mpo": {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]},
}


def model(folder):
    return AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.float32)


def main(folder: Path, pairs: Path, output: Path) -> None:
    rows = [json.loads(line) for line in pairs.read_text().splitlines()]
    tokenizer = AutoTokenizer.from_pretrained(str(folder / "policy"))
    tokenizer.pad_token = "<|endoftext|>"
    found = {"trl": trl.__version__}
    for name, settings in CASES.items():
        args = trl.DPOConfig(
            output_dir=str(output.parent / name),
            per_device_train_batch_size=len(rows),
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            report_to=[],
            max_length=None,
            dataloader_pin_memory=False,
            **settings,
        )
        trainer = trl.DPOTrainer(
            model=model(folder / "policy"),
            ref_model=model(folder / "reference"),
            args=args,
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
        )
        batch = next(
            iter(
                torch.utils.data.DataLoader(
                    trainer.train_dataset, batch_size=len(rows), collate_fn=trainer.data_collator
                )
            )
        )
        trainer.model.train()
        loss = trainer.compute_loss(trainer.model, batch)
        loss.backward()
        norm = torch.sqrt(sum(p.grad.square().sum() for p in trainer.model.parameters() if p.grad is not None))
        metrics = {key: values[-1] for key, values in trainer._metrics["train"].items()}
        lengths = batch["attention_mask"].sum(-1).tolist()
        tokens = [ids[:n] for ids, n in zip(batch["input_ids"].tolist(), lengths, strict=True)]
        masks = [mask[:n] for mask, n in zip(batch["completion_mask"].tolist(), lengths, strict=True)]
        found[name] = {
            "loss": loss.item(),
            "grad_norm": norm.item(),
            "metrics": metrics,
            "tokens": tokens,
            "masks": masks,
        }
    output.write_text(json.dumps(found))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
