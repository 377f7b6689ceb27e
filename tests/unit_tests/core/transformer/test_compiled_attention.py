"""Compiled attention against torch's blocks and an explicit product in fp64, and what it keeps."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megatron.core.cpu_kernels import build, choice
from megatron.core.cpu_kernels.attention import attention_kernel
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.tensor_parallel.random import SampleRng
from megatron.core.transformer import dot_product_attention
from megatron.core.transformer.attention_weights import PLAIN, Weighting
from megatron.core.transformer.blocked_attention import WeightDropout, blocked_causal_attention
from megatron.core.transformer.compiled_attention import (
    can_be_compiled,
    compiled_attention,
    compiled_attention_of_projection,
)
from megatron.core.transformer.config.rotary import RotaryConfig
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.forward_context import ForwardContext
from megatron.core.transformer.rotary import RotaryTables, split_and_rotate
from tests.helpers.models import tiny_config, world_of_one

pytestmark = pytest.mark.skipif(build.compiler() is None, reason="needs a C++ compiler")

DTYPES = (torch.float32, torch.bfloat16)
NEAR = {torch.float32: 3e-6, torch.bfloat16: 1.2e-2}
"""Largest error, as a share of the largest number."""


@pytest.fixture(autouse=True)
def _must_compile() -> None:
    with choice.using("compiled"):
        probe = torch.empty(16)
        if attention_kernel(probe, probe) is None:
            pytest.skip("no products of blocks here")
        yield


class Shape:
    """Sizes of one case."""

    def __init__(self, b: int, heads: int, groups: int, s: int, d: int, e: int = 0) -> None:
        self.b, self.heads, self.groups, self.s, self.d, self.e = b, heads, groups, s, d, e or d

    def inputs(self, dtype: torch.dtype) -> list[Tensor]:
        """Return queries, keys, values and the gradient of the output."""
        generator = torch.Generator().manual_seed(self.s)
        sizes = ((self.heads, self.d), (self.groups, self.d), (self.groups, self.e))
        return [
            torch.randn(self.b, n, self.s, size, generator=generator).to(dtype)
            for n, size in (*sizes, (self.heads, self.e))
        ]


def _with_grads(attend: Callable[..., Tensor], inputs: list[Tensor]) -> list[Tensor]:
    *leaves, upstream = inputs
    leaves = [x.detach().requires_grad_() for x in leaves]
    out = attend(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, upstream)]


def _explicit(window: int | None) -> Callable[..., Tensor]:
    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        s, repeats = query.shape[2], query.shape[1] // key.shape[1]
        key, value = (x.repeat_interleave(repeats, dim=1) for x in (key, value))
        seen = torch.ones(s, s, dtype=torch.bool).tril()
        if window is not None:
            seen.triu_(-window)
        scores = (query @ key.mT / query.shape[-1] ** 0.5).masked_fill(~seen, float("-inf"))
        return scores.softmax(dim=-1) @ value

    return attend


def _errors(got: list[Tensor], exact: list[Tensor]) -> list[float]:
    largest = max(x.abs().max().item() for x in exact)
    return [(x - y).abs().max().item() / largest for x, y in zip(got, exact, strict=True)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("shape", "window"),
    [
        (Shape(1, 1, 1, 1, 64), None),
        (Shape(2, 2, 2, 3, 32), None),
        (Shape(2, 4, 2, 129, 64), None),
        (Shape(1, 4, 1, 513, 64), None),
        (Shape(1, 2, 1, 1100, 80, 48), 100),
        (Shape(1, 1, 1, 600, 192, 128), None),
        (Shape(1, 2, 2, 130, 256), 63),
        (Shape(1, 1, 1, 200, 16), 0),
    ],
)
def test_output_and_gradients_are_as_near_to_fp64_as_those_of_torch(
    shape: Shape, window: int | None, dtype: torch.dtype
) -> None:
    inputs, weighting = shape.inputs(dtype), Weighting(window=window)
    exact = _with_grads(_explicit(window), [x.double() for x in inputs])
    got = _with_grads(lambda q, k, v: compiled_attention(q, k, v, weighting), inputs)
    blocked = _with_grads(lambda *x: blocked_causal_attention(*x, None, weighting), inputs)
    for mine, theirs in zip(_errors(got, exact), _errors(blocked, exact), strict=True):
        assert mine < max(NEAR[dtype], 2.0 * theirs), f"{mine=} {theirs=}"
    assert [x.dtype for x in got] == [dtype] * 4


def _mixed(s: int, b: int, groups: int, dtype: torch.dtype, d: int = 32) -> Tensor:
    generator = torch.Generator().manual_seed(s)
    return torch.randn(s, b, groups, 4, d, generator=generator).to(dtype)


def _tables(s: int, dtype: torch.dtype, interleaved: bool, percent: float) -> RotaryTables:
    config = RotaryConfig(position_embedding_type="rope", rotary_interleaved=interleaved)
    rotary = RotaryEmbedding(config, channels=32, rotary_dim=int(32 * percent))
    return rotary([range(5, 5 + s)], torch.empty(0, dtype=dtype), length=5 + s)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("percent", [0.25, 1.0])
@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "interleaved"])
def test_one_pass_from_the_projection_is_splitting_rotating_and_attending(
    interleaved: bool, percent: float, dtype: torch.dtype
) -> None:
    s = 70
    mixed, weighting = _mixed(s, 2, 3, dtype), Weighting(scale=0.3)
    upstream = torch.randn(s, 2, 192, generator=torch.Generator().manual_seed(1)).to(dtype)

    def in_steps(tables: RotaryTables) -> Callable[[Tensor], Tensor]:
        def attend(mixed: Tensor) -> Tensor:
            heads = split_and_rotate(mixed, tables)
            return blocked_causal_attention(*heads, None, weighting).permute(2, 0, 1, 3).flatten(2)

        return attend

    tables = _tables(s, dtype, interleaved, percent)
    exact = _with_grads(
        in_steps(tables._replace(cos=tables.cos.double(), sin=tables.sin.double())),
        [mixed.double(), upstream.double()],
    )
    got = _with_grads(
        lambda x: compiled_attention_of_projection(x, tables, weighting), [mixed, upstream]
    )
    stepwise = _with_grads(in_steps(tables), [mixed, upstream])
    for mine, theirs in zip(_errors(got, exact), _errors(stepwise, exact), strict=True):
        assert mine < max(NEAR[dtype], 1.5 * theirs), f"{mine=} {theirs=}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bits_do_not_depend_on_what_is_computed_beside(dtype: torch.dtype) -> None:
    mixed = _mixed(150, 4, 4, dtype)
    tables = _tables(150, dtype, interleaved=False, percent=1.0)
    upstream = torch.randn(150, 4, 4, 64, generator=torch.Generator().manual_seed(1)).to(dtype)

    def attend(mixed: Tensor, upstream: Tensor) -> list[Tensor]:
        return _with_grads(
            lambda x: compiled_attention_of_projection(x, tables, PLAIN),
            [mixed, upstream.flatten(2)],
        )

    out, grad = attend(mixed, upstream)
    again = attend(mixed, upstream)
    assert torch.equal(again[0], out)
    assert torch.equal(again[1], grad)
    one, one_grad = attend(mixed[:, 2:3], upstream[:, 2:3])
    assert torch.equal(one, out[:, 2:3])
    assert torch.equal(one_grad, grad[:, 2:3])
    half, half_grad = attend(mixed[:, :, 2:], upstream[:, :, 2:])
    assert torch.equal(half, out[:, :, 128:])
    assert torch.equal(half_grad, grad[:, :, 2:])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_query_sees_what_comes_later(dtype: torch.dtype) -> None:
    query, key, value, _ = Shape(1, 2, 1, 140, 32).inputs(dtype)
    out = compiled_attention(query, key, value, PLAIN)
    assert torch.equal(out[:, :, 0], value[:, :, 0].expand(1, 2, 32))
    for position in (1, 63, 64, 139):
        changed = [x.clone() for x in (key, value)]
        for x in changed:
            x[:, :, position:] = 7.0
        got = compiled_attention(query, *changed, PLAIN)
        assert torch.equal(got[:, :, :position], out[:, :, :position])
        assert not torch.equal(got[:, :, position], out[:, :, position])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_large_scores_stay_finite_and_what_is_no_number_stays_none(dtype: torch.dtype) -> None:
    inputs = Shape(1, 1, 1, 100, 32).inputs(dtype)
    inputs[0] *= 1e4
    large = _with_grads(lambda *x: compiled_attention(*x, PLAIN), inputs)
    assert all(x.isfinite().all() for x in large)
    inputs[0][0, 0, 50, 3] = float("nan")
    out, d_query, d_key, _ = _with_grads(lambda *x: compiled_attention(*x, PLAIN), inputs)
    assert out[0, 0, 50].isnan().all()
    assert out[0, 0, :50].isfinite().all()
    assert d_query[0, 0, 50].isnan().all()
    assert d_key[0, 0, :51].isnan().all()


class _Largest(TorchDispatchMode):
    """The largest tensor that an operation returned."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self.numel = max(self.numel, result.numel())
        return result


