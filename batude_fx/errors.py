"""The exceptions of batude_fx. Each message says what is wrong, where, the numbers compared and what to do about it.

```
BatudeError
├── BudgetError         a budget that cannot be read, or that no plan can meet
├── DiscoveryError      a model without convolutions, or one that does not run on the example input
├── SelectionError      an include/exclude pattern or an override that matches nothing
├── CalibrationError    calibration images that are empty, of the wrong shape, or not finite
├── UnsupportedError    a convolution, dtype or device that cannot be handled exactly
├── SavedModelError     a folder that is missing, damaged, not from batude_fx, or unsafe to read
├── RecipeError         a recipe that cannot be read, or that names what does not exist
├── ExportError         a network that cannot be written in another format, or whose file computes something else
└── TrainingError       a run that cannot start or continue, or whose loss is not finite
```
"""

_MOST_CHARACTERS = 4000
# Control characters, and those that change the direction of text; but not line ends and tabs.
_HIDDEN = {*range(32), *range(127, 160), *range(0x202A, 0x202F), *range(0x2066, 0x206A)} - {*map(ord, "\n\t")}
_VISIBLE = {code: repr(chr(code))[1:-1] for code in _HIDDEN}


class BatudeError(Exception):
    """Root of every error that batude_fx raises on purpose.

    Its message is safe to print, whatever the names and values are that it quotes.
    """

    def __init__(self, message: object = "") -> None:
        text = printable(str(message))
        super().__init__(text if len(text) <= _MOST_CHARACTERS else f"{text[:_MOST_CHARACTERS]} ...")


class BudgetError(BatudeError, ValueError):
    """A budget that cannot be read, or that no plan can meet; the message then names the smallest reachable budget."""


class QualityWarning(UserWarning):
    """A compressed network often disagrees with its original, on images that were held back."""


class DiscoveryError(BatudeError):
    """A model without convolutions, or one that does not run on the example input."""


class SelectionError(BatudeError):
    """An include or exclude pattern, or an override, that matches no site."""


class CalibrationError(BatudeError):
    """Calibration images that are empty, of the wrong shape, or not finite."""


class UnsupportedError(BatudeError):
    """A convolution, dtype or device that cannot be handled exactly."""


class SavedModelError(BatudeError):
    """A folder that is missing, damaged, not from batude_fx, or unsafe to read."""


class RecipeError(BatudeError):
    """A recipe that cannot be read, or that names what does not exist; the message has file, line and key."""


class ExportError(BatudeError):
    """A network that cannot be written in another format, or whose file computes something else."""


class TrainingError(BatudeError):
    """A run that cannot start or continue, or whose loss is not finite."""


def printable(text: str) -> str:
    """Return a text in which characters that would control a terminal, such as escapes, are spelt out."""
    return text.translate(_VISIBLE)


def first_line(error: Exception) -> str:
    """Return the first line of another library's error message, or its class name where it has no message."""
    return _lines(error)[0].rstrip(".")


def last_line(error: Exception) -> str:
    """Return the last line of another library's error message, where the first ones say where it was raised."""
    return _lines(error)[-1].rstrip(".")


def _lines(error: Exception) -> list[str]:
    return str(error).strip().splitlines() or [type(error).__name__]
