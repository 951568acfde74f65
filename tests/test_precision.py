"""Precision: formats against torch's, rounding against its casts, blocks and products by hand."""

import inspect
import json
import math
import re
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from llmbook.model import ModelConfig, TransformerLM
from llmbook.precision import (
    BLOCK_FORMATS,
    FORMATS,
    RECIPES,
    BlockFormat,
    EmulatedLinear,
    FloatFormat,
    Recipe,
    emulate,
    float_fields,
    float_format,
    quantize_blocks,
    round_to,
    show_bits,
)

CAST = [f for f in FORMATS.values() if f.dtype is not None]
SHORT = [f for f in FORMATS.values() if f.bits <= 16]
# Before torch 2.9 or so, a cast to e4m3 gives NaN where later ones saturate.
SATURATES = torch.tensor(500.0).to(torch.float8_e4m3fn).float().item() == 448.0
E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]


def ids(format):
    return format.name


def as_torch(x, format):
    """What torch's cast to the format makes of float32 numbers, and ours, to be compared."""
    saturate = False if format.top == "nan" and format.signed and not SATURATES else None
    return x.to(format.dtype).float(), round_to(x, format, saturate=saturate)


def assert_same(theirs, ours):
    """Equal bit for bit, the sign of zero too; any NaN equals any other."""
    same = (theirs == ours) & (theirs.signbit() == ours.signbit())
    same |= theirs.isnan() & ours.isnan()
    assert same.all(), (theirs[~same][:5], ours[~same][:5])


@cache
def numbers():
    """All numbers of 16 bits, midpoints of short formats, and random bits."""
    every = torch.arange(-(2**15), 2**15, dtype=torch.int16)
    found = [every.view(torch.bfloat16).float(), every.view(torch.float16).float()]
    for format in SHORT:
        codes = range(0, 2**format.bits, 1 if format.bits < 16 else 31)
        values = torch.tensor([format.decode(code) for code in codes])
        values = values[values.isfinite()].double().sort().values.unique()
        above = values * (1 + format.epsilon)  # the next number, or near it
        middles = ((values + above) / 2).float() if format.bits == 16 else None
        if middles is None:
            middles = ((values[1:] + values[:-1]) / 2).float()
        found += [middles, middles.nextafter(torch.tensor(torch.inf))]
        found += [middles.nextafter(torch.tensor(-torch.inf))]
    generator = torch.Generator().manual_seed(0)
    noise = torch.randint(-(2**31), 2**31, (20_000,), dtype=torch.int32, generator=generator)
    return torch.cat([*found, noise.view(torch.float32)])


# Formats


@pytest.mark.parametrize("format", CAST, ids=ids)
def test_a_format_has_the_limits_that_torch_reports(format):
    limits = torch.finfo(format.dtype)
    assert (format.bits, format.largest, format.epsilon) == (limits.bits, limits.max, limits.eps)
    assert format.smallest_normal == limits.smallest_normal


def test_limits_of_what_torch_does_not_have():
    tf32, e2m1 = FORMATS["tfloat32"], FORMATS["float4_e2m1fn"]
    assert (tf32.bits, tf32.epsilon, tf32.largest) == (19, 2.0**-10, (2 - 2.0**-10) * 2.0**127)
    assert [e2m1.decode(code) for code in range(8)] == E2M1
    assert [e2m1.decode(code) for code in range(8, 16)] == [-x for x in E2M1]
    assert (e2m1.largest, e2m1.smallest_normal, e2m1.smallest_subnormal) == (6.0, 1.0, 0.5)
    with_infinity = {f.name for f in FORMATS.values() if f.has_infinities}
    assert with_infinity == {"float32", "tfloat32", "bfloat16", "float16", "float8_e5m2"}


