"""What an app needs to know of a student, for backends whose files carry it along."""

from __future__ import annotations

from typing import Any

from exporters.student import Student


def about(student: Student, capacity: int) -> dict[str, Any]:
    """Texts and plain JSON values by key: who made it, token ids, and the constants of pre- and post-processing."""
    return {
        "author": student.name,
        "license": student.license,
        "version": student.version,
        "edge.student": student.name,
        "edge.student_sha256": student.sha256,
        "edge.tokenizer": "tokenizer/tokenizer.json" if student.tokenizer is not None else "",
        "edge.vocab_size": student.config["vocab_size"],
        "edge.context": capacity,
        "edge.special_tokens": dict(student.special),
        "edge.modalities": {
            name: {
                "tokens": [entry.first, entry.end],
                "codebooks": entry.codebooks,
                "codebook_size": entry.codebook_size,
                "grid": list(entry.grid),
                "begin": entry.begin_id,
                "end": entry.end_id,
                "preprocessing": dict(entry.preprocessing or {}),
            }
            for name, entry in student.modalities.items()
        },
    }
