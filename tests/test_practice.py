"""FSDP2's settings on real ranks: what is gathered, loaded, cast and saved is what nbs_lib.practice predicts."""
from __future__ import annotations

import os
from itertools import product

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("ipykernel")

import torch.distributed as dist  # noqa: E402
from hypothesis import given, settings, strategies as st  # noqa: E402
from torch import nn  # noqa: E402

from nbs_lib import practice  # noqa: E402
from nbs_lib.course.world import RankError  # noqa: E402
from nbs_lib.gpt import GPT, Block, GPTConfig  # noqa: E402
from nbs_lib.kernels import card  # noqa: E402
from nbs_lib.practice import Unit, schedule, units, wrapped  # noqa: E402

SMALL = GPTConfig(layers=3, heads=2, hidden=32, vocab=97, context=16)  # 97 rows: padded on 2 and on 4 ranks
NO_BIAS = GPTConfig(layers=2, heads=2, hidden=16, vocab=30, context=8, bias=False)

TEXT = GPTConfig(layers=1, heads=2, hidden=18, vocab=131, context=8)  # rows that four ranks do not divide


# --- called on ranks


def loaded_right(config: GPTConfig, file: str, way: str) -> list[str]:
    """Names of the weights that differ from the file's."""
    model, truth = practice.load(config, file, way), torch.load(file)
    assert model.head.weight is model.tokens.weight
    return practice.differences({k: v.full_tensor() for k, v in model.state_dict().items()}, truth)


def counted_in_bf16(config: GPTConfig) -> practice.Schedule:
    from torch.distributed.fsdp import MixedPrecisionPolicy
    return practice.counted(config, Block, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))


def saved(config: GPTConfig, folder: str, steps: int) -> dict | None:
    """Train, save; rank 0 brings the whole state."""
    model, optimizer = practice.fresh(config, 3)
    practice.advance(model, optimizer, 0, steps)
    practice.save_sharded(model, optimizer, folder)
    state = practice.whole(model, optimizer)
    return state if dist.get_rank() == 0 else None


def read_back(config: GPTConfig, folder: str) -> dict | None:
    model, optimizer = practice.fresh(config, 4)
    practice.load_sharded(model, optimizer, folder)
    state = practice.whole(model, optimizer)
    return state if dist.get_rank() == 0 else None


def not_there(folder: str) -> str:
    model, optimizer = practice.fresh(NO_BIAS, 0)
    with pytest.raises(ValueError) as e:
        practice.load_sharded(model, optimizer, folder)
    return str(e.value)


def refused_run(config: GPTConfig, batch: int) -> None:
    model, optimizer = practice.fresh(config, 0)
    practice.advance(model, optimizer, 0, 1, batch=batch)


def growth(nbytes: int) -> int:
    with practice.HostPeak() as peak:
        big = bytearray(nbytes)
        big[::1024] = b"x"*len(range(0, nbytes, 1024))  # touched, else the kernel gives no memory
        del big
    return peak.growth


# --- units


def test_policies_choose_by_class_by_size_and_never_what_cannot_be_a_unit():
    model = GPT(SMALL)
    blocks = [f"blocks.{i}" for i in range(3)]
    assert wrapped(model, Block) == wrapped(model, (Block,)) == blocks and wrapped(model, None) == []
    size = sum(p.numel() for p in model.blocks[0].parameters())
    assert wrapped(model, size) == blocks and wrapped(model, size + 1) == []
    everything = wrapped(model, 1)
    assert "blocks" not in everything and "" not in everything            # lists have no forward; the root is not listed
    assert "tokens" not in everything and "head" not in everything        # tied: they share a parameter
    assert {"positions", "norm", "blocks.0.qkv", "blocks.2.norm1"} <= set(everything)
    assert "blocks.0" not in everything                                   # nothing of its own is left


