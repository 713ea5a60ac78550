"""nbs_lib.hardware: physics that the table must obey, names, and detection against fake nvidia-smi programs."""
import copy
import dataclasses
import math
import os
import pickle
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import assume, given, settings, strategies as st

from nbs_lib import hardware
from nbs_lib.hardware import GB, GPU, GiB, KINDS, MiB, detect, detect_why, format_bytes, format_rate, gpu, gpus, parse_smi, per_clock, squash

ROOT = Path(__file__).resolve().parent.parent
NAMES = [g.name for g in gpus()]
card = pytest.mark.parametrize("g", gpus(), ids=NAMES)
CONTRACT = {"h100-sxm", "h100-pcie", "h200", "b200", "a100-80gb-sxm", "a100-40gb-sxm", "a100-80gb-pcie", "a100-40gb-pcie",
            "a10", "l4", "l40s", "rtx-3090", "rtx-4090", "rtx-5090", "tpu-v5e", "tpu-v5p"}


def numbers(g: GPU) -> set[str]:
    """The names of a card's numbers."""
    plain = {n for n in ("memory", "usable", "bandwidth", "power", "sms", "capability", "clock", "tensor_clock", "bus_bits", "pin_rate")
             if getattr(g, n) is not None}
    return plain | {f"flops.{d}" for d in g.flops} | {f"links.{k}" for k in g.links}


# ------------------------------------------------------------------------------------------------ the table

def test_the_cards_of_the_course_are_there():
    assert CONTRACT <= set(NAMES) and len(set(NAMES)) == len(NAMES)


@card
def test_kinds_and_ranges(g):
    assert type(g.memory) is int and 0 < g.memory < 2**40
    assert g.usable is None or type(g.usable) is int and 0.95 * g.memory < g.usable < g.memory
    assert all(1e8 < v < 1e17 and isinstance(v, float) for v in (g.bandwidth, *g.flops.values(), *g.links.values()))
    assert "bf16" in g.flops and "pcie" in g.links
    assert set(g.flops) <= {"fp32", "tf32", "fp16", "bf16", "fp8", "int8", "fp4"} and set(g.links) <= {"nvlink", "pcie", "ici"}
    assert g.memory_basis in ("driver", "nominal")


@card
def test_the_box_says_gib_but_for_check_bits(g):
    share = g.memory / (g.box * GiB)
    gddr_with_ecc = g.name in ("a10", "l4", "l40s")
    assert 15 / 16 - 0.002 < share < 15 / 16 if gddr_with_ecc else 0.99 < share <= 1


# What the makers' architecture papers give for dense bf16 with fp32 accumulation, FLOP per clock and multiprocessor.
BF16_PER_CLOCK = {"h100-sxm": 4096, "h100-pcie": 4096, "h200": 4096, "a100-80gb-sxm": 2048, "a100-40gb-sxm": 2048,
                  "a100-80gb-pcie": 2048, "a100-40gb-pcie": 2048, "a10": 1024, "l4": 1024, "l40s": 1024,
                  "rtx-3090": 512, "rtx-4090": 512, "rtx-5090": 512}


@card
def test_rates_are_multiprocessors_times_clock_and_dense(g):
    """A sparse or an fp16-accumulate rate in place of a dense fp32-accumulate one would be off by two."""
    if per_clock(g) is None:
        assert g.name in ("b200", "tpu-v5e", "tpu-v5p")
        return
    assert per_clock(g) == pytest.approx(BF16_PER_CLOCK[g.name], rel=0.015)
    assert per_clock(g, "fp32") == pytest.approx(128 if g.name.startswith("a100") else 256, rel=0.015)
    for dtype in g.flops:
        each = per_clock(g, dtype)
        assert each == pytest.approx(2 ** round(math.log2(each)), rel=0.02), dtype


