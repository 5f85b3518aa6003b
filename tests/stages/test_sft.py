"""Whole runs of fine-tuning, from a base model that a run has pretrained."""

import json
import math
import subprocess
import sys

import pytest
import torch
from support import families
from support.ranks import environment
from support.runs import BUDGET, PADDED, PP2, RANKS2, SP, TP2, last_validation, latest, losses, words_from
from support.slow import slow_but

WORDS = ["stage=sft", "model=from_checkpoint", "model.seq_length=128", "data.split='90,10,0'", "stage.num_samples=2",
         "stage.max_new_tokens=6", "optim.lr=3e-3", "train.global_batch_size=4",
         "train.micro_batch_size=2"]  # fmt: skip
words = words_from(WORDS)
LORA = ["peft=lora", "peft.rank=4", "peft.dropout=0.1"]


@pytest.fixture(scope="session")
def conversations(tmp_path_factory):
    """Sums in words; every fourth conversation has two turns, every fifth a weight."""
    path = tmp_path_factory.mktemp("data") / "sums.jsonl"
    with open(path, "w") as file:
        for a in range(12):
            for b in range(10):
                turns = [("user", f"{a} and {b}?"), ("assistant", f"That is {a + b}.")]
                if (a + b) % 4 == 0:
                    turns += [("user", "and twice that?" * (1 + b % 3)), ("assistant", f"{2 * (a + b)}")]
                row = {"messages": [{"role": role, "content": text} for role, text in turns]}
                if b % 5 == 0:
                    row["weight"] = 2.0
                file.write(json.dumps(row) + "\n")
    return path


VARIANTS = {
    "packed_tp2": ["precision=bf16", TP2, SP],
    "padded": [PADDED, "data.num_workers=1"],
    "budget_pp2": [BUDGET, PP2],
    "noise_and_dropout": ["stage.neftune_noise_alpha=5", "model.hidden_dropout=0.1", "stage.label_smoothing=0.1"],
    "compiled_padded_bf16": [PADDED, "model.compile_ops=true", "precision=bf16"],
    "lora_tp2": [*LORA, TP2, "precision=bf16"],
    "dora_distributed": ["peft=dora", "peft.rank=4", "parallel.use_distributed_optimizer=true", RANKS2],
    "qlora": ["peft=qlora", "peft.rank=4", "precision=bf16"],
    "prompt_tuning": ["peft=prompt_tuning", "peft.num_virtual_tokens=6", "peft.prompt_init_text='def sum'"],
}


@pytest.mark.parametrize("variant", slow_but(VARIANTS, "packed_tp2", "padded", "budget_pp2", "lora_tp2"))
def test_resume_in_mid_epoch_is_bit_for_bit(runs, tmp_path, base, conversations, variant):
    """12 steps of 4 samples; 108 conversations are 10 to 13 packed rows, so that epochs end between and in steps."""
    said = words(base, conversations, "train.train_iters=12", *VARIANTS[variant])
    resumed, whole = runs.resumed_and_whole(tmp_path, *said, stop=6, iteration=12)
    assert losses(whole)[-1] < losses(whole)[0]
    assert (resumed / "samples.jsonl").read_text() == (whole / "samples.jsonl").read_text()


def test_epochs_and_what_a_run_leaves(runs, tmp_path, base, conversations):
    """Two epochs of single conversations: 108 of the 120 train, so 54 steps of 4; evaluation and samples at the end."""
    run = tmp_path / "run"
    said = words(base, conversations, PADDED, "train.train_iters=null", "train.train_epochs=2")
    assert runs(run, *said) == []
    assert latest(run) == 54
    last = last_validation(run)
    assert last["iteration"] == 54
    assert 0.2 < last["token accuracy validation"] <= 1.0
    assert math.isclose(last["lm loss validation ppl"], math.exp(last["lm loss validation"]))
    samples = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
    assert len(samples) == 2
    for sample in samples:
        assert sample["prompt"].endswith("<|assistant|>\n") and sample["reference"].endswith("<|endoftext|>")
        assert sample["before"] != sample["after"]
    assert "| before | after |" in (run / "samples.md").read_text()
    events = next((run / "tensorboard").iterdir()).read_bytes()
    assert b"samples/text_summary" in events


