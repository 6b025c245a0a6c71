"""A real one-layer attention model in eager torch with a fixed-capacity KV cache, for tests of sessions."""

from __future__ import annotations

import torch

from runtimes.bundle import Artifact, StateSpec, TensorSpec
from runtimes.session import Limits
from runtimes.torch_ import TorchSession

VOCAB, WIDTH, CAPACITY = 40, 8, 32


class EagerLm(torch.nn.Module):
    """`forward(ids [1, S], last [1], key [C, W], value [C, W])`: logits of the last position, and the two states.

    With `in_place` the states that came in are updated and returned; otherwise new tensors are returned.
    """

    def __init__(self, in_place: bool) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.in_place = in_place
        self.embedding = torch.nn.Parameter(torch.randn(VOCAB, WIDTH, generator=generator))
        self.projections = torch.nn.Parameter(torch.randn(3, WIDTH, WIDTH, generator=generator))

    def forward(
        self, ids: torch.Tensor, last: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        positions = last.long() - ids.shape[1] + 1 + torch.arange(ids.shape[1])
        x = self.embedding[ids[0].long()]
        query, new_key, new_value = x @ self.projections
        if self.in_place:
            key.index_copy_(0, positions, new_key)
            value.index_copy_(0, positions, new_value)
        else:
            key, value = key.index_copy(0, positions, new_key), value.index_copy(0, positions, new_value)
        scores = query @ key.T / WIDTH**0.5
        scores = scores.masked_fill(torch.arange(CAPACITY) > positions[:, None], float("-inf"))
        x = x + scores.softmax(-1) @ value
        return x[-1:] @ self.embedding.T, key, value


def lm_artifact() -> Artifact:
    return Artifact(
        component="lm",
        backend="torch",
        form="eager",
        mode="exact",
        model="lm.pt2",
        files=("lm.pt2",),
        inputs=(TensorSpec("ids", "int32", (1, "S")), TensorSpec("last", "int32", (1,))),
        outputs=(TensorSpec("logits", "float32", (1, VOCAB)),),
        states=tuple(
            StateSpec(name, "float32", (CAPACITY, WIDTH), f"past_{name}", f"present_{name}")
            for name in ("key", "value")
        ),
        precision={"weights": "float32", "activations": "float32"},
        bytes_per_token=None,
        operators={},
        preferred=True,
    )


def open_eager_lm(in_place: bool = True, timing: bool = False) -> TorchSession:
    return TorchSession(EagerLm(in_place), lm_artifact(), Limits(CAPACITY, {"ids": VOCAB}), timing=timing)


def decoder_artifact() -> Artifact:
    return Artifact(
        component="image_decoder",
        backend="torch",
        form="eager",
        mode="exact",
        model="image.pt2",
        files=("image.pt2",),
        inputs=(TensorSpec("codes", "int32", ("B", 4, 4)),),
        outputs=(TensorSpec("image", "float32", ("B", 1, 4, 4)),),
        states=(),
        precision={"weights": "float32", "activations": "float32"},
        bytes_per_token=None,
        operators={},
        preferred=True,
    )


def open_eager_decoder() -> TorchSession:
    """A lookup in a codebook of 16."""
    book = torch.linspace(-1, 1, 16)
    return TorchSession(lambda codes: book[codes.long()][:, None], decoder_artifact(), Limits(0, {"codes": 16}))
