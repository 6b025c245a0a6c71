"""What cannot be quantised as asked: one clear error each, before anything is written."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from device_profiles import ProfileError
from device_profiles.loader import load_profile_file
from exporters.build import main, parse, run_command
from exporters.errors import ExportError
from tests.conftest import MakeStudent
from tests.exporters.plain import text_only
from tests.refusals import raises

HOST = Path(__file__).parents[2] / "device_profiles" / "host.toml"


@pytest.fixture
def refused(make_tiny_student: MakeStudent, tmp_path: Path):
    """Runs the build and gives what it is refused with."""

    def run(*options: str, variant: str = "float", package: Path | None = None) -> str:
        output = tmp_path / "bundle"
        folder = package or make_tiny_student(variant=variant)
        given = ["--profile", "host", "--package", str(folder), "--output", str(output), "--backends", "onnx"]
        with raises((ExportError, ProfileError)) as caught:
            run_command(parse([*given, "--no-bench", *options]))
        assert not output.exists()
        return str(caught.value)

    return run


def test_a_quantised_student(refused):
    message = refused("--quantise", "int8", variant="int4")
    assert "already quantised: its own quantisation is carried over" in message
    assert "Leave --quantise out" in message


def test_no_calibration_data(refused, make_tiny_student, tmp_path):
    package = text_only(make_tiny_student(variant="float"), tmp_path / "plain")  # without samples
    message = refused("--quantise", "int4-gptq", package=package)
    assert "gptq is fitted to data, and there is none" in message
    assert "--calibration" in message
    assert "budget is measured on data" in refused("--quantise", "int4", "--mean-kl", "0.1", package=package)


def test_an_int8_cache_without_data(refused, tiny_student, tmp_path):
    package = text_only(tiny_student, tmp_path / "plain")
    assert "int8 KV cache is fitted to data, and there is none" in refused("--kv-cache", "int8", package=package)


def test_an_int8_cache_that_no_backend_has(refused, tiny_student):
    message = refused("--kv-cache", "int8", "--backends", "openvino", package=tiny_student)
    assert "openvino/ir/exact: an int8 KV cache (quantise.kv_cache) is ONNX Runtime's alone" in message


def test_text_without_a_tokenizer(refused, make_tiny_student, tmp_path):
    package = text_only(make_tiny_student(variant="float"), tmp_path / "plain", tokenizer=False)
    data = tmp_path / "data"
    data.mkdir()
    (data / "a.txt").write_text("say three")
    assert "the student has no tokenizer" in refused(
        "--quantise", "int4-gptq", "--calibration", str(data), package=package
    )


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.csv", b"1,2", "holds no .txt or .safetensors file"),
        ("a.txt", b"\xff\xfe\x00", "is not UTF-8"),
        ("a.txt", b"", "holds no row of two tokens"),
        ("a.safetensors", b"not one", "cannot be read"),
    ],
)
def test_a_folder_of_something_else(refused, tmp_path, name, content, reason):
    data = tmp_path / "data"
    data.mkdir()
    (data / name).write_bytes(content)
    message = refused("--quantise", "int4-gptq", "--calibration", str(data))
    assert reason in message
    assert str(data) in message


@pytest.mark.parametrize(
    ("tensors", "reason"),
    [
        ({"tokens": np.zeros((2, 8), np.int32)}, "holds no integer ids"),
        ({"ids": np.zeros((2, 8), np.float32)}, "holds no integer ids"),
        ({"ids": np.zeros((2, 8), np.int32), "length": np.zeros(3, np.int32)}, "holds no integer ids"),
        ({"ids": np.full((2, 8), 136, np.int32)}, "token 136 (lowest 136) of a vocabulary of 136"),
        ({"ids": np.full((2, 8), -1, np.int64)}, "token -1 (lowest -1)"),
    ],
)
def test_rows_that_are_not_the_students(refused, tmp_path, tensors, reason):
    data = tmp_path / "data"
    data.mkdir()
    save_file(tensors, data / "rows.safetensors")
    assert reason in refused("--quantise", "int4-awq", "--calibration", str(data))


def test_a_folder_that_is_none(refused, tmp_path):
    assert "is not a folder" in refused("--quantise", "int4-awq", "--calibration", str(tmp_path / "nothing"))


def test_groups_that_do_not_divide(refused):
    message = refused("--quantise", "int4", "--group", "48")
    assert "groups of 48 columns do not divide K = 64" in message
    assert "--group 64 divides it" in message


def test_groups_that_no_product_takes(refused):
    assert "24 is no multiple of 16" in refused("--quantise", "int4", "--group", "24")


@pytest.mark.parametrize("option", ["--mean-kl=0.1", "--group=32"])
def test_an_option_of_quantising_without_a_method(refused, option):
    message = refused(option)
    assert message.startswith(f"{option.partition('=')[0]}: is given without a method, and profile host names none")
    assert "Add --quantise with one of int4, " in message


@pytest.mark.parametrize("budget", ["0", "-1", "nan"])
def test_a_budget_that_is_none(refused, budget):
    assert "is outside 0 to 10" in refused("--quantise", "int4", f"--mean-kl={budget}")


def test_a_budget_that_nothing_keeps(refused):
    message = refused("--quantise", "int8", "--mean-kl", "1e-12")
    assert "needs every matrix in float" in message


def test_an_unknown_method(capsys):
    with pytest.raises(SystemExit):
        main(["--profile", "host", "--quantise", "int3"])
    assert "int4-gptq" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("table", "key", "reason"),
    [
        ('method = "magic"\nbits = 4', "quantise.method", "'magic' is not known"),
        ('method = "awq"\nbits = 8', "quantise.bits", "awq has no 8 bits"),
        ('method = "gptq"', "quantise.bits", "gptq has no None bits"),
        ("bits = 4", "quantise.method", "is missing"),
        ('method = "gptq"\nbits = "4"', "quantise.bits", "must be a whole number"),
        ('method = "gptq"\nbits = 4\ngroup = 20', "quantise.group", "no multiple of 16"),
        ('method = "gptq"\nbits = 4\nmean_kl = 11', "quantise.mean_kl", "outside 0 to 10"),
        ('methods = "gptq"', "quantise.methods", "unknown key"),
        ('method = "smoothquant"\nbits = 8\nactivations = "int2"', "quantise.activations", "'int2' is not known"),
        ('method = "gptq"\nbits = 4\nactivations = "int8"', "quantise.activations", "gptq leaves them float"),
        ('kv_cache = "int2"', "quantise.kv_cache", "'int2' is not known"),
        ("kv_cache_kl = -1", "quantise.kv_cache_kl", "outside 0 to 10"),
        ('activations = "int8"', "quantise.method", "is missing"),
    ],
)
def test_a_profile_that_asks_for_what_is_not_there(tmp_path, table, key, reason):
    path = tmp_path / "host.toml"
    path.write_text(HOST.read_text().replace("[components]", f"[quantise]\n{table}\n\n[components]", 1))
    with raises(ProfileError) as caught:
        load_profile_file(path)
    assert reason in str(caught.value)
    assert caught.value.where == f"host.toml: {key}"