def test_units_hold_every_parameter_once_padded_to_the_ranks():
    for policy, ranks in product((Block, None, 1, 4000, nn.Linear), (2, 3, 4)):
        model = GPT(SMALL)
        whole = sum(-(-p.shape[0]//ranks)*ranks*(p.numel()//p.shape[0])*4 for p in model.parameters())
        root = units(model, policy, ranks)
        assert sum(u.nbytes for u in root.walk()) == whole
        assert {u.name for u in root.walk()} == {"root", *wrapped(model, policy)}
        assert 2*sum(u.nbytes for u in units(model, policy, ranks, torch.bfloat16).walk()) == whole
    with torch.device("meta"):
        assert units(GPT(SMALL), Block, 4) == units(model, Block, 4)


@settings(max_examples=60, deadline=None)
@given(L=st.integers(4, 12), r=st.integers(1, 50), u=st.integers(1, 50), n=st.sampled_from([2, 4, 8]), ahead=st.integers(0, 3), behind=st.integers(0, 3))
def test_equal_blocks_have_closed_forms(L, r, u, n, ahead, behind):
    u, r = 64*u, 64*r
    root = Unit("root", r, tuple(Unit(str(i), u) for i in range(L)))
    s = schedule(root, n, ahead=ahead, behind=behind)
    assert s.peak == max(r + max(3, 2 + ahead, 1 + behind)*u, 2*r + 2*u)    # the root's buffer waits for the first block
    assert (s.gathers, s.sent, s.parameters) == (2*L + 1, (2*L*u + r)*(n - 1)//n, r + u)
    kept = schedule(root, n, reshard=False)
    assert (kept.gathers, kept.sent, kept.parameters) == (L + 1, (L*u + r)*(n - 1)//n, r + L*u)
    assert schedule(root, n, root_reshard=True).gathers == 2*L + 2
    assert schedule(root, n, reshard=n) == schedule(root, n)               # a group of all ranks is no smaller group
    if n > 2:
        half = schedule(root, n, reshard=n//2)
        assert s.parameters < half.parameters < kept.parameters or n//2 >= L
        assert half.sent < s.sent and half.gathers == s.gathers


# --- what is gathered, on ranks

GATHERED = [(Block, {}), (None, {}), (4000, {}), (1, {}), (nn.Linear, {}), (Block, dict(reshard=False)), (Block, dict(reshard=2)), (4000, dict(reshard=2, root_reshard=True)),
            (Block, dict(root_reshard=2)), (Block, dict(ahead=2)), (4000, dict(ahead=1, behind=0)), (Block, dict(behind=2, ahead=3, root_reshard=True))]


@pytest.mark.parametrize("policy, given_settings", GATHERED, ids=lambda x: getattr(x, "__name__", str(x)))
def test_what_is_gathered_is_predicted_to_the_byte(four, policy, given_settings):
    predicted = schedule(units(GPT(SMALL), policy, 4), 4, **given_settings)
    assert four.run(practice.counted, SMALL, policy, **given_settings) == [predicted]*4


def test_on_two_ranks_without_biases_and_in_bf16(two):
    root = units(GPT(NO_BIAS), Block, 2)
    assert two.run(practice.counted, NO_BIAS, Block) == [schedule(root, 2)]*2
    assert two.run(practice.counted, NO_BIAS, Block, reshard=2) == [schedule(root, 2, reshard=2)]*2
    half = schedule(units(GPT(NO_BIAS), Block, 2, torch.bfloat16), 2)
    assert two.run(counted_in_bf16, NO_BIAS) == [half]*2 and 2*half.peak == schedule(root, 2).peak


def test_the_count_tells_settings_apart(two):
    """A count that agreed with every prediction would prove nothing."""
    found = {str(s): two.run(practice.counted, NO_BIAS, Block, **s)[0] for s in ({}, dict(reshard=False), dict(root_reshard=True))}
    assert len(set(found.values())) == 3


# --- loading, precision, checkpoints


@pytest.mark.parametrize("way", practice.WAYS)
def test_every_way_of_loading_gives_the_files_weights(two, tmp_path, way):
    torch.manual_seed(5)
    torch.save(GPT(SMALL).state_dict(), tmp_path/"weights.pt")
    assert two.run(loaded_right, SMALL, str(tmp_path/"weights.pt"), way) == [[], []]


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux's /proc")
def test_the_peak_of_a_process_is_measured_although_the_memory_is_gone(two):
    for n in (64 << 20, 128 << 20, 64 << 20):
        for found in two.run(growth, n):
            assert n <= found + (1 << 20) and found <= n + (8 << 20)


def test_precisions_of_fsdp2_and_of_accelerate(two):
    bf16, fp32 = torch.bfloat16, torch.float32
    found = two.run(practice.fsdp2_precisions, NO_BIAS, bf16, dict(param_dtype=bf16, reduce_dtype=fp32))[0]
    assert found == dict(stored="bf16", gathered="bf16", reduced="fp32", gradient="bf16", optimizer="bf16")
    found = two.run(practice.fsdp2_precisions, NO_BIAS, fp32, None)[0]
    assert set(found.values()) == {"fp32"} and tuple(found) == practice.KINDS
    pytest.importorskip("accelerate")
    found = two.run(practice.accelerate_precisions, NO_BIAS, bf16, "bf16")[0]
    assert found == dict(stored="fp32", gathered="bf16", reduced="bf16", gradient="fp32", optimizer="fp32")
    assert set(two.run(practice.accelerate_precisions, NO_BIAS, bf16, "no")[0].values()) == {"bf16"}


def test_a_checkpoint_is_the_same_on_any_number_of_ranks(four, two, tmp_path):
    for name, writer, reader in (("a", four, two), ("b", two, four)):
        state = writer.run(saved, TEXT, str(tmp_path/name), 2)[0]
        assert state["optimizer"]["state"] and practice.differences(reader.run(read_back, TEXT, str(tmp_path/name))[0], state) == []
    assert "accepted is one that save_sharded wrote" in two.run(not_there, str(tmp_path/"none"))[0]


def test_a_run_goes_on_and_the_check_can_fail(two, tmp_path):
    folder = str(tmp_path)
    (straight, same), _ = two.run(practice.interrupted, practice.RUN, folder, 2, 5)
    assert same is True and two.run(practice.resumed, practice.RUN, folder, 2, 5)[0] == (straight, [])
    losses, lacks = two.run(practice.resumed, practice.RUN, folder, 2, 5, with_optimizer=False)[0]
    assert losses[0] == straight[0] and losses[1:] != straight[1:] and lacks
    assert two.run(practice.own_file, practice.RUN, folder)[0] == "loaded"


def test_differences_are_named():
    a = {"x": {"w": torch.ones(2)}, "n": 1}
    assert practice.differences(a, {"x": {"w": torch.ones(2)}, "n": 1}) == []
    assert practice.differences(a, {"x": {"w": torch.tensor([1, 1.0000001])}, "n": 1}) == ["/x/w"]
    assert sorted(practice.differences(a, {"x": {}, "n": 2})) == ["/n", "/x/w"]


# --- the host, and bad input


def test_another_host_changes_its_links_and_its_updates_only():
    base = card("h100-sxm")
    slow = practice.with_host(base, link=base.gpu.links["pcie"]/2, update=5e7)
    for key, rate in base.measured["links"].items():
        want = rate/2 if key.startswith("to ") else 5e7 if key.startswith("host adamw") else rate
        assert slow.measured["links"][key] == want
    assert practice.with_host(base) == base and slow.host_optimizer("adamw", 2) == 5e7


@pytest.mark.parametrize("call, says", [
    (lambda: wrapped(GPT(NO_BIAS), "Block"), "policy is 'Block'; accepted are a class of modules"),
    (lambda: wrapped(GPT(NO_BIAS), 0), "policy is 0;"), (lambda: units(GPT(NO_BIAS), int, 2), "policy is <class 'int'>"),
    (lambda: units(GPT(NO_BIAS), Block, 1), "ranks is 1; accepted is a whole number from 2"),
    (lambda: schedule(Unit("root", 4), 4, reshard=3), "reshard is 3; accepted are True, False, and a divisor of ranks, 4"),
    (lambda: schedule(Unit("root", 4), 4, root_reshard=1), "root_reshard is 1"), (lambda: schedule(Unit("root", 4), 4, ahead=-1), "ahead is -1"),
    (lambda: schedule(Unit("root", 4), 4, behind=.5), "behind is 0.5"), (lambda: practice.host_models(2, "mmap"), "way is 'mmap'; accepted are build, read, send"),
    (lambda: practice.adamw_rate(True, torch.float32), "threads is True"), (lambda: practice.with_host(card("h100-sxm"), link=0), "link is 0"),
])
def test_bad_input_is_a_sentence(call, says):
    with pytest.raises(ValueError) as e:
        call()
    assert says in str(e.value)


def test_runs_that_cannot_be_are_told(two):
    with pytest.raises(RankError, match="batch is 7; accepted is a multiple of the ranks, 2"):
        two.run(refused_run, TEXT, 7)
    with pytest.raises(RankError, match="vocab is 30; accepted is 128 or more"):
        two.run(refused_run, NO_BIAS, 8)
