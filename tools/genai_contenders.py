"""A process for each contender of tools/bench_genai.py, which answers each line of its input with a line of JSON.

python -m tools.genai_contenders KIND FOLDER MODE THREADS VOCABULARY
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from importlib import import_module
from pathlib import Path
from typing import Any

CAPACITY = 1024
# Tokens of the prompt that a decode follows.
PROMPT = 64


class Ours:
    """An artifact of our bundle in its session."""

    MODULES = ("onnxruntime", "runtimes.bundle", "runtimes.sampling", "runtimes.session", "runtimes.onnxruntime_")

    def __init__(self, folder: Path, mode: str, threads: int) -> None:
        from runtimes.bundle import load_bundle
        from runtimes.sampling import GREEDY, Allowed, Sampler
        from runtimes.session import open_session

        bundle = load_bundle(folder)
        self._session = open_session(bundle, bundle.artifact("lm", "onnx", "fused", mode), threads)
        self._sampler, self._allowed = Sampler(GREEDY, bundle.vocab_size), Allowed(0, bundle.vocab_size)

    def start(self) -> None:
        self._session.reset()

    def prefill(self, ids: Any) -> None:
        self._logits = self._session.run({"ids": ids})["logits"]

    def step(self) -> None:
        """Takes the most likely token and runs it."""
        import numpy as np

        token = self._sampler.pick(self._logits[0], self._allowed)
        self._logits = self._session.run({"ids": np.array([[token]], np.int32)})["logits"]


class Peer:
    """The builder's model in GenAI's generator."""

    MODULES = ("onnxruntime_genai",)

    def __init__(self, folder: Path, mode: str, threads: int) -> None:
        import onnxruntime_genai

        del mode
        path = folder / "genai_config.json"
        config = json.loads(path.read_text())
        config["model"]["decoder"]["session_options"] |= {"intra_op_num_threads": threads}
        path.write_text(json.dumps(config))
        self._library = onnxruntime_genai
        self._model = onnxruntime_genai.Model(str(folder))

    def start(self) -> None:
        parameters = self._library.GeneratorParams(self._model)
        parameters.set_search_options(max_length=CAPACITY, min_length=CAPACITY, do_sample=False)
        self._generator = self._library.Generator(self._model, parameters)
        self._fresh = True

    def prefill(self, ids: Any) -> None:
        self._generator.append_tokens(ids)

    def step(self) -> None:
        """Runs the last token and takes the most likely one; behind a prefill there is nothing to run yet."""
        if self._fresh:
            self._generator.generate_next_token()
            self._fresh = False
        self._generator.generate_next_token()


CONTENDERS = {"ours": Ours, "peer": Peer}


def contend(kind: str, folder: Path, mode: str, threads: int, vocabulary: int) -> None:
    """A contender's process: loads, answers "prefill N" and "decode N" with seconds, "peak" and "held" with bytes."""
    import numpy as np

    from runtimes.host import peak_rss_bytes, rss_bytes

    memory = {"peak": peak_rss_bytes, "held": rss_bytes}
    rows = np.random.default_rng(0).integers(0, vocabulary - 8, (1, CAPACITY)).astype(np.int32)
    for module in CONTENDERS[kind].MODULES:
        import_module(module)  # no part of loading a model
    start = time.perf_counter()
    contender = CONTENDERS[kind](folder, mode, threads)
    print(json.dumps(time.perf_counter() - start), flush=True)
    for line in sys.stdin:
        what, count = line.split()
        if what in memory:
            print(json.dumps(memory[what]()), flush=True)
            continue
        contender.start()
        start = time.perf_counter()
        contender.prefill(rows[:, : int(count) if what == "prefill" else PROMPT])
        if what == "decode":
            contender.step()
            start = time.perf_counter()
            for _ in range(int(count)):
                contender.step()
        print(json.dumps(time.perf_counter() - start), flush=True)


class Contender:
    """The process of one contender, waiting for its turns."""

    def __init__(self, kind: str, folder: Path, mode: str, threads: int, vocabulary: int) -> None:
        arguments = [kind, str(folder), mode, str(threads), str(vocabulary)]
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tools.genai_contenders", *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parent.parent,
        )
        self.load = self._answer()

    def ask(self, what: str, count: int = 0) -> float:
        """Sends one line and returns the answer."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{what} {count}\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> float:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"a contender ended with {self._process.wait()}")
        return float(json.loads(line))

    def close(self) -> None:
        """Ends the process."""
        self._process.communicate()


if __name__ == "__main__":
    kind, folder, mode, threads, vocabulary = sys.argv[1:]
    contend(kind, Path(folder), mode, int(threads), int(vocabulary))
