"""The generate command.

python -m runtimes.generate BUNDLE --prompt "a handwritten seven" --to image --output seven.png
python -m runtimes.generate BUNDLE --prompt "say three" --to audio --output three.wav
python -m runtimes.generate BUNDLE --image seven.png --to text
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from runtimes.cli import bundle_parser, exit_code, open_bundle, positive
from runtimes.generator import SIGNALS, Generation, Generator, PromptError
from runtimes.output import check_writable
from runtimes.sampling import Sampling


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line; see --help."""
    parser = bundle_parser("generate", "Generates text, an image or a sound with a bundle.", __doc__ or "")
    parser.add_argument("--prompt", default="", help="text of the request")
    parser.add_argument("--image", type=Path, metavar="FILE", help="image as input (PNG or JPEG)")
    parser.add_argument("--audio", type=Path, metavar="FILE", help="sound as input (PCM WAV)")
    parser.add_argument("--to", default="text", metavar="MODALITY", help="what to generate (default: text)")
    parser.add_argument("--output", type=Path, metavar="FILE", help="where to write it; text goes to stdout without it")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy (default), 1 the model's own")
    parser.add_argument("--top-k", type=int, default=0, help="sample from the K most likely tokens (default: all)")
    parser.add_argument("--top-p", type=float, default=1.0, help="sample from the most likely tokens that hold P")
    parser.add_argument("--seed", type=int, help="makes sampling repeatable")
    parser.add_argument(
        "--max-tokens", type=positive, metavar="N", help="longest text (default: what the context holds)"
    )
    return parser.parse_args(arguments)


def check_output(to: str, output: Path | None) -> None:
    """Raises PromptError or OutputError for an output that could not be written, before anything is loaded."""
    if to in SIGNALS:
        suffix = SIGNALS[to].suffix
        if output is None or output.suffix.lower() != suffix:
            raise PromptError(
                f"{to} is written as a {suffix} file", "--output", f"Name one, as in --output {to}{suffix}"
            )
    if output is not None:
        check_writable(output)


def run(options: argparse.Namespace) -> int:
    """Generates once and writes the result; a line with the times goes to stderr."""
    sampling = Sampling(options.temperature, options.top_k, options.top_p, options.seed)
    check_output(options.to, options.output)
    inputs = {name: path for name in SIGNALS if (path := getattr(options, name)) is not None}
    bundle = open_bundle(options.bundle, options.trust)
    with Generator(bundle, backend=options.backend, mode=options.mode, threads=options.threads) as generator:
        generation = generator.generate(
            options.prompt, to=options.to, inputs=inputs, sampling=sampling, max_tokens=options.max_tokens
        )
        if options.output is not None:
            generator.save(generation, options.output)
    if options.output is None:
        print((generation.text or "").strip())
    print(summary(generation, options.output), file=sys.stderr)
    return 0


def summary(generation: Generation, output: Path | None) -> str:
    """The line with the times."""
    line = (
        f"prompt {generation.prompt_tokens} tokens, TTFT {generation.ttft * 1e3:.1f} ms, "
        f"{len(generation.tokens)} tokens at {generation.tokens_per_second:.1f} tokens/s"
    )
    return f"{line} -> {output}" if output else line


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    return exit_code(lambda: run(options))


if __name__ == "__main__":
    sys.exit(main())
