"""Runs a bundle: text, images and sounds in; text, an image or a sound out. (`runtimes.generate` is its command.)

A prompt is, in tokens: <bos>, each input signal's codes between its begin and end token, the text, and for an image
or a sound the begin token of what is asked for. Text in a prompt is only ever text: a special token written out in it
is encoded as the characters it consists of.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from runtimes.bundle import Bundle, Modality
from runtimes.errors import Fault
from runtimes.images import read_image, to_pixels, write_image
from runtimes.output import write_output
from runtimes.sampling import GREEDY, Allowed, Sampler, Sampling
from runtimes.session import CheckedSession, choose_artifact, open_session
from runtimes.sounds import read_sound, to_samples, write_sound
from runtimes.tokens import allowed_codes, codes_of, tokens_of

if TYPE_CHECKING:
    from tokenizers import Tokenizer

Array = np.ndarray[Any, Any]
MAX_PROMPT_CHARACTERS = 1 << 20


class PromptError(Fault):
    """What was asked for does not fit the bundle."""


@dataclass(frozen=True)
class SignalKind:
    """How one modality's files are read, checked and written."""

    suffix: str
    read: Callable[[Path, Mapping[str, Any]], Array]
    check: Callable[[Array, Mapping[str, Any]], object]
    write: Callable[[Path, Array, Mapping[str, Any]], None]


SIGNALS = {
    "image": SignalKind(".png", read_image, to_pixels, write_image),
    "audio": SignalKind(".wav", read_sound, lambda sound, _: to_samples(sound), write_sound),
}


@dataclass(frozen=True)
class Generation:
    """What came out. `tokens` are the generated ids (without end tokens); `text` or `signal` is what they stand for.

    `signal` is the decoder's float32 output: [1, C, H, W] normalised, or [1, 1, N].
    `ttft` is the time in seconds from the request to the first token, input encoders included; `tokens_per_second`
    is the rate of the tokens after it (0 when there was only one).
    """

    to: str
    prompt_tokens: int
    tokens: tuple[int, ...]
    text: str | None
    signal: Array | None
    ttft: float
    tokens_per_second: float


