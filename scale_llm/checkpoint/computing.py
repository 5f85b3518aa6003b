"""What a model computes on tokens, layer by layer: a Hugging Face directory by transformers, a checkpoint by us.

Legend: b batch, s sequence, h hidden, v vocabulary. Everything in FP32 on one process.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from scale_llm.checkpoint.huggingface.merging import Reader, is_adapters, model_reader
from scale_llm.checkpoint.huggingface.source import FOLDER, read_json
from scale_llm.checkpoint.torch_dist import checkpoint_config, find_checkpoint
from scale_llm.checkpoint.verifying import Difference
from scale_llm.config.checkpoint_files import TOKENIZER_DIR, is_huggingface
from scale_llm.config.errors import UserError
from scale_llm.config.model import Backend, Head, PositionEmbedding
from scale_llm.config.parallel import ParallelConfig
from scale_llm.config.precision import PrecisionConfig
from scale_llm.config.train import TrainConfig
from scale_llm.models.huggingface import read_model

Outputs = dict[str, torch.Tensor]


def tokens_of(paths: list[Path], text: str, count: int) -> torch.Tensor:
    """The first `count` tokens [1, s] of a text, by the first tokenizer.json that lies in or beside the paths."""
    import tokenizers

    for path in paths:
        for place in (path, *_tokenizers(path)):
            if (place / "tokenizer.json").is_file():
                ids = tokenizers.Tokenizer.from_file(str(place / "tokenizer.json")).encode(text).ids[:count]
                return torch.tensor([ids])
    raise UserError(f"{paths[0]}: no tokenizer.json there or at {paths[1]}, so there are no tokens to compare on")


def _tokenizers(path: Path) -> list[Path]:
    """Where a checkpoint's tokenizer may lie."""
    try:
        found = find_checkpoint(path)
    except UserError:
        return []
    return [found / TOKENIZER_DIR, found.parent / FOLDER]


def longest(path: Path) -> int | None:
    """Tokens that the model at a path can take: the length of its learned position table; None: no limit."""
    if is_huggingface(path):
        model = read_model(read_json(path / "config.json"), str(path / "config.json"))
    else:
        model = checkpoint_config(find_checkpoint(path)).model
    learned = model.position_embedding_type is PositionEmbedding.learned_absolute
    return (model.max_position_embeddings or model.seq_length) if learned else None


def compare_outputs(a: Path | str, b: Path | str, tokens: torch.Tensor) -> Iterator[Difference]:
    """Largest difference of the logits or scores, and after the embedding, every layer and the last norm, there as a
    share of the largest value where that is above 1."""
    left, right = (outputs_of(Path(path), tokens) for path in (a, b))
    for name, value in left.items():
        other = right.get(name)
        if other is None or other.shape != value.shape:
            shape = "nothing" if other is None else tuple(other.shape)
            yield Difference(name, None, f"{tuple(value.shape)} and {shape}")
        else:
            # Some models have hidden states of a thousand, whose FP32 rounding alone is above any absolute limit.
            scale = 1.0 if name in ("logits", "scores") else max(1.0, other.abs().max().item())
            yield Difference(name, (value - other).abs().max().item() / scale)


def outputs_of(path: Path, tokens: torch.Tensor) -> Outputs:
    """`embedding`, `layer 1` and so on [b, s, h], `final norm` [b, s, h], `logits` [b, s, v] or `scores` [b, s, 1]."""
    with torch.no_grad():
        return _by_transformers(path, tokens) if is_huggingface(path) else _by_us(find_checkpoint(path), tokens)


