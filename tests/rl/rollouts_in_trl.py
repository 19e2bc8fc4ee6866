"""Runs in an environment with TRL: what its GRPO trainer makes of a small text model and given answers.

    python rollouts_in_trl.py MODEL ROLLOUTS OUTPUT

MODEL is a folder of a causal language model with a chat template; ROLLOUTS is JSON, a list of prompts with "ids" and
"answers", each with "ids" and "reward". OUTPUT/CASE is the model after two updates with the same answers, and
OUTPUT/found.json has what the trainer logged.
"""

import json
import sys
from pathlib import Path

import torch
import trl
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

LONGEST = 12  # tokens of an answer, by which dr_grpo divides
CASES = {
    "grpo": {"loss_type": "grpo"},
    "dapo": {"loss_type": "dapo", "epsilon_high": 0.28},
    "dr_grpo": {"loss_type": "dr_grpo", "scale_rewards": "none"},
    "gspo": {"loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon": 3e-4, "epsilon_high": 4e-4},
    "two_sided": {"loss_type": "bnpo", "delta": 1.5},
}


def main(folder: Path, rollouts: Path, output: Path) -> None:
    given = json.loads(rollouts.read_text())
    count = len(given[0]["answers"])
    tokenizer = AutoTokenizer.from_pretrained(str(folder))
    tokenizer.pad_token = "<|endoftext|>"
    found = {"trl": trl.__version__}

    def answers(prompts, *_):
        """In place of sampling. Each prompt comes once for each of its answers."""
        seen, ids, answered = {}, [], []
        for prompt in prompts:
            number = int(prompt if isinstance(prompt, str) else prompt[-1]["content"])
            seen[number] = seen.get(number, -1) + 1
            ids.append(given[number]["ids"])
            answered.append(given[number]["answers"][seen[number]]["ids"])
        return {"prompt_ids": ids, "completion_ids": answered, "logprobs": [[0.0] * len(one) for one in answered]}

    def reward(prompts, completion_ids, **_):
        known = {
            (n, tuple(answer["ids"])): answer["reward"] for n, group in enumerate(given) for answer in group["answers"]
        }
        return [known[int(prompt), tuple(ids)] for prompt, ids in zip(prompts, completion_ids, strict=True)]

    for name, settings in CASES.items():
        args = trl.GRPOConfig(
            output_dir=str(output / f"{name}_run"),
            per_device_train_batch_size=count * len(given),
            num_generations=count,
            num_iterations=2,
            steps_per_generation=1,
            max_steps=2,
            max_completion_length=LONGEST,
            learning_rate=0.02,
            lr_scheduler_type="constant",
            optim="sgd",
            max_grad_norm=0.0,
            weight_decay=0.0,
            temperature=1.0,
            shuffle_dataset=False,
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            dataloader_pin_memory=False,
            save_strategy="no",
            logging_steps=1,
            report_to=[],
            **settings,
        )
        trainer = trl.GRPOTrainer(
            model=AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.float32),
            reward_funcs=reward,
            args=args,
            train_dataset=Dataset.from_list([{"prompt": str(number)} for number in range(len(given))]),
            processing_class=tokenizer,
            rollout_func=answers,
        )
        trainer.train()
        trainer.model.save_pretrained(str(output / name))
        found[name] = [line for line in trainer.state.log_history if "loss" in line]
    (output / "found.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
