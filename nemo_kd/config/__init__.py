"""Configuration dataclasses with their checks. No other module reads a raw config.

The errors for what a user gave stand here; they need no other package.
"""


class UserInputError(ValueError):
    """Report input that cannot work; the message says what, where and what to do."""


class ConfigError(UserInputError):
    """Report a configuration key that is unknown, missing or has a value that cannot work."""


class DataError(UserInputError):
    """A dataset file or one of its records cannot be used."""
