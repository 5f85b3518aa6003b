"""Which names of parameters and of checkpoint tensors are adapters'. No torch."""


def is_adapter(name: str) -> bool:
    """Whether a parameter, by its name in the model or in a checkpoint, is trained beside a frozen base."""
    return ".adapter." in f".{name}" or "virtual_tokens." in name
