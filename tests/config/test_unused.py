"""A key that the run would not read is refused where it is not at its default, and nowhere else."""

from dataclasses import fields

import pytest
from support.configs import config_of

from scale_llm.config.data import FieldsConfig, TooLong
from scale_llm.config.peft import PeftConfig
from scale_llm.config.stage import REFERENCE_FREE
from scale_llm.config.store import STAGES, options
from scale_llm.config.unused import RULES, unused_problems
from scale_llm.config.validate import problems_of
from scale_llm.losses import preference

DOCUMENTS, SEQUENCES = ("pretrain", "evaluate"), ("sft", "reward", "dpo")

CONVERSATION_KEYS = ("data.format=alpaca", "data.on_too_long=fail", "data.fields.prompt=question",
                     "data.fields.weight=w", "data.fields.sender=who")  # fmt: skip
COMPARISON_KEYS = ("data.fields.chosen=good", "data.fields.ranks=r", "data.fields.label=l")
REWARD_KEYS = ("data.fields.ground_truth=g", "data.fields.extra_info=e", "reward.function=gsm8k", "reward.default=-1.0",
               "reward.gsm8k_flexible=true",
               "layout.critic.ranks=first_half", "layout.actor.offload=true")  # fmt: skip
TRAINING_KEYS = ("data.split='1,1,1'", "data.embedded_megabytes=2.0", "data.num_workers=2", "train.train_iters=5",
                 "train.global_batch_size=64", "train.recompute_granularity=full", "optim.lr=0.1",
                 "optim.clip_grad=2.0", "optim.lr_decay_style=linear", "checkpoint.save_interval=5",
                 "logging.log_params_norm=true")  # fmt: skip
DOCUMENT_KEYS = ("data.fields.text=body", "data.index_workers=2", "data.max_document_megabytes=1.0",
                 "data.temperature=2.0", "data.reset_position_ids=true", "data.reset_attention_mask=true",
                 "data.eod_mask_loss=true")  # fmt: skip
LOW_RANK_KEYS = ("peft.rank=8", "peft.alpha=1.0", "peft.use_rslora=true", "peft.dropout=0.1",
                 "peft.target_modules=[linear_qkv]", "peft.quantize_base=nf4")  # fmt: skip
PROMPT_KEYS = ("peft.num_virtual_tokens=5", "peft.prompt_init_text=hello")

BUDGET, SMOOTHING = "stage.max_tokens_per_micro_batch=4096", "stage.label_smoothing=0.1"

UNREAD = {
    "stage=pretrain tokenizer.path=a.json": ("tokenizer.chat_template=chat.jinja", "tokenizer.special_tokens=[user]"),
    "stage=sft tokenizer.path=a.json": ("tokenizer.special_tokens=[user]",),
    **{f"stage={stage}": (*CONVERSATION_KEYS, *COMPARISON_KEYS, "train.train_epochs=1.0") for stage in DOCUMENTS},
    **{
        f"stage={stage}": (*COMPARISON_KEYS, *DOCUMENT_KEYS, *TRAINING_KEYS, "train.train_epochs=1.0", *more)
        for stage, more in {
            "score": ("data.fields.weight=w",),
            "generate": ("data.fields.weight=w", "data.fields.output=o"),
        }.items()
    },
    "stage=evaluate data.eod_mask_loss=true": ("data.loader=torch", "data.fim_rate=0.5"),
    "stage=pretrain data.fim_rate=0": ("data.fim_spm_rate=0.1", "data.fim_middle_token=m"),
    "stage=sft": ("data.loader=torch", "data.fim_rate=0.5", *COMPARISON_KEYS, *DOCUMENT_KEYS, *REWARD_KEYS, BUDGET),
    "stage=grpo": (
        *DOCUMENT_KEYS,
        *COMPARISON_KEYS[:2],
        "data.fields.weight=w",
        "stage.lam=0.5",
        "stage.whiten_advantages=false",
        "stage.gamma=0.5",
        "stage.kl_ctrl.horizon=5.0",
        "stage.max_num_gen_batches=2",
        "stage.overlong_penalty_factor=2.0",
        "stage.guard.action=stop",
        "reward.num_workers=2",
        "reward.load_weight=2.0",
        "layout.checksum=true",
        "layout.critic.tensor_model_parallel_size=2",
        "data.num_workers=2",
    ),
    "stage=grpo reward.function=length": ("reward.gsm8k_flexible=true", "reward.regex_pattern=x"),
    "stage=grpo stage.adv_estimator=rloo stage.kl_loss_coef=0": (
        "stage.norm_adv_by_std_in_grpo=false",
        "stage.kl_loss_type=k2",
        "stage.reference_load=x",
    ),
    "stage=ppo stage.adv_estimator=reinforce_plus_plus": ("stage.critic_lr=0.1", "stage.cliprange_value=0.1"),
    "stage=evaluate profile.stop=12": ("profile.start=10",),
    "stage=pretrain": ("profile.stop=12", "profile.memory=true", "profile.with_stack=true"),
    "stage=sft profile.start=10 profile.nvtx=true": ("profile.with_stack=true",),
    "stage=sft stage.batching=padded": (BUDGET,),
    "stage=reward": (*DOCUMENT_KEYS, BUDGET),
    "stage=dpo": (*DOCUMENT_KEYS, BUDGET, "stage.simpo_gamma=2.0", SMOOTHING),
    "stage=dpo stage.loss=simpo": ("stage.reference=copy", "stage.reference_load=x", SMOOTHING),
    "stage=dpo stage.loss=orpo": ("stage.reference=copy", "stage.simpo_gamma=2.0", SMOOTHING),
    "peft=none": (*LOW_RANK_KEYS, *PROMPT_KEYS),
    "peft=prompt_tuning": LOW_RANK_KEYS,
    **{f"peft={method}": PROMPT_KEYS for method in ("lora", "dora", "qlora")},
}
"""Words of a run, and others that would do nothing there."""

