"""The KV cache in few bits: its rounding, its bytes, and its life inside transformers."""
import importlib.util

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM
from transformers.cache_utils import QuantizedLayer as TheirLayer

from nbs_lib import cache as c
from nbs_lib.cache import Plan, QuantizedCache, QuantizedLayer
from nbs_lib.memory import inference_memory

LLAMA = LlamaConfig(vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
                    num_key_value_heads=2, head_dim=16, max_position_embeddings=256, bos_token_id=0, eos_token_id=1)
SMALL = Plan(group=8, window=8)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return LlamaForCausalLM(LLAMA).eval()


def states(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# the grid

@settings(max_examples=60)
@given(st.integers(1, 8), st.integers(0, 10_000), st.floats(1e-3, 1e3), st.floats(-1e3, 1e3))
def test_no_other_code_is_nearer_and_the_error_stays_below_the_bound(bits, seed, size, shift):
    x = states(5, 8, seed=seed)*size + shift
    codes, scale, minimum = c.grid_with_minimum(x, bits)
    values = torch.arange(2**bits)*scale.float()[..., None] + minimum.float()[..., None]        # brute force: all codes
    off = (codes*scale.float() + minimum.float() - x).abs()
    best = (values - x[..., None]).abs().amin(-1)
    assert (off <= best + 1e-5*(size + abs(shift))).all()
    bound = c.steps(x.view(1, 1, 5, 8), Plan(bits, group=8), "token").view(5, 8)
    assert (off <= bound).all()


def test_half_a_step_is_reached():
    x = torch.tensor([[0., 15., 7.5, 3.5, 1, 2, 3, 4]])
    codes, scale, minimum = c.grid_with_minimum(x, 4)
    assert (codes*scale.float() + minimum.float() - x).abs().max() == 0.5


def test_groups_of_equal_numbers_and_of_numbers_too_large():
    codes, scale, minimum = c.grid_with_minimum(torch.full((2, 8), 3.0), 4)
    assert not codes.any() and not scale.any() and (minimum == 3).all()
    with pytest.raises(ValueError, match="65504"): c.grid_with_minimum(torch.full((1, 8), 1e6), 4)
    with pytest.raises(ValueError, match="fp16"): c.grid_with_minimum(torch.tensor([[float("nan")]*8]), 4)


# packing

@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("by", ["token", "channel"])
def test_packing_by_token_and_by_channel_is_the_same_up_to_a_transpose(bits, by):
    plan, x = Plan(bits, group=16), states(2, 3, 32, 16)
    p = c.pack_states(x, plan, by)
    back = c.unpack_states(p, plan, by)
    assert back.shape == x.shape and p.nbytes*8 == x.numel()*plan.number_bits
    assert ((back - x).abs() <= c.steps(x, plan, by)).all()
    other = {"token": "channel", "channel": "token"}[by]
    turned = c.unpack_states(c.pack_states(x.mT.contiguous(), plan, other), plan, other).mT
    assert torch.equal(back, turned)


def test_an_outlier_channel_hurts_packing_by_token_only():
    x = states(1, 1, 64, 32)
    x[..., 5] *= 50
    off = {by: (c.unpack_states(c.pack_states(x, Plan(4), by), Plan(4), by) - x)[..., :5].norm() for by in ("token", "channel")}
    assert off["token"] > 5*off["channel"]
    assert c.outliers(x) > 30 > 2 > c.outliers(states(1, 1, 64, 32))


@pytest.mark.parametrize("bad, says", [(dict(bits=9), "bits is 9"), (dict(bits=True), "bits is True"), (dict(keys="row"), "keys is 'row'"),
                                       (dict(values=0), "values is 0"), (dict(group=12), "group is 12"), (dict(window=-1), "window is -1")])
def test_bad_plans_are_refused(bad, says):
    with pytest.raises(ValueError, match=says): Plan(**bad)


def test_a_group_that_does_not_divide_is_refused():
    with pytest.raises(ValueError, match="16 channels a head"): c.pack_states(states(1, 1, 32, 16), Plan(), "token")
    with pytest.raises(ValueError, match="20 tokens"): c.pack_states(states(1, 1, 20, 32), Plan(), "channel")


# the cache

@pytest.mark.parametrize("chunk", [1, 5, 40])
def test_with_a_long_window_it_is_the_plain_cache_bit_for_bit(model, chunk):
    ids = torch.arange(40)[None] % 64
    ours, plain = QuantizedCache(Plan(group=8, window=64)), DynamicCache()
    with torch.inference_mode():
        for i in range(0, 40, chunk):
            a, b = (model(ids[:, i:i + chunk], past_key_values=x).logits for x in (ours, plain))
            assert torch.equal(a, b)
    assert ours.nbytes == c.cache_bytes(plain) == c.predicted_bytes(LLAMA, 1, 40, number=4)


@settings(max_examples=15)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=6), st.sampled_from([0, 5, 8, 20]), st.sampled_from([2, 4, 8]),
       st.sampled_from(["token", "channel"]), st.sampled_from(["token", "channel"]))
