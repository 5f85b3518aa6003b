"""What runs of later stages begin with: pairs of answers, and their like."""

import json

import pytest


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
