"""What --check prints."""

from typing import Any

from rich.console import Console
from rich.table import Table

from scale_llm.checkpoint.written import written_config
from scale_llm.config.batch import total_iterations
from scale_llm.config.memory import human
from scale_llm.config.plan import Batches, Plan, make_plan
from scale_llm.config.policy import PolicyStageConfig
from scale_llm.config.roles import TRAINED_ROLES, is_the_actor, layout_of, load_of, ranks_of, role_config, roles_of
from scale_llm.config.run import RunConfig
from scale_llm.config.stage import Batching, GenerateConfig, SequenceStageConfig
from scale_llm.config.validate_layout import world_size
from scale_llm.config.validate_policy import span
from scale_llm.launch.run_directory import greeting


def print_plan(cfg: RunConfig) -> None:
    """The plan as one table, a row a fact."""
    plan = make_plan(cfg)
    table = Table(title=f"plan of {cfg.run_dir}", show_header=False, title_justify="left")
    if isinstance(cfg.stage, PolicyStageConfig):
        sections = [_run(cfg), _roles(cfg), _iteration(cfg, cfg.stage), _parameters(plan)]
    else:
        sections = [_run(cfg), _layout(plan), _batches(cfg, plan.batches), _parameters(plan), _cost(plan)]
    for section in sections:
        for name, value in section:
            table.add_row(name, value)
        table.add_section()
    Console(highlight=False).print(table)


Rows = list[tuple[str, str]]


def _run(cfg: RunConfig) -> Rows:
    precision = "bf16" if cfg.precision.bf16 else "fp16" if cfg.precision.fp16 else "fp32"
    if cfg.precision.fp8 is not None:
        precision += f" with fp8 ({cfg.precision.fp8_recipe.value})"
    threads = f", OMP_NUM_THREADS={cfg.cluster.omp_num_threads}" if cfg.cluster.device.value == "cpu" else ""
    return [
        ("stage", f"{cfg.stage.name} of {cfg.model.name}; {greeting(cfg)}"),
        ("device", f"{cfg.cluster.device.value}, {precision}{threads}"),
        ("data", _data(cfg.data.path)),
    ]


def _data(path: Any) -> str:
    """Sources by name are told one by one below."""
    if path is None:
        return "the standard library of Python"
    return ", ".join(map(str, path)) if isinstance(path, dict) else str(path)


def _layout(plan: Plan) -> Rows:
    layout = plan.layout
    axes = f"tensor {layout.tp} x pipeline {layout.pp} x context {layout.cp} x data {layout.dp}"
    extra = f", virtual pipeline {layout.vpp}" if layout.vpp > 1 else ""
    rows = [("ranks", f"{layout.world} = {axes}{extra}")]
    if plan.parameters.inactive or layout.ep > 1:
        experts = f"expert {layout.ep} x expert tensor {layout.etp} x pipeline {layout.pp}"
        rows.append(("ranks of experts", f"{layout.world} = {experts} x expert data {layout.expert_dp}"))
    return rows


def _roles(cfg: RunConfig) -> Rows:
    """Where each role's model lies, and what a rank holds of it; then what the fullest rank holds of all."""
    rows, held = [], [0] * world_size(cfg)
    for role in roles_of(cfg):
        written = written_config(load_of(cfg, role)).model if role in ("critic", "reward") else None
        own = role_config(cfg, role, written)
        if role not in TRAINED_ROLES:
            own.stage = GenerateConfig()  # weights alone
        ranks, plan = ranks_of(cfg, role), make_plan(own)
        layout = plan.layout
        sizes = {"tensor": layout.tp, "pipeline": layout.pp, "context": layout.cp, "data": layout.dp}
        axes = "".join(f", {name} {size}" for name, size in sizes.items() if size > 1)
        away = ", in host memory while idle" if layout_of(cfg, role).offload else ""
        rows.append((role, f"ranks {span(ranks)}{axes}: {human(plan.memory.total)} a rank{away}"))
        for rank in ranks:
            held[rank] += plan.memory.total
    if is_the_actor(cfg):
        rows.append(("rollout", "the actor itself"))
    return [*rows, ("memory of the fullest rank", f"{human(max(held))}; caches and activations on top")]


def _iteration(cfg: RunConfig, stage: PolicyStageConfig) -> Rows:
    prompts, each = cfg.train.global_batch_size, stage.num_generations_per_prompt
    mini = stage.ppo_mini_batch_size or prompts
    steps = -(-prompts // mini) * stage.ppo_epochs
    rows = [
        ("iteration", f"{prompts} prompts, {prompts * each} answers of at most {stage.max_new_tokens} tokens"),
        ("optimizer steps an iteration", f"{steps}, of {mini} prompts each"),
    ]
    return [*rows, ("iterations", f"{total_iterations(cfg.train):,}")]


def _batches(cfg: RunConfig, batches: Batches | None) -> Rows:
    if batches is None:
        return []
    ramp = ""
    if batches.first_micro_batches != batches.micro_batches:
        ramp = f" (from {batches.first_micro_batches}, growing)"
    step = f"{batches.samples_per_step} samples"
    if not isinstance(cfg.stage, SequenceStageConfig) or cfg.stage.batching is Batching.packed:
        step += f", {batches.tokens_per_step:,} tokens"
    rows = [("step", step), ("micro-batches a step", f"{batches.micro_batches}{ramp}")]
    if isinstance(cfg.stage, SequenceStageConfig) and cfg.stage.batching is Batching.token_budget:
        rows[1] = ("micro-batches a step", f"as many as {cfg.stage.max_tokens_per_micro_batch:,} tokens each make")
    if batches.iterations is None:
        return [*rows, ("whole run", f"{cfg.train.train_epochs:g} epochs; iterations are known once data are read")]
    total = f"{batches.total_samples:,} samples"
    if not isinstance(cfg.stage, SequenceStageConfig):
        total += f", {batches.total_tokens:,} tokens"
    return [*rows, ("iterations", f"{batches.iterations:,}"), ("whole run", total)]


def _parameters(plan: Plan) -> Rows:
    counts = plan.parameters
    parts = {
        "embedding": counts.embedding,
        "attention": counts.attention,
        "experts and router" if counts.inactive else "mlp": counts.mlp,
        "norms": counts.norms,
        "output": counts.output,
    }
    rows = [("parameters", f"{counts.total:,}")]
    rows += [(f"  {name}", f"{count:,}") for name, count in parts.items() if count]
    if counts.inactive:
        rows.append(("  active per token", f"{counts.active:,}"))
    rows.append(("  on the fullest rank", f"{plan.per_rank.total:,}"))
    rows.append(("vocabulary, padded", f"{plan.padded_vocab_size:,}"))
    return rows


def _cost(plan: Plan) -> Rows:
    memory = plan.memory
    parts = f"weights {human(memory.weights)}, gradients {human(memory.gradients)}"
    parts += f", optimizer {human(memory.optimizer)}"
    if memory.activations is None:
        held = f"{human(memory.total)}: {parts}; activations on top"
    else:
        held = f"about {human(memory.peak)}: {parts}, activations about {human(memory.activations)}"
    return [
        ("operations per token", f"{plan.flops_per_token / 1e9:,.3f} GFLOP, forward and backward"),
        ("memory of a rank", held),
        ("checkpoint", f"about {human(plan.checkpoint_bytes)}"),
    ]
