"""Loss, perplexity and bits per byte of a checkpoint on one split."""

import json
import math
from functools import partial
from pathlib import Path

import torch.distributed as dist

from scale_llm.config.checkpoint_files import latest_checkpoint
from scale_llm.config.errors import UserError
from scale_llm.config.io import write_text
from scale_llm.config.stage import EvaluateConfig
from scale_llm.engine.engine import Engine
from scale_llm.losses.language_model import language_model_loss
from scale_llm.stages.context import RunContext
from scale_llm.stages.evaluation import LanguageModelEvaluation
from scale_llm.stages.run_state import load_weights


def evaluate(run: RunContext) -> None:
    """Prints the result and writes run_dir/evaluation.json."""
    cfg = run.cfg
    stage = cfg.stage
    assert isinstance(stage, EvaluateConfig)
    found = latest_checkpoint(cfg.checkpoint.load) if cfg.checkpoint.load else None
    if found is None:
        raise UserError(
            f"checkpoint.load={cfg.checkpoint.load}: no checkpoint there; name one that training has written"
        )
    engine = Engine(cfg, run.mesh, run.device, vocab_size=run.vocab_size, trainable=False)
    load_weights(run, engine, found[1])
    loss_fn = partial(language_model_loss, tp_group=run.mesh.groups.tp, vocab_size=run.vocab_size)
    loss, tokens = LanguageModelEvaluation(run, stage.split, loss_fn).totals(engine)
    if tokens == 0:
        raise UserError(
            f"stage.split={stage.split}: holds fewer than one micro-batch on every rank; give it a larger share in "
            f"data.split={cfg.data.split}, or set train.eval_iters above {cfg.train.eval_iters}"
        )
    result = {
        "iteration": found[0],
        "checkpoint": str(found[1]),
        "split": stage.split,
        "tokens": tokens,
        "lm loss": loss / tokens,
        "ppl": math.exp(min(loss / tokens, 20.0)),
    }
    if run.prepared.num_bytes is not None:
        bytes_per_token = run.prepared.num_bytes / run.prepared.num_tokens  # the corpus' mean
        result["bits per byte"] = loss / tokens / math.log(2) / bytes_per_token
    if dist.get_rank() == dist.get_world_size() - 1:
        write_text(Path(cfg.run_dir) / "evaluation.json", json.dumps(result, indent=2) + "\n")
        shown = " | ".join(f"{k}: {v:.6g}" if isinstance(v, float) else f"{k}: {v}" for k, v in result.items())
        print(f" evaluation | {shown} |", flush=True)
