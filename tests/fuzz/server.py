"""Coverage-guided fuzzing of what the server does with the frames and descriptors of an agent; run by `make fuzz`.

Wants the extra `fuzz` (atheris). Arguments are those of libFuzzer.
"""

from __future__ import annotations

import sys
from pathlib import Path

import atheris

sys.path.insert(0, str(Path(__file__).parent.parent))
with atheris.instrument_imports(include=["devboxd.agent"]):
    from support.conversation import play

if __name__ == "__main__":
    atheris.Setup(sys.argv, play)
    atheris.Fuzz()
