"""Precision: formats against torch's, rounding against its casts, blocks and products by hand."""

import copy
import inspect
import itertools
import json
import math
import re
from functools import cache

import jaxtyping
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from llmbook.batches import Batch, ResumableBatches
from llmbook.environment import seed_everything
from llmbook.generation import generate
from llmbook.model import ModelConfig, TransformerLM, count_parameters
from llmbook.optimization import AdamW, clip_gradients, cross_entropy
from llmbook.precision import (
    BLOCK_FORMATS,
    FORMATS,
    RECIPES,
    BlockFormat,
    CastProducts,
    CompactAdamW,
    EmulatedLinear,
    FloatFormat,
    GradScaler,
    LiveMemory,
    MixedPrecision,
    Recipe,
    checkpoint_blocks,
    emulate,
    float_fields,
    float_format,
    memory_breakdown,
    quantize_blocks,
    round_to,
    show_bits,
)
from llmbook.training import Trainer, TrainingConfig, TrainingError, next_token_objective

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
        (lambda: Recipe(history=0), "history: expected a whole number of at least 1, got 0"),
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


SIZES = {"vocab_size": 23, "context_length": 16, "d_model": 16, "n_layers": 2, "n_heads": 2}


def model_of(seed=0, backend="torch", **changes):
    seed_everything(seed)
    return TransformerLM(ModelConfig(**SIZES | changes), backend)