@card
def test_narrower_types_are_never_slower(g):
    order = [g.flops[d] for d in ("fp32", "tf32", "bf16", "fp8", "fp4") if d in g.flops]
    assert order == sorted(order)
    assert g.flops.get("fp16", g.flops["bf16"]) == g.flops["bf16"]
    geforce = g.name.startswith("rtx")
    assert g.flops["int8"] / g.flops["bf16"] == pytest.approx(4 if geforce else 2, rel=0.02)
    if "tf32" in g.flops:
        assert g.flops["bf16"] / g.flops["tf32"] == pytest.approx(2, rel=0.02)
        assert (g.flops["tf32"] == g.flops["fp32"]) == geforce


@card
def test_bandwidth_is_wires_times_rate(g):
    if g.bus_bits and g.pin_rate:
        assert g.bandwidth == pytest.approx(g.bus_bits * g.pin_rate / 8, rel=0.02)


def test_links_are_one_direction():
    for name, links, each in (("a100-80gb-sxm", 12, 25e9), ("h100-sxm", 18, 25e9), ("h200", 18, 25e9), ("b200", 18, 50e9), ("rtx-3090", 4, 14.0625e9)):
        assert gpu(name).links["nvlink"] == links * each
    for g in gpus():
        assert g.links["pcie"] in ((32e9, 64e9) if g.capability else (15e9,))       # x16 of generation 4 or 5
        assert g.links.get("nvlink", 0) < g.bandwidth
    assert not any("nvlink" in gpu(n).links for n in ("a10", "l4", "l40s", "rtx-4090", "rtx-5090"))


@card
def test_ridge(g):
    assert g.ridge() == g.flops["bf16"] / g.bandwidth and 50 < g.ridge() < 500
    for dtype, rate in g.flops.items():
        assert g.ridge(dtype) * g.bandwidth == pytest.approx(rate)
    for bad in ("fp64", "BF16", "", None, 16, ["bf16"]):
        for ask in (g.ridge, lambda d: per_clock(g, d)):
            with pytest.raises(ValueError, match="dtype=.*bf16"):
                ask(bad)


def test_measured_here():
    """nvidia-smi on the project's own machines."""
    assert gpu("h100-sxm").memory == 81559 * MiB and gpu("h100-sxm").evidence("memory") == "measured"
    assert gpu("h200").memory == 143771 * MiB and gpu("h200").evidence("memory") == "measured"


# ------------------------------------------------------------------------------------------------ sources

@card
def test_every_number_has_a_source_or_is_marked(g):
    assert {n for n in numbers(g) if g.evidence(n) == "unverified"} == g.unverified
    for s in g.sources:
        assert s.title and s.address and s.date and s.kind in KINDS and s.supports
        assert set(s.supports) <= numbers(g) | {"flops", "links"}, f"{s.title} supports what {g.name} has not"


@card
def test_without_sources_everything_is_unverified(g):
    assert dataclasses.replace(g, sources=()).unverified == numbers(g)


def test_evidence_is_the_best_source():
    g = gpu("h100-sxm")
    assert g.evidence("flops.bf16") == "vendor" and g.evidence("flops.tf32") == "transcript"
    for bad in ("price", "flops.fp4", "flops", ""):
        with pytest.raises(ValueError, match="number=.*bandwidth"):
            g.evidence(bad)


# ------------------------------------------------------------------------------------------------ facts stay facts

@card
def test_read_only(g):
    for table, key in ((g.flops, "bf16"), (g.links, "pcie")):
        before = dict(table)
        for write in (lambda: table.__setitem__(key, 1), lambda: table.update({key: 1}), lambda: table.pop(key), table.clear,
                      lambda: table.setdefault("x", 1), table.popitem, lambda: table.__delitem__(key), lambda: table.__ior__({key: 1})):
            with pytest.raises(TypeError, match="read-only"):
                write()
        assert table == before
        with pytest.raises(KeyError, match="this card has"):
            table["no such key"]
        assert table.get("no such key") is None
    with pytest.raises(dataclasses.FrozenInstanceError):
        g.memory = 1


