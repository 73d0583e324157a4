"""Training a pruned model to get its quality back: LoRA, all weights, or distillation from the dense model."""
