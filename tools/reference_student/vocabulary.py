"""Step `vocabulary`: one contiguous id space for text, special tokens, image codes and audio codes.

Only text and special tokens are in tokenizer.json. The runtime inserts code ids itself, so a
prompt that spells out "<image_17>" stays plain text and can inject no code.
"""

import json
from dataclasses import dataclass
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from tools.reference_student import audio_codec, image_codec
from tools.reference_student.training import arguments

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
SPECIALS = ("<bos>", "<eos>", "<pad>", "<image>", "</image>", "<audio>", "</audio>", "<reserved>")
TEXT = 384
IMAGE_PROMPTS = (
    "a handwritten {}",
    "draw a {}",
    "draw the number {}",
    "draw the digit {}",
    "write a {}",
    "write the number {}",
    "the digit {}, handwritten",
    "a picture of the digit {}",
    "an image of a {}",
    "handwritten digit {}",
    "show me a {}",
    "sketch the number {}",
    "a {} written by hand",
    "please draw a {}",
    "paint a handwritten {}",
    "picture: {}",
)
AUDIO_PROMPTS = (
    "say {}",
    "say the number {}",
    "say the digit {}",
    "speak {}",
    "speak the number {}",
    "pronounce {}",
    "read {} aloud",
    "the digit {}, spoken",
    "a voice saying {}",
    "the sound of {}",
    "please say {}",
    "tell me the number {}",
    "a recording of {}",
    "spoken digit {}",
    "utter the word {}",
    "sound: {}",
)


@dataclass(frozen=True)
class Vocabulary:
    """Token ids: text [0, 384), specials, image codes, audio codes (one run of 256 for each codebook)."""

    tokenizer: Tokenizer
    bos: int = TEXT
    eos: int = TEXT + 1
    pad: int = TEXT + 2
    image_begin: int = TEXT + 3
    image_end: int = TEXT + 4
    audio_begin: int = TEXT + 5
    audio_end: int = TEXT + 6
    image_first: int = TEXT + len(SPECIALS)
    audio_first: int = TEXT + len(SPECIALS) + image_codec.CODEBOOK
    size: int = TEXT + len(SPECIALS) + image_codec.CODEBOOK + audio_codec.CODEBOOKS * audio_codec.CODEBOOK

    def encode(self, text: str) -> list[int]:
        """Text ids without bos and eos."""
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: list[int]) -> str:
        """Text of the ids up to the first that is not text."""
        end = next((place for place, token in enumerate(ids) if token >= TEXT), len(ids))
        return self.tokenizer.decode(ids[:end])


def prompts(templates: tuple[str, ...], digit: int) -> list[str]:
    """Every way the corpus asks for one digit: word or numeral, capitalised or not, with or without a full stop."""
    result = []
    for template in templates:
        for name in (WORDS[digit], str(digit)):
            text = template.format(name)
            if name[0] == "e":
                text = text.replace(" a e", " an e")
            text = text.replace("a 8", "an 8")
            result += [text, text[0].upper() + text[1:], text + ".", text[0].upper() + text[1:] + "."]
    return result


def corpus() -> list[str]:
    """The text the tokenizer is trained on: all prompts and all answers."""
    return [
        text
        for digit in range(10)
        for templates in (IMAGE_PROMPTS, AUDIO_PROMPTS)
        for text in (*prompts(templates, digit), WORDS[digit])
    ]


def train() -> Tokenizer:
    """Byte-level BPE with exactly 384 text ids, then the special tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=TEXT, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(corpus(), trainer)
    if tokenizer.get_vocab_size() != TEXT:
        raise ValueError(f"the corpus gave {tokenizer.get_vocab_size()} text ids, {TEXT} are needed; add prompts")
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIALS])
    return tokenizer


def load(folder: Path) -> Vocabulary:
    """Read `folder/tokenizer.json`."""
    return Vocabulary(Tokenizer.from_file(str(folder / "tokenizer.json")))


def write(tokenizer: Tokenizer, folder: Path, version: str) -> None:
    """Write the four tokenizer files of a delivery package."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    roles = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>"}
    others = [token for token in SPECIALS if token not in roles.values()]
    config = {
        "student_version": version,
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": 256,
        "clean_up_tokenization_spaces": False,
        **roles,
        "additional_special_tokens": others,
    }
    for name, value in (
        ("tokenizer_config.json", config),
        ("special_tokens_map.json", {**roles, "additional_special_tokens": others}),
        ("added_tokens.json", {token: TEXT + place for place, token in enumerate(SPECIALS)}),
    ):
        (folder / name).write_text(json.dumps(value, indent=2) + "\n")


def main() -> None:
    """Train the tokenizer and write `work/tokenizer/`."""
    options = arguments(__doc__)
    write(train(), options.work / "tokenizer", "1.0.0")
    vocabulary = load(options.work / "tokenizer")
    print(f"{TEXT} text ids, {len(SPECIALS)} special, {vocabulary.size} in all; 'seven' = {vocabulary.encode('seven')}")


if __name__ == "__main__":
    main()
