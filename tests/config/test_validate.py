"""Every problem a configuration can have, each named by key, value and remedy."""

import os

import pytest
from support.configs import config_of

from scale_llm.config.io import save_config
from scale_llm.config.machine import Machine
from scale_llm.config.resolve import resolve
from scale_llm.config.validate import problems_of

MACHINE = Machine(cores=2, gpus=0, fast_bf16_cpu=False)


def problems(*words: str) -> list[str]:
    """Problems of a run that would be valid without these words."""
    return problems_of(resolve(config_of("train.train_iters=10", *words), MACHINE), MACHINE)


CASES = {
    "cluster.nproc_per_node=3": ["parallel=tp2", "cluster.nproc_per_node=3", "train.global_batch_size=3"],
    "model.num_attention_heads=6": ["parallel.tensor_model_parallel_size=4", "model.num_attention_heads=6",
                                    "model.hidden_size=240", "model.num_query_groups=2"],
    "model.num_query_groups=2": ["parallel.tensor_model_parallel_size=4", "cluster.nproc_per_node=4",
                                 "model.num_attention_heads=4", "model.num_query_groups=2"],
    "model.num_query_groups=3": ["parallel=tp2", "model.num_attention_heads=6", "model.hidden_size=240",
                                 "model.num_query_groups=3"],
    "model.ffn_hidden_size=201": ["parallel=tp2", "model.ffn_hidden_size=201"],
    "profile.start=-1": ["profile.start=-1", "profile.stop=3"],
    "profile.start=10": ["profile=trace"],
    "profile.stop=null": ["profile.start=3"],
    "profile.stop=3": ["profile.start=3", "profile.stop=3"],
    "profile.ranks=[0, 1]": ["profile.start=3", "profile.stop=5", "profile.ranks=[0,1]"],
    "profile.ranks=[]": ["profile.start=3", "profile.stop=5", "profile.ranks=[]"],
    "profile.nvtx=true": ["profile.start=3", "profile.stop=5", "profile.nvtx=true"],
    "profile.memory=true": ["profile.start=3", "profile.stop=5", "profile.memory=true"],
    "model.num_layers=5": ["parallel=pp2", "model.num_layers=5"],
    "model.num_layers=6": ["parallel=pp2_vpp2", "model.num_layers=6"],
    "parallel.virtual_pipeline_model_parallel_size=2": ["parallel.virtual_pipeline_model_parallel_size=2"],
    "parallel.sequence_parallel=true": ["parallel.sequence_parallel=true"],
    "model.seq_length=510": ["parallel=cp2", "model.seq_length=510"],
    "model.seq_length=511": ["parallel=tp2_sp", "model.seq_length=511"],
    "parallel.overlap_param_gather=true": ["parallel.overlap_param_gather=true"],
    "parallel.ddp_bucket_size=1000": ["parallel.ddp_bucket_size=1000"],
    "parallel.ddp_bucket_size=0": ["parallel=distopt", "parallel.ddp_bucket_size=0"],
    "parallel.ddp_pad_buckets_for_high_nccl_busbw=true": ["parallel.ddp_pad_buckets_for_high_nccl_busbw=true"],
    "parallel.overlap_p2p_comm=true": ["parallel=pp2", "parallel.overlap_p2p_comm=true"],
    "parallel.tp_comm_overlap=true": ["parallel=tp2_sp", "parallel.tp_comm_overlap=true"],
    "parallel.use_distributed_optimizer=true": ["parallel=distopt", "optim=sgd"],
    "parallel.expert_model_parallel_size=2": ["parallel=ep2", "cluster.nproc_per_node=2"],
    "model.num_experts=3": ["model=tiny_moe", "parallel=ep2", "model.num_experts=3"],
    "parallel.expert_model_parallel_size=4": ["model=tiny_moe", "parallel.expert_model_parallel_size=4",
                                              "cluster.nproc_per_node=2"],
    "parallel.sequence_parallel=false": ["model=tiny_moe", "parallel=tp2"],
    "model.moe_router_topk=5": ["model=tiny_moe", "model.moe_router_topk=5"],
    "model.hidden_size=250": ["model.hidden_size=250"],
    "model.num_attention_heads=4": ["model.num_query_groups=3"],
    "model.kv_channels=33": ["model.kv_channels=33"],
    "model.max_position_embeddings=64": ["model.position_embedding_type=learned_absolute",
                                         "model.max_position_embeddings=64"],
    "model.vocab_size=100": ["model.vocab_size=100"],
    "tokenizer.path=/nowhere": ["tokenizer.path=/nowhere"],
    "train.recompute_num_layers=9": ["train.recompute_granularity=full", "train.recompute_num_layers=9"],
    "train.global_batch_size=10": ["train.global_batch_size=10", "train.micro_batch_size=4"],
    "train.global_batch_size=3": ["parallel=pp2_vpp2", "train.global_batch_size=3"],
    "train.rampup_batch_size=[4, 2]": ["train.rampup_batch_size=[4,2]"],
    "train.rampup_batch_size=[2, 4, 100]": ["train.rampup_batch_size=[2,4,100]"],
    "train.rampup_batch_size=[16, 4, 100]": ["train.rampup_batch_size=[16,4,100]"],
    "train.rampup_batch_size[0]=3": ["train.rampup_batch_size=[3,5,100]", "train.micro_batch_size=4"],
    "train.train_iters=null": ["train.train_iters=null"],
    "train.train_iters=10, train.train_samples=10": ["train.train_samples=10"],
    "train.train_iters=0": ["train.train_iters=0"],
    "train.micro_batch_size=-1": ["train.micro_batch_size=-1"],
    "train.eval_iters=-1": ["train.eval_iters=-1"],
    "optim.lr=nan": ["optim.lr=nan"],
    "optim.min_lr=1.0": ["optim.min_lr=1"],
    "optim.adam_beta2=1.0": ["optim.adam_beta2=1"],
    "model.rotary_percent=0.0": ["model.rotary_percent=0"],
    "optim.lr_warmup_iters=3, optim.lr_warmup_fraction=0.1": ["optim.lr_warmup_iters=3",
                                                               "optim.lr_warmup_fraction=0.1"],
    "optim.lr_decay_iters=3, optim.lr_decay_samples=3": ["optim.lr_decay_iters=3", "optim.lr_decay_samples=3"],
    "precision.bf16=true, precision.fp16=true": ["precision=bf16", "precision.fp16=true"],
    "precision.min_loss_scale=8.0": ["precision.min_loss_scale=8", "precision.initial_loss_scale=4"],
    "data.split=90,10": ["data.split='90,10'"],
    "model.rotary_percent=nan": ["model.rotary_percent=nan"],
    "model.rotary_percent=inf": ["model.rotary_percent=inf"],
    f"train.seed={2**63}": [f"train.seed={2**63}"],
    f"cluster.nnodes={10**18}": ["stage=grpo", f"cluster.nnodes={10**18}"],
    "layout.bucket_megabytes=inf": ["stage=grpo", "parallel=tp2", "layout.rollout.tensor_model_parallel_size=1",
                                    "layout.bucket_megabytes=inf"],
    "layout.actor.ranks=0-99999999999999": ["stage=grpo", "layout.actor.ranks=0-99999999999999"],
    "data.split=a,b,c": ["data.split='a,b,c'"],
    "data.split=0,0,0": ["data.split='0,0,0'"],
    "stage.split=dev": ["stage=evaluate", "stage.split=dev", "checkpoint.load=/"],
    "checkpoint.load=null": ["stage=evaluate"],
    "checkpoint.load=/nowhere": ["checkpoint.load=/nowhere"],
    "checkpoint.load=/usr": ["checkpoint.load=/usr"],
    "cluster.device=cuda": ["cluster.device=cuda"],
    "model.compile_ops=true": ["model.compile_ops=true"],
    "train.cuda_graph_impl=local": ["train.cuda_graph_impl=local"],
    "run_dir=/etc/passwd": ["run_dir=/etc/passwd"],
    "run_dir=/etc/passwd/x": ["run_dir=/etc/passwd/x"],
}  # fmt: skip


