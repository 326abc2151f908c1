"""python -m scripts: list the scripts."""

import ast
import signal
from pathlib import Path

from terminal import say

if __name__ == "__main__":
    # End at once if the reader of our output has closed it, as in `| head`.
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    say("python -m scripts.NAME runs a script; python -m scripts.NAME --help shows its settings:")
    for path in sorted(Path(__file__).parent.glob("*.py")):
        text = path.read_text()
        if "launch(" in text and not path.stem.startswith("_"):
            first_line = ast.get_docstring(ast.parse(text)).partition("\n")[0]
            say(f"  {path.stem:<17} {first_line}")
