"""File names of an adapter folder in mlx-lm's layout."""

WEIGHTS, CONFIG = "adapters.safetensors", "adapter_config.json"
