"""Exceptions: each message names what is wrong and what to do about it."""


class DPCacheError(Exception):
    """Base of every error this library raises on purpose."""


class InfeasibleBudgetError(DPCacheError, ValueError):
    """No schedule with this many key steps satisfies the constraints."""


class UnsupportedPipelineError(DPCacheError, TypeError):
    """The pipeline, or the boundary asked of it, is not one the library can follow."""


class ScheduleMismatchError(DPCacheError, ValueError):
    """The schedule or calibration was made for another model."""


class CacheStateError(DPCacheError, RuntimeError):
    """`enable`, `disable` or `stats` called in the wrong order."""


class CalibrationError(DPCacheError, ValueError):
    """Calibration cannot start or was stopped by what it measured (no inputs, NaN, no sampling loop)."""


class GridError(CalibrationError):
    """A calibration says nothing of the noise levels, or of the kind of scheduler, that it is asked about."""


class UnknownModelError(DPCacheError, ValueError):
    """No model goes by this name, and no pipeline is found at this path."""


class FileFormatError(DPCacheError, ValueError):
    """A calibration or schedule file is truncated, edited, of another version, or something else altogether."""


class ExportError(DPCacheError, ValueError):
    """Nothing in a schedule is of use to another program."""


class HubError(DPCacheError, OSError):
    """Something could not be fetched from the Hugging Face Hub, or not be put there."""


class MissingExtraError(DPCacheError, ImportError):
    """What is asked for needs packages that are not installed; the message names what to install."""


class PromptError(DPCacheError, ValueError):
    """A prompt, or a line of a file of them, that nothing can be drawn from."""


class GenerationError(DPCacheError, RuntimeError):
    """Some prompts could not be drawn, or none can be as things stand: no worker has the model, or sees the folder."""


def missing_extra(what: str, error: ImportError, install: str) -> MissingExtraError:
    """The error to raise where something cannot be imported.

    Args:
        what: is asked for, as the beginning of a sentence.
        error: that importing it raised.
        install: what brings it, for pip: an extra, like "dpcache[report]".
    """
    message = f'{what} needs {error.name}, which is not installed: pip install "{install}"'
    return MissingExtraError(message, name=error.name)
