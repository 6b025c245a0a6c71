"""Model-local functions: what TensorRT's own operators and our kernels compute, in standard operators.

A node of domain "trt" is a layer of TensorRT 11, one of domain "edge" a plugin of ours (kernels/cuda). With these
bodies in the file any ONNX runtime computes the same from the same bytes, so the very file that goes to the device
passes the parity gate before it gets there. The texts are ONNX's own syntax (onnx.parser).
"""

from __future__ import annotations

from collections.abc import Iterator

import onnx.parser
import onnx_ir as ir

from exporters.ops.tensorrt import EDGE, TRT
from exporters.passes.context import Context

# TensorRT's own operators. The query of TRT_Attention is scaled beforehand, and its last row is at length - 1.
_NATIVE = {
    "TRT_KVCacheUpdate": """
    TRT_KVCacheUpdate (cache, update, start) => (present) {
        at = Cast <to = 7> (start)
        present = TensorScatter <axis = 2, mode = "linear"> (cache, update, at)
    }""",
    "TRT_Attention": """
    TRT_Attention <causal_kind> (query, key, value, mask, scale, lengths) => (out) {
        zero = Constant <value_int = 0> ()
        one = Constant <value_int = 1> ()
        steps = Shape <start = 2, end = 3> (query)
        slots = Shape <start = 2, end = 3> (key)
        axis = Constant <value_ints = [0]> ()
        step_count = Squeeze (steps, axis)
        slot_count = Squeeze (slots, axis)
        step = Range (zero, step_count, one)
        slot = Range (zero, slot_count, one)
        length = Cast <to = 7> (lengths)
        first = Sub (length, step_count)
        last_axis = Constant <value_ints = [1]> ()
        first_column = Unsqueeze (first, last_axis)
        position = Add (first_column, step)
        around = Constant <value_ints = [1, 3]> ()
        at = Unsqueeze (position, around)
        visible = LessOrEqual (slot, at)
        out = Attention <scale = 1.0> (query, key, value, visible)
    }""",
}

# Helpers. What an attribute says reaches them as a tensor: TensorRT's parser loses attributes handed from one function
# to the next. The first: int32 words [N, n] -> their fields [N, n * 32/bits] as float32, low bits first.
_FIELDS = """
    EdgeFields (words, width) => (fields) {
        zero = Constant <value_int = 0> ()
        word = Constant <value_int = 32> ()
        two = Constant <value_int = 2> ()
        range = Constant <value_int = 4294967296> ()
        last = Constant <value_ints = [-1]> ()
        wide = Cast <to = 7> (words)
        negative = Less (wide, zero)
        shifted = Add (wide, range)
        unsigned = Where (negative, shifted, wide)
        column = Unsqueeze (unsigned, last)
        position = Range (zero, word, width)
        factor = Pow (two, position)
        below = Pow (two, width)
        quotient = Div (column, factor)
        field = Mod (quotient, below)
        rows = Constant <value_ints = [0, -1]> ()
        flat = Reshape (field, rows)
        fields = Cast <to = 1> (flat)
    }"""
_WEIGHTS = """
    EdgeWeights (codes, scales, zeros, width) => (weights) {
        code = EdgeFields (codes, width)
        point = EdgeFields (zeros, width)
        blocks = Shape <start = 1, end = 2> (scales)
        rows = Constant <value_ints = [0]> ()
        rest = Constant <value_ints = [-1]> ()
        one = Constant <value_ints = [1]> ()
        cut = Concat <axis = 0> (rows, blocks, rest)
        blocked = Reshape (code, cut)
        points = Slice (point, rows, blocks, one)
        point_column = Unsqueeze (points, rest)
        centred = Sub (blocked, point_column)
        scale = Cast <to = 1> (scales)
        scale_column = Unsqueeze (scale, rest)
        scaled = Mul (centred, scale_column)
        flat = Concat <axis = 0> (rows, rest)
        weights = Reshape (scaled, flat)
    }"""
