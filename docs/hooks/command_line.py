"""mkdocs hook: the command-line page, made from the typer application when the site is built."""

import re

import typer
from typer.cli import get_docs_for_click

from batude_fx_cli.app import app


def on_page_markdown(markdown: str, **_: object) -> str:
    """Put the help of every command where a page asks for it, as `<!-- command line -->`."""
    if "<!-- command line -->" not in markdown:
        return markdown
    command = typer.main.get_command(app)
    context = typer.Context(command, info_name="batude-fx")
    help_text = get_docs_for_click(obj=command, ctx=context, indent=1, name="batude-fx")
    examples = re.sub(r"^Example: (.+)$", r"```sh\n\1\n```", help_text, flags=re.MULTILINE)
    return markdown.replace("<!-- command line -->", examples)
