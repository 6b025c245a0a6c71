"""The families of language models that are known by name: what is special about each.

A family needs no code of its own. Its modules are transformers', traced; which of them become fused ops, which window
each layer has and what its RoPE tables hold is found by asking and trying them (attention.py, swaps.py, rope.py,
experts.py). A row here says what there is to find, and that tests show it (tests/exporters/families_maker.py). A
model_type without a row goes the same way, and is refused if one of its modules is not understood.
"""

from __future__ import annotations

from collections.abc import Mapping

#: model_type -> what is special about it
FAMILIES: Mapping[str, str] = {
    "llama": "RoPE scaled as in Llama 3, linear, YaRN, or dynamic within the trained length (SmolLM2 is one)",
    "qwen2": "biases of query, key and value; windows from a layer on (Qwen2.5 is one)",
    "qwen3": "norms of each head's query and key",
    "mistral": "a sliding window in every layer",
    "gemma": "norms of 1 + weight, embeddings times the root of the width",
    "gemma2": "as gemma; every other layer has a window; caps of scores and logits; scale by query_pre_attn_scalar",
    "gemma3_text": "as gemma2 without caps; norms of each head's query and key; two RoPE tables",
    "smollm3": "layers without RoPE",
    "phi": "RoPE of a part of each head, LayerNorm with biases, attention and MLP side by side",
    "phi3": "one projection for query, key and value, one for gate and up; longrope within the original length (Phi-4)",
    "stablelm": "LayerNorm with biases, RoPE of a part of each head",
    "gpt_neox": "one interleaved projection for query, key and value; LayerNorm; RoPE of a part of each head",
    "gpt2": "learned positions; weights stored transposed, which are exported in float; LayerNorm with biases",
    "gpt_bigcode": "as gpt2 with linear layers; one key and value for all heads (StarCoder is one)",
    "opt": "learned positions behind two rows that are left over; LayerNorm with biases",
    "biogpt": "as opt; embeddings times the root of the width",
    "falcon": "attention of its own, read as it runs; attention and MLP side by side; ALiBi is refused",
    "gptj": "attention of its own, read as it runs; RoPE of neighbouring pairs of a part of each head, by a table",
    "codegen": "as gptj, with one projection for query, key and value",
    "olmo2": "norms behind attention and MLP alone, and of the whole query and key",
    "granite": "multipliers of embeddings, residual sums, scores and logits",
    "qwen2_moe": "experts, executed densely; a shared expert with a gate",
    "qwen3_moe": "experts, executed densely, some layers without; norms of each head's query and key",
    "mixtral": "experts, executed densely; tensors stored under other names",
}