# x [..., K] float16 times the weights, in float32.
_PRODUCT = """
    EdgeProduct (x, codes, scales, zeros, bias, width) => (y) {
        whole = EdgeWeights (codes, scales, zeros, width)
        columns = Shape <start = -1> (x)
        zero = Constant <value_ints = [0]> ()
        one = Constant <value_ints = [1]> ()
        weights = Slice (whole, zero, columns, one)
        turned = Transpose (weights)
        wide = Cast <to = 1> (x)
        product = MatMul (wide, turned)
        wide_bias = Cast <to = 1> (bias)
        y = Add (product, wide_bias)
    }"""
_NORMALISE = """
    EdgeNormalise (x, norm, epsilon) => (y) {
        last = Constant <value_ints = [-1]> ()
        wide = Cast <to = 1> (x)
        square = Mul (wide, wide)
        mean = ReduceMean (square, last)
        shifted = Add (mean, epsilon)
        root = Sqrt (shifted)
        scaled = Div (wide, root)
        rounded = Cast <to = 10> (scaled)
        y = Mul (rounded, norm)
    }"""
_HELPERS = {
    "EdgeFields": _FIELDS,
    "EdgeWeights": _WEIGHTS,
    "EdgeProduct": _PRODUCT,
    "EdgeNormalise": _NORMALISE,
}

_LINEAR = {
    "EdgeLinear": """
    EdgeLinear <bits, block, plugin_namespace, plugin_version> (x, codes, scales, zeros, bias) => (y) {
        width = Constant <value_int: int = @bits> ()
        wide = EdgeProduct (x, codes, scales, zeros, bias, width)
        y = Cast <to = 10> (wide)
    }""",
    "EdgeLinearResidual": """
    EdgeLinearResidual <bits, block, plugin_namespace, plugin_version>
            (x, codes, scales, zeros, bias, residual) => (y) {
        width = Constant <value_int: int = @bits> ()
        wide = EdgeProduct (x, codes, scales, zeros, bias, width)
        wide_residual = Cast <to = 1> (residual)
        sum = Add (wide, wide_residual)
        y = Cast <to = 10> (sum)
    }""",
    "EdgeNormLinear": """
    EdgeNormLinear <bits, block, eps, plugin_namespace, plugin_version>
            (x, norm, codes, scales, zeros, bias) => (y) {
        epsilon = Constant <value_float: float = @eps> ()
        normed = EdgeNormalise (x, norm, epsilon)
        width = Constant <value_int: int = @bits> ()
        wide = EdgeProduct (normed, codes, scales, zeros, bias, width)
        y = Cast <to = 10> (wide)
    }""",
    "EdgeNormLinearSwiglu": """
    EdgeNormLinearSwiglu <bits, block, eps, plugin_namespace, plugin_version>
            (x, norm, codes, scales, zeros, bias) => (y) {
        epsilon = Constant <value_float: float = @eps> ()
        normed = EdgeNormalise (x, norm, epsilon)
        width = Constant <value_int: int = @bits> ()
        joined = EdgeProduct (normed, codes, scales, zeros, bias, width)
        gate, up = Split <axis = -1, num_outputs = 2> (joined)
        sigmoid = Sigmoid (gate)
        silu = Mul (gate, sigmoid)
        product = Mul (silu, up)
        y = Cast <to = 10> (product)
    }""",
}

