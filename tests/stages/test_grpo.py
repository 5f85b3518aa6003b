"""Whole runs of GRPO and its kin, from a base model that a run has pretrained."""

import json

import pytest

TP2 = "parallel.tensor_model_parallel_size=2"
PP2 = "parallel.pipeline_model_parallel_size=2"
CP2 = "parallel.context_parallel_size=2"
RANKS2 = "cluster.nproc_per_node=2"

WORDS = ["stage=grpo", "model=from_checkpoint", "model.seq_length=64", "data.split='80,20,0'", "optim.lr=1e-3",
         "train.global_batch_size=4", "train.train_iters=3", "train.eval_iters=1", "optim.lr_warmup_iters=0",
         "stage.num_generations_per_prompt=4", "stage.max_new_tokens=12", "reward.function=length",
         "reward.length_target_tokens=6"]  # fmt: skip


@pytest.fixture(scope="session")
def prompts(tmp_path_factory):
    """Sums of unequal lengths."""
    path = tmp_path_factory.mktemp("data") / "prompts.jsonl"
    with open(path, "w") as file:
        for a in range(6):
            for b in range(4):
                file.write(json.dumps({"prompt": f"{a} and {b}?" * (1 + a % 3), "label": str(a + b)}) + "\n")
    return path


def words(base, prompts, *more):
    return [*WORDS, f"data.path={prompts}", f"checkpoint.load={base}", *more]