def test_bytes_and_lengths_are_as_predicted_however_the_tokens_come(parts, window, bits, keys, values):
    plan, layer = Plan(bits, keys, values, group=8, window=window), QuantizedLayer(Plan(bits, keys, values, group=8, window=window))
    s, all_keys = 0, []
    for i, n in enumerate(parts):
        k = states(2, 2, n, 16, seed=i)
        got, _ = layer.update(k, 2*k)
        s, all_keys = s + n, [*all_keys, k]
        assert got.shape[-2] == s == layer.get_seq_length() and layer.packed_length <= plan.packed_tokens(s)
        assert torch.equal(got[..., -n:, :], k)                     # the new ones always come back as they are
    true = torch.cat(all_keys, -2)
    assert layer.packed_length == plan.packed_tokens(s) and torch.equal(layer.keys, true[..., plan.packed_tokens(s):, :])
    one = c.predicted_bytes(LLAMA, 2, s, plan, 4)/LLAMA.num_hidden_layers
    assert layer.nbytes == one


def test_tokens_one_by_one_or_at_once_leave_the_same_cache():
    k, v = states(1, 2, 50, 16), states(1, 2, 50, 16, seed=1)
    one, many = QuantizedLayer(SMALL), QuantizedLayer(SMALL)
    one.update(k, v)
    for i in range(50): many.update(k[..., i:i + 1, :], v[..., i:i + 1, :])
    for x, y in zip((*one.packed[0], *one.packed[1], one.keys, one.values), (*many.packed[0], *many.packed[1], many.keys, many.values)):
        assert torch.equal(x, y)


class TheirsWithOurGrid(TheirLayer):
    """transformers' own layer, with this module's rounding in the place of quanto's or hqq's."""
    def __init__(self, plan):
        super().__init__(residual_length=plan.group)
        self.plan = plan

    def _quantize(self, tensor, axis): return c.pack_states(tensor, self.plan, "token"), tensor.dtype
    def _dequantize(self, q): return c.unpack_states(q[0], self.plan, "token", q[1])


def test_it_keeps_what_transformers_own_quantized_layer_keeps():
    plan = Plan(4, keys="token", group=8, window=0)
    ours, theirs = QuantizedLayer(plan), TheirsWithOurGrid(plan)
    for i, n in enumerate((16, *[1]*40)):
        k, v = states(1, 2, n, 16, seed=i), states(1, 2, n, 16, seed=100 + i)
        for x, y in zip(ours.update(k, v), theirs.update(k, v)):
            # they round the whole cache again each time, which moves a number by what fp16 rounds off the scales
            torch.testing.assert_close(x, y, rtol=0, atol=0.02)
    assert ours.get_seq_length() == theirs.get_seq_length() == 56


@pytest.mark.skipif(any(importlib.util.find_spec(n) for n in ("optimum", "hqq")), reason="a backend is there")
def test_transformers_own_backends_are_not_installed():
    from transformers.cache_utils import QuantizedCache as TheirCache
    for backend in ("quanto", "hqq"):
        with pytest.raises(ImportError): TheirCache(backend, LLAMA)


def test_generate_takes_it_greedily_and_with_beams(model):
    ids = torch.arange(2, 26)[None]
    how = dict(max_new_tokens=12, do_sample=False, pad_token_id=0, eos_token_id=None)
    plain = model.generate(ids, **how)
    assert torch.equal(model.generate(ids, past_key_values=QuantizedCache(Plan(8, group=8, window=8)), **how), plain)
    beams = model.generate(ids, num_beams=3, past_key_values=QuantizedCache(Plan(8, group=8, window=8)), **how)
    assert torch.equal(beams, model.generate(ids, num_beams=3, **how))