# Logits of the rows in [first, end), -inf elsewhere; per tile of 256 rows the k largest, missing ones -inf and id -1.
_HEAD = {
    "EdgeHead": """
    EdgeHead <bits, block, eps, k, plugin_namespace, plugin_version>
            (x, norm, codes, scales, zeros, rows) => (logits, values, ids) {
        epsilon = Constant <value_float: float = @eps> ()
        normed = EdgeNormalise (x, norm, epsilon)
        nothing = Constant <value = float[1] {0}> ()
        row_count = Shape <start = 0, end = 1> (codes)
        no_bias = Expand (nothing, row_count)
        width = Constant <value_int: int = @bits> ()
        all = EdgeProduct (normed, codes, scales, zeros, no_bias, width)
        middle = Constant <value_ints = [1]> ()
        flat = Squeeze (all, middle)
        zero = Constant <value_int = 0> ()
        one = Constant <value_int = 1> ()
        axis = Constant <value_ints = [0]> ()
        count = Squeeze (row_count, axis)
        row = Range (zero, count, one)
        wide_rows = Cast <to = 7> (rows)
        first = Gather (wide_rows, zero)
        end = Gather (wide_rows, one)
        from = GreaterOrEqual (row, first)
        to = Less (row, end)
        inside = And (from, to)
        lowest = Constant <value_float = -inf> ()
        logits = Where (inside, flat, lowest)
        tile = Constant <value_int = 256> ()
        excess = Mod (row_count, tile)
        lacking = Sub (tile, excess)
        more = Mod (lacking, tile)
        none = Constant <value_ints = [0, 0, 0]> ()
        pads = Concat <axis = 0> (none, more)
        padded = Pad (logits, pads, lowest)
        tiles = Constant <value_ints = [0, -1, 256]> ()
        tiled = Reshape (padded, tiles)
        wanted = Constant <value_int: int = @k> ()
        column = Constant <value_ints = [-1]> ()
        asked = Reshape (wanted, column)
        values, at = TopK <axis = -1> (tiled, asked)
        tile_count = Shape <start = 1, end = 2> (tiled)
        number = Squeeze (tile_count, axis)
        tile_row = Range (zero, number, one)
        start = Mul (tile_row, tile)
        start_column = Unsqueeze (start, column)
        id = Add (at, start_column)
        minus_one = Constant <value_int = -1> ()
        missing = IsInf <detect_positive = 0> (values)
        marked = Where (missing, minus_one, id)
        ids = Cast <to = 6> (marked)
    }""",
    "EdgeMergeTop": """
    EdgeMergeTop <k, plugin_namespace, plugin_version> (values, ids) => (top_values, top_ids) {
        wanted = Constant <value_int: int = @k> ()
        column = Constant <value_ints = [-1]> ()
        asked = Reshape (wanted, column)
        rows = Constant <value_ints = [0, -1]> ()
        flat = Reshape (values, rows)
        flat_ids = Reshape (ids, rows)
        top_values, at = TopK <axis = -1> (flat, asked)
        top_ids = GatherElements <axis = -1> (flat_ids, at)
    }""",
}

