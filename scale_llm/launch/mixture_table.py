"""What a run takes of its sources, printed by --check and at the start of a pretraining."""

from rich.console import Console
from rich.table import Table
from rich.text import Text

from scale_llm.config.parameters import count_parameters
from scale_llm.config.plan import make_batches, make_layout
from scale_llm.config.run import RunConfig
from scale_llm.config.stage import PretrainConfig
from scale_llm.data.at_hand import tokens_at_hand
from scale_llm.data.mixture import Part, amounts, parts_of_run, repeats, short


def print_mixture(cfg: RunConfig) -> None:
    """The sources of a pretraining as a table, what its model wants beside what is there, and warnings."""
    if not isinstance(cfg.stage, PretrainConfig):
        return
    layout = make_layout(cfg)
    run_tokens = make_batches(cfg, layout.dp).total_tokens
    sources, tokens, estimated = zip(*tokens_at_hand(cfg.data, cfg.tokenizer), strict=True)
    parts = parts_of_run(sources, tokens, estimated, cfg.data.temperature, run_tokens)
    parameters = count_parameters(cfg.model, layout.tp).active
    console = Console(highlight=False, soft_wrap=True, markup=False)
    console.print(_table(parts))
    for name, text in amounts(parameters, parts, run_tokens):
        console.print(f"{name}: {text}")
    for warning in repeats(parts):
        console.print(warning)


def _table(parts: list[Part]) -> Table:
    """A row a source: what was given, tokens of its training split, share of the run, passes over it."""
    guessed = any(part.estimated for part in parts)
    title = "sources" + (" (~: estimated from bytes; exact once indexed)" if guessed else "")
    table = Table(title=title, title_justify="left")
    table.add_column("source", overflow="fold")
    for name in ("weight", "tokens", "share", "epochs in this run"):
        table.add_column(name, justify="right", no_wrap=True)
    for part in parts:
        about = "~" if part.estimated else ""
        tokens = f"{about}{short(part.tokens)}" if part.estimated else f"{part.tokens:,}"
        epochs = "" if part.epochs is None else f"{about}{part.epochs:.3g}"
        table.add_row(Text(part.name), part.given, tokens, f"{part.share:.1%}", epochs)
    return table