@card
def test_copies_and_pickles_are_equal(g):
    for twin in (copy.copy(g), copy.deepcopy(g), pickle.loads(pickle.dumps(g))):
        assert twin == g and hash(twin) == hash(g) and twin.flops == g.flops and twin.unverified == g.unverified
    assert len({g, copy.deepcopy(g)}) == 1
    assert len(repr(g)) < 1500


# ------------------------------------------------------------------------------------------------ names

DRIVER = {"NVIDIA H100 80GB HBM3": "h100-sxm", "NVIDIA H100 PCIe": "h100-pcie", "NVIDIA H200": "h200", "NVIDIA B200": "b200",
          "NVIDIA A100-SXM4-80GB": "a100-80gb-sxm", "NVIDIA A100-SXM4-40GB": "a100-40gb-sxm", "A100-SXM4-40GB": "a100-40gb-sxm",
          "NVIDIA A100 80GB PCIe": "a100-80gb-pcie", "NVIDIA A100-PCIE-40GB": "a100-40gb-pcie", "NVIDIA A10": "a10", "NVIDIA L4": "l4",
          "NVIDIA L40S": "l40s", "NVIDIA GeForce RTX 3090": "rtx-3090", "NVIDIA GeForce RTX 4090": "rtx-4090", "GeForce RTX 3090": "rtx-3090",
          "NVIDIA GeForce RTX 5090": "rtx-5090", "TPU v5 lite": "tpu-v5e", "TPU v5p": "tpu-v5p"}


@pytest.mark.parametrize("spoken, name", [*DRIVER.items(), ("H100 SXM", "h100-sxm"), ("rtx4090", "rtx-4090"), ("4090", "rtx-4090"),
                                          (" h100_sxm ", "h100-sxm"), ("A100 SXM 80GB", "a100-80gb-sxm"), ("v5e", "tpu-v5e")])
def test_aliases(spoken, name):
    assert gpu(spoken) is gpu(name) and gpu(name).name == name


@given(st.sampled_from(gpus()), st.data())
def test_spelling_does_not_matter(g, data):
    words = g.name.split("-")
    gaps = data.draw(st.lists(st.sampled_from(["", " ", "-", "_", " - "]), min_size=len(words), max_size=len(words)))
    upper = data.draw(st.lists(st.booleans(), min_size=len(words), max_size=len(words)))
    spoken = "".join((w.upper() if u else w) + gap for w, u, gap in zip(words, upper, gaps))
    prefix = data.draw(st.sampled_from(["", "NVIDIA ", "nvidia-", "GeForce ", "NVIDIA GeForce "]))
    assert gpu(prefix + spoken) is g


@given(st.one_of(st.text(), st.text(alphabet="nvidiageforcetpuNVIDIA hxa10l4-_ 5")))
def test_squash_is_idempotent(text):
    assert squash(squash(text)) == squash(text)


@given(st.one_of(st.text(max_size=400), st.sampled_from(sorted(DRIVER)).flatmap(lambda n: st.text("abdgilmnotxz0123 ", min_size=1).map(lambda t: n + t))))
@settings(max_examples=300)
def test_unknown_names_are_refused_by_name(name):
    assume(squash(name) not in hardware._NAMES and squash(name) not in hardware._FAMILIES)
    with pytest.raises(ValueError) as refused:
        gpu(name)
    message = str(refused.value)
    assert message.startswith("gpu=") and repr(name[:60])[1:-1][:50] in message and all(n in message for n in NAMES) and len(message) < 1200


@pytest.mark.parametrize("name", ["A10G", "NVIDIA A10G", "L40", "NVIDIA L40", "NVIDIA H100 NVL", "NVIDIA H200 NVL", "NVIDIA GH200 480GB",
                                  "NVIDIA H100 80GB HBM2e", "NVIDIA GeForce RTX 4090 D", "NVIDIA GeForce RTX 4090 Laptop GPU", "RTX 3090 Ti",
                                  "NVIDIA GeForce RTX 5090 D", "NVIDIA A100X", "NVIDIA A800-SXM4-80GB", "NVIDIA B300", "NVIDIA GB200", "A40",
                                  "NVIDIA RTX A6000", "Tesla T4", "TPU v6e", "h100-sxm0", "h 100 sxm 4"])