# The kernel's partial sums are its own affair: here the whole result stands in the rows that the merge reads.
_ATTENTION = {
    "EdgeRotate": """
    EdgeRotate (rows, cos, sin) => (turned) {
        wide = Cast <to = 1> (rows)
        first, second = Split <axis = -1, num_outputs = 2> (wide)
        a = Mul (first, cos)
        b = Mul (second, sin)
        c = Mul (second, cos)
        d = Mul (first, sin)
        low = Sub (a, b)
        high = Add (c, d)
        joined = Concat <axis = -1> (low, high)
        turned = Cast <to = 10> (joined)
    }""",
    "EdgeAttention": """
    EdgeAttention <heads, kv_heads, scale, window, softcap, splits, plugin_namespace, plugin_version>
            (qkv, past_key, past_value, last, cos, sin) => (partial, present_key, present_value) {
        zero = Constant <value_int = 0> ()
        one = Constant <value_int = 1> ()
        axis_0 = Constant <value_ints = [0]> ()
        axis_1 = Constant <value_ints = [1]> ()
        axis_2 = Constant <value_ints = [2]> ()
        axis_3 = Constant <value_ints = [3]> ()
        free = Constant <value_ints = [-1]> ()
        keep = Constant <value_ints = [0]> ()
        q_heads = Constant <value_int: int = @heads> ()
        k_heads = Constant <value_int: int = @kv_heads> ()
        q_count = Reshape (q_heads, free)
        k_count = Reshape (k_heads, free)
        batch = Shape <start = 0, end = 1> (qkv)
        steps = Shape <start = 1, end = 2> (qkv)
        capacity = Shape <start = 2, end = 3> (past_key)
        width = Shape <start = 3, end = 4> (past_key)
        step_count = Squeeze (steps, axis_0)
        slot_count = Squeeze (capacity, axis_0)
        step = Range (zero, step_count, one)
        slot = Range (zero, slot_count, one)
        newest = Cast <to = 7> (last)
        before = Sub (step_count, one)
        first = Sub (newest, before)
        first_column = Unsqueeze (first, axis_1)
        position = Add (first_column, step)
        q_size = Mul (q_count, width)
        k_size = Mul (k_count, width)
        q_end = Identity (q_size)
        k_end = Add (q_end, k_size)
        v_end = Add (k_end, k_size)
        q_flat = Slice (qkv, axis_0, q_end, axis_2)
        k_flat = Slice (qkv, q_end, k_end, axis_2)
        v_flat = Slice (qkv, k_end, v_end, axis_2)
        q_shape = Concat <axis = 0> (batch, steps, q_count, width)
        k_shape = Concat <axis = 0> (batch, steps, k_count, width)
        q_rows = Reshape (q_flat, q_shape)
        k_rows = Reshape (k_flat, k_shape)
        v_rows = Reshape (v_flat, k_shape)
        cos_rows = Gather (cos, position)
        sin_rows = Gather (sin, position)
        cos_column = Unsqueeze (cos_rows, axis_2)
        sin_column = Unsqueeze (sin_rows, axis_2)
        q_turned = EdgeRotate (q_rows, cos_column, sin_column)
        k_turned = EdgeRotate (k_rows, cos_column, sin_column)
        key = Transpose <perm = [0, 2, 1, 3]> (k_turned)
        value = Transpose <perm = [0, 2, 1, 3]> (v_rows)
        place = Constant <value_ints = [1, 3]> ()
        at = Unsqueeze (position, place)
        new_shape = Shape (key)
        index = Expand (at, new_shape)
        present_key = ScatterElements <axis = 2> (past_key, index, key)
        present_value = ScatterElements <axis = 2> (past_value, index, value)
        not_later = LessOrEqual (slot, at)
        reach = Constant <value_int: int = @window> ()
        endless = Equal (reach, zero)
        oldest = Sub (at, reach)
        near = Greater (slot, oldest)
        in_window = Or (endless, near)
        visible = And (not_later, in_window)
        seen_number = Cast <to = 1> (visible)
        seen_most = ReduceMax <keepdims = 0> (seen_number, axis_2)
        seen = Cast <to = 9> (seen_most)
        seen_column = Unsqueeze (seen, free)
        nothing = Constant <value_float = 0.0> ()
        wide_key = Cast <to = 1> (present_key)
        wide_value = Cast <to = 1> (present_value)
        clean_key = Where (seen_column, wide_key, nothing)
        clean_value = Where (seen_column, wide_value, nothing)
        grouped_key = Unsqueeze (clean_key, axis_2)
        grouped_value = Unsqueeze (clean_value, axis_2)
        q_turned_heads = Transpose <perm = [0, 2, 1, 3]> (q_turned)
        grouped_shape = Concat <axis = 0> (batch, k_count, free, steps, width)
        q_grouped = Reshape (q_turned_heads, grouped_shape)
        q_wide = Cast <to = 1> (q_grouped)
        factor = Constant <value_float: float = @scale> ()
        q_scaled = Mul (q_wide, factor)
        key_turned = Transpose <perm = [0, 1, 2, 4, 3]> (grouped_key)
        plain = MatMul (q_scaled, key_turned)
        cap = Constant <value_float: float = @softcap> ()
        capped = Greater (cap, nothing)
        unit = Constant <value_float = 1.0> ()
        divisor = Where (capped, cap, unit)
        ratio = Div (plain, divisor)
        bent = Tanh (ratio)
        bent_scaled = Mul (bent, divisor)
        score = Where (capped, bent_scaled, plain)
        lowest = Constant <value_float = -inf> ()
        mask = Unsqueeze (visible, axis_2)
        masked = Where (mask, score, lowest)
        weight = Softmax <axis = -1> (masked)
        mixed = MatMul (weight, grouped_value)
        out_shape = Concat <axis = 0> (batch, q_count, steps, width)
        out = Reshape (mixed, out_shape)
        one_column = Concat <axis = 0> (batch, q_count, steps, axis_1)
        float_zero = Constant <value = float[1] {0}> ()
        float_one = Constant <value = float[1] {1}> ()
        largest = Expand (float_zero, one_column)
        total = Expand (float_one, one_column)
        rows = Concat <axis = -1> (out, largest, total)
        split_number = Constant <value_int: int = @splits> ()
        split_count = Reshape (split_number, free)
        row_count = Max (split_count, steps)
        lacking = Sub (row_count, steps)
        none = Constant <value_ints = [0, 0, 0, 0, 0, 0]> ()
        pads = Concat <axis = 0> (none, lacking, keep)
        partial = Pad (rows, pads, nothing)
    }""",
    "EdgeAttentionMerge": """
    EdgeAttentionMerge <heads, plugin_namespace, plugin_version> (partial, qkv) => (out) {
        axis_0 = Constant <value_ints = [0]> ()
        axis_2 = Constant <value_ints = [2]> ()
        axis_3 = Constant <value_ints = [3]> ()
        minus_two = Constant <value_ints = [-2]> ()
        minus_one = Constant <value_ints = [-1]> ()
        most = Constant <value_ints = [9223372036854775807]> ()
        steps = Shape <start = 1, end = 2> (qkv)
        rows = Slice (partial, axis_0, steps, axis_2)
        sums = Slice (rows, axis_0, minus_two, axis_3)
        total = Slice (rows, minus_one, most, axis_3)
        mean = Div (sums, total)
        turned = Transpose <perm = [0, 2, 1, 3]> (mean)
        flat = Constant <value_ints = [0, 0, -1]> ()
        wide = Reshape (turned, flat)
        out = Cast <to = 10> (wide)
    }""",
}

