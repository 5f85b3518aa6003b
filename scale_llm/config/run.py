"""The whole of one run."""

from dataclasses import dataclass, field

from scale_llm.config.checkpoint import CheckpointConfig
from scale_llm.config.cluster import ClusterConfig
from scale_llm.config.data import DataConfig
from scale_llm.config.health import HealthConfig
from scale_llm.config.layout import LayoutConfig
from scale_llm.config.logging import LoggingConfig
from scale_llm.config.model import ModelConfig
from scale_llm.config.optim import OptimConfig
from scale_llm.config.parallel import ParallelConfig
from scale_llm.config.peft import PeftConfig
from scale_llm.config.precision import PrecisionConfig
from scale_llm.config.profile import ProfileConfig
from scale_llm.config.reward import RewardFunctionConfig
from scale_llm.config.stage import PretrainConfig, StageConfig
from scale_llm.config.tokenizer import TokenizerConfig
from scale_llm.config.train import TrainConfig


@dataclass(kw_only=True, slots=True)
class RunConfig:
    run_dir: str
    """Everything the run writes lies here; a rerun with the same directory resumes."""
    stage: StageConfig = field(default_factory=PretrainConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    layout: LayoutConfig = field(default_factory=LayoutConfig)
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    peft: PeftConfig = field(default_factory=PeftConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    reward: RewardFunctionConfig = field(default_factory=RewardFunctionConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    health: HealthConfig = field(default_factory=HealthConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    profile: ProfileConfig = field(default_factory=ProfileConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