@pytest.mark.parametrize("start", CASES)
def test_problem_is_named(start):
    """The problem starts with key=value and ends with a remedy after a semicolon."""
    found = problems(*CASES[start])
    matching = [problem for problem in found if problem.startswith((f"{start}:", f"{start},", f"{start} ("))]
    assert len(matching) == 1, found
    assert "; " in matching[0]


def test_valid_runs_have_no_problems():
    layouts = ["single", "tp2", "tp2_sp", "pp2", "pp2_vpp2", "cp2", "tp2_pp2", "distopt"]
    assert [problems(f"parallel={layout}") for layout in layouts] == [[]] * len(layouts)
    assert problems("model=tiny_moe", "parallel=ep2") == []
    assert problems("model=tiny_moe", "parallel=tp2_sp") == []
    assert problems("train.rampup_batch_size=[4,2,100]") == []


@pytest.mark.parametrize("words", [
    ("experiment=demo_pretrain", "cluster.nproc_per_node=4"),
    ("experiment=demo_pretrain", "cluster.nproc_per_node=4", "parallel.pipeline_model_parallel_size=2"),
    ("experiment=demo_pretrain", "cluster.nproc_per_node=8", "train.global_batch_size=64"),
    ("experiment=demo_sft", "cluster.nproc_per_node=4", "data.path=/", "tokenizer.path=/", "checkpoint.load=null"),
])  # fmt: skip
def test_batches_of_the_demo_divide_by_more_ranks(words):
    """As the README has it on four and eight."""
    assert not [problem for problem in problems(*words) if "batch" in problem]


