"""The exceptions of batude_fx: one root, and a message that says what, where, both numbers and the way out.

```
BatudeError
├── BudgetError         a budget that cannot be read, or that no plan can meet
├── DiscoveryError      a model without convolutions, or one that does not run on the example input
├── SelectionError      an include/exclude pattern or an override that matches nothing
├── CalibrationError    calibration images that are empty, of the wrong shape, or not finite
├── UnsupportedError    a convolution, dtype or device that cannot be handled exactly
├── SavedModelError     a folder that is missing, broken, foreign or unsafe
├── RecipeError         a recipe that cannot be read, or asks for what does not exist
├── ExportError         a network that cannot be written as a file of another format, or computes something else there
└── TrainingError       a run that cannot start, cannot go on, or whose loss is not finite
```
"""


class BatudeError(Exception):
    """Root of every error that batude_fx raises on purpose."""


class BudgetError(BatudeError, ValueError):
    """A budget that cannot be read, or that no plan can meet; then the message names the smallest reachable one."""


class DiscoveryError(BatudeError):
    """A model without convolutions, or one that does not run on the example input."""


class SelectionError(BatudeError):
    """An include or exclude pattern, or an override, that matches no site."""


class CalibrationError(BatudeError):
    """Calibration images that are empty, of the wrong shape, or not finite."""


class UnsupportedError(BatudeError):
    """A convolution, dtype or device that cannot be handled exactly."""


class SavedModelError(BatudeError):
    """A folder that is missing, broken, foreign or unsafe to read."""


class RecipeError(BatudeError):
    """A recipe that cannot be read, or asks for what does not exist; the message has file, line and key."""


class ExportError(BatudeError):
    """A network that cannot be written as a file of another format, or that computes something else there."""


class TrainingError(BatudeError):
    """A run that cannot start, cannot go on, or whose loss is not finite."""


def first_line(error: Exception) -> str:
    """What another library's error says, to be quoted in one of ours; its name where it says nothing."""
    return _lines(error)[0].rstrip(".")


def last_line(error: Exception) -> str:
    """The same of an error that begins with where it comes from."""
    return _lines(error)[-1].rstrip(".")


def _lines(error: Exception) -> list[str]:
    return str(error).strip().splitlines() or [type(error).__name__]
