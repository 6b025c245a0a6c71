"""Generating from a bundle: every modality in and out, and every request that cannot be met."""

from __future__ import annotations

import subprocess
import sys
import wave
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tokenizers import Tokenizer

from runtimes.bundle import Bundle, Modality, load_bundle
from runtimes.generate import main
from runtimes.generator import Generator, PromptError
from runtimes.sampling import Sampling
from runtimes.session import choose_artifact, open_session
from tests.runtimes.bundle_edits import copy_bundle, edit_fields

PROMPT = "a handwritten seven"


@pytest.fixture(scope="module")
def bundle(tiny_bundle: Path) -> Bundle:
    return load_bundle(tiny_bundle)


@pytest.fixture(scope="module")
def generator(bundle: Bundle) -> Iterator[Generator]:
    with Generator(bundle, threads=1) as generator:
        yield generator


def text_ids(bundle: Bundle, prompt: str) -> list[int]:
    assert bundle.tokenizer is not None
    return Tokenizer.from_file(str(bundle.file(bundle.tokenizer))).encode(prompt, add_special_tokens=False).ids


def decode_by_hand(bundle: Bundle, prompt: list[int], masks: list[np.ndarray]) -> list[int]:
    """Greedy tokens under one mask per step, by a full prefill for every token: no cache, no fast path."""
    tokens: list[int] = []
    with open_session(bundle, choose_artifact(bundle, "lm"), threads=1) as session:
        for mask in masks:
            session.reset()
            logits = session.run({"ids": np.array([prompt + tokens], np.int32)})["logits"][0]
            tokens.append(int(np.where(mask, logits, -np.inf).argmax()))
    return tokens


def code_masks(bundle: Bundle, modality: Modality) -> list[np.ndarray]:
    ids = np.arange(bundle.vocab_size)
    starts = [modality.first + modality.codebook_size * (i % modality.codebooks) for i in range(modality.length)]
    return [(ids >= start) & (ids < start + modality.codebook_size) for start in starts]


@pytest.mark.parametrize("to", ["image", "audio"])
def test_greedy_codes_are_those_of_a_masked_argmax_without_a_cache(
    bundle: Bundle, generator: Generator, to: str
) -> None:
    modality = bundle.modalities[to]
    made = generator.generate(PROMPT, to=to)
    assert bundle.special.bos is not None
    assert modality.begin is not None
    prompt = [bundle.special.bos, *text_ids(bundle, PROMPT), modality.begin]
    assert made.prompt_tokens == len(prompt)
    assert list(made.tokens) == decode_by_hand(bundle, prompt, code_masks(bundle, modality))
    assert made.signal is not None
    assert made.text is None
    assert made.ttft > 0
    assert made.tokens_per_second > 0


@pytest.mark.parametrize("to", ["image", "audio"])
@pytest.mark.parametrize("seed", range(5))
def test_sampled_codes_are_the_modalitys_own_and_exactly_as_many_as_its_grid(
    bundle: Bundle, generator: Generator, to: str, seed: int
) -> None:
    sampling = Sampling(temperature=5.0, top_k=0, top_p=1.0, seed=seed)
    made = generator.generate(PROMPT, to=to, sampling=sampling)
    masks = code_masks(bundle, bundle.modalities[to])
    assert len(made.tokens) == len(masks)
    assert all(mask[token] for mask, token in zip(masks, made.tokens, strict=True))
    again = generator.generate(PROMPT, to=to, sampling=sampling)
    assert again.tokens == made.tokens


def test_text_stays_within_text_and_its_bound(bundle: Bundle, generator: Generator) -> None:
    text = bundle.modalities["text"]
    for seed in range(5):
        made = generator.generate(PROMPT, max_tokens=12, sampling=Sampling(temperature=2.0, seed=seed))
        assert len(made.tokens) <= 12
        assert all(text.first <= token < text.end for token in made.tokens)
        assert isinstance(made.text, str)


def test_text_ends_at_the_end_token_which_is_not_part_of_it(
    tiny_bundle: Path, tmp_path: Path, generator: Generator
) -> None:
    greedy = generator.generate(PROMPT, max_tokens=10)
    assert len(greedy.tokens) == 10
    stop = greedy.tokens[4]

    def end_early(fields: dict) -> None:
        fields["special"]["eos"] = [stop]

    bundle = edit_fields(copy_bundle(tiny_bundle, tmp_path / "bundle"), end_early)
    with Generator(bundle, threads=1) as early:
        made = early.generate(PROMPT, max_tokens=10)
    assert made.tokens == greedy.tokens[: greedy.tokens.index(stop)]


def test_text_fills_the_context_and_no_more(bundle: Bundle, generator: Generator) -> None:
    made = generator.generate("say", sampling=Sampling(temperature=1.0, seed=0))
    assert len(made.tokens) <= bundle.context - made.prompt_tokens + 1


@pytest.mark.parametrize("name", ["image", "audio"])
def test_signals_go_in_as_their_codes(bundle: Bundle, generator: Generator, tmp_path: Path, name: str) -> None:
    file = tmp_path / f"in.{'png' if name == 'image' else 'wav'}"
    generator.save(generator.generate(PROMPT, to=name, sampling=Sampling(temperature=1.0, seed=1)), file)
    made = generator.generate("a", inputs={name: file}, max_tokens=4)
    modality = bundle.modalities[name]
    # bos, begin, codes, end, text
    assert made.prompt_tokens == 1 + 1 + modality.length + 1 + len(text_ids(bundle, "a"))
    assert made.tokens == generator.generate("a", inputs={name: file}, max_tokens=4).tokens


