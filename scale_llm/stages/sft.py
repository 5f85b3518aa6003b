"""Supervised fine-tuning: the tokens of assistant turns are predicted, from the weights of a base model."""

import math
from functools import partial

import numpy as np

from scale_llm.config.stage import SftConfig
from scale_llm.data.chat.examples import AssistantTokens, load_examples
from scale_llm.data.of_stage import places_taken
from scale_llm.data.prefixed import PrefixedSequences
from scale_llm.data.sequence_loader import TokenSequences
from scale_llm.data.units import single_units
from scale_llm.losses.language_model import counted_tokens, language_model_loss, with_token_accuracy
from scale_llm.stages.base import Evaluation
from scale_llm.stages.context import RunContext
from scale_llm.stages.samples import Samples
from scale_llm.stages.sequence_stage import SequenceStage, SequenceTask, Totals, held_out_units, means


def sft(run: RunContext) -> SequenceStage:
    """The stage the loop drives for `stage=sft`."""
    stage, examples = run.cfg.stage, load_examples(run.prepared)
    assert isinstance(stage, SftConfig)
    groups = single_units(len(examples))
    prefix = virtual_tokens(run)

    def prefixed(some: TokenSequences) -> TokenSequences:
        return PrefixedSequences(some, prefix) if len(prefix) else some

    sequences, of_assistant = prefixed(examples), prefixed(AssistantTokens(examples))
    numbers = held_out_units(run, groups)
    marked = any(examples[int(number)].answers.any() for number in numbers)
    part = {"tp_group": run.mesh.groups.tp, "vocab_size": run.vocab_size}
    return SequenceStage(
        run,
        SequenceTask(
            sequences=sequences,
            groups=groups,
            loss=partial(language_model_loss, label_smoothing=stage.label_smoothing, **part),
            counts=counted_tokens,
            held_out=of_assistant if marked else sequences,
            held_out_loss=partial(with_token_accuracy, **part),
            summary=summary,
            answers=Samples(run, of_assistant, numbers),
            noise=stage.neftune_noise_alpha,
        ),
    )


def virtual_tokens(run: RunContext) -> np.ndarray:
    """Token ids of prompt tuning's vectors: those after the vocabulary."""
    return np.arange(run.vocab_size, run.vocab_size + places_taken(run.cfg))


def summary(totals: Totals) -> Evaluation:
    """Means over the tokens that count, and the perplexity."""
    found = means(totals)
    return Evaluation({**found, "lm loss validation ppl": math.exp(min(found["lm loss validation"], 20.0))})
