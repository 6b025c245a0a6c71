"""The schema of package.json."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictInt, StrictStr, ValidationError

from exporters.errors import PackageError

MANIFEST = "package.json"
_VERSION = r"^(0|[1-9]\d{0,8})\.(0|[1-9]\d{0,8})\.(0|[1-9]\d{0,8})(-[0-9A-Za-z.-]{1,64})?$"
_Count = Annotated[StrictInt, Field(ge=1, le=1 << 24)]
_Range = Annotated[list[Annotated[StrictInt, Field(ge=0, le=1 << 24)]], Field(min_length=2, max_length=2)]


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class ModalityEntry(_Model):
    """One row of the modality table; text has `tokens` alone, every other modality has all fields."""

    tokens: _Range
    codebooks: _Count | None = None
    codebook_size: _Count | None = None
    grid: Annotated[list[_Count], Field(min_length=1, max_length=4)] | None = None
    begin: Annotated[StrictStr, Field(min_length=1, max_length=200)] | None = None
    end: Annotated[StrictStr, Field(min_length=1, max_length=200)] | None = None
    discretizer: Annotated[StrictStr, Field(min_length=1, max_length=200)] | None = None


class FileModel(_Model):
    """Size in bytes and SHA-256 of one file."""

    size: Annotated[StrictInt, Field(ge=0)]
    sha256: Annotated[StrictStr, Field(pattern=r"^[0-9a-f]{64}$")]


class Manifest(_Model):
    """The content of package.json."""

    format: Literal[1]
    name: Annotated[StrictStr, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")]
    version: Annotated[StrictStr, Field(pattern=_VERSION)]
    license: Annotated[StrictStr, Field(min_length=1, max_length=200)]
    modalities: Annotated[
        dict[Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]{0,31}$")], ModalityEntry], Field(min_length=1)
    ]
    files: dict[StrictStr, FileModel]
    sha256: Annotated[StrictStr, Field(pattern=r"^[0-9a-f]{64}$")]


def parse_manifest(raw: Any, where: str) -> Manifest:
    """The manifest of a parsed package.json; raises PackageError naming the first field that is wrong."""
    try:
        return Manifest.model_validate(raw)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        at = ".".join(str(part) for part in first["loc"])
        raise PackageError(
            f"{first['msg']} ({error.error_count()} such fields)" if error.error_count() > 1 else first["msg"],
            where=f"{where}: {at}",
            way_out="The schema is exporters.package_schema.Manifest",
        ) from error
