"""minilora: LoRA fine-tuning of Qwen models, written by hand."""

__version__ = "0.1.0"