@pytest.mark.parametrize("format", [f for f in CAST if f.bits <= 16], ids=ids)
def test_every_code_has_the_value_it_has_in_torch(format):
    size = torch.int16 if format.bits == 16 else torch.uint8
    codes = torch.arange(2**format.bits)
    theirs = codes.to(size).view(format.dtype).double()
    ours = torch.tensor([format.decode(code) for code in codes.tolist()], dtype=torch.float64)
    assert_same(theirs, ours)


@pytest.mark.parametrize("format", SHORT, ids=ids)
def test_fields_of_every_number_are_its_bits(format):
    for code in range(0, 2**format.bits, 1 if format.bits < 16 else 101):
        value = format.decode(code)
        if math.isnan(value):
            continue
        fields = float_fields(value, format)
        assert int(fields.bits.replace(" ", ""), 2) == code
        assert fields.value == value
        packed = (fields.sign << format.exponent_bits) + fields.exponent
        assert (packed << format.fraction_bits) + fields.fraction == code


def test_fields_by_hand():
    assert float_fields(1.0)[:4] == (0, 127, 0, 1.0)  # float32 unless another is named
    assert float_fields(-0.0, "e5m2").bits == "1 00000 00"
    assert float_fields(0.1, torch.bfloat16).bits == "0 01111011 1001101"
    assert float_fields(2.0**-24, "float16").fraction == 1
    assert float_fields(1e9, "e5m2").value == math.inf
    assert float_fields(1e9, "e4m3").value == 448.0
    assert float_fields(math.nan, "fp16").bits == "0 11111 1000000000"
    assert float_fields(math.nan, "e4m3").bits == "0 1111 111"
    assert float_fields(3.0, "e8m0").bits == "10000001"  # a tie, up to 4


def test_formats_by_name_and_type():
    names = {"fp32": "float32", "tf32": "tfloat32", "bf16": "bfloat16", "fp16": "float16"}
    names |= {"e4m3": "float8_e4m3fn", "e5m2": "float8_e5m2", "e2m1": "float4_e2m1fn"}
    for short, name in (names | {"e8m0": "float8_e8m0fnu"}).items():
        assert float_format(short) is float_format(name) is FORMATS[name]
        assert float_format(FORMATS[name]) is FORMATS[name]
    for format in CAST:
        assert float_format(format.dtype) is format


@pytest.mark.parametrize("unknown", ["float17", "", torch.int8, torch.float64])
def test_an_unknown_format_is_refused_with_the_known_ones(unknown):
    message = "format: expected one of float32, tfloat32, bfloat16, .*float8_e8m0fnu, got"
    with pytest.raises(ValueError, match=message):
        float_format(unknown)
    with pytest.raises(ValueError, match=r"format: expected one of float32, .*got None"):
        inspect.unwrap(float_format)(None)
    with pytest.raises(ValueError, match=re.escape(repr(unknown))):
        inspect.unwrap(round_to)(torch.ones(2), unknown)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("name", 5),
        ("exponent_bits", 1),
        ("exponent_bits", 9),
        ("fraction_bits", -1),
        ("fraction_bits", 24),
        ("top", "nothing"),
        ("signed", 1),
        ("dtype", "float16"),
    ],
)
def test_a_format_that_cannot_be_is_refused(field, value):
    given = {"name": "own", "exponent_bits": 4, "fraction_bits": 3} | {field: value}
    with pytest.raises(ValueError, match=rf"{field}.*: expected .*{value}"):
        FloatFormat(**given)


@pytest.mark.parametrize(
    ("field", "value"),
    [("element", "fp5"), ("scale", "fp5"), ("size", 0), ("tensor_scale", 1), ("name", 2)],
)
def test_a_block_format_that_cannot_be_is_refused(field, value):
    given = {"name": "own", "element": "float16", "size": 4, "scale": "float8_e8m0fnu"}
    with pytest.raises(ValueError, match=rf"{field}: expected .*{value}"):
        BlockFormat(**given | {field: value})


@pytest.mark.parametrize("code", [-1, 256])
def test_a_code_that_does_not_exist_is_refused(code):
    with pytest.raises(ValueError, match=f"code: expected .*{code}"):
        inspect.unwrap(FloatFormat.decode)(FORMATS["float8_e5m2"], code)