def test_a_checkpoint_of_adapters_holds_nothing_else(runs, tmp_path, base, conversations):
    """It is small, is evaluated with its base, and its template goes on to the next stage."""
    run = tmp_path / "run"
    assert runs(run, *words(base, conversations, *LORA)) == []
    from scale_llm.checkpoint.torch_dist import TorchDistReader

    names = TorchDistReader(run / "checkpoints" / "iter_0000020").tensors
    assert names and all(".adapter." in name for name in names)
    assert (run / "checkpoints" / "iter_0000020" / "tokenizer" / "chat_template.jinja").is_file()

    evaluate = ["stage=evaluate", "model=from_checkpoint", "train.eval_iters=2", "stage.split=validation"]
    with_adapters, without = tmp_path / "with", tmp_path / "without"
    assert runs(with_adapters, *evaluate, f"checkpoint.load={run / 'checkpoints'}") == []
    assert runs(without, *evaluate, f"checkpoint.load={base}") == []
    found, plain = (json.loads((path / "evaluation.json").read_text()) for path in (with_adapters, without))
    assert found["lm loss"] != plain["lm loss"]


def test_losses_of_transformers(runs, tmp_path, conversations):
    """The same conversations, weights and AdamW in transformers, padded there, packed here: losses within 1e-4."""
    from scale_llm.config.io import load_config
    from scale_llm.data.chat.examples import load_examples, split_indices
    from scale_llm.data.of_stage import prepare_run
    from scale_llm.data.sequence_stream import PackedStream

    directory, run = families.save("llama3", tmp_path / "model"), tmp_path / "run"
    (directory / "chat_template.jinja").unlink()
    text = conversations.read_text().replace(', "weight": 2.0', "")
    (tmp_path / "plain.jsonl").write_text(text)
    said = words(directory, tmp_path / "plain.jsonl", "train.train_iters=10", "tokenizer.eod_token='</s>'",
                 f"tokenizer.path={directory}", "optim.weight_decay=0.1", "optim.lr_warmup_iters=0",
                 "optim.lr_decay_style=constant", "data.split='100,0,0'", "train.eval_iters=0",
                 "model.ffn_hidden_size=112", "model.num_attention_heads=8", "model.num_query_groups=4")  # fmt: skip
    assert runs(run, *said) == []

    cfg = load_config(run)
    examples = load_examples(prepare_run(cfg))
    train = split_indices(len(examples), cfg.data.split, "train")
    stream = PackedStream(examples.lengths[train] - 1, cfg.model.seq_length, seed=cfg.train.seed)
    model = families.build("llama3").train()
    decayed = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() == 1]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=cfg.optim.lr, betas=(cfg.optim.adam_beta1, cfg.optim.adam_beta2),
                                  eps=cfg.optim.adam_eps)  # fmt: skip
    wanted = []
    for step in range(10):
        numbers = [number for sample in range(4 * step, 4 * step + 4) for number in stream.sample(sample)]
        chosen = [examples[int(train[number])] for number in numbers]
        width = max(len(one.tokens) for one in chosen)
        tokens, labels = torch.zeros(len(chosen), width, dtype=torch.int64), torch.full((len(chosen), width), -100)
        for i, one in enumerate(chosen):
            tokens[i, : len(one.tokens)] = torch.from_numpy(one.tokens)
            labels[i, : len(one.tokens)][torch.from_numpy(one.trained)] = torch.from_numpy(one.tokens[one.trained])
        loss = model(tokens, labels=labels).loss
        wanted.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.optim.clip_grad)
        optimizer.step()
    assert wanted[0] - wanted[-1] > 0.5, "training must show"
    assert max(abs(a - b) for a, b in zip(losses(run), wanted, strict=True)) < 1e-4, (losses(run), wanted)


@pytest.mark.slow
def test_gsm8k_from_the_command_line(tmp_path, gsm8k):
    """The demo's model after a few steps on text, tuned by the documented command: the mean loss of assistant tokens
    over the last steps is below that of the first, before anything is learnt, by over 30%."""
    small = ["train.eval_iters=1", "logging.progress=false", "cluster.omp_num_threads=1", "model.compile_ops=false",
             "train.global_batch_size=4"]  # fmt: skip
    base, run = tmp_path / "base", tmp_path / "run"
    text = ["train.train_iters=60", "data.embedded_megabytes=1"]
    scale_llm("experiment=demo_pretrain", f"run_dir={base}", *text, *small)
    said = scale_llm(
        "experiment=demo_sft", f"data.path={gsm8k}", "data.fields.prompt=question", "data.fields.response=answer",
        f"run_dir={run}", f"checkpoint.load={base / 'checkpoints'}", "train.train_iters=100", "optim.lr=2e-3",
        "stage.num_samples=1", "train.eval_interval=null", *small,
    )  # fmt: skip
    assert "of 7,473 rows" in said and "of the places of a step hold a token" in said
    found = losses(run)
    assert sum(found[-10:]) / 10 < 0.7 * found[0], found


def scale_llm(*arguments: str) -> str:
    """The command line's output; it must succeed."""
    done = subprocess.run(
        [sys.executable, "-m", "scale_llm.launch.cli", *arguments], capture_output=True, text=True, env=environment()
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout
