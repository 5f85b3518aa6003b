"""The words that the README has for published methods are taken as they are."""

import re
from pathlib import Path

import pytest
from support.configs import config_of

from scale_llm.config.machine import Machine
from scale_llm.config.policy import GrpoConfig
from scale_llm.config.resolve import resolve
from scale_llm.config.roles import roles_of
from scale_llm.config.unused import unused_problems
from scale_llm.config.validate_policy import policy_problems

README = Path(__file__).parents[2] / "README.md"


@pytest.mark.parametrize("method", ["Dr. GRPO", "DAPO", "GSPO"])
def test_a_method_of_the_readme(method):
    """Yu et al. 2025 and Liu et al. 2025 drop the KL term, and with it the reference model."""
    (row,) = re.findall(rf"^\| {re.escape(method)} \| `(.*?)`", README.read_text(), re.MULTILINE)
    words = row.replace("=...", "=16").split()
    machine = Machine(cores=2, gpus=0, fast_bf16_cpu=False, compiler=True)
    cfg = resolve(config_of("stage=grpo", "checkpoint.load=x", *words), machine)
    assert isinstance(cfg.stage, GrpoConfig)
    assert unused_problems(cfg) == [] and policy_problems(cfg, cfg.stage) == []
    assert ("reference" in roles_of(cfg)) == (method == "GSPO")