# Rounding to nearest


@pytest.mark.parametrize("format", CAST, ids=ids)
def test_rounding_is_torchs_cast(format):
    x = numbers()
    if not format.signed:  # below 2**-126 torch takes the power above, even if it is farther
        x = x[(x.abs() >= 2.0**-126) | (x == 0) | x.isnan()]
    assert_same(*as_torch(x, format))


@settings(max_examples=300, deadline=None)
@given(st.lists(st.floats(width=32), min_size=1, max_size=20), st.sampled_from(CAST))
def test_rounding_is_torchs_cast_for_any_numbers(drawn, format):
    x = torch.tensor(drawn)
    if not format.signed:
        x = x[(x.abs() >= 2.0**-126) | (x == 0) | x.isnan()]
    assert_same(*as_torch(x, format))


@settings(max_examples=200, deadline=None)
@given(st.floats(width=32, allow_nan=False), st.sampled_from(list(FORMATS.values())))
def test_rounding_gives_a_number_of_the_format_and_the_nearest(number, format):
    rounded = round_to(torch.tensor([number]), format).item()
    assert math.isnan(rounded) or float_fields(rounded, format).value == rounded
    if format.smallest_subnormal <= abs(number) <= format.largest:
        exponent = max(math.frexp(number)[1] - 1, format.smallest_exponent)
        spacing = math.ldexp(1.0, exponent - format.fraction_bits)
        assert abs(rounded - (number if format.signed else abs(number))) <= spacing / 2


def test_e2m1_rounds_ties_to_even_and_saturates():
    x = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 5.01, 7.0, 1e9, math.inf])
    expected = torch.tensor([0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0, 6.0, 6.0, 6.0, 6.0])
    assert torch.equal(round_to(x, "e2m1"), expected)
    assert torch.equal(round_to(-x, "e2m1"), -expected)


def test_tf32_keeps_ten_bits_with_ties_to_even():
    x = torch.tensor([1 + 2.0**-11, 1 + 3 * 2.0**-11, 1 + 2.0**-11 + 2.0**-20, 2.0**-140])
    expected = torch.tensor([1.0, 1 + 2.0**-9, 1 + 2.0**-10, 0.0])
    assert torch.equal(round_to(x, "tf32")[:3], expected[:3])
    assert round_to(x, "tf32")[3] == 0.0 or FORMATS["tfloat32"].smallest_subnormal < 2.0**-135
    assert round_to(torch.tensor([3.4028234e38]), "tf32").item() == math.inf


def test_float64_is_rounded_once():
    x = torch.tensor([1 + 2.0**-8 + 2.0**-40], dtype=torch.float64)  # float32 would make it a tie
    assert round_to(x, "bf16").item() == 1 + 2.0**-7
    assert round_to(x, "bf16").dtype == torch.float64
    generator = torch.Generator().manual_seed(0)
    many = torch.randn(1000, dtype=torch.float64, generator=generator)
    assert torch.equal(round_to(many, "float32"), many.float().double())


@pytest.mark.parametrize(
    ("format", "default", "saturated", "unsaturated"),
    [
        ("float16", math.inf, 65504.0, math.inf),
        ("bfloat16", math.inf, FORMATS["bfloat16"].largest, math.inf),
        ("float8_e5m2", math.inf, 57344.0, math.inf),
        ("float8_e4m3fn", 448.0, 448.0, math.nan),
        ("float8_e8m0fnu", math.nan, 2.0**127, math.nan),
    ],
)
def test_what_is_too_large(format, default, saturated, unsaturated):
    for saturate, expected in ((None, default), (True, saturated), (False, unsaturated)):
        for number in (3.4e38, math.inf):
            x = torch.tensor([number, -number])
            sign = 1 if format == "float8_e8m0fnu" else -1
            found = round_to(x, format, saturate=saturate)
            assert_same(torch.tensor([expected, sign * expected]), found)