class Generator:
    """The sessions of a bundle, opened when first needed and kept. A context manager; for one thread at a time."""

    def __init__(
        self, bundle: Bundle, *, backend: str | None = None, mode: str | None = None, threads: int | None = None
    ) -> None:
        self.bundle = bundle
        self._backend, self._mode, self._threads = backend, mode, threads
        self._sessions: dict[str, CheckedSession] = {}
        self._tokenizer: Tokenizer | None = None
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self._sessions.clear()
        self._stack.close()

    def outputs(self) -> list[str]:
        """The modalities that this bundle can generate."""
        held = {artifact.component for artifact in self.bundle.artifacts}
        return [m for m in self.bundle.modalities if m == "text" or (m in SIGNALS and f"{m}_decoder" in held)]

    def generate(
        self,
        prompt: str = "",
        *,
        to: str = "text",
        inputs: Mapping[str, Path | Array] | None = None,
        sampling: Sampling = GREEDY,
        max_tokens: int | None = None,
    ) -> Generation:
        """One request. `inputs` maps "image" or "audio" to a file, or to a float32 array as the encoder takes it.

        `max_tokens` bounds text; an image or a sound always takes exactly the tokens of its grid.
        Raises Fault (PromptError, RuntimeInputError, SamplingError, ImageError, SoundError, EmptyOutput), BundleError.
        """
        target = self._target(to)
        signals = {name: self._read(name, source) for name, source in (inputs or {}).items()}
        text = self._encode_text(prompt)
        lm = self._session("lm")
        decoder = self._session(f"{to}_decoder") if target.grid else None
        for name in signals:
            self._session(f"{name}_encoder")

        start = time.perf_counter()
        ids = self._prompt_ids(text, signals, target)
        steps = self._steps(len(ids), target, lm.capacity, max_tokens)
        stop = () if target.grid else self.bundle.special.eos
        tokens, ttft = _decode(lm, ids, steps, Sampler(sampling, self.bundle.vocab_size), stop, start)
        spent = time.perf_counter() - start - ttft
        rate = (len(tokens) - 1) / spent if len(tokens) > 1 else 0.0
        if decoder is None:
            kept = tokens[:-1] if tokens[-1] in stop else tokens
            return Generation(to, len(ids), kept, self._decode_text(kept), None, ttft, rate)
        signal = self._decode_signal(decoder, tokens, target)
        return Generation(to, len(ids), tokens, None, signal, ttft, rate)

    def save(self, generation: Generation, path: Path) -> None:
        """Writes a PNG, a WAV or UTF-8 text, whole or not at all."""
        if generation.signal is None:
            write_output(path, (generation.text or "").encode())
        else:
            modality = self.bundle.modalities[generation.to]
            SIGNALS[generation.to].write(path, generation.signal, modality.preprocessing)

    def _target(self, to: str) -> Modality:
        if to not in self.outputs():
            raise PromptError(f"this bundle cannot generate {to!r}", "--to", f"It can: {', '.join(self.outputs())}")
        return self.bundle.modalities[to]

    def _read(self, name: str, source: Path | Array) -> Array:
        modality = self.bundle.modalities.get(name)
        held = {artifact.component for artifact in self.bundle.artifacts}
        if modality is None or name not in SIGNALS or f"{name}_encoder" not in held:
            there = ", ".join(m for m in self.bundle.modalities if f"{m}_encoder" in held) or "text alone"
            raise PromptError(f"this bundle takes no {name} as input", f"--{name}", f"It takes: {there}")
        return SIGNALS[name].read(source, modality.preprocessing) if isinstance(source, Path) else source

    def _session(self, component: str) -> CheckedSession:
        if component not in self._sessions:
            artifact = choose_artifact(self.bundle, component, self._backend, mode=self._mode)
            session = open_session(self.bundle, artifact, self._threads)
            self._sessions[component] = self._stack.enter_context(session)
        return self._sessions[component]

    def _load_tokenizer(self) -> Tokenizer:
        if self._tokenizer is None:
            from tokenizers import Tokenizer

            if self.bundle.tokenizer is None:
                raise PromptError(
                    "this bundle has no tokenizer", str(self.bundle.folder), "Feed token ids to its session"
                )
            self._tokenizer = Tokenizer.from_file(str(self.bundle.file(self.bundle.tokenizer)))
            # Special tokens written out in a text are read as the characters they consist of.
            self._tokenizer.encode_special_tokens = True
        return self._tokenizer

    def _encode_text(self, prompt: str) -> list[int]:
        if len(prompt) > MAX_PROMPT_CHARACTERS:
            raise PromptError(f"{len(prompt)} characters are too many", "--prompt", "Shorten it")
        if not prompt:
            return []
        try:
            prompt.encode()
        except UnicodeEncodeError as error:
            raise PromptError("is not valid Unicode text", "--prompt", "Give it as UTF-8") from error
        ids: list[int] = self._load_tokenizer().encode(prompt, add_special_tokens=False).ids
        if not ids:
            raise PromptError("holds nothing that this tokenizer knows", "--prompt", "Use its own language")
        text = self.bundle.modalities["text"]
        control = self._control_ids()
        for token in ids:
            if not text.first <= token < text.end or token in control:
                name = self._load_tokenizer().id_to_token(token)
                raise PromptError(f"holds {name!r}, which is not text to this student", "--prompt", "Leave it out")
        return ids

    def _control_ids(self) -> set[int]:
        special, wrapped = self.bundle.special, self.bundle.modalities.values()
        ids = {special.bos, special.pad, *special.eos, *(t for m in wrapped for t in (m.begin, m.end_token))}
        return {token for token in ids if token is not None}

    def _decode_text(self, tokens: tuple[int, ...]) -> str:
        text: str = self._load_tokenizer().decode(list(tokens), skip_special_tokens=True)
        return text

    def _prompt_ids(self, text: list[int], signals: Mapping[str, Array], target: Modality) -> list[int]:
        bos = self.bundle.special.bos
        ids = [] if bos is None else [bos]
        for name, signal in signals.items():
            modality, encoder = self.bundle.modalities[name], self._session(f"{name}_encoder")
            feed, output = encoder.artifact.inputs[0].name, encoder.artifact.outputs[0].name
            codes = tokens_of(encoder.run({feed: signal})[output], modality).tolist()
            ids += [*_wrap(modality.begin), *codes, *_wrap(modality.end_token)]
        ids += [*text, *_wrap(target.begin)]
        if not ids:
            raise PromptError("is empty", "--prompt", "Give a prompt, an image or a sound")
        return ids

    def _steps(self, prompt: int, target: Modality, capacity: int, max_tokens: int | None) -> Iterator[Allowed]:
        """What may come out at each step. Raises PromptError when the KV cache cannot hold prompt and output."""
        # The last token that comes out is never fed back.
        room = capacity - prompt + 1
        if max_tokens is not None and max_tokens < max(1, target.length):
            raise PromptError(f"{max_tokens} is less than {max(1, target.length)}", "--max-tokens", "Leave it out")
        if room < max(1, target.length):
            raise PromptError(
                f"is {prompt} tokens long, with {max(1, target.length)} to come; this bundle holds {capacity}",
                "--prompt",
                "Shorten it",
            )
        if target.grid:
            ranges = allowed_codes(target)
            return (ranges[i % len(ranges)] for i in range(target.length))
        text = Allowed(target.first, target.end, self.bundle.special.eos)
        return (text for _ in range(min(room, max_tokens or room)))

    def _decode_signal(self, decoder: CheckedSession, tokens: tuple[int, ...], target: Modality) -> Array:
        feed, output = decoder.artifact.inputs[0], decoder.artifact.outputs[0].name
        codes = codes_of(np.array(tokens, np.int32), target, len(feed.shape))
        # The session overwrites its outputs in its next run; what is handed out has to stay.
        signal = decoder.run({feed.name: codes})[output].copy()
        SIGNALS[target.name].check(signal, target.preprocessing)
        return signal


def _wrap(token: int | None) -> list[int]:
    return [] if token is None else [token]


def _decode(
    lm: CheckedSession,
    prompt: list[int],
    steps: Iterator[Allowed],
    sampler: Sampler,
    stop: tuple[int, ...],
    start: float,
) -> tuple[tuple[int, ...], float]:
    """Prefill, then one token per step until a `stop` token or the end of `steps`.

    Returns the tokens (the stop token included) and the seconds from `start` to the first of them.
    """

    def next_token(feeds: dict[str, Array], allowed: Allowed) -> int:
        # A head that picks by itself reads the range's rows alone, and sends no vocabulary of logits to the host.
        if sampler.takes(lm.candidates, allowed):
            return sampler.pick_among(*lm.run_top(feeds, allowed.first, allowed.end))
        return sampler.pick(lm.run(feeds)["logits"][0], allowed)

    lm.reset()
    tokens = [next_token({"ids": np.array([prompt], np.int32)}, next(steps))]
    ttft = time.perf_counter() - start
    step = np.empty((1, 1), np.int32)
    feeds = {"ids": step}
    for allowed in steps:
        if tokens[-1] in stop:
            break
        step[0, 0] = tokens[-1]
        tokens.append(next_token(feeds, allowed))
    return tuple(tokens), ttft