def test_batches_are_reordered_repeated_selected_and_forgotten():
    k = states(2, 2, 24, 16)
    layer = QuantizedLayer(SMALL)
    layer.reorder_cache(torch.tensor([1, 0]))                        # nothing in it yet
    layer.update(k, k)
    def now(): return torch.cat([c.unpack_states(layer.packed[0], SMALL, "channel"), layer.keys], -2)
    before = now()
    layer.reorder_cache(torch.tensor([1, 0]))
    assert torch.equal(now(), before.flip(0))
    layer.batch_repeat_interleave(2)
    assert torch.equal(now(), before.flip(0).repeat_interleave(2, 0))
    layer.batch_select_indices(torch.tensor([3]))
    assert torch.equal(now(), before[:1])
    layer.crop(-3)
    assert layer.get_seq_length() == 21 and torch.equal(now(), before[:1, :, :21])
    with pytest.raises(ValueError, match="tokens_to_remove is -6; accepted are -5 to 0"): layer.crop(-6)
    with pytest.raises(ValueError, match="tokens_to_remove is 3"): layer.crop(3)
    layer.reset()
    assert layer.get_seq_length() == 0 == layer.nbytes


# predictions

def test_predicted_bytes_beside_inference_memory():
    a = dict(batch=8, seq=4096)
    kept = inference_memory("llama-3-8b", **a).terms["kv_cache"]
    assert kept == c.predicted_bytes("llama-3-8b", **a)
    eight = inference_memory("llama-3-8b", **a, kv_precision="int8").terms["kv_cache"]
    assert c.predicted_bytes("llama-3-8b", **a, plan=Plan(8, window=0)) == eight*9/8       # scales and minimums
    with pytest.raises(ValueError, match="kv_precision"): inference_memory("llama-3-8b", **a, kv_precision="int4")


@settings(max_examples=25)
@given(st.integers(0, 10_000), st.sampled_from([2, 4, 8]), st.sampled_from(["token", "channel"]), st.floats(0.01, 3))
def test_attention_stays_within_the_bound(seed, bits, by, size):
    q, k, v = (states(1, 2, n, 16, seed=seed + i)*size for i, n in enumerate((3, 32, 32)))
    plan = Plan(bits, keys=by, group=8)
    packed = [c.unpack_states(c.pack_states(x, plan, how), plan, how) for x, how in ((k, plan.keys), (v, plan.values))]
    off = (c.attention(q, *packed) - c.attention(q, k, v)).abs()
    bound = c.attention_bound(q, k, v, plan)
    assert (off <= bound + 1e-6).all()


def test_the_loss_through_a_plain_cache_is_the_loss_without_one(model):
    ids = torch.arange(60)[None] % 64
    got = c.cached_loss(model, ids, DynamicCache(), prompt=20, chunk=7)
    with torch.inference_mode():
        true = torch.nn.functional.cross_entropy(model(ids).logits[0, 19:-1], ids[0, 20:])
    assert got == pytest.approx(float(true), abs=1e-5)
    with pytest.raises(ValueError, match="prompt is 60"): c.cached_loss(model, ids, DynamicCache(), prompt=60)


# the committed measurement

def test_committed_rows_kept_the_predicted_bytes_and_have_provenance():
    held = c.rows()
    assert set(held["rows"]) == set(c.PLANS) and len(held["layers"]) == 30
    for name, row in held["rows"].items():
        assert row["bytes"] == row["predicted"] == c.predicted_bytes("smollm2-135m", 1, 320, c.PLANS[name], 4)
        assert {"torch", "date", "command", "cpu"} <= set(row["provenance"])


def test_on_smollm2_keys_have_outlier_channels_and_rounding_by_channel_halves_their_error():
    layers = c.rows()["layers"]
    assert all(x["keys"]["channel"] < 0.6*x["keys"]["token"] for x in layers)
    # values have no such channels, but in the first layer
    assert all(x["keys"]["outliers"] > 1.5*x["values"]["outliers"] for x in layers[1:])
    assert all(0.75*x["values"]["token"] < x["values"]["channel"] < 1.05*x["values"]["token"] for x in layers[1:])
