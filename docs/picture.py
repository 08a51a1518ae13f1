"""Draw docs/picture.svg: what `mbf quickstart` prints, as a picture of a terminal.

    python docs/picture.py [--stream-folder quickstart]

It runs `mbf quickstart --out FOLDER`. Tasks that FOLDER has learned already are not learned again.
"""

import argparse
import io
import os
import subprocess
import sys
from pathlib import Path

from rich.console import Console
from rich.text import Text

ROOT = Path(__file__).resolve().parents[1]
PICTURE = ROOT / "docs" / "picture.svg"
COLUMNS = 112  # two tables of three tasks stand beside each other
LAST = "it answers:"  # what comes below this line is how to go on
# rich's own picture of a terminal, without the web addresses of its font: a picture must not load anything.
FRAME = """<svg class="rich-terminal" viewBox="0 0 {width} {height}" xmlns="http://www.w3.org/2000/svg">
<!-- made by docs/picture.py -->
<style>
.{unique_id}-matrix {{
    font-family: "Fira Code", "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace;
    font-size: {char_height}px;
    line-height: {line_height}px;
}}
.{unique_id}-title {{ font-size: 18px; font-weight: bold; font-family: arial, sans-serif; }}
{styles}
</style>
<defs>
<clipPath id="{unique_id}-clip-terminal">
<rect x="0" y="0" width="{terminal_width}" height="{terminal_height}"/>
</clipPath>
{lines}
</defs>
{chrome}
<g transform="translate({terminal_x}, {terminal_y})" clip-path="url(#{unique_id}-clip-terminal)">
{backgrounds}
<g class="{unique_id}-matrix">
{matrix}
</g>
</g>
</svg>
"""


def draw(command: str, printed: str) -> str:
    """Return the picture of a terminal in which a command printed some text, as SVG.

    Args:
        command: As it was typed.
        printed: What it printed, with the colours that a terminal is told (ANSI codes).
    """
    console = Console(record=True, width=COLUMNS, file=io.StringIO(), force_terminal=True)
    console.print(Text(f"$ {command}", style="bold"))
    console.print(Text.from_ansi(printed.rstrip("\n")))
    return console.export_svg(title="mbf-mlx", code_format=FRAME, unique_id="mbf")


def shown(printed: str) -> str:
    """Return the part of quickstart's output that the picture shows: up to the answer."""
    lines = printed.splitlines()
    last = max(number for number, line in enumerate(lines) if LAST in line)
    return "\n".join(lines[: last + 1])


def main() -> None:
    """Run the quickstart and draw what it prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stream-folder", type=Path, default=Path("quickstart"))
    folder = parser.parse_args().stream_folder
    done = subprocess.run(
        [sys.executable, str(ROOT / "cli.py"), "quickstart", "--out", str(folder)],
        env={**os.environ, "FORCE_COLOR": "1", "TERM": "xterm-256color"},
        stdout=subprocess.PIPE,
        check=True,
    )
    PICTURE.write_text(draw("mbf quickstart", shown(done.stdout.decode())), encoding="utf-8")
    print(f"{PICTURE}: {PICTURE.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