def test_the_limit_is_half_a_step_above_the_largest():
    x = torch.tensor([65519.996, 65520.0])
    assert round_to(x, "float16").tolist() == [65504.0, math.inf]
    assert round_to(torch.tensor([61439.0, 61440.0]), "e5m2").tolist() == [57344.0, math.inf]
    assert_same(
        round_to(torch.tensor([464.0, 464.1]), "e4m3", saturate=False),
        torch.tensor([448.0, math.nan]),
    )


def test_rounding_changes_nothing_else():
    x = torch.randn(4, 6, requires_grad=True)
    before = x.detach().clone()
    rounded = round_to(x.T, "e4m3")  # not contiguous
    assert not rounded.requires_grad and torch.equal(x.detach(), before)
    assert torch.equal(rounded, round_to(x.detach().T.contiguous(), "e4m3"))
    for kind in (torch.float16, torch.bfloat16):
        assert round_to(x.detach().to(kind), "e4m3").dtype == torch.float32
    exact = torch.tensor([0.5, -2.0, 448.0])
    for format in ("float32", "e4m3"):
        result = round_to(exact, format)
        result.zero_()
        assert exact.tolist() == [0.5, -2.0, 448.0]  # never the same memory
    assert round_to(torch.empty(0, 3), "fp16").shape == (0, 3)
    assert round_to(torch.tensor(1.3), "e2m1").shape == ()
    assert round_to(torch.tensor([math.nan]), "e4m3").isnan().all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"x": torch.ones(2, dtype=torch.int64)}, "x: expected floats"),
        ({"x": [1.0]}, "x: expected a tensor of floats, got"),
        ({"rounding": "up"}, "rounding: expected one of nearest, stochastic, got 'up'"),
        ({"saturate": 1}, "saturate: expected True, False or None, got 1"),
        ({"generator": 0, "rounding": "stochastic"}, "generator: expected a torch.Generator"),
        ({"generator": torch.Generator()}, "generator: expected None, as nothing is drawn"),
        ({"format": "e2m1", "saturate": False}, "saturate: .*float4_e2m1fn.*, got False"),
        ({"format": "e2m1", "x": torch.tensor([math.nan])}, "x: .*float4_e2m1fn.*, got nan"),
    ],
)
def test_rounding_refuses(arguments, message):
    call = {"x": torch.ones(2), "format": "bf16"} | arguments
    with pytest.raises(ValueError, match=message):
        inspect.unwrap(round_to)(**call)


@pytest.mark.parametrize("number", [None, "1", True, [1.0]])
def test_fields_refuse_what_is_no_number(number):
    with pytest.raises(ValueError, match="number: expected a number, got"):
        inspect.unwrap(float_fields)(number)


# Stochastic rounding


def chance(x, format, seed=0, **options):
    generator = torch.Generator().manual_seed(seed)
    return round_to(x, format, rounding="stochastic", generator=generator, **options)


@pytest.mark.parametrize("format", [f for f in SHORT if f.signed], ids=ids)
@pytest.mark.parametrize("sign", [1, -1])
def test_stochastic_rounding_takes_a_neighbor_and_is_right_on_average(format, sign):
    normal, low = 1.0, format.smallest_subnormal
    for below, spacing in ((normal, format.epsilon), (low, low), (0.0, low)):
        for share in (0.1, 0.5, 0.8):
            x = torch.full((40_000,), sign * (below + share * spacing), dtype=torch.float64)
            rounded = chance(x, format)
            assert set(rounded.abs().tolist()) == {below, below + spacing}
            up = (rounded.abs() > below).double().mean().item()
            assert abs(up - share) < 5 * math.sqrt(share * (1 - share) / 40_000)
            assert (rounded.signbit() == (sign < 0)).all()


