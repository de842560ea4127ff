"""Every configuration dataclass with its checks. No other module reads a raw config."""

from nemo_kd.config.typed import ConfigError, describe, typed

__all__ = ["ConfigError", "describe", "typed"]