def test_neighbours_do_not_pass(name):
    with pytest.raises(ValueError, match="not in the table"):
        gpu(name)


def test_near_names_are_offered():
    for typo, meant in (("rtx 4900", "rtx-4090"), ("h100-smx", "h100-sxm"), ("l40z", "l40s"), ("a100-80gb-sxn", "a100-80gb-sxm")):
        with pytest.raises(ValueError, match=f"Near:.*{meant}"):
            gpu(typo)


@pytest.mark.parametrize("name, cards", [("h100", {"h100-sxm", "h100-pcie"}), ("NVIDIA H100", {"h100-sxm", "h100-pcie"}),
                                         ("H100 80GB", {"h100-sxm", "h100-pcie"}), ("A100", {n for n in NAMES if n.startswith("a100")}),
                                         ("a100-sxm", {"a100-80gb-sxm", "a100-40gb-sxm"}), ("a100 pcie", {"a100-80gb-pcie", "a100-40gb-pcie"}),
                                         ("a100-80gb", {"a100-80gb-sxm", "a100-80gb-pcie"}), ("TPU", {"tpu-v5e", "tpu-v5p"})])
def test_ambiguous_names_say_what_differs(name, cards):
    with pytest.raises(ValueError) as refused:
        gpu(name)
    message = str(refused.value)
    listed = {line.strip().split(":")[0] for line in message.splitlines()[1:]}
    assert listed == cards and f"{len(cards)} cards" in message and "x in " in message


def test_ambiguous_h100_states_the_factor():
    with pytest.raises(ValueError, match=r"1\.68x in bandwidth and 1\.31x in bf16"):
        gpu("h100")


@given(st.one_of(st.none(), st.integers(), st.floats(), st.binary(), st.lists(st.text()), st.dictionaries(st.text(), st.text()), st.booleans()))
def test_what_is_no_name_is_refused(junk):
    with pytest.raises(ValueError, match="give a card's name"):
        gpu(junk)


def test_gpu_objects_pass_through_and_lists_are_fresh():
    mine = dataclasses.replace(gpu("l4"), memory=16 * GiB)
    assert gpu(mine) is mine and gpu("l4").memory != mine.memory
    gpus().clear()
    assert [g.name for g in gpus()] == NAMES


# ------------------------------------------------------------------------------------------------ units

def test_units():
    assert (MiB, GiB, GB) == (2**20, 2**30, 10**9)
    assert [format_bytes(n) for n in (0, 1023, 1024, GiB, 81559 * MiB, 2**41)] == ["0 B", "1023 B", "1 KiB", "1 GiB", "79.65 GiB", "2 TiB"]
    assert [format_rate(3.35e12, "B/s"), format_rate(989.4e12), format_rate(12.0, "B/s")] == ["3.35 TB/s", "989.4 TFLOP/s", "12 B/s"]


@given(st.integers(0, 2**60))
def test_printed_bytes_are_close_and_labelled(n):
    value, unit = format_bytes(n).split()
    scale = {"B": 1, "KiB": 2**10, "MiB": MiB, "GiB": GiB, "TiB": 2**40}[unit]
    assert float(value) * scale == pytest.approx(n, rel=1e-3)


# ------------------------------------------------------------------------------------------------ imports

def test_imports_the_standard_library_only_and_fast():
    code = ("import sys, time; before = set(sys.modules); t = time.perf_counter(); import nbs_lib.hardware; t = time.perf_counter() - t\n"
            "print(t, *sorted({m.split('.')[0] for m in set(sys.modules) - before}))")
    runs = [subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split() for _ in range(5)]
    assert set(runs[0][1:]) <= sys.stdlib_module_names | {"nbs_lib"}
    assert not {"subprocess", "difflib"} & set(runs[0][1:]), "imported when needed, not before"
    assert min(float(r[0]) for r in runs) < 0.05