def test_several_at_once():
    found = problems(
        "parallel=tp2_sp", "model.num_attention_heads=3", "train.train_samples=5", "optim.lr_warmup_iters=1",
        "optim.lr_warmup_samples=2", "checkpoint.load=/nowhere", "precision=bf16", "precision.fp16=true",
    )  # fmt: skip
    keys = ["train.train_iters", "precision.bf16", "optim.lr_warmup_iters", "model.num_attention_heads",
            "checkpoint.load"]  # fmt: skip
    for key in keys:
        assert any(problem.startswith(key) for problem in found), key


def test_a_zero_size_does_not_bury_the_rest():
    found = problems("train.micro_batch_size=0", "data.split='1,2'", "checkpoint.load=/nowhere")
    assert [problem.split("=")[0] for problem in found] == [
        "train.micro_batch_size", "data.split", "checkpoint.load",
    ]  # fmt: skip


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_run_dir_not_writable():
    assert problems("run_dir=/etc/scale")[0].startswith("run_dir=/etc/scale: /etc is not writable")


def started(tmp_path, *words):
    """A run directory in which a run has got to a checkpoint."""
    cfg = resolve(config_of("train.train_iters=10", f"run_dir={tmp_path}", *words), MACHINE)
    checkpoint = tmp_path / "checkpoints" / "iter_0000005"
    checkpoint.mkdir(parents=True)
    save_config(cfg, tmp_path)
    save_config(cfg, checkpoint)
    (tmp_path / "checkpoints" / "latest_checkpointed_iteration.txt").write_text("5")


def test_another_model_in_run_dir(tmp_path):
    started(tmp_path, "model=tiny")
    assert problems(f"run_dir={tmp_path}", "model=tiny") == []
    (problem,) = problems(f"run_dir={tmp_path}", "model=demo")
    assert problem.startswith(f"run_dir={tmp_path}") and "model.num_attention_heads=8 (there 4)" in problem
    assert "stage pretrain" in problems(
        f"run_dir={tmp_path}", "stage=evaluate", f"checkpoint.load={tmp_path}/checkpoints"
    )[0]  # fmt: skip


def test_what_may_change_on_resume(tmp_path):
    started(tmp_path)
    assert problems(
        f"run_dir={tmp_path}", "train.train_iters=99", "optim.lr=1", "parallel=tp2", "model.seq_length=64",
        "precision=bf16", "model.attention_dropout=0.1",
    ) == []  # fmt: skip


def test_a_run_that_never_started_may_be_replaced(tmp_path):
    save_config(resolve(config_of("model=demo"), MACHINE), tmp_path)
    assert problems(f"run_dir={tmp_path}", "model=tiny") == []