def test_an_image_becomes_a_sound(bundle: Bundle, generator: Generator, tmp_path: Path) -> None:
    generator.save(generator.generate(PROMPT, to="image"), tmp_path / "in.png")
    made = generator.generate(to="audio", inputs={"image": tmp_path / "in.png"})
    assert len(made.tokens) == bundle.modalities["audio"].length


def test_what_is_handed_out_stays_when_the_session_runs_again(generator: Generator) -> None:
    first = generator.generate(PROMPT, to="image")
    assert first.signal is not None
    kept = first.signal.copy()
    generator.generate("say three", to="image", sampling=Sampling(temperature=5.0, seed=9))
    np.testing.assert_array_equal(first.signal, kept)


def test_the_command_writes_a_picture_and_a_sound(bundle: Bundle, tmp_path: Path) -> None:
    for to, name in (("image", "seven.png"), ("audio", "three.wav")):
        output = tmp_path / name
        command = [sys.executable, "-m", "runtimes.generate", str(bundle.folder), "--prompt", PROMPT, "--threads", "1"]
        done = subprocess.run(
            [*command, "--to", to, "--output", str(output)], capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, done.stderr
        assert "TTFT" in done.stderr
        assert "tokens/s" in done.stderr
    with Image.open(tmp_path / "seven.png") as image:
        height, width = bundle.modalities["image"].preprocessing["size"]
        assert image.size == (width, height)
    with wave.open(str(tmp_path / "three.wav")) as sound:
        assert sound.getframerate() == bundle.modalities["audio"].preprocessing["sample_rate"]
        assert sound.getnframes() == bundle.modalities["audio"].preprocessing["samples"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["seven.png", "three.wav"]


def test_the_command_prints_text_or_writes_it(
    bundle: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [str(bundle.folder), "--prompt", PROMPT, "--max-tokens", "5", "--threads", "1"]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert main([*arguments, "--output", str(tmp_path / "text.txt")]) == 0
    assert (tmp_path / "text.txt").read_text().strip() == printed.strip()


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--to", "video", "--prompt", "x"], "cannot generate 'video'. It can: audio, image, text"),
        (["--to", "image", "--prompt", "x"], "--output: image is written as a .png file"),
        (["--to", "image", "--prompt", "x", "--output", "x.wav"], "--output: image is written as a .png file"),
        (["--to", "audio", "--prompt", "x", "--output", "x.png"], "--output: audio is written as a .wav file"),
        (["--to", "image", "--prompt", "x", "--output", "none/x.png"], "its folder does not exist"),
        (["--image", "none.png"], "none.png: cannot be read"),
        (["--audio", "none.wav"], "none.wav: cannot be read"),
        (["--image", "text.txt"], "text.txt: is not an image"),
        (["--audio", "text.txt"], "text.txt: is not a PCM WAV file"),
        (["--prompt", "a handwritten seven " * 200], "tokens long"),
        (["--prompt", "\udcff"], "is not valid Unicode"),
        (["--to", "image", "--output", "x.png", "--prompt", "x", "--max-tokens", "3"], "--max-tokens: 3 is less than"),
        (["--prompt", "x", "--temperature", "-1"], "temperature"),
        (["--prompt", "x", "--top-p", "0"], "top-p"),
        (["--prompt", "x", "--backend", "abacus"], "no backend=abacus"),
    ],
)
def test_a_request_that_cannot_be_met_is_one_line_and_leaves_nothing(
    bundle: Bundle,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    text: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("words")
    assert main([str(bundle.folder), "--threads", "1", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert text in error
    assert error.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["text.txt"]


def test_the_output_is_checked_before_the_bundle_is_even_opened(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(tmp_path / "none"), "--to", "image", "--output", str(tmp_path / "no" / "x.png")]) == 2
    assert "its folder does not exist" in capsys.readouterr().err


def test_a_missing_bundle_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path / "none"), "--prompt", "x"]) == 2
    assert "does not exist" in capsys.readouterr().err


@pytest.mark.parametrize("special", ["<eos>", "<image>", "</image>", "<bos>"])
def test_special_tokens_in_a_prompt_are_text_or_refused_but_never_special(
    bundle: Bundle, generator: Generator, special: str
) -> None:
    control = text_ids(bundle, special)
    assert len(control) == 1, "the tokenizer itself would make it special"
    ids = generator._encode_text(f"a {special} seven")
    text = bundle.modalities["text"]
    assert control[0] not in ids
    assert all(text.first <= token < text.end for token in ids)


def test_an_added_token_that_is_not_marked_special_is_refused(tiny_bundle: Path, tmp_path: Path) -> None:
    folder = copy_bundle(tiny_bundle, tmp_path / "bundle")
    bundle = load_bundle(folder)
    assert bundle.tokenizer is not None
    path = bundle.file(bundle.tokenizer)
    path.write_text(path.read_text().replace('"special": true', '"special": false'))
    with (
        Generator(edit_fields(folder, lambda fields: None), threads=1) as generator,
        pytest.raises(PromptError) as caught,
    ):
        generator.generate("a <eos> seven")
    assert "'<eos>'" in str(caught.value)


def test_an_empty_request_is_begin_of_text_alone(generator: Generator) -> None:
    assert generator.generate(max_tokens=1).prompt_tokens == 1
