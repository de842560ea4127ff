"""Errors for what a user gave; they need no other package."""


class UserInputError(ValueError):
    """Report input that cannot work; the message says what, where and what to do."""


class ConfigError(UserInputError):
    """Report a configuration key that is unknown, missing or has a value that cannot work."""
