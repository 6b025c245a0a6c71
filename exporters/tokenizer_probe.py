"""Tokenise texts in a process of its own: `python tokenizer_probe.py TOKENIZER_JSON MEMORY_BYTES CPU_SECONDS < TEXTS`.

A tokenizer is a program: its patterns may backtrack without end, and the library may abort on odd content. So it runs
first where both cost nothing but this process. Reads a JSON list of texts, writes a JSON list of lists of ids.
Needs only the `tokenizers` package, and imports nothing else of this project.
"""

from __future__ import annotations

import json
import resource
import sys


def main() -> None:
    """Entry point of the process."""
    path, memory, seconds = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    from tokenizers import Tokenizer

    texts = json.load(sys.stdin)
    tokenizer = Tokenizer.from_file(path)
    json.dump([tokenizer.encode(text, add_special_tokens=False).ids for text in texts], sys.stdout)


if __name__ == "__main__":
    main()
