"""The [quantise] table of a profile: what the build does to a float student, and to the KV cache of any.

[quantise]
method = "gptq"         # how weights are rounded; absent: float weights stay float
bits = 4
group = 32              # columns that share a scale; absent: 32 for 4 bits, a whole row for 8
mean_kl = 0.02          # quality budget in nats: matrices that cost too much are kept at 8 bits, or in float
activations = "int8"    # the layers' inputs are rounded as well, each token with its own scale; absent: float
kv_cache = "int8"       # absent: the cache is float
kv_cache_kl = 0.005     # gate of an int8 cache: mean KL divergence from the student with a float one, nats
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

#: Method -> the widths that it has.
METHODS: Mapping[str, tuple[int, ...]] = {
    "round-to-nearest": (4, 8),
    "gptq": (4, 8),
    "awq": (4,),
    "smoothquant": (8,),
}
#: What `--quantise` takes -> (method, bits, activations).
RECIPES: Mapping[str, tuple[str, int, str | None]] = {
    f"int{bits}" + ("" if method == "round-to-nearest" else f"-{method}"): (method, bits, None)
    for method, widths in METHODS.items()
    for bits in widths
} | {"w8a8-smoothquant": ("smoothquant", 8, "int8")}
ACTIVATIONS = ("int8",)
KV_CACHES = ("int8",)
#: Columns per scale where neither profile nor option says: as wide as the codes need.
DEFAULT_GROUPS: Mapping[int, int | None] = {4: 32, 8: None}


@dataclass(frozen=True)
class Quantise:
    """What to quantise; None: not at all, or the default.

    Attributes:
        method, bits: a row of METHODS.
        group: columns that share a scale.
        mean_kl: the quality budget, nats.
        activations: what the inputs of the linear layers are rounded to, one of ACTIVATIONS.
        kv_cache: dtype of the cache, one of KV_CACHES.
        kv_cache_kl: limit of its gate, nats: by default what int8 weights may cost.
    """

    method: str | None = None
    bits: int | None = None
    group: int | None = None
    mean_kl: float | None = None
    activations: str | None = None
    kv_cache: str | None = None
    kv_cache_kl: float = 0.005

    @property
    def name(self) -> str | None:
        """As the option writes it, such as "int4-gptq"; None without a method."""
        row = self.method, self.bits, self.activations
        return next((name for name, each in RECIPES.items() if each == row), None)

    @property
    def columns(self) -> int | None:
        """Columns per scale; None for a whole row."""
        return self.group if self.group is not None or self.bits is None else DEFAULT_GROUPS[self.bits]

    def problems(self) -> list[tuple[str, str, str]]:
        """(key, what is wrong, way out) of every value that cannot be."""
        found = []
        if self.method is not None and self.method not in METHODS:
            found.append(("method", f"{self.method!r} is not known", f"One of: {', '.join(METHODS)}."))
        elif self.method is None and (self.bits or self.group or self.activations or self.mean_kl is not None):
            found.append(("method", "is missing", f"Name one: {', '.join(METHODS)}."))
        elif self.method is not None and self.bits not in METHODS[self.method]:
            offered = " or ".join(map(str, METHODS[self.method]))
            found.append(("bits", f"{self.method} has no {self.bits} bits", f"Offered: {offered}."))
        if self.group is not None and (self.group < 16 or self.group % 16):
            found.append(("group", f"{self.group} is no multiple of 16", "Matrix products take blocks of 16 columns."))
        if self.mean_kl is not None and not 0 < self.mean_kl <= 10:
            found.append(("mean_kl", f"{self.mean_kl!r} is outside 0 to 10", "Give nats, as in 0.02."))
        if self.activations is not None and self.activations not in ACTIVATIONS:
            found.append(("activations", f"{self.activations!r} is not known", f"One of: {', '.join(ACTIVATIONS)}."))
        elif self.activations is not None and self.method is not None and self.name is None:
            found.append(("activations", f"{self.method} leaves them float", 'Use method "smoothquant" with 8 bits.'))
        if self.kv_cache is not None and self.kv_cache not in KV_CACHES:
            found.append(("kv_cache", f"{self.kv_cache!r} is not known", f"One of: {', '.join(KV_CACHES)}."))
        if not 0 < self.kv_cache_kl <= 10:
            found.append(("kv_cache_kl", f"{self.kv_cache_kl!r} is outside 0 to 10", "Give nats, as in 0.005."))
        return found

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)


def parse_table(raw: Any) -> Quantise | list[tuple[str, str, str]]:
    """The table of a profile file, or (key, what, way out) of what is wrong with it."""
    if not isinstance(raw, dict):
        return [("", f"must be a table, not {raw!r:.60}", "Write it as [quantise].")]
    known = {item.name: str(item.type) for item in fields(Quantise)}
    found = []
    for key, value in raw.items():
        kind = known.get(key)
        if kind is None:
            found.append((key, "unknown key", f"Known: {', '.join(known)}."))
        elif kind.startswith("str") and not isinstance(value, str):
            found.append((key, f"must be a text, not {value!r:.60}", "Correct it."))
        elif kind.startswith("int") and type(value) is not int:
            found.append((key, f"must be a whole number, not {value!r:.60}", "Correct it."))
        elif kind.startswith("float") and type(value) not in (int, float):
            found.append((key, f"must be a number, not {value!r:.60}", "Correct it."))
    if found:
        return found
    table = Quantise(**raw)
    return table.problems() or table