def test_stochastic_rounding_leaves_numbers_of_the_format_and_can_be_repeated():
    every = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(torch.bfloat16).float()
    assert_same(every, chance(every, "bf16"))
    x = torch.randn(1000)
    assert torch.equal(chance(x, "e4m3", seed=1), chance(x, "e4m3", seed=1))
    assert not torch.equal(chance(x, "e4m3", seed=1), chance(x, "e4m3", seed=2))
    torch.manual_seed(3)
    first = round_to(x, "e4m3", rounding="stochastic")
    torch.manual_seed(3)
    assert torch.equal(first, round_to(x, "e4m3", rounding="stochastic"))
    assert chance(torch.tensor([1e6]), "e4m3").item() == 448.0


def test_a_weight_moves_by_chance_and_not_to_nearest():
    near = by_chance = torch.ones(4000)
    for step in range(300):
        near = round_to(near + 1e-3 / 128, "bf16")
        by_chance = chance(by_chance + 1e-3 / 128, "bf16", seed=step)
    assert (near == 1).all()
    assert abs((by_chance - 1).mean().item() * 128 - 0.3) < 0.05


# Blocks


def test_bits_of_a_value_with_its_share_of_the_scale():
    bits = {name: block.bits_per_value for name, block in BLOCK_FORMATS.items()}
    assert bits == {"mxfp8": 8.25, "mxfp8_e5m2": 8.25, "mxfp4": 4.25, "nvfp4": 4.5}


def test_mxfp8_by_the_rule_of_the_specification():
    x = torch.zeros(2, 64)
    x[0, 0], x[0, 1] = 1.9, 0.3  # floor(log2(1.9)) - 8 = -8
    x[0, 40] = 5.0
    x[1, 7] = -(2.0**-120)
    found = quantize_blocks(x, "mxfp8")
    assert found.scales.tolist() == [[2.0**-8, 2.0**-6], [2.0**-127, 2.0**-127]]
    assert found.values[0, 0] == 448.0  # 1.9 * 256 = 486.4 saturates
    assert found.values[0, 1] == round_to(torch.tensor(0.3 * 256), "e4m3")
    assert found.values[0, 40] == 320.0 and found.values[1, 7] == -128.0
    assert found.tensor_scale == 1.0
    assert torch.equal(found.dequantize()[0, 32:], x[0, 32:])


def test_nvfp4_by_hand():
    x = torch.zeros(1, 32)
    x[0, 0], x[0, 1], x[0, 16] = 12.0, 3.0, 0.6
    found = quantize_blocks(x, "nvfp4")
    tensor_scale = 12 / (6 * 448)
    assert math.isclose(found.tensor_scale.item(), tensor_scale, rel_tol=1e-6)
    second = round_to(torch.tensor(0.6 / 6 / tensor_scale), "e4m3").item()
    assert found.scales.tolist() == [[448.0, second]]
    assert found.values[0, 0] == 6.0 and found.values[0, 1] == 1.5
    assert abs(found.dequantize()[0, 0].item() - 12.0) < 1e-5


@pytest.mark.parametrize("name", BLOCK_FORMATS)
def test_values_and_scales_are_numbers_of_their_formats(name):
    generator = torch.Generator().manual_seed(0)
    scale = torch.randn(3, 1, 1, generator=generator).mul(20).exp()
    x = torch.randn(3, 4, 64, generator=generator) * scale
    x[1] = 0.0
    block = BLOCK_FORMATS[name]
    found = quantize_blocks(x, name)
    assert found.values.shape == x.shape and found.scales.shape == (3, 4, 64 // block.size)
    assert torch.equal(round_to(found.values, block.element), found.values)
    kept = round_to(found.scales, block.scale)
    assert torch.equal(kept, found.scales)
    back = found.dequantize()
    assert back.isfinite().all() and (back[1] == 0).all()
    # Half a step of the largest in a block, or what saturates: a quarter of it at most.
    worst = (back - x).abs().unflatten(-1, (-1, block.size)).amax(-1)
    amax = x.abs().unflatten(-1, (-1, block.size)).amax(-1)
    lost = found.scales == 0  # blocks far below the largest of the tensor, in nvfp4
    assert (worst <= 0.26 * amax)[~lost & (amax > 0)].all()
    assert torch.equal(quantize_blocks(x, block).values, found.values)


def test_blocks_are_along_the_last_dimension_and_independent():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, 96, generator=generator)
    whole = quantize_blocks(x, "mxfp4").dequantize()
    parts = [quantize_blocks(part, "mxfp4").dequantize() for part in x.split(32, dim=-1)]
    assert torch.equal(whole, torch.cat(parts, dim=-1))


