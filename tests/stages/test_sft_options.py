"""What a fine-tuning run's options do to its first step, whose learning rate is still 0: losses of the base model."""

import json
import math

import pytest
from support.runs import latest, rows

WORDS = ["stage=sft", "model=from_checkpoint", "model.seq_length=128", "stage.batching=padded", "stage.num_samples=0",
         "data.split='75,25,0'", "train.global_batch_size=6", "train.micro_batch_size=2",
         "train.train_iters=1"]  # fmt: skip


def write(path, turns):
    """Eight conversations of so many questions and answers, unequal in length; six of them train."""
    with open(path, "w") as file:
        for a in range(8):
            said = [("user", f"{a} and 5?"), ("assistant", f"That is {a + 5}." * (1 + a % 3))]
            said += [("user", "and twice that?" * (1 + a % 2)), ("assistant", f"{2 * (a + 5)}, I believe")]
            messages = [{"role": role, "content": text} for role, text in said[: 2 * turns]]
            file.write(json.dumps({"messages": messages}) + "\n")
    return path


@pytest.fixture(scope="module")
def first_step(runs, base, tmp_path_factory):
    """What a run with these options has logged and where; equal runs are made once."""
    directory = tmp_path_factory.mktemp("options")
    files = {turns: write(directory / f"{turns}.jsonl", turns) for turns in (1, 2)}
    known = {}

    def run(*options, turns=2):
        if (options, turns) not in known:
            path = directory / f"run_{len(known)}"
            assert runs(path, *WORDS, f"data.path={files[turns]}", f"checkpoint.load={base}", *options) == []
            step, validation = rows(path)
            assert step["learning-rate"] == 0.0
            logged = {**step, **validation}
            known[options, turns] = logged, path
        return known[options, turns]

    return run


def prepared(path):
    """The run's configuration and what its data were made into."""
    from scale_llm.config.io import load_config
    from scale_llm.data.of_stage import prepare_run

    cfg = load_config(path)
    return cfg, prepare_run(cfg)


def total(run):
    """Tokens that the step's loss counts, and the sum of their losses."""
    from scale_llm.data.chat.examples import load_examples, split_indices

    logged, path = run
    cfg, data = prepared(path)
    examples = load_examples(data)
    train = split_indices(len(examples), cfg.data.split, "train")
    assert len(train) == cfg.train.global_batch_size
    count = sum(int(examples[number].trained[1:].sum()) for number in train)
    return count, count * logged["lm loss"]


def test_label_smoothing_mixes_the_loss_with_the_vocabularys_mean(first_step):
    """(1 - e) of the label's loss and e of the mean over the vocabulary: a line through the plain loss at e = 0.
    Validation stays the plain loss."""
    logged = [first_step(*words)[0] for words in ([], ["stage.label_smoothing=0.2"], ["stage.label_smoothing=0.4"])]
    plain, some, more = (row["lm loss"] for row in logged)
    assert abs(some - plain) > 1e-3 * plain
    assert math.isclose(more - plain, 2 * (some - plain), rel_tol=1e-3)
    assert len({row["lm loss validation"] for row in logged}) == 1


def test_noise_on_embeddings_is_of_training_alone(first_step):
    """Little noise moves the loss a little, and validation sees none."""
    plain, noisy = first_step()[0], first_step("stage.neftune_noise_alpha=0.05")[0]
    assert 0 < abs(noisy["lm loss"] - plain["lm loss"]) < 0.02 * plain["lm loss"]
    assert plain["lm loss validation"] == noisy["lm loss validation"]


def test_train_on_chooses_the_tokens_that_the_loss_counts(first_step):
    """A token's loss depends on those before it alone, so the sum over all answers is that over the last ones and that
    over the first ones, which conversations cut off after them give. All tokens are more, and so is their sum."""
    every, last, all_tokens = (
        total(first_step(*words)) for words in ([], ["stage.train_on=last_assistant"], ["stage.train_on=all"])
    )
    first = total(first_step(turns=1))
    assert 0 < last[0] < every[0] == first[0] + last[0]
    assert math.isclose(every[1], first[1] + last[1], rel_tol=1e-5)
    assert all_tokens[0] > 2 * every[0] and all_tokens[1] > 1.5 * every[1]