@pytest.fixture
def untyped():
    """Switch jaxtyping's checks off, as they are for a reader, to see our own messages."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


class Rows(ResumableBatches):
    """Rows of random ids, others at each step."""

    def identity(self):
        return {"rows": "random"}

    def __getitem__(self, step):
        ids = torch.randint(23, (4, 13), generator=torch.Generator().manual_seed(step))
        return Batch(ids[:, :-1], ids[:, 1:].contiguous())


def trainer_of(precision=None, objective=None, n_steps=6, folder=None, model=None, **changes):
    given = {"batch_size": 4, "learning_rate": 0.01, "log_every": 1, "checkpoint_every": 1}
    given["precision"] = changes.pop("precision_setting", "float32")
    config = TrainingConfig(n_steps=n_steps, **given | changes)
    options = {"precision": precision, "objective": objective, "folder": folder}
    return Trainer(model or model_of(dropout=0.1), Rows(), config, **options)


def weights_of(trainer):
    return [p.detach().clone() for p in trainer.parameters]


def trained(trainer):
    """Take all steps, with the same random numbers whoever asks."""
    seed_everything(1)
    trainer.train()
    return trainer


def same(some, others):
    return all(map(torch.equal, some, others))


# The scaler


class Twin:
    """Two weights with an optimizer each, under one scaler."""

    def __init__(self, scaler):
        self.scaler = scaler
        self.weights = [nn.Parameter(torch.ones(3)) for _ in range(2)]
        sgd, adam = torch.optim.SGD([self.weights[0]], lr=0.1), AdamW([self.weights[1]], lr=0.1)
        self.optimizers = [sgd, adam]

    def step(self, factors, unscaled):
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        for micro_batch in factors:
            losses = [(w * f).sum() for w, f in zip(self.weights, micro_batch, strict=True)]
            for loss in self.scaler.scale(losses):
                loss.backward()
        for weight, optimizer, early in zip(self.weights, self.optimizers, unscaled, strict=True):
            if early:
                self.scaler.unscale_(optimizer)
                clip_gradients([weight], 1.0)
            self.scaler.step(optimizer)
        self.scaler.update()


FACTORS = st.sampled_from([1.0, -0.3, 1e-6, 1e36, -3e38, math.inf, -math.inf, math.nan])
STEPS = st.lists(
    st.tuples(
        st.lists(st.tuples(FACTORS, FACTORS), min_size=1, max_size=3),
        st.tuples(st.booleans(), st.booleans()),
    ),
    min_size=1,
    max_size=12,
)
SETTINGS = st.fixed_dictionaries(
    {
        "init_scale": st.sampled_from([2.0**16, 1.0, 3.7, 1e30, 0.001]),
        "growth_factor": st.sampled_from([2.0, 1.7, 1e5]),
        "backoff_factor": st.sampled_from([0.5, 0.3]),
        "growth_interval": st.integers(1, 3),
    }
)


@given(steps=STEPS, chosen=SETTINGS, swap=st.integers(0, 12))
@settings(max_examples=60, deadline=None)
def test_every_decision_is_torchs(steps, chosen, swap):
    twins = [Twin(GradScaler(**chosen)), Twin(torch.amp.GradScaler("cpu", **chosen))]
    twins[1].scaler.scale(torch.ones(()))  # makes its scale, else its states are refused
    for number, (factors, unscaled) in enumerate(steps):
        if number == swap:
            states = [twin.scaler.state_dict() for twin in twins]
            for twin, state in zip(twins, reversed(states), strict=True):
                twin.scaler.load_state_dict(state)
        for twin in twins:
            twin.step(factors, unscaled)
        states = [twin.scaler.state_dict() for twin in twins]
        assert states[0] == states[1]
        exactly = {"rtol": 0, "atol": 0, "equal_nan": True}
        torch.testing.assert_close(twins[0].weights, twins[1].weights, **exactly)


def stepped(scaler, gradient=1.0):
    weight = nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    scaler.scale((weight * gradient).sum()).backward()
    return weight, optimizer


def test_the_settings_are_torchs_by_default():
    ours, theirs = GradScaler(), torch.amp.GradScaler("cpu")
    assert ours.state_dict() == theirs.state_dict()
    assert ours.is_enabled()
    for name in ("scale", "growth_factor", "backoff_factor", "growth_interval"):
        assert getattr(ours, f"get_{name}")() == getattr(theirs, f"get_{name}")()


def test_a_scaler_that_is_not_enabled_does_nothing():
    scaler = GradScaler(enabled=False)
    weight, optimizer = stepped(scaler, math.inf)
    loss = torch.ones(())
    assert scaler.scale(loss) is loss
    scaler.unscale_(optimizer)
    scaler.step(optimizer)
    scaler.update()
    scaler.load_state_dict({})
    assert not weight.isfinite().all()
    assert (scaler.get_scale(), scaler.state_dict(), scaler.is_enabled()) == (1.0, {}, False)


def test_losses_are_scaled_in_32_bits_and_in_what_they_came_in():
    scaler, half = GradScaler(), torch.ones((), dtype=torch.float16)
    assert scaler.scale(half) == 2.0**16  # more than float16 holds
    assert scaler.scale([half, [half]]) == [2.0**16, [2.0**16]]
    assert scaler.scale((half,)) == (2.0**16,)
    assert list(scaler.scale(iter([half]))) == [2.0**16]
    for wrong in (3, "loss"):
        with pytest.raises(
            ValueError, match=f"^outputs: expected a tensor or several, got {wrong!r}"
        ):
            scaler.scale(wrong)


def test_the_value_of_the_optimizer_is_returned_and_a_skipped_step_has_none():
    class Telling(torch.optim.SGD):
        def step(self):
            return "taken"

    for gradient, said in ((1.0, "taken"), (math.nan, None)):
        scaler, weight = GradScaler(), nn.Parameter(torch.zeros(2))
        scaler.scale((weight * gradient).sum()).backward()
        assert scaler.step(Telling([weight])) == said


def test_an_optimizer_without_some_gradients_and_with_sparse_and_empty_ones():
    table, unused, empty = nn.Embedding(5, 2, sparse=True), nn.Parameter(torch.ones(2)), []
    empty = nn.Parameter(torch.zeros(0))
    optimizer = torch.optim.SGD([*table.parameters(), unused, empty], lr=1.0)
    before, scaler = table.weight.detach().clone(), GradScaler()
    scaler.scale(table(torch.tensor([1, 1])).sum() + empty.sum()).backward()
    scaler.step(optimizer)
    moved = torch.zeros(5, 2)
    moved[1] = 2
    torch.testing.assert_close(table.weight.detach(), before - moved)


def test_a_second_step_or_unscaling_before_update_is_refused():
    scaler = GradScaler()
    _, optimizer = stepped(scaler)
    scaler.unscale_(optimizer)
    message = r"^optimizer: expected update\(\) before {}, got SGD after {}"
    with pytest.raises(RuntimeError, match=message.format(r"unscale_\(\)", r"unscale_\(\)")):
        scaler.unscale_(optimizer)
    scaler.step(optimizer)
    with pytest.raises(RuntimeError, match=message.format(r"step\(\)", r"step\(\)")):
        scaler.step(optimizer)
    with pytest.raises(RuntimeError, match=message.format(r"unscale_\(\)", r"step\(\)")):
        scaler.unscale_(optimizer)
    scaler.update()
    scaler.step(optimizer)


def test_calls_without_what_they_need_are_refused():
    scaler = GradScaler()
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(2))], lr=1.0)
    with pytest.raises(RuntimeError, match=r"^update: expected unscale_\(\) or step\(\) before"):
        scaler.update()
    with pytest.raises(RuntimeError, match=r"^optimizer: expected gradients, got SGD without any"):
        scaler.step(optimizer)
    with pytest.raises(RuntimeError, match=r"^optimizer: expected unscale_\(\) first, got SGD"):
        scaler.found_inf(optimizer)
    with pytest.raises(ValueError, match=r"^arguments: expected none"):
        scaler.step(optimizer, lambda: 0.0)


@pytest.mark.usefixtures("untyped")
def test_what_is_no_optimizer_is_refused():
    with pytest.raises(ValueError, match=r"^optimizer: expected one of torch.optim, got 3"):
        GradScaler().unscale_(3)


def test_weights_in_float16_are_refused():
    scaler, weight = GradScaler(init_scale=4.0), nn.Parameter(torch.zeros(2, dtype=torch.float16))
    scaler.scale(weight.sum()).backward()
    message = r"^optimizer: expected weights and gradients in float32, got .* float16, .*\(2,\)"
    for call in (scaler.unscale_, scaler.step):
        with pytest.raises(ValueError, match=message):
            call(torch.optim.SGD([weight], lr=1.0))
    with pytest.raises(ValueError, match="Attempting to unscale FP16 gradients"):
        theirs = torch.amp.GradScaler("cpu")
        theirs.scale(torch.ones(()))
        theirs.unscale_(torch.optim.SGD([weight], lr=1.0))


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("init_scale", 0.0, "a positive number that float32 holds"),
        ("init_scale", math.inf, "a positive number that float32 holds"),
        ("init_scale", math.nan, "a positive number that float32 holds"),
        ("init_scale", 1e39, "a positive number that float32 holds"),
        ("growth_factor", 1.0, "more than 1"),
        ("backoff_factor", 1.0, "at least 0 and less than 1"),
        ("backoff_factor", 0.0, "more than 0"),
        ("growth_interval", 0, "a whole number of at least 1"),
    ],
)
def test_settings_of_the_scaler_out_of_range(name, value, expected):
    message = "^" + re.escape(f"{name}: expected {expected}, got {value!r}")
    with pytest.raises(ValueError, match=message):
        GradScaler(**{name: value})
    if name != "init_scale":
        with pytest.raises(ValueError, match=message):
            getattr(GradScaler(), f"set_{name}")(value)
        with pytest.raises(ValueError, match=message):
            GradScaler().load_state_dict(GradScaler().state_dict() | {name: value})


def test_a_scale_of_ones_own_and_a_state_that_is_none():
    scaler = GradScaler()
    scaler.update(3.0)
    assert scaler.get_scale() == 3.0
    with pytest.raises(ValueError, match=r"^new_scale: expected a positive number .* got -1.0"):
        scaler.update(-1.0)
    with pytest.raises(ValueError, match=r"^state_dict: expected the state .* without '_growth"):
        scaler.load_state_dict({})
    with pytest.raises(ValueError, match=r"^_growth_tracker: expected at least 0, got -1"):
        scaler.load_state_dict(scaler.state_dict() | {"_growth_tracker": -1})


def test_a_power_of_two_changes_no_digit():
    weight = nn.Parameter(torch.randn(50))
    gradients = []
    for scale in (1.0, 2.0**20, 2.0**-20):
        weight.grad, scaler = None, GradScaler(init_scale=scale)
        scaler.scale((weight.square() * torch.arange(50)).sum()).backward()
        scaler.unscale_(torch.optim.SGD([weight], lr=1.0))
        gradients.append(weight.grad)
    assert same(gradients[1:], gradients[:1] * 2)


# Casts


def outcome(context, model, ids):
    model.zero_grad()
    with context:
        logits = model(ids)
    cross_entropy(logits.float(), ids).backward()
    return [logits.detach(), *[p.grad for p in model.parameters()]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "changes", [{}, {"n_kv_heads": 1}, {"norm": "layernorm", "activation": "gelu"}]
)
def test_casts_are_those_of_autocast(dtype, changes):
    ids = Rows()[0].inputs
    ours = outcome(CastProducts(dtype), model_of(**changes), ids)
    theirs = outcome(torch.autocast("cpu", dtype), model_of(**changes), ids)
    assert same(ours, theirs)
    assert ours[0].dtype == dtype
    exact = outcome(torch.autocast("cpu", enabled=False), model_of(**changes), ids)
    emulated = outcome(CastProducts(dtype, emulate=True), model_of(**changes), ids)
    assert emulated[0].dtype == torch.float32
    bound = 8 * {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}[dtype]
    for some in (ours, emulated):
        for a, b in zip(some, exact, strict=True):
            assert 0 < (a.float() - b).norm() < bound * b.norm()


def test_which_functions_go_down_and_which_stay_up():
    x, low = torch.randn(4, 4), torch.randn(4, 4).half()
    with CastProducts(torch.bfloat16):
        for product in (x @ x, torch.mm(x, x), F.linear(x, x), x.matmul(low), F.linear(low, low)):
            assert product.dtype == torch.bfloat16
        attention = F.scaled_dot_product_attention(x[None], x[None], x[None])
        assert attention.dtype == torch.bfloat16
        for wide in (low.softmax(-1), low.exp(), low.sum(), F.layer_norm(low, (4,)), low.var()):
            assert wide.dtype == torch.float32
        assert (x + low).dtype == (x * 2).dtype == torch.float32
        assert (low * 2).dtype == torch.float16
        assert (x.double() @ x.double()).dtype == torch.float64
        assert torch.mm(x, x, out=torch.empty(4, 4)).dtype == torch.float32
    assert (x @ x).dtype == torch.float32
    with CastProducts(torch.bfloat16, emulate=True):
        assert torch.equal(x @ x, (x.bfloat16().float() @ x.bfloat16().float()).bfloat16().float())
        assert low.exp().dtype == torch.float16


def test_emulated_gradients_are_rounded_on_their_way_back():
    x = torch.ones(1, 1, requires_grad=True)
    for dtype, arrives in ((torch.float16, 0.0), (torch.bfloat16, 1e-9)):
        x.grad = None
        with CastProducts(dtype, emulate=True):
            y = x @ torch.ones(1, 1)
        (y * 1e-9).sum().backward()
        assert float(x.grad) == pytest.approx(arrives, rel=0.01)


@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, "bfloat16", None])
def test_products_can_be_cast_to_two_types(dtype):
    with pytest.raises(ValueError, match=r"^dtype: expected torch.float16 or torch.bfloat16, got"):
        CastProducts(dtype)


# In the trainer


def test_by_name_as_by_setting():
    plain, by_object = trained(trainer_of()), trained(trainer_of(MixedPrecision("float32")))
    assert same(weights_of(plain), weights_of(by_object))
    by_setting = trained(trainer_of(model=model_of(), precision_setting="bfloat16"))
    by_object = trained(trainer_of(MixedPrecision(), model=model_of()))
    assert same(weights_of(by_setting), weights_of(by_object))
    assert by_setting.identity()["precision"] == by_object.identity()["precision"] == "bfloat16"
    assert not same(weights_of(by_setting), weights_of(plain))


def overflowing(at, seen):
    """An objective whose gradient is infinite in the calls of these numbers, the loss never."""

    def objective(model, batch):
        total, count = next_token_objective(model, batch)
        seen.append(batch.inputs)
        weight = next(model.parameters())
        if len(seen) in at:  # the gradient of 0 * sqrt(0) is infinite times zero
            total = total + (0 * weight.detach() * weight).sum() + (weight * 0).abs().sqrt().sum()
        return total, count

    return objective


def test_a_batch_that_overflows_is_repeated_and_counts_once():
    seen, scaler = [], GradScaler(init_scale=2.0**8)
    precision = MixedPrecision("float16", scaler=scaler, emulate=True)
    trainer = trainer_of(precision, overflowing({3, 4}, seen), model=model_of(), max_skipped=0)
    log = trainer.train()
    assert (trainer.step, trainer.guard.skipped, precision.overflows) == (6, 0, 2)
    assert len(seen) == 8  # batch number 2 three times
    assert all(torch.equal(seen[i], Rows()[2].inputs[:, : seen[i].size(1)]) for i in (2, 3, 4))
    assert log.column("loss_scale")[1] == [2.0**8] * 2 + [2.0**6] * 4
    assert log.column("overflows")[1] == [0, 0, 2, 2, 2, 2]
    assert log.column("step")[1] == log.column("loss")[0] == [1, 2, 3, 4, 5, 6]
    state = trainer.optimizer.state_dict()["state"][0]
    assert int(state["step"]) == 6
    expected = trainer.schedule(5) * 0.01
    assert trainer.optimizer.param_groups[0]["lr"] == pytest.approx(expected)


def test_a_loss_that_is_not_finite_is_the_guards_business():
    def bad(model, batch):
        total, count = next_token_objective(model, batch)
        return total * (math.inf if torch.equal(batch.inputs, Rows()[2].inputs) else 1.0), count

    def fresh():
        return MixedPrecision("float16", scaler=GradScaler(init_scale=2.0**8), emulate=True)

    precision = fresh()
    trainer = trained(trainer_of(precision, bad))
    assert (trainer.step, trainer.guard.skipped, precision.overflows) == (6, 1, 0)
    assert all(weight.isfinite().all() for weight in weights_of(trainer))
    with pytest.raises(TrainingError, match=r"step 3: 1 steps in a row .* the loss was inf"):
        trainer_of(fresh(), bad, max_skipped=0).train()


def test_a_gradient_that_is_infinite_at_any_scale_ends_the_run():
    precision = MixedPrecision("float16", emulate=True, lowest_scale=1.0)
    trainer = trainer_of(precision, overflowing(range(1000), []), max_skipped=2)
    with pytest.raises(TrainingError, match=r"step 3: 3 steps in a row were skipped, .*norm was"):
        trainer.train()
    assert precision.overflows == 17  # from 2**16 to below 1
    assert precision.scaler.get_scale() < 1


@pytest.mark.parametrize("stop", [1, 3, 5])
@pytest.mark.parametrize("name", ["float16", "bfloat16"])
def test_a_resumed_run_is_the_same_to_the_bit(stop, name, tmp_path):
    def fresh(folder):
        scaler = GradScaler(init_scale=2.0**18, growth_interval=2, enabled=name == "float16")
        precision = MixedPrecision(name, scaler=scaler, emulate=True)
        return trainer_of(precision, folder=folder, micro_batch_size=2, clip_norm=0.1)

    whole, stopped = trained(fresh(None)), fresh(tmp_path)
    seed_everything(1)
    while stopped.step < stop:
        stopped.train_step(next(iter(stopped.batches)))
    stopped.save()
    resumed = fresh(tmp_path)
    resumed.train()
    assert same(weights_of(resumed), weights_of(whole))
    assert resumed.precision.state_dict() == whole.precision.state_dict()
    assert (whole.precision.overflows > 0) == (name == "float16")
    with pytest.raises(ValueError, match=f"^precision: expected '{name}', as in the checkpoint"):
        trainer_of(folder=tmp_path, micro_batch_size=2, clip_norm=0.1).resume()


def test_scaled_steps_are_those_of_float32_where_nothing_is_rounded():
    """A scale changes no digit: with float32 products, micro-batches and clipping, not a bit."""
    plain = trainer_of(micro_batch_size=2, clip_norm=0.1)
    scaled = trainer_of(
        MixedPrecision("float32", scaler=GradScaler(init_scale=2.0**10)),
        micro_batch_size=2,
        clip_norm=0.1,
    )
    assert same(weights_of(trained(plain)), weights_of(trained(scaled)))


@pytest.mark.parametrize("optimizer", ["muon", "sgd", "NAdam"])
def test_every_optimizer_can_be_scaled(optimizer):
    changes = {"optimizer": optimizer, "micro_batch_size": 2, "spike_factor": 50.0}
    scaler = GradScaler(init_scale=2.0**6)
    precision = MixedPrecision("float16", scaler=scaler, emulate=True)
    trainer, plain = trainer_of(precision, **changes), trainer_of(**changes)
    ours, exact = weights_of(trained(trainer)), weights_of(trained(plain))
    assert trainer.guard.skipped == precision.overflows == 0
    for a, b in zip(ours, exact, strict=True):
        assert 0 < (a - b).norm() < 0.1 * b.norm()


def test_evaluation_computes_in_the_same_precision():
    trainer = trainer_of(MixedPrecision("bfloat16"))
    trainer.validation = [Rows()[7]]
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        total, count = next_token_objective(trainer.model.eval(), Rows()[7])
    assert trainer.evaluate() == pytest.approx(float(total / count))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["float32", "bfloat16", "float16"])
def test_master_weights_in_16_bits_are_refused(name, dtype):
    message = f"^model: expected master weights in float32, got embedding.weight in {dtype}"
    with pytest.raises(ValueError, match=message):
        trainer_of(MixedPrecision(name), model=model_of().to(dtype))
    assert trainer_of(MixedPrecision(name), model=model_of().double())


@pytest.mark.usefixtures("untyped")
def test_unknown_names_and_arguments():
    for name in ("fp16", "float8_e4m3fn", None, 16):
        expected = r"^name: expected one of float32, bfloat16, float16, got"
        with pytest.raises(ValueError, match=expected):
            MixedPrecision(name)
    with pytest.raises(ValueError, match=r"^scaler: expected a GradScaler, got <torch.amp"):
        MixedPrecision("float16", scaler=torch.amp.GradScaler("cpu"))
    with pytest.raises(ValueError, match=r"^emulate: expected True or False, got 1"):
        MixedPrecision("float16", emulate=1)
    with pytest.raises(ValueError, match=r"^lowest_scale: expected a positive number"):
        MixedPrecision("float16", lowest_scale=0)
    with pytest.raises(ValueError, match=r"^state: expected scaler and overflows"):
        MixedPrecision("float16").load_state_dict({})


def test_the_documented_defaults_of_mixed_precision():
    precision = MixedPrecision()
    assert (precision.name, precision.emulate, precision.lowest_scale) == (
        "bfloat16",
        False,
        2**-14,
    )
    assert not precision.scaler.is_enabled()
    assert MixedPrecision("float16").scaler.get_scale() == 2.0**16
    assert precision.numbers() == precision.state_dict() == {}


# The optimizer's state


def test_the_state_has_16_bits_and_is_right_on_average():
    weight = nn.Parameter(torch.zeros(20_000))
    plain = nn.Parameter(torch.zeros(1))
    torch.manual_seed(0)
    optimizer, exact = CompactAdamW([weight]), AdamW([plain])
    for step in range(30):
        for parameter, kind in ((weight, optimizer), (plain, exact)):
            parameter.grad = torch.full_like(parameter, 1.0 if step < 5 else 0.37)
            kind.step()
    for name in ("exp_avg", "exp_avg_sq"):
        state = optimizer.state[weight][name]
        assert state.dtype == torch.bfloat16
        true = float(exact.state[plain][name])
        assert len(state.unique()) > 1
        assert float(state.float().mean()) == pytest.approx(true, rel=3e-3)
    assert weight.dtype == torch.float32


def test_rounding_to_the_nearest_gets_stuck_as_documented():
    for beta, moves in ((0.999, False), (0.99, True)):
        weight = nn.Parameter(torch.zeros(3))
        optimizer = CompactAdamW([weight], betas=(0.9, beta), rounding="nearest")
        found = []
        for step in range(60):
            weight.grad = torch.full((3,), 1.0 if step < 30 else 0.0)
            optimizer.step()
            found.append(optimizer.state[weight]["exp_avg_sq"].clone())
        assert torch.equal(found[29], found[59]) != moves
        assert optimizer.param_groups[0]["params"][0] is weight


def test_where_16_bits_suffice_it_is_adamw():
    """With gradients and means that bfloat16 holds, nothing is rounded."""
    results = []
    for kind in (AdamW, CompactAdamW):
        weights = [nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2, 2))]
        groups = [{"params": weights[:1], "lr": 0.5}, {"params": weights[1:], "weight_decay": 0.0}]
        optimizer = kind(groups, betas=(0.5, 0.5))
        for _ in range(3):
            for weight in weights:
                weight.grad = torch.full_like(weight, 2.0)
            optimizer.step()
        results.append([w.detach() for w in weights])
    assert same(*results)


def test_the_compact_state_resumes_to_the_bit(tmp_path):
    def fresh(folder):
        config = TrainingConfig(n_steps=6, batch_size=4, checkpoint_every=1)
        compact = lambda model: CompactAdamW(model.parameters(), lr=0.01)  # noqa: E731
        return Trainer(model_of(), Rows(), config, optimizer=compact, folder=folder)

    whole, stopped = trained(fresh(None)), fresh(tmp_path)
    seed_everything(1)
    for _ in range(3):
        stopped.train_step(next(iter(stopped.batches)))
    stopped.save()
    resumed = fresh(tmp_path)
    resumed.train()
    assert same(weights_of(resumed), weights_of(whole))
    assert resumed.identity()["optimizer group 0, rounding"] == "stochastic"


@pytest.mark.usefixtures("untyped")
def test_closures_and_unknown_roundings():
    weight = nn.Parameter(torch.ones(2))

    def closure():
        weight.grad = None
        loss = weight.square().sum()
        loss.backward()
        return loss

    optimizer = CompactAdamW([weight], lr=0.1)
    assert optimizer.step(closure).item() == 2.0
    assert weight[0].item() < 1
    again = copy.deepcopy(optimizer)
    assert again.param_groups[0]["rounding"] == "stochastic"
    with pytest.raises(
        ValueError, match=r"^rounding: expected one of nearest, stochastic, got 'up'"
    ):
        CompactAdamW([weight], rounding="up")


# Memory


def test_the_bytes_of_a_parameter():
    config = ModelConfig(**SIZES)
    n, matrices = count_parameters(config), 2 * (4 * 16 * 16 + 3 * 16 * config.d_ff)
    for precision, optimizer, per_parameter, per_matrix in (
        ("float32", "adamw", 16, 0), ("float32", "sgd", 8, 0), ("pure", "adamw", 8, 0),
        ("bfloat16", "adamw", 16, 2), ("float16", "compact_adamw", 12, 2),
        ("float32", "muon", 16, -4),
    ):  # fmt: skip
        parts = memory_breakdown(config, 2, 8, precision=precision, optimizer=optimizer)
        static = sum(parts[k] for k in ("weights", "16-bit copies", "gradients", "optimizer"))
        head = 2 * 23 * 16 if per_matrix == 2 else 0
        assert static == per_parameter * n + per_matrix * matrices + head


@pytest.mark.parametrize("changes", [{}, {"n_kv_heads": 1}, {"activation": "gelu", "n_layers": 3}])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_formula_is_what_a_forward_pass_keeps(changes, precision, checkpointing):
    sizes = {"vocab_size": 64, "context_length": 64, "d_model": 64, "n_layers": 3, "n_heads": 4}
    config = ModelConfig(**sizes | changes)
    model, ids = TransformerLM(config), torch.zeros(4, 64, dtype=torch.int64)
    if checkpointing:
        checkpoint_blocks(model)
    with LiveMemory() as memory, MixedPrecision(precision).computing(ids.device):
        total = model(ids).sum()
    assert total.requires_grad
    options = {"precision": precision, "checkpointing": checkpointing}
    parts = memory_breakdown(config, 4, 64, **options)
    expected = parts["activations"] + parts["16-bit copies"]
    if checkpointing:  # the block that is computed again is not yet there, nor are all copies
        one = memory_breakdown(ModelConfig(**sizes | changes | {"n_layers": 1}), 4, 64, **options)
        ends = (2 * 64 if precision == "float32" else 64 + 32) * 4 * 4 * 64
        block = one["activations"] - ends - 64 * 4 * 4 * 64
        expected = parts["activations"] - block
        assert memory.live == pytest.approx(expected, rel=0.2)
    else:
        assert memory.live == pytest.approx(expected, rel=0.03)


def test_logits_and_their_chunks():
    config = ModelConfig(**SIZES)
    whole = memory_breakdown(config, 2, 8)["logits"]
    assert whole == 2 * 8 * 23 * 4
    assert memory_breakdown(config, 2, 8, chunk_size=4)["logits"] == whole / 4
    assert memory_breakdown(config, 2, 8, chunk_size=400)["logits"] == whole
    assert memory_breakdown(config, 2, 8, precision="bfloat16")["logits"] == whole
    assert memory_breakdown(config, 2, 8, precision="pure")["logits"] == whole / 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"precision": "fp8"}, "precision: expected one of float32, bfloat16, float16, pure, got"),
        ({"optimizer": "lion"}, "optimizer: expected one of sgd, adamw, compact_adamw, muon, got"),
        ({"chunk_size": 0}, "chunk_size: expected at least 1, got 0"),
        ({"batch_size": 0}, "batch_size: expected at least 1, got 0"),
        ({"sequence": 0}, "sequence: expected at least 1, got 0"),
    ],
)
def test_what_memory_cannot_be_counted_for(options, message):
    given = {"batch_size": 2, "sequence": 8} | options
    with pytest.raises(ValueError, match=f"^{message}"):
        memory_breakdown(ModelConfig(**SIZES), **given)


def test_experts_are_refused():
    config = ModelConfig(**SIZES, n_experts=4, n_active_experts=2)
    with pytest.raises(ValueError, match=r"^n_experts: expected 0, got 4"):
        memory_breakdown(config, 2, 8)


def test_living_bytes_are_counted_once_and_until_they_die():
    before = torch.zeros(100)
    with LiveMemory() as memory:
        view = before.view(10, 10).t()
        assert memory.live == 0  # was there before
        x = torch.zeros(100)
        y = x[:50]
        z = x + 1
        assert memory.live == 800
        x.add_(1)
        del z
        assert (memory.live, memory.peak) == (400, 800)
        del x
        assert memory.live == 400  # y is a view of it
        del y
    assert (memory.live, memory.peak) == (0, 800)
    assert view.shape == (10, 10)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_checkpointed_blocks_have_the_same_gradients(dropout):
    found = []
    for prepare in (lambda model: model, checkpoint_blocks):
        model, batch = prepare(model_of(dropout=dropout)), Rows()[0]
        torch.manual_seed(1)
        next_token_objective(model, batch)[0].backward()
        found.append([p.grad for p in model.parameters()])
    assert same(*found)
    state = model.state_dict()
    assert state.keys() == model_of().state_dict().keys()


def test_checkpointing_twice_is_once_and_generation_goes_on():
    plain, model = model_of(), checkpoint_blocks(checkpoint_blocks(model_of()))
    assert not hasattr(model.blocks[0].forward.args[0], "func")
    for lm in (plain, model):
        lm.eval()
    options = {"prompts": [[1, 2, 3]], "max_new_tokens": 4}
    assert generate(plain, **options) == generate(model, **options)


@pytest.mark.usefixtures("untyped")
def test_only_our_model_has_blocks():
    with pytest.raises(ValueError, match=r"^model: expected a TransformerLM, got Linear"):
        checkpoint_blocks(nn.Linear(2, 2))


def test_checkpointed_blocks_in_the_trainer(tmp_path):
    plain = trainer_of(MixedPrecision("bfloat16"), model=model_of())
    saving = trainer_of(MixedPrecision("bfloat16"), model=checkpoint_blocks(model_of()))
    for trainer in (plain, saving):
        trainer.train()
    assert same(weights_of(plain), weights_of(saving))


def test_scales_are_numbers_that_float32_holds():
    assert GradScaler(init_scale=0.1).get_scale() == float(np.float32(0.1))
    scaler = GradScaler(init_scale=3e38, growth_interval=1)
    weight = nn.Parameter(torch.zeros(1))
    for _ in itertools.repeat(None, 2):  # it would be infinite, so it stays
        weight.grad = torch.ones(1)
        scaler.step(torch.optim.SGD([weight], lr=1.0))
        scaler.update()
    assert scaler.get_scale() == float(np.float32(3e38))


@pytest.mark.parametrize("emulate", [False, True])
def test_blocks_that_are_computed_again_are_cast_again(emulate):
    ids = torch.arange(12).view(1, 12)
    found = []
    for change in (lambda model: model, checkpoint_blocks):
        model = change(model_of())
        with CastProducts(torch.bfloat16, emulate=emulate):
            logits = model(ids)
        logits.float().square().mean().backward()
        found.append([p.grad for p in model.parameters()])
    assert all(map(torch.equal, *found))


def test_a_scaler_that_is_not_enabled_has_found_nothing():
    weight = nn.Parameter(torch.ones(2))
    weight.grad = torch.full((2,), math.inf)
    assert GradScaler(enabled=False).found_inf(torch.optim.SGD([weight], lr=0.1)) is False


@pytest.mark.parametrize(
    "loss, lowest, ready, scale",
    [
        (1.0, 2.0**-14, False, 512.0),
        (math.nan, 2.0**-14, True, 1024.0),
        (1.0, 2048.0, True, 1024.0),
    ],
)
def test_the_scale_falls_only_where_that_may_help(loss, lowest, ready, scale):
    precision = MixedPrecision("float16", scaler=GradScaler(init_scale=1024.0), lowest_scale=lowest)
    weight = nn.Parameter(torch.ones(2))
    weight.grad = torch.full((2,), math.inf)
    assert precision.settle(torch.optim.SGD([weight], lr=0.1), torch.tensor(loss)) is ready
    assert precision.scaler.get_scale() == scale


def test_a_layer_alone_is_emulated_and_nothing_is_refused():
    assert isinstance(emulate(nn.Linear(32, 32), "mxfp8"), EmulatedLinear)
    with pytest.raises(ValueError, match=r"model: expected linear layers besides \('lm_head',\)"):
        emulate(nn.LayerNorm(4), "mxfp8")


def test_emulated_products_are_not_cast_by_autocast():
    layer = emulate(nn.Linear(32, 32, bias=False), "fp8_current")
    x = torch.randn(4, 32)
    with torch.autocast("cpu", torch.bfloat16):
        inside = layer(x)
    assert inside.dtype == torch.float32 and torch.equal(inside, layer(x))


def test_numbers_of_numpy_have_fields():
    assert float_fields(np.float32(0.75), "e4m3") == float_fields(0.75, "e4m3")