def test_blocks_rounded_by_chance_are_right_on_average():
    x = torch.linspace(-1, 1, 32).repeat(4000, 1)
    options = {"rounding": "stochastic", "generator": torch.Generator().manual_seed(0)}
    for name in ("mxfp8", "nvfp4"):
        mean = quantize_blocks(x, name, **options).dequantize().mean(dim=0)
        inside = x[0].abs() < 0.85  # what saturates is not
        assert (mean - x[0])[inside].abs().max() < 0.01


@pytest.mark.parametrize(
    ("x", "format", "message"),
    [
        (torch.ones(2, 33), "mxfp8", r"x: expected whole blocks of 32 .*got shape \(2, 33\)"),
        (torch.ones(2, 24), "nvfp4", r"x: expected whole blocks of 16 .*got shape \(2, 24\)"),
        (torch.ones(0, 32), "mxfp8", r"x: .*at least one, got shape \(0, 32\)"),
        (torch.ones(0), "nvfp4", r"x: .*at least one, got shape \(0,\)"),
        (torch.tensor([math.nan] * 32), "mxfp8", "x: expected finite numbers, got nan"),
        (torch.tensor([1.0, math.inf] * 16), "nvfp4", "x: expected finite numbers, got inf"),
        (torch.ones(32), "mxfp5", "format: expected one of mxfp8, .*, got 'mxfp5'"),
        (torch.ones(32, dtype=torch.int64), "mxfp8", "x: expected floats"),
        (torch.tensor(1.0), "mxfp8", "x: expected floats of shape"),
    ],
)
def test_blocks_refuse(x, format, message):
    with pytest.raises(ValueError, match=message):
        inspect.unwrap(quantize_blocks)(x, format)


# Emulated products


def layers(recipe, seed=0, **sizes):
    torch.manual_seed(seed)
    plain = nn.Linear(64, 48, **sizes)
    return plain, emulate(nn.Sequential(plain), recipe)[0]


def by_one_scale(x, name):
    scale = x.abs().max() / float_format(name).largest
    return round_to(x / scale, name) * scale


@pytest.mark.parametrize(
    ("recipe", "forward", "backward"),
    [
        ("bfloat16", lambda x: round_to(x, "bf16"), lambda x: round_to(x, "bf16")),
        ("fp8_unscaled", lambda x: round_to(x, "e4m3"), lambda x: round_to(x, "e5m2")),
        ("fp8_current", lambda x: by_one_scale(x, "e4m3"), lambda x: by_one_scale(x, "e5m2")),
        ("fp8_delayed", lambda x: by_one_scale(x, "e4m3"), lambda x: by_one_scale(x, "e5m2")),
    ],
)
def test_all_three_products_have_rounded_operands(recipe, forward, backward):
    plain, layer = layers(recipe)
    x = torch.randn(2, 5, 64, requires_grad=True)
    out = layer(x)
    gradient = torch.randn(2, 5, 48)
    out.backward(gradient)
    rows, g = x.detach().flatten(0, 1), gradient.flatten(0, 1)
    expected = forward(rows) @ forward(plain.weight.detach()).T + plain.bias
    assert torch.allclose(out.flatten(0, 1), expected, atol=1e-6)
    dx = backward(g) @ forward(plain.weight.detach())
    assert torch.allclose(x.grad.flatten(0, 1), dx, atol=1e-5)
    assert torch.allclose(layer.weight.grad, backward(g).T @ forward(rows), atol=1e-5)
    assert torch.allclose(layer.bias.grad, g.sum(dim=0), atol=1e-5)


