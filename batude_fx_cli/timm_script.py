"""The command `timm`, which runs a script that the user names, with the networks of this package registered."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from batude_fx_cli.terminal import one_line_errors


@one_line_errors
def run_timm_script(
    script: Annotated[Path, typer.Argument(help="One of timm's scripts, such as validate.py, or one of your own.")],
    arguments: Annotated[list[str] | None, typer.Argument(help="What the script is called with.")] = None,
) -> None:
    """Run a script of timm in which timm knows the networks of this package: local-dir:small, hf-hub:USER/NAME.

    timm's scripts are in its repository, github.com/huggingface/pytorch-image-models, and not in its package.

    Example: batude-fx timm validate.py photos/ --model local-dir:small --pretrained
    """
    import runpy

    import batude_fx  # noqa: F401 - the import registers the networks
    from batude_fx.errors import BatudeError

    if not script.is_file():
        raise BatudeError(
            f"{script} is no file. timm's scripts are in its repository: git clone "
            "https://github.com/huggingface/pytorch-image-models, then give the path of validate.py there."
        )
    sys.argv = [str(script), *(arguments or ())]
    sys.path.insert(0, str(script.parent.resolve()))
    runpy.run_path(str(script), run_name="__main__")