def test_memory_grows_with_the_sequence_not_with_its_square() -> None:
    kept, largest = [], []
    for s in (256, 512):
        saved: dict[int, int] = {}

        def keep(x: Tensor, saved: dict[int, int] = saved) -> Tensor:
            saved[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        mixed = _mixed(s, 1, 1, torch.float32).requires_grad_()
        with _Largest() as mode, torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            out = compiled_attention_of_projection(mixed, None, PLAIN)
            out.sum().backward()
        kept.append(sum(saved.values()))
        largest.append(mode.numel)
    # the projection, the output, a number for each of two heads
    assert kept == [4 * s * (4 * 32 + 2 * 32 + 2) for s in (256, 512)]
    assert largest == [s * 4 * 32 for s in (256, 512)]


def _core(**options: object) -> DotProductAttention:
    return DotProductAttention(tiny_config(**options), layer_number=0, pg_collection=world_of_one())


def test_the_choice_torch_takes_the_old_path_bit_for_bit() -> None:
    query, key, value, _ = Shape(2, 4, 2, 70, 16).inputs(torch.float32)
    blocked = blocked_causal_attention(query, key, value).permute(2, 0, 1, 3).flatten(2)
    core = _core()
    compiled = core(query, key, value, None, ForwardContext())
    with choice.using("torch"):
        old = core(query, key, value, None, ForwardContext())
        assert (
            core.of_projection(_mixed(9, 2, 2, torch.float32), None, None, ForwardContext()) is None
        )
    assert torch.equal(old, blocked)
    assert not torch.equal(compiled, blocked)
    torch.testing.assert_close(compiled, blocked, rtol=1e-5, atol=1e-5)


def test_masks_dropout_caps_and_sinks_are_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object) -> None:
        raise AssertionError("compiled")

    monkeypatch.setattr(dot_product_attention, "compiled_attention", never)
    monkeypatch.setattr(dot_product_attention, "compiled_attention_of_projection", never)
    query, key, value, _ = Shape(2, 4, 2, 9, 16).inputs(torch.float32)
    mask = torch.zeros(2, 1, 9, 9, dtype=torch.bool)
    others = ({"attn_logit_softcapping": 5.0}, {"attention_dropout": 0.1})
    cores = [(_core(), mask), *((_core(**options), None) for options in others)]
    cores.append((_core(softmax_type="off-by-one"), None))
    for core, hidden in cores:
        assert core(query, key, value, hidden, ForwardContext()).shape == (9, 2, 64)
    with pytest.raises(AssertionError, match="compiled"):
        _core()(query, key, value, None, ForwardContext())
    rng = SampleRng(1, (10, 11))
    assert not can_be_compiled(Weighting(dropout=WeightDropout(rng, 0.3, 5)))
    assert can_be_compiled(Weighting(scale=0.5, window=3))


def test_sizes_and_dtypes_without_a_kernel_are_torchs() -> None:
    for dtype, d in ((torch.float64, 16), (torch.float32, 8), (torch.float32, 272)):
        inputs = Shape(1, 1, 1, 3, d).inputs(dtype)[:3]
        assert compiled_attention(*inputs, PLAIN) is None
