"""What can go wrong, said so that the reader knows what, where, and what to do next.

Every message is one or two lines. `InputError` and its children mean that the user can mend it (exit code 2);
any other `MLAConvertError` is a failure on our side or the machine's (exit code 1).
"""


class MLAConvertError(Exception):
    """Root of all errors that mlaconvert raises on purpose."""

    exit_code = 1


class InputError(MLAConvertError):
    """Wrong usage or wrong input."""

    exit_code = 2


class CheckpointError(InputError):
    """A checkpoint cannot be found, read or trusted: missing, truncated, not finite, the wrong shape."""


class UnsupportedModelError(InputError):
    """A checkpoint can be read, but it is not of a family that mlaconvert converts."""


class ConfigError(InputError):
    """A config, recipe or option has an unknown field or an impossible value."""


class OutputError(InputError):
    """An output path exists already, or there is no room for what would be written."""