_DECODER = {
    "EdgeCodebook": """
    EdgeCodebook <size, plugin_namespace, plugin_version> (codes, tables) => (y) {
        zero = Constant <value_int = 0> ()
        one = Constant <value_int = 1> ()
        axis = Constant <value_ints = [0]> ()
        last = Constant <value_ints = [-1]> ()
        entries = Constant <value_int: int = @size> ()
        batch = Shape <start = 0, end = 1> (codes)
        books = Shape <start = 1, end = 2> (codes)
        rest = Shape <start = 2> (codes)
        book_count = Squeeze (books, axis)
        book = Range (zero, book_count, one)
        offset = Mul (book, entries)
        offset_column = Unsqueeze (offset, last)
        cut = Constant <value_ints = [0, 0, -1]> ()
        flat = Reshape (codes, cut)
        wide = Cast <to = 7> (flat)
        row = Add (wide, offset_column)
        found = Gather (tables, row)
        wide_rows = Cast <to = 1> (found)
        books_axis = Constant <value_ints = [1]> ()
        sum = ReduceSum <keepdims = 0> (wide_rows, books_axis)
        turned = Transpose <perm = [0, 2, 1]> (sum)
        channels = Shape <start = 1, end = 2> (turned)
        shape = Concat <axis = 0> (batch, channels, rest)
        shaped = Reshape (turned, shape)
        y = Cast <to = 10> (shaped)
    }""",
    "EdgeGroupNormSilu": """
    EdgeGroupNormSilu <groups, eps, silu, plugin_namespace, plugin_version> (x, weight, bias) => (y) {
        group_number = Constant <value_int: int = @groups> ()
        free = Constant <value_ints = [-1]> ()
        keep = Constant <value_ints = [0]> ()
        group_count = Reshape (group_number, free)
        cut = Concat <axis = 0> (keep, group_count, free)
        shape = Shape (x)
        wide = Cast <to = 1> (x)
        grouped = Reshape (wide, cut)
        mean = ReduceMean (grouped, free)
        centred = Sub (grouped, mean)
        square = Mul (centred, centred)
        variance = ReduceMean (square, free)
        epsilon = Constant <value_float: float = @eps> ()
        shifted = Add (variance, epsilon)
        root = Sqrt (shifted)
        scaled = Div (centred, root)
        channels = Shape <start = 0> (weight)
        by_channel = Concat <axis = 0> (keep, channels, free)
        rows = Reshape (scaled, by_channel)
        wide_weight = Cast <to = 1> (weight)
        wide_bias = Cast <to = 1> (bias)
        weight_column = Unsqueeze (wide_weight, free)
        bias_column = Unsqueeze (wide_bias, free)
        weighted = Mul (rows, weight_column)
        affine = Add (weighted, bias_column)
        sigmoid = Sigmoid (affine)
        activated = Mul (affine, sigmoid)
        wanted = Constant <value_int: int = @silu> ()
        with_silu = Cast <to = 9> (wanted)
        chosen = Where (with_silu, activated, affine)
        shaped = Reshape (chosen, shape)
        y = Cast <to = 10> (shaped)
    }""",
    "EdgeBiasActivation": """
    EdgeBiasActivation <activation, plugin_namespace, plugin_version> (x, bias) => (y) {
        free = Constant <value_ints = [-1]> ()
        keep = Constant <value_ints = [0]> ()
        shape = Shape (x)
        channels = Shape <start = 0> (bias)
        by_channel = Concat <axis = 0> (keep, channels, free)
        wide = Cast <to = 1> (x)
        rows = Reshape (wide, by_channel)
        wide_bias = Cast <to = 1> (bias)
        bias_column = Unsqueeze (wide_bias, free)
        z = Add (rows, bias_column)
        sigmoid = Sigmoid (z)
        silu = Mul (z, sigmoid)
        wave = Sin (z)
        square = Mul (wave, wave)
        snake = Add (z, square)
        kind = Constant <value_int: int = @activation> ()
        one = Constant <value_int = 1> ()
        is_silu = Equal (kind, one)
        chosen = Where (is_silu, silu, snake)
        shaped = Reshape (chosen, shape)
        y = Cast <to = 10> (shaped)
    }""",
}

