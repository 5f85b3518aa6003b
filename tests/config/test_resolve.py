"""Open values are settled for a machine, and only those."""

import dataclasses
import json

import pytest
from support.configs import config_of

from scale_llm.config.cluster import Device
from scale_llm.config.data import LoaderKind
from scale_llm.config.machine import Machine
from scale_llm.config.resolve import default_ffn_hidden_size, resolve

LAPTOP = Machine(cores=8, gpus=0, fast_bf16_cpu=False)
AMX = Machine(cores=2, gpus=0, fast_bf16_cpu=True)
GPUS = Machine(cores=64, gpus=8, fast_bf16_cpu=False)


def resolved(machine: Machine, *words: str):
    return resolve(config_of(*words), machine)


@pytest.mark.parametrize(("machine", "bf16"), [(LAPTOP, False), (AMX, True), (GPUS, True)])
def test_auto_precision_follows_the_hardware(machine, bf16):
    cfg = resolved(machine)
    assert (cfg.precision.bf16, cfg.precision.fp16, cfg.precision.auto) == (bf16, False, False)


def test_precision_that_was_asked_for_stays():
    assert not resolved(AMX, "precision=fp32").precision.bf16
    assert not resolved(AMX, "precision.bf16=false").precision.bf16
    assert not resolved(LAPTOP, "precision=auto", "precision.fp16=true").precision.bf16
    assert not resolved(GPUS, "cluster=local_cpu").precision.bf16, "the CPU runs it, not the GPU"


def test_ops_are_compiled_where_there_is_a_compiler():
    assert resolved(LAPTOP).model.compile_ops is False
    assert resolved(dataclasses.replace(LAPTOP, compiler=True)).model.compile_ops is True
    assert resolved(dataclasses.replace(LAPTOP, compiler=True), "model.compile_ops=false").model.compile_ops is False


def test_graphs_are_captured_beside_no_other_threads():
    assert resolved(GPUS).data.loader is LoaderKind.auto
    assert resolved(GPUS, "train.cuda_graph_impl=local").data.loader is LoaderKind.torch


@pytest.mark.parametrize(
    ("machine", "words", "device", "ranks", "threads"),
    [
        (LAPTOP, [], Device.cpu, 1, 8),
        (LAPTOP, ["parallel=tp2_pp2"], Device.cpu, 4, 2),
        (AMX, ["parallel=tp2_pp2"], Device.cpu, 4, 1),
        (LAPTOP, ["model=tiny_moe", "parallel=ep2"], Device.cpu, 2, 4),
        (GPUS, ["parallel=tp2"], Device.cuda, 8, 8),
        (GPUS, ["cluster.nproc_per_node=2"], Device.cuda, 2, 32),
        (GPUS, ["cluster=local_cpu", "parallel=tp2"], Device.cpu, 2, 32),
    ],
)
def test_ranks_and_threads(machine, words, device, ranks, threads):
    cluster = resolved(machine, *words).cluster
    assert (cluster.device, cluster.nproc_per_node, cluster.omp_num_threads) == (device, ranks, threads)


def test_model_sizes():
    model = resolved(LAPTOP, "model.hidden_size=320", "model.num_attention_heads=8").model
    assert model.kv_channels == 40 and model.num_query_groups == 8
    assert model.ffn_hidden_size == 896, "8/3 x 320 = 853.3, up to a multiple of 64"
    assert model.vocab_size == 8192 and model.max_position_embeddings == model.seq_length
    plain = resolved(LAPTOP, "model.swiglu=false").model
    assert plain.ffn_hidden_size == 4 * plain.hidden_size
    assert default_ffn_hidden_size(model) % 64 == 0


def test_vocabulary_of_a_given_tokenizer(tmp_path):
    content = {"model": {"vocab": {"a": 0, "b": 1}}, "added_tokens": [{"id": 5, "content": "<eod>"}]}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    assert resolved(LAPTOP, f"tokenizer.path={tmp_path}").model.vocab_size == 6, "one more than the highest id"
    assert resolved(LAPTOP, f"tokenizer.path={tmp_path}/none.json").model.vocab_size is None


def test_directories_follow_run_dir():
    cfg = resolved(LAPTOP, "run_dir=a/b", "checkpoint.load=~/c")
    assert (cfg.checkpoint.save, cfg.data.cache_dir) == ("a/b/checkpoints", "a/b/data")
    assert cfg.checkpoint.load is not None and not cfg.checkpoint.load.startswith("~")


def test_run_without_run_dir_is_named_by_what_it_is():
    assert resolved(LAPTOP, "parallel=pp2_vpp2").run_dir == "runs/pretrain-tiny-1n2g-pp2vpp2"


def test_resolving_twice_changes_nothing():
    once = resolved(AMX, "experiment=demo_pretrain")
    assert resolve(once, LAPTOP) == once
