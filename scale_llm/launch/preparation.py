"""Data before ranks: tokenizer, tokens and conversations are made once, and what is wrong with them is found here."""

from scale_llm.config.errors import UserError
from scale_llm.config.run import RunConfig
from scale_llm.config.stage import EvaluateConfig, SftConfig
from scale_llm.data.tokenizer_json import fim_problems
from scale_llm.launch.mixture_table import print_mixture


def prepare_data(cfg: RunConfig) -> None:
    """Make or find the data of a run; raises UserError for anything wrong with them."""
    from scale_llm.data.chat.examples import PreparedExamples, empty_splits
    from scale_llm.data.chat.preferences import PreparedPreferences, preference_lines
    from scale_llm.data.chat.prompts import PreparedPrompts
    from scale_llm.data.chat.reading import lost_lines, report_lines
    from scale_llm.data.index_work import left_out_lines
    from scale_llm.data.of_stage import prepare_run
    from scale_llm.data.prepare import check_splits

    prepared = prepare_run(cfg, show_progress=cfg.logging.progress)
    problems = []
    if isinstance(prepared, PreparedPrompts):
        kept = f"{prepared.num_prompts:,} prompts of at most {prepared.longest} tokens"
        print("\n".join([kept, *lost_lines(prepared.report)]), flush=True)
    elif isinstance(prepared, PreparedExamples):
        print("\n".join(report_lines(prepared.report)), flush=True)
        if isinstance(cfg.stage, SftConfig):
            problems = empty_splits(cfg.data.split, prepared.num_examples, "conversations", splits_used(cfg))
            if not problems:
                print(packing_line(cfg, prepared), flush=True)
    elif isinstance(prepared, PreparedPreferences):
        print("\n".join(preference_lines(prepared.report)), flush=True)
        problems = empty_splits(cfg.data.split, prepared.num_comparisons, "rows", splits_used(cfg))
    else:
        print("".join(f"{line}\n" for line in left_out_lines(prepared.left_out)), end="", flush=True)
        problems = check_splits(prepared, cfg.data, seq_length=cfg.model.seq_length, splits=splits_used(cfg))
        problems += fim_problems(cfg.data, prepared.tokenizer_path)
    if cfg.model.vocab_size is not None and prepared.vocab_size > cfg.model.vocab_size:
        problems.append(
            f"model.vocab_size={cfg.model.vocab_size}: smaller than the {prepared.vocab_size} tokens of "
            f"{prepared.tokenizer_path}; leave model.vocab_size=null to take the tokenizer's"
        )
    if problems:
        raise UserError(problems)
    print_mixture(cfg)


def packing_line(cfg: RunConfig, prepared) -> str:
    """How well the training conversations fill their rows."""
    from scale_llm.data.chat.examples import load_examples, split_indices
    from scale_llm.data.of_stage import places_taken
    from scale_llm.data.sequence_stream import filled

    assert isinstance(cfg.stage, SftConfig)
    examples = load_examples(prepared)
    lengths = examples.lengths[split_indices(len(examples), cfg.data.split, "train")] + places_taken(cfg) - 1
    share = filled(
        cfg.stage, lengths, row_tokens=cfg.model.seq_length, micro_batch_size=cfg.train.micro_batch_size,
        seed=cfg.train.seed,
    )  # fmt: skip
    return f"{cfg.stage.batching.value}: {share:.1%} of the places of a step hold a token"


def splits_used(cfg: RunConfig) -> tuple[str, ...]:
    """Splits this run reads."""
    if isinstance(cfg.stage, EvaluateConfig):
        return (cfg.stage.split,)
    return ("train", "validation") if cfg.train.eval_iters > 0 else ("train",)