def test_checkpoint_of_another_model(tmp_path):
    (tmp_path / "a").mkdir()
    started(tmp_path / "a", "model=tiny")
    load, other = f"checkpoint.load={tmp_path}/a/checkpoints", f"run_dir={tmp_path}/b"
    assert problems(load, other) == []
    (tmp_path / "a/checkpoints/iter_0000005/metadata.json").touch()  # what a whole checkpoint has
    assert problems(f"{load}/iter_0000005", other) == []
    (problem,) = problems(load, other, "model.hidden_size=512")
    assert problem.startswith("checkpoint.load=") and "model.hidden_size=512 (there 256)" in problem
    (problem,) = problems(f"checkpoint.load={tmp_path}/a", other)
    assert f"give {tmp_path}/a/checkpoints" in problem
    (tmp_path / "a/checkpoints/latest_checkpointed_iteration.txt").write_text("7")
    assert "iter_0000007" in problems(load, other)[0]


def test_adapters_that_a_checkpoint_holds_are_not_made_others(tmp_path):
    """Another alpha would be another function, and with fewer targets some of them would be left out."""
    lora = ["stage=sft", "peft=lora", "data.path=/", "tokenizer.path=/"]
    started(tmp_path / "a", *lora)
    load = f"checkpoint.load={tmp_path}/a/checkpoints"
    there = [f"run_dir={tmp_path}/a", load]
    for where, start in (([f"run_dir={tmp_path}/b", load], load), (there[:1], there[0])):
        changed = ["peft.alpha=8", "peft.rank=4", "peft.target_modules=[q_proj]"]
        found = [p for p in problems(*lora, *where, *changed) if "other adapters" in p]
        assert len(found) == 1 and found[0].startswith(f"{start}: ")
        for text in ("peft.alpha=8.0 (there 32.0)", "peft.rank=4 (there 16)", "peft.target_modules=['q_proj'] (there"):
            assert text in found[0]
        parts = "peft.target_modules=[q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj]"
        same = problems(*lora, *where, parts, "peft.dropout=0.1")
        assert not [problem for problem in same if "adapters" in problem], same
        (problem,) = [p for p in problems(*lora[:1], "peft=dora", *where) if "other adapters" in p]
        assert "peft.method=dora (there lora)" in problem
    (problem,) = [p for p in problems("stage=sft", *there[:1]) if "other adapters" in p]
    assert "peft.method=none (there lora)" in problem
    for stage, key in (("sft", "checkpoint.load"), ("dpo", "stage.reference_load"), ("grpo", "stage.reference_load")):
        given = f"{key}={tmp_path}/a/checkpoints"
        (problem,) = [p for p in problems(f"stage={stage}", f"run_dir={tmp_path}/b", given) if "adapters alone" in p]
        assert problem.startswith(f"{given}: holds adapters alone; merge them into their base")


def test_local_copies_have_a_place_and_another_node():
    (problem,) = problems("checkpoint.local_interval=10", "checkpoint.local_replicas=0")
    assert problem.startswith("checkpoint.local_interval=10: there is no place") and "checkpoint.local_dir" in problem
    copies = ["checkpoint.local_interval=10", "checkpoint.local_dir=/tmp/copies"]
    (problem,) = problems(*copies)
    assert problem.startswith("checkpoint.local_replicas=1: with cluster.nnodes=1 there are 0 other nodes; set at most")
    assert problems(*copies, "checkpoint.local_replicas=0") == []
    (problem,) = problems("checkpoint.local_dir=/tmp/copies")
    assert problem.startswith("checkpoint.local_dir=/tmp/copies: without checkpoint.local_interval")
    (problem,) = problems("checkpoint.local_replicas=2")
    assert problem.startswith("checkpoint.local_replicas=2: without checkpoint.local_interval")


def test_checkpoints_that_are_to_stay():
    (problem,) = problems("checkpoint.keep_every=100")
    assert problem.startswith("checkpoint.keep_every=100: without checkpoint.keep_last")
    (problem,) = problems("checkpoint.keep_last=0")
    assert problem.startswith("checkpoint.keep_last=0: must be larger than 0")
    assert problems("checkpoint.keep_last=2", "checkpoint.keep_every=100") == []
