"""Configuration dataclasses with their checks. No other module reads a raw config."""

from nemo_kd.config.errors import ConfigError, UserInputError

__all__ = ["ConfigError", "UserInputError"]
