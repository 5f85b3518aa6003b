"""What runs of later stages begin with: a model that knows a little, and pairs of answers."""

import json

import pytest


@pytest.fixture(scope="session")
def base(runs, tmp_path_factory):
    """Checkpoints of a pretrained model, its tokenizer with them."""
    path = tmp_path_factory.mktemp("base") / "run"
    assert runs(path) == []
    return path / "checkpoints"


@pytest.fixture(scope="session")
def pairs(tmp_path_factory):
    """Sums, said and not said, of unequal lengths; every third pair is clearly better (a margin)."""
    path = tmp_path_factory.mktemp("data") / "pairs.jsonl"
    with open(path, "w") as file:
        for a in range(6):
            for b in range(5):
                prompt, chosen = f"{a} and {b}?" * (1 + a % 3), f"That is {a + b}."
                row = {"prompt": prompt, "chosen": chosen, "rejected": "No idea" * (1 + b)}
                if a % 3 == 0:
                    row["margin"] = 0.5
                file.write(json.dumps(row) + "\n")
    return path


@pytest.fixture(scope="session")
def judged(tmp_path_factory):
    """Single answers to sums, right ones desirable, others not; of unequal lengths."""
    path = tmp_path_factory.mktemp("data") / "judged.jsonl"
    with open(path, "w") as file:
        for a in range(6):
            for b in range(6):
                prompt, good = f"{a} and {b}?" * (1 + a % 3), (a + b) % 2 == 0
                answer = f"That is {a + b}." if good else "No idea" * (1 + b % 3)
                file.write(json.dumps({"prompt": prompt, "completion": answer, "label": good}) + "\n")
    return path


@pytest.fixture(scope="session")
def ranked(tmp_path_factory):
    """Two to four answers each, best first: the fewer words, the better."""
    path = tmp_path_factory.mktemp("data") / "ranked.jsonl"
    with open(path, "w") as file:
        for a in range(6):
            for b in range(5):
                answers = [f"That is {a + b}.", "No idea", "No idea" * 3, "No idea " * 6][: 2 + (a + b) % 3]
                file.write(json.dumps({"prompt": f"{a} and {b}?" * (1 + a % 3), "responses": answers}) + "\n")
    return path


WAYS_TO_ASK = ("Say {}", "Repeat {}", "Give me a {}", "The digit {} please", "{}", "Again: {}")


@pytest.fixture(scope="session")
def digits(tmp_path_factory):
    """Prompts that ask for their digit; a label has it."""
    path = tmp_path_factory.mktemp("data") / "digits.jsonl"
    with open(path, "w") as file:
        for way in WAYS_TO_ASK:
            for digit in range(10):
                file.write(json.dumps({"prompt": way.format(digit), "label": str(digit)}) + "\n")
    return path


@pytest.fixture(scope="session")
def beginner(runs, base, digits, tmp_path_factory):
    """Checkpoints of a model that has been told what such answers look like: one in five of them is right."""
    said = digits.with_name("said.jsonl")
    with open(said, "w") as file:
        for way in WAYS_TO_ASK:
            for digit in range(10):
                for other in range(5):
                    answer = (digit + 2 * other) % 10
                    file.write(json.dumps({"prompt": way.format(digit), "response": str(answer)}) + "\n")
    run = tmp_path_factory.mktemp("beginner") / "run"
    words = ["stage=sft", "model=from_checkpoint", f"checkpoint.load={base}", f"data.path={said}",
             "data.split='98,2,0'", "train.train_iters=80", "train.global_batch_size=50", "train.micro_batch_size=50",
             "train.eval_interval=null", "optim.lr=3e-3", "stage.num_samples=0", "stage.batching=padded",
             "train.log_interval=20"]  # fmt: skip
    assert runs(run, *words) == []
    return run / "checkpoints"