def test_blocks_lie_along_what_each_product_sums_over():
    plain, layer = layers("mxfp8", bias=False)
    x, gradient = torch.randn(37, 64, requires_grad=True), torch.randn(37, 48)
    out = layer(x)
    out.backward(gradient)

    def blocks(matrix):  # along the last dimension, filled up with zeros
        filled = nn.functional.pad(matrix, (0, -matrix.size(1) % 32))
        return quantize_blocks(filled, "mxfp8").dequantize()[:, : matrix.size(1)]

    w = plain.weight.detach()
    assert torch.allclose(out, blocks(x.detach()) @ blocks(w).T, atol=1e-6)
    assert torch.allclose(x.grad, blocks(gradient) @ blocks(w.T).T, atol=1e-5)
    dw = blocks(gradient.T) @ blocks(x.detach().T).T
    assert torch.allclose(layer.weight.grad, dw, atol=1e-5)


def test_gradients_of_4_bit_recipes_are_right_on_average():
    plain, layer = layers("nvfp4", bias=False)
    x, g = torch.randn(16, 64), torch.randn(16, 48)
    nearest = emulate(
        nn.Sequential(plain), Recipe(forward="nvfp4", backward="nvfp4", scaling="block")
    )[0]
    wanted = g.T @ quantize_blocks(x.T.contiguous(), "nvfp4").dequantize().T
    errors = {}
    for name, module in (("chance", layer), ("nearest", nearest)):
        total = torch.zeros_like(plain.weight)
        for _ in range(60):
            module.zero_grad()
            module(x).backward(g)
            total += module.weight.grad / 60
        errors[name] = (total - wanted).norm() / wanted.norm()
    assert errors["chance"] < errors["nearest"] / 2, errors


def test_delayed_scales_look_back():
    recipe = Recipe(scaling="delayed", history=3)
    _, layer = layers(recipe, bias=False)
    largest = FORMATS["float8_e4m3fn"].largest
    layer(torch.ones(1, 64))
    # The first step used its own amax, the second uses that of the first, and saturates.
    seen = layer._rounded(torch.full((1, 64), 8.0), 0, dim=1)
    assert torch.allclose(seen, torch.ones(1, 64))
    assert layer.history[0].tolist() == [8.0, 1.0, 0.0]
    assert torch.allclose(
        layer._rounded(torch.full((1, 64), 8.0), 0, dim=1).max(), torch.tensor(8.0)
    )
    layer.eval()
    before = layer.history.clone()
    layer(torch.full((1, 64), 100.0))
    assert torch.equal(layer.history, before) and largest == 448.0
    assert "history" in layer.state_dict()


def test_a_tensor_of_zeros_stays_zero():
    for recipe in RECIPES:
        _, layer = layers(recipe, bias=False)
        assert (layer(torch.zeros(2, 64)) == 0).all()


def test_emulation_copies_a_model_and_keeps_its_head():
    sizes = {"d_model": 32, "n_layers": 1, "n_heads": 2, "d_ff": 64, "context_length": 16}
    torch.manual_seed(0)
    model = TransformerLM(ModelConfig(vocab_size=31, **sizes))
    copy = emulate(model, "fp8_current")
    kinds = {name: type(module) for name, module in copy.named_modules()}
    changed = [name for name, kind in kinds.items() if kind is EmulatedLinear]
    assert len(changed) == 7 and kinds["lm_head"] is nn.Linear
    assert not any(isinstance(module, EmulatedLinear) for module in model.modules())
    assert copy.state_dict().keys() == model.state_dict().keys()
    x = torch.randint(31, (2, 8))
    gap = (copy(x) - model(x)).abs().max()
    assert 0 < gap < 1
    every = emulate(model, RECIPES["fp8_current"], keep=())
    assert isinstance(every.lm_head, EmulatedLinear)
    assert not emulate(model.eval(), "bfloat16").blocks[0].feed_forward.up_proj.training


