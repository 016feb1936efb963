"""Format the code cells of the chapters, in place, and nothing else of them.

python tools/format_cells.py                        every chapter
python tools/format_cells.py book/theory/score.md   these chapters only
"""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RUFF = [str(Path(sys.executable).parent / "ruff"), "format", "--stdin-filename"]
# A cell's fence, its options (YAML block or `:key: value` lines), its source.
CELL = re.compile(
    r"^(```\{code-cell\}[^\n]*\n(?:---\n.*?^---\n|(?::[^\n]*\n)*)\n*)(.*?)(?=^```$)",
    re.DOTALL | re.MULTILINE,
)


def format_source(source):
    """Format one cell as ruff's settings for the book say."""
    command = [*RUFF, str(ROOT / "book" / "cell.py"), "-"]
    done = subprocess.run(command, input=source, capture_output=True, text=True)
    if done.returncode:
        raise ValueError(done.stderr)
    return done.stdout


def format_chapter(text):
    """Format all cells of a chapter's text."""
    return CELL.sub(lambda cell: cell[1] + format_source(cell[2]), text)


def main(argv=None):
    """Format the chapters named, or all of them."""
    chapters = [Path(name) for name in argv or sys.argv[1:]]
    for chapter in chapters or sorted(ROOT.glob("book/*/*.md")):
        old = chapter.read_text()
        new = format_chapter(old)
        if new != old:
            chapter.write_text(new)
            print("formatted", chapter)


if __name__ == "__main__":
    main()
