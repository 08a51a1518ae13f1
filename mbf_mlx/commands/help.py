"""How `mbf COMMAND --help` looks: one usage line in plain words, and the options in named groups."""

import re
from typing import Any

from typer.core import TyperArgument, TyperCommand, TyperOption

NAME_WIDTH = 27  # characters of the column of names; a longer name has a line of its own
# The headings of the groups. An option names its group as `rich_help_panel`; one that names none is in FIRST.
ARGUMENTS, FIRST = "Arguments", "Options"
NEW, TRAINING, MEMORY = "For a new stream, fixed for its life", "Training", "Memory and power"
SAVING, AGAIN = "Saving and scoring", "Learning again"
SAMPLING, LOAD, OTHER = "Sampling, where a request does not say", "Load", "Other options"
GROUPS = (ARGUMENTS, FIRST, NEW, TRAINING, SAMPLING, MEMORY, LOAD, SAVING, AGAIN, OTHER)
_HELD = str.maketrans({" ": "\N{NO-BREAK SPACE}", "-": "\N{NON-BREAKING HYPHEN}"})
_FREED = {ord(held): letter for letter, held in _HELD.items()}


class Command(TyperCommand):
    """One command of the command line. Its help shows metavars as the command writes them, never a Python type."""

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        """Return the parts of the usage line: STREAM TASK... [OPTIONS]."""
        return [*(_named(param) for param in self.params if isinstance(param, TyperArgument)), "[OPTIONS]"]

    def get_help(self, ctx: Any) -> str:
        """Return the help, with plain spaces and hyphens again."""
        return super().get_help(ctx).translate(_FREED)

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write the arguments, then the groups of options that the command has."""
        groups: dict[str, list[tuple[str, str]]] = {title: [] for title in GROUPS}
        for param in self.params:
            if isinstance(param, TyperArgument):
                groups[ARGUMENTS].append((_named(param).strip("[]"), param.help or ""))
            elif isinstance(param, TyperOption) and (record := param.get_help_record(ctx)):
                groups[param.rich_help_panel or FIRST].append((_short(record[0]), _held(record[1])))
        groups[FIRST].append(("-h, --help", "Show this message and exit."))
        width = min(NAME_WIDTH, max(len(name) for rows in groups.values() for name, _ in rows))
        for title, rows in ((title, rows) for title, rows in groups.items() if rows):
            with formatter.section(title):
                formatter.write_dl([(name.ljust(width), words) for name, words in rows], col_max=width)


def _named(argument: TyperArgument) -> str:
    return argument.metavar or argument.name.upper()


def _short(names: str) -> str:
    """Return "--[no-]guard" for "--guard / --no-guard"."""
    first, _, second = names.partition(" / ")
    return f"--[no-]{first[2:]}" if second == f"--no-{first[2:]}" else names


def _held(words: str) -> str:
    """Return a help text whose default is never broken across lines."""
    return re.sub(r" +(\[default: [^]]+])$", lambda found: " " + found[1].translate(_HELD), words)