def test_emulation_is_close_to_float32_and_closer_with_more_bits():
    gaps = {}
    x = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    for recipe in ("bfloat16", "fp8_current", "mxfp8", "nvfp4", "mxfp4"):
        plain, layer = layers(recipe)
        gaps[recipe] = ((layer(x) - plain(x)).norm() / plain(x).norm()).item()
    assert 0 < gaps["bfloat16"] < 0.005 < gaps["fp8_current"] < 0.06 < gaps["nvfp4"]
    assert gaps["mxfp8"] < 0.06 and gaps["nvfp4"] < gaps["mxfp4"] < 0.3


def test_defaults_of_recipes():
    assert Recipe() == Recipe(
        forward="float8_e4m3fn",
        backward="float8_e5m2",
        scaling="current",
        history=16,
        stochastic=False,
    )
    assert [name for name, recipe in RECIPES.items() if recipe.stochastic] == ["mxfp4", "nvfp4"]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Recipe(scaling="yesterday"), "scaling: expected .*none.*block.*'yesterday'"),
        (lambda: Recipe(forward="float9"), "forward: expected one of float32, .*'float9'"),
        (lambda: Recipe(backward="nvfp4"), "backward: expected one of float32, .*'nvfp4'"),
        (lambda: Recipe(scaling="block"), "forward: expected one of mxfp8, .*'float8_e4m3fn'"),
        (lambda: Recipe(history=0), "history: expected at least 1, got 0"),
        (lambda: emulate(nn.Linear(2, 2), "fp7"), "recipe: expected one of bfloat16, .*'fp7'"),
        (lambda: inspect.unwrap(emulate)(5, "mxfp8"), "model: expected a module of PyTorch, got 5"),
        (
            lambda: inspect.unwrap(emulate)(nn.Linear(2, 2), "mxfp8", keep="lm_head"),
            "keep: expected a collection of names, got 'lm_head'",
        ),
    ],
)
def test_emulation_refuses(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_block_format_of_ones_own():
    own = BlockFormat("own", "float16", 4, "float8_e8m0fnu")
    assert own.bits_per_value == 18.0
    x = torch.randn(3, 8)
    assert torch.allclose(quantize_blocks(x, own).dequantize(), x, rtol=1e-3)


# The figure


def test_the_figure_holds_the_number_in_every_short_format():
    figure = show_bits(0.1, "bf16")
    data = json.loads(re.search(r'application/json">(.*?)</script>', figure.html)[1])
    names = [entry["name"] for entry in data["formats"]]
    assert names == [f.name for f in SHORT if f.signed]
    assert names[data["chosen"]] == "bfloat16"
    for entry in data["formats"]:
        format = FORMATS[entry["name"]]
        assert format.decode(entry["code"]) == float_fields(0.1, format).value
        assert (entry["exponent"], entry["fraction"]) == (
            format.exponent_bits,
            format.fraction_bits,
        )
        assert entry["top"] == format.top
        assert float_fields(0.1, format).bits in figure.html  # the table for readers without script
    assert figure._repr_html_() == figure.html and "html=..." in repr(figure)
    assert "http" not in figure.html and 'querySelectorAll(".llmbook-bits' in figure.html
    assert "3.14159" in show_bits().html
    assert (
        names[json.loads(re.search(r"json\">(.*?)</", show_bits().html)[1])["chosen"]] == "float16"
    )


@pytest.mark.parametrize(
    ("number", "format", "message"),
    [
        (math.nan, "fp16", "number: expected a number that all formats have, got nan"),
        (1.0, "float32", "format: expected one of bfloat16, .*got 'float32'"),
        (1.0, "e8m0", "format: expected one of bfloat16, .*got 'e8m0'"),
        (1.0, "fp5", "format: expected one of float32, .*got 'fp5'"),
    ],
)
def test_the_figure_refuses(number, format, message):
    with pytest.raises(ValueError, match=message):
        show_bits(number, format)
