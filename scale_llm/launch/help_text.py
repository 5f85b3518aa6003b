"""What scale-llm --help prints. Reads the names in conf/, imports neither Hydra nor torch."""

from pathlib import Path

from scale_llm.config.store import GROUPS, conf_dir, options

USAGE = """\
usage: scale-llm [--check] [-m] experiment=NAME run_dir=DIR [group=OPTION ...] [group.key=VALUE ...]

Trains and evaluates language models: composes a configuration, checks it, starts its ranks.

  scale-llm experiment=demo_pretrain run_dir=runs/first
  scale-llm experiment=demo_pretrain run_dir=runs/mine data.path='books/*.txt' train.train_iters=500
  scale-llm model=tiny parallel=tp2_pp2 cluster.nproc_per_node=8 train.train_iters=20 --check
  scale-llm -m experiment=demo_pretrain optim.lr=1e-3,3e-3 train.seed=1,2
  torchrun --nproc-per-node 8 -m scale_llm.launch.cli model=llama3_8b ...     srun scale-llm model=llama3_8b ...

  scale-llm cluster=slurm cluster.nodes=4 cluster.gpus_per_node=8 cluster.time=12:00:00 model=llama3_8b run_dir=...
  scale-llm status RUN_DIR...
  scale-llm score runs/reward/checkpoints answers.jsonl runs/scores      (rewards of the answers in a file)

A rerun with the same run_dir resumes. Under torchrun and srun it joins the ranks that are there.

  --check         print the plan (layout, batches, parameters, memory); start nothing
  --prepare       make the data (tokenizer, tokens, conversations) and start nothing
  --dry-run       print the job script of cluster=slurm; write nothing and submit nothing
  -m, --multirun  one run for each combination of values separated by commas
  --cfg job       print the composed configuration
  --version       print the version
  -h, --help      print this

groups and their options (* is the default):"""


def help_text() -> str:
    """Usage, examples, the groups with their options and the keys of each."""
    return "\n".join([USAGE, *_groups(), "", _keys()])


def _groups() -> list[str]:
    defaults = _defaults(conf_dir() / "config.yaml")
    lines = []
    for group in GROUPS:
        names = [f"{name}*" if name == defaults.get(group) else name for name in options(group)]
        lines.append(f"  {group:<11} {' '.join(names)}")
    return lines


def _defaults(path: Path) -> dict[str, str]:
    """The option of each group in the defaults list of config.yaml."""
    pairs = [line.strip(" -\n").split(": ") for line in path.read_text(encoding="utf-8").splitlines()]
    return {pair[0]: pair[1] for pair in pairs if len(pair) == 2}


def _keys() -> str:
    return (
        "Every key with its value: scale-llm --cfg job [words].\n"
        "Their meaning is written under each field in scale_llm/config/<group>.py."
    )