#: Our kernels' nodes; the plugin of each has its name.
KERNELS = {**_LINEAR, **_HEAD, **{k: v for k, v in _ATTENTION.items() if k != "EdgeRotate"}, **_DECODER}
_TEXTS = {
    TRT: _NATIVE,
    EDGE: {**_HELPERS, **_LINEAR, **_HEAD, **_ATTENTION, **_DECODER},
}


def add_functions(model: ir.Model, context: Context) -> None:
    """Adds the functions that the graph's nodes call, and those that these call, in place."""
    opset = model.graph.opset_imports[""]
    wanted = [(node.domain, node.op_type) for node in model.graph]
    while wanted:
        domain, name = wanted.pop()
        if name not in _TEXTS.get(domain, {}) or (domain, name, "") in model.functions:
            continue
        function = _function(domain, name, opset)
        model.functions[function.identifier()] = function
        model.graph.opset_imports[domain] = 1
        wanted += [(node.domain, node.op_type) for node in function]


def plugins(model: ir.Model) -> Iterator[str]:
    """Names of our kernels that the graph calls, each once, sorted."""
    yield from sorted({node.op_type for node in model.graph if node.domain == EDGE and node.op_type in KERNELS})


def _function(domain: str, name: str, opset: int) -> ir.Function:
    imports = f'<domain: "{domain}", opset_import: ["" : {opset}, "{domain}" : 1]>'
    text = _TEXTS[domain][name]
    for helper in _TEXTS[EDGE]:  # a call of another function names its domain
        text = text.replace(f"= {helper} ", f"= {domain}.{helper} ")
    return ir.from_proto(onnx.parser.parse_function(f"{imports}\n{text}"))
