"""Continual fine-tuning of one quantized Llama on one's own machine: learn task after task, merge before forget."""

__version__ = "0.1.0"
