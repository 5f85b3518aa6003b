"""Small trainable weights beside frozen ones, on megatron-core's parallel layers: LoRA, DoRA, QLoRA, prompt tuning."""