def _by_transformers(path: Path, tokens: torch.Tensor) -> Outputs:
    try:
        import transformers
    except ImportError as error:
        raise UserError("logits of a Hugging Face model need transformers: pip install transformers") from error
    transformers.utils.logging.set_verbosity_error()
    name = (read_json(path / "config.json").get("architectures") or ["AutoModelForCausalLM"])[0]
    model = getattr(transformers, name).from_pretrained(path, dtype=torch.float32, attn_implementation="eager").eval()
    seen = model(tokens, output_hidden_states=True, use_cache=False)
    *layers, final = seen.hidden_states
    found = {"embedding" if i == 0 else f"layer {i}": value for i, value in enumerate(layers)}
    found["final norm"] = final
    if name.endswith(("ForCausalLM", "LMHeadModel")):
        found["logits"] = seen.logits
    else:
        found["scores"] = getattr(model, "score", None)(final) if hasattr(model, "score") else model.classifier(final)
    return found


def _by_us(path: Path, tokens: torch.Tensor) -> Outputs:
    cfg = checkpoint_config(path)
    # In FP32 on one process, however the run that wrote it computed
    cfg.parallel = ParallelConfig(expert_tensor_parallel_size=1)
    cfg.precision, cfg.train = PrecisionConfig(), TrainConfig()
    cfg.model.backend, cfg.model.compile_ops = Backend.torch, False
    cfg.model.seq_length = max(tokens.size(1), 2)
    cfg.model.hidden_dropout = cfg.model.attention_dropout = 0.0
    vocabulary = cfg.model.vocab_size
    if vocabulary is None:
        raise UserError(f"{path}: its config.yaml does not say model.vocab_size")
    model = _alone(cfg, path, vocabulary)
    found: Outputs = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(module: Any, inputs: Any, output: Any) -> None:
            value = output[0] if isinstance(output, tuple) else output
            found[name] = value.transpose(0, 1).clone()

        return hook

    model.embedding.register_forward_hook(keep("embedding"))
    for i, layer in enumerate(model.decoder.layers[:-1]):
        layer.register_forward_hook(keep(f"layer {i + 1}"))
    model.decoder.final_layernorm.register_forward_hook(keep("final norm"))
    positions = torch.arange(tokens.size(1)).expand_as(tokens)
    output = model(tokens, positions, None).transpose(0, 1)
    if cfg.model.head is Head.language_model:
        found["logits"] = output[..., :vocabulary]
    else:
        found["scores"] = output
    return found


def _alone(cfg, path: Path, vocabulary: int):
    """The model on this process alone, its weights loaded."""
    from scale_llm.parallel.device import seed_everything, start_alone

    start_alone()
    seed_everything(1, tp_rank=0, pp_rank=0, ep_rank=0, etp_rank=0)  # its generators must exist
    from scale_llm.checkpoint.checkpointer import load_sharded
    from scale_llm.models.gpt import build_gpt
    from scale_llm.models.transformer_config import transformer_config
    from scale_llm.parallel.mesh import MeshSizes, build_mesh

    mesh = build_mesh(MeshSizes(), "gloo")
    assert mesh is not None
    config = transformer_config(cfg.model, cfg.parallel, cfg.precision, cfg.train, on_cuda=False)
    (model,) = build_gpt(cfg.model, config, mesh, vocab_size=vocabulary, seed=1, on_cuda=False)
    metadata = {"dp_cp_group": mesh.groups.dp_cp, "singleton_local_shards": False}
    state = model.sharded_state_dict(metadata=metadata)
    if is_adapters(path):
        _fill(state, model_reader(path))
    else:
        model.load_state_dict(load_sharded(path, {"model": state})["model"])
    return model.eval()


def _fill(state: dict[str, Any], reader: Reader) -> None:
    """A model on this process alone from whole tensors, in place."""
    from scale_llm.models.init import shards

    with torch.no_grad():
        for shard in shards(state):
            depth = shard.prepend_axis_num
            whole = reader.read(shard.key, tuple(shard.global_offset[:depth]))
            rows = shard.global_shape[depth] - whole.size(0)  # padding of the vocabulary depends on the layout
            whole = torch.cat([whole, whole.new_zeros(rows, *whole.shape[1:])]) if rows > 0 else whole
            box = tuple(map(_slice, shard.global_offset[depth:], shard.local_shape))
            shard.data.copy_(whole[box].view(shard.data.shape))


def _slice(start: int, size: int) -> slice:
    return slice(start, start + size)