READ = {
    "stage=pretrain": ("tokenizer.chat_template=chat.jinja", "tokenizer.special_tokens=[user]"),
    "stage=sft tokenizer.path=a.json": ("tokenizer.chat_template=chat.jinja", "data.on_bad_row=drop"),
    **{f"stage={stage} data.on_bad_row=drop": DOCUMENT_KEYS for stage in DOCUMENTS},
    **{
        f"stage={stage}": (*(key for key in CONVERSATION_KEYS if "weight" not in key), "train.seed=5")
        for stage in ("score", "generate")
    },
    "stage=sft": (*CONVERSATION_KEYS, *TRAINING_KEYS, "train.train_epochs=1.0", SMOOTHING),
    "stage=reward": (*CONVERSATION_KEYS, *COMPARISON_KEYS, "train.train_epochs=1.0"),
    "stage=grpo": (*REWARD_KEYS, "data.fields.label=l", "stage.kl_loss_type=k2", "stage.max_tokens_per_micro_batch=99"),
    "stage=ppo": (*REWARD_KEYS, "stage.lam=0.5", "stage.gamma=0.5", "stage.critic_lr=0.1", "stage.reference_load=x"),
    "stage=dpo": (*CONVERSATION_KEYS, *COMPARISON_KEYS, "train.train_epochs=1.0", "stage.reference=copy"),
    "stage=dpo stage.loss=simpo": ("stage.simpo_gamma=2.0",),
    **{f"stage=dpo stage.loss={loss}": (SMOOTHING,) for loss in ("cdpo", "robust_dpo")},
    **{f"stage={stage} stage.batching=token_budget": (BUDGET,) for stage in SEQUENCES},
    **{f"peft={method}": LOW_RANK_KEYS for method in ("lora", "dora")},
    "peft=prompt_tuning": PROMPT_KEYS,
    "stage=pretrain data.fim_rate=0.5": ("data.fim_spm_rate=0.1", "data.fim_suffix_token=s", "data.loader=torch"),
}


@pytest.mark.parametrize("run", UNREAD)
def test_keys_that_are_not_read_are_refused(run):
    """All of them at once, each with its value and, after a semicolon, a remedy."""
    found = unused_problems(config_of(*run.split(), *UNREAD[run]))
    named = {problem.split(": ")[0].replace("'", "") for problem in found}
    assert named == {key.replace("'", "") for key in UNREAD[run]}
    assert len(found) == len(UNREAD[run])
    assert all("; " in problem and "{" not in problem for problem in found)


@pytest.mark.parametrize("run", READ)
def test_keys_that_are_read_are_not(run):
    assert unused_problems(config_of(*run.split(), *READ[run])) == []


@pytest.mark.parametrize(
    ("words", "stages"),
    [
        ("stage=pretrain data.format=alpaca", "stage=sft, reward, dpo, ppo, grpo, score or generate"),
        ("stage=generate data.fields.output=o", "stage=sft, reward, dpo or score"),
        ("stage=sft data.fields.label=l", "stage=reward, dpo, ppo or grpo"),
        ("stage=score data.fields.text=t", "stage=pretrain or evaluate"),
        ("stage=score train.train_epochs=1.0", "stage=sft, reward or dpo"),
    ],
)
def test_the_remedy_names_the_stages_that_read_the_key(words, stages):
    (problem,) = unused_problems(config_of(*words.split()))
    assert f"or choose {stages}" in problem


def test_a_prompt_is_never_cut():
    """stage=generate leaves long prompts out, also where nothing is said; asked to cut them it refuses."""
    assert config_of("stage=generate").data.on_too_long is TooLong.drop
    assert config_of("stage=score").data.on_too_long is TooLong.truncate
    (problem,) = [one for one in problems_of(config_of("stage=generate", "data.on_too_long=truncate")) if "long" in one]
    assert problem.startswith("data.on_too_long=truncate: ") and "drop or fail" in problem


def test_all_at_once_among_the_other_problems():
    found = problems_of(config_of("train.micro_batch_size=0", "peft.rank=8", "data.format=alpaca"))
    assert {problem.split(":")[0] for problem in found} >= {
        "train.micro_batch_size=0", "peft.rank=8", "data.format=alpaca",
    }  # fmt: skip


@pytest.mark.parametrize("group", ["experiment", "stage", "peft"])
def test_what_we_ship_sets_nothing_unused(group):
    for option in options(group):
        assert unused_problems(config_of(f"{group}={option}")) == []


def test_rules_name_keys_that_exist_each_once():
    """A field of a row, and a key of peft, that is added is to say who reads it."""
    keys = [key for rule in RULES for key in rule.keys.split()]
    assert len(keys) == len(set(keys))
    assert {key for key in keys if key.startswith("data.fields.")} == {
        f"data.fields.{field.name}" for field in fields(FieldsConfig)
    }
    assert {key for key in keys if key.startswith("peft.")} == {
        f"peft.{field.name}" for field in fields(PeftConfig) if field.name != "method"
    }
    known = {field.name for stage in STAGES.values() for field in fields(stage)}
    assert {key.split(".")[1] for key in keys if key.startswith("stage.")} <= known


def test_config_and_losses_agree_on_what_needs_no_reference():
    assert {loss.value for loss in REFERENCE_FREE} == preference.REFERENCE_FREE