# ------------------------------------------------------------------------------------------------ detection

GOOD = "NVIDIA H100 80GB HBM3, 81559, 580.159.04, 700.00, Disabled"


@pytest.fixture
def smi(tmp_path, monkeypatch):
    """A function that puts a fake nvidia-smi, a shell script, first on PATH."""
    def install(script: str, mode: int = 0o755) -> Path:
        program = tmp_path / "nvidia-smi"
        program.write_text("#!/bin/sh\n" + script + "\n")
        program.chmod(mode)
        monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
        return tmp_path
    return install


def say(*lines: str) -> str:
    return "cat <<'EOF'\n" + "\n".join(lines) + "\nEOF"


def test_detect_one_card(smi):
    folder = smi(f'echo "$@" > {"$(dirname $0)"}/asked\n' + say(GOOD))
    [found] = detect()
    assert found.gpu is gpu("h100-sxm") and found.memory == 81559 * MiB and found.driver == "580.159.04"
    assert found.power_limit == 700.0 and not found.mig and found.reason == ""
    asked = (folder / "asked").read_text()
    assert "--query-gpu=name,memory.total,driver_version,power.limit" in asked and "--format=csv,noheader,nounits" in asked


def test_detect_two_cards(smi):
    smi(say(GOOD, "NVIDIA L4, 23034, 580.159.04, 72.00, [N/A]"))
    assert [c.gpu.name for c in detect()] == ["h100-sxm", "l4"]
    assert detect_why()[1] == "nvidia-smi lists 2 card(s)"