def test_validation_is_of_answers_whatever_is_trained_on(first_step):
    """With stage.train_on=all, too, so that runs compare; samples are questions with their answers."""
    samples = ["stage.num_samples=2", "stage.max_new_tokens=4"]
    (every, path), (all_tokens, other) = (first_step(*samples, *words) for words in ([], ["stage.train_on=all"]))
    assert abs(all_tokens["lm loss"] - every["lm loss"]) > 1e-3
    for name in ("lm loss validation", "token accuracy validation"):
        assert all_tokens[name] == every[name]
    read = [(directory / "samples.jsonl").read_text() for directory in (path, other)]
    found, wanted = ([json.loads(line) for line in text.splitlines()] for text in read)
    assert len(found) == 2
    for a, b in zip(found, wanted, strict=True):
        assert (a["prompt"], a["reference"], a["before"]) == (b["prompt"], b["reference"], b["before"])
        assert a["prompt"].endswith("<|assistant|>\n") and a["reference"].endswith("<|endoftext|>")


def test_validation_without_a_single_answer_is_of_all_tokens(runs, base, tmp_path):
    """Prompts that fill the rows, trained on whole: the loss of nothing would be 0."""
    with open(tmp_path / "long.jsonl", "w") as file:
        for a in range(8):
            turns = [("user", f"{a} and 5? " * 60), ("assistant", f"{a + 5}")]
            messages = [{"role": role, "content": text} for role, text in turns]
            file.write(json.dumps({"messages": messages}) + "\n")
    words = [f"data.path={tmp_path / 'long.jsonl'}", f"checkpoint.load={base}", "stage.train_on=all"]
    assert runs(tmp_path / "run", *WORDS, *words) == []
    step, validation = rows(tmp_path / "run")
    assert validation["lm loss validation"] > 0.5 * step["lm loss"]


def test_it_is_said_that_no_prompt_leaves_room_for_an_answer(runs, base, tmp_path):
    file = write(tmp_path / "turns.jsonl", 1)
    room = ["stage.num_samples=2", "stage.max_new_tokens=127"]
    said = runs.command(tmp_path / "run", *WORDS, f"data.path={file}", f"checkpoint.load={base}", *room)
    assert "no samples: none of 2 validation conversations" in said and "stage.max_new_tokens=127" in said
    assert not (tmp_path / "run" / "samples.md").exists()


@pytest.mark.parametrize("text", ["def sum", None])
def test_virtual_tokens_begin_as_a_text_or_as_random_tokens(first_step, base, text):
    """As `peft.prompt_init_text` says: the text's tokens over and over, or different ones of the vocabulary."""
    from scale_llm.checkpoint.torch_dist import TorchDistReader
    from scale_llm.data.tokenizer import Tokenizer

    options = ["peft=prompt_tuning", "peft.num_virtual_tokens=6", f"peft.prompt_init_text={json.dumps(text)}"]
    _, path = first_step(*options)
    cfg, data = prepared(path)
    assert cfg.checkpoint.load == str(base / f"iter_{latest(base.parent):07d}"), "what lies under them is named"
    table = TorchDistReader(base / f"iter_{latest(base.parent):07d}").read("embedding.word_embeddings.weight")
    vectors = TorchDistReader(path / "checkpoints" / "iter_0000001").read("virtual_tokens.weight")
    found = [(table == vector).all(1).nonzero().flatten().tolist() for vector in vectors]
    if text is None:
        assert all(len(rows) == 1 for rows in found) and len({rows[0] for rows in found}) > 3
        return
    tokens = Tokenizer.load(data.tokenizer_path, cfg.tokenizer.eod_token).encode(text)
    assert 1 < len(tokens) < 6
    assert found == [[token] for token in (tokens * 6)[:6]]
