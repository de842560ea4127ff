"""Every configuration dataclass with its checks. No other module reads a raw config."""

from nemo_kd.config.typed import ConfigError, UserInputError, describe, typed

__all__ = ["ConfigError", "UserInputError", "describe", "typed"]