@pytest.mark.parametrize("name, memory", [(n, gpu(c).memory // MiB) for n, c in DRIVER.items() if gpu(c).capability])
def test_detect_every_card_of_the_table(smi, name, memory):
    smi(say(f"{name}, {memory}, 550.54.15, 300.00, [N/A]"))
    assert detect()[0].gpu is gpu(name)


def test_detect_missing(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert detect() == [] and "no nvidia-smi on PATH" in detect_why()[1]


def test_detect_failing(smi):
    smi('echo "NVIDIA-SMI has failed because it couldn\'t communicate with the NVIDIA driver."; exit 9')
    found, why = detect_why()
    assert found == [] and "exit status 9" in why and "couldn't communicate" in why


def test_detect_failing_after_printing_a_card(smi):
    smi(say(GOOD) + "\nexit 1")
    assert detect() == []


def test_detect_no_devices(smi):
    smi('echo "No devices were found"')
    assert detect() == [] and "No devices were found" in detect_why()[1]


def test_detect_not_executable_or_no_program(smi, tmp_path):
    smi("echo", mode=0o644)
    os.environ["PATH"] = str(tmp_path)          # monkeypatch restores it
    assert detect() == []
    (tmp_path / "nvidia-smi").write_bytes(b"\x7fELF no")
    (tmp_path / "nvidia-smi").chmod(0o755)
    assert detect() == [] and detect_why()[1].startswith("nvidia-smi cannot be run")


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_detect_hanging_is_ended_with_its_children(smi):
    """The shell's child holds the pipe open: ending the shell alone would leave us waiting for it."""
    folder = smi('sleep 60 &\necho $$ $! > "$(dirname "$0")/pids"\nwait')
    start = time.perf_counter()
    found, why = detect_why(timeout=0.5)
    assert found == [] and "did not answer within 0.5 s" in why and time.perf_counter() - start < 5
    deadline = time.monotonic() + 5
    pids = [int(p) for p in (folder / "pids").read_text().split()]
    while any(map(alive, pids)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert len(pids) == 2 and not any(map(alive, pids))


@pytest.mark.parametrize("garbage", ["<html>502 Bad Gateway</html>", "a,b,c,d,e", ",,,,", "name, memory.total [MiB], driver_version, power.limit [W], mig",
                                     "Unable to determine the device handle for GPU0000:01:00.0: GPU is lost.", "NVIDIA H100 80GB HBM3"])
def test_detect_garbage(smi, garbage):
    smi(say(garbage))
    assert detect() == []


def test_detect_binary_garbage_and_a_flood(smi):
    smi("head -c 300000 /dev/urandom")
    assert detect() == [] and len(detect_why()[1]) < 400


def test_detect_passes_over_warnings(smi):
    smi(say("WARNING: infoROM is corrupted at gpu 0000:00:1E.0", GOOD, ""))
    assert [c.gpu.name for c in detect()] == ["h100-sxm"]


def test_detect_unknown_card_is_named_and_not_guessed(smi):
    smi(say("NVIDIA RTX 9999 Ultra, 98304, 999.10, 800.00, [N/A]", GOOD))
    unknown, known = detect()
    assert unknown.gpu is None and unknown.name == "NVIDIA RTX 9999 Ultra" and unknown.memory == 98304 * MiB
    assert "NVIDIA RTX 9999 Ultra" in unknown.reason and "not in the table" in unknown.reason
    assert known.gpu is gpu("h100-sxm")


def test_detect_other_memory_is_another_card(smi):
    smi(say("NVIDIA GeForce RTX 4090, 49140, 570.86, 450.00, [N/A]"))      # a card with twice the memory soldered on
    [found] = detect()
    assert found.gpu is None and "47.99 GiB" in found.reason and "23.99 GiB" in found.reason


def test_detect_a_slice_is_another_card(smi):
    smi(say("NVIDIA H100 80GB HBM3, 40448, 580.159.04, 700.00, Disabled"))
    assert detect()[0].gpu is None


def test_detect_older_driver_and_ecc_off_are_the_same_card(smi):
    smi(say("NVIDIA A100-SXM4-80GB, 81251, 470.57.02, 400.00, Disabled", "NVIDIA A10, 24564, 535.54.03, 150.00, [N/A]"))
    assert [c.gpu.name for c in detect()] == ["a100-80gb-sxm", "a10"]


def test_detect_mig(smi):
    smi(say("NVIDIA A100-SXM4-80GB, 81920, 580.159.04, 400.00, Enabled"))
    [found] = detect()
    assert found.mig and found.gpu is None and "MIG" in found.reason and "a100-80gb-sxm" in found.reason


def test_detect_driver_that_does_not_know_mig(smi):
    smi('case "$1" in *mig*) echo "Field \\"mig.mode.current\\" is not a valid field to query."; exit 2;; esac\n'
        'echo "GeForce RTX 3090, 24576, 440.100, 350.00"')
    [found] = detect()
    assert found.gpu is gpu("rtx-3090") and not found.mig


def test_detect_fields_that_the_driver_withholds(smi):
    smi(say("NVIDIA L4, [N/A], 580.95.05, [Not Supported], [N/A]"))
    [found] = detect()
    assert found.memory is None and found.power_limit is None and found.gpu is gpu("l4")


@pytest.mark.parametrize("bad", [0, -1, None, "10", float("nan"), float("inf"), True])
def test_detect_bad_timeout(bad):
    with pytest.raises(ValueError, match="timeout=.*positive number"):
        detect(timeout=bad)


# Names, numbers and noise in the places where nvidia-smi prints its columns.
CELL = st.one_of(st.text(max_size=12), st.sampled_from(["NVIDIA L4", "H100", "81559", "1e400", "nan", "-5", "[N/A]", "580.1", "Enabled", "٣"]))


@given(st.one_of(st.text(), st.lists(st.lists(CELL, min_size=3, max_size=6).map(", ".join)).map("\n".join)))
@settings(max_examples=300)
def test_parse_never_raises_and_never_guesses(text):
    for found in parse_smi(text):
        assert found.name and (found.gpu is None) == bool(found.reason)
        assert found.memory is None or type(found.memory) is int and found.memory > 0
        if found.gpu:
            assert gpu(found.name) is found.gpu and not found.mig
