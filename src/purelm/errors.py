"""The errors purelm raises on bad input. This file imports nothing, so every folder may import it.

Each message says what was found, what was expected, in which file or tensor, and what to do.
"""


class PurelmError(Exception):
    """Base of every error that purelm raises on purpose."""


class ArgumentError(PurelmError, ValueError):
    """An argument has a value that cannot be used."""


class InputError(PurelmError, ValueError):
    """A batch cannot be run: ids out of range, a row longer than the context, no labels."""


class BusyError(PurelmError, RuntimeError):
    """As many requests wait as may; the same one may be accepted later."""


class KernelError(PurelmError, ValueError):
    """A tensor has a shape, dtype, layout or device that a kernel or quantizer cannot take."""


class LoadError(PurelmError, ValueError):
    """Something read from a file or a hub cannot be used.

    `file` and `tensor` name the place where it was found, as far as it is known.
    """

    def __init__(self, message: str, *, file: object = None, tensor: str | None = None) -> None:
        self.file = None if file is None else str(file)
        self.tensor = tensor
        place = ", ".join(
            part
            for part in (
                f"tensor {tensor!r}" if tensor else "",
                f"file {self.file}" if self.file else "",
            )
            if part
        )
        super().__init__(f"{message} [{place}]" if place else message)


class SourceError(LoadError):
    """A model name leads to no folder or repository that can be read."""


class LoadMemoryError(LoadError, MemoryError):
    """Memory ran out while a model was loaded; nothing of it is left, and all else works on."""


class ConfigError(LoadError):
    """A config.json (or a like file) is missing, malformed, contradictory or not supported."""


class CheckpointError(LoadError):
    """A weight file is missing, malformed, incomplete or does not fit the model."""


class TokenizerError(LoadError):
    """A tokenizer's files are missing or malformed."""


class TemplateError(PurelmError, ValueError):
    """A chat template is absent, malformed, refused by the sandbox, or refuses the messages."""


class AdapterError(LoadError):
    """An adapter's files are missing, malformed, or do not fit the model."""


class DataError(PurelmError, ValueError):
    """A training row or data file cannot be used."""


class TrainingError(PurelmError, ArithmeticError):
    """A training step gave no usable numbers, or ran out of memory."""


class SaveError(PurelmError, OSError):
    """Something could not be written; what stood there before is untouched."""


class UploadError(PurelmError, OSError):
    """A repository of the hub could not be written; its content is as it was."""
