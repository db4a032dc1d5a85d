"""The device table holds dense figures with a source, and every name in it resolves."""

import pytest
import torch

from memfit.planner.devices import DEVICES, Device, DeviceError, device, device_reported_as

GPUS = [entry for entry in DEVICES.values() if entry.kind == "cuda"]


@pytest.mark.parametrize("name", DEVICES)
def test_every_name_resolves(name: str) -> None:
    assert device(name).name == name
    assert device(f" {name.upper().replace('-', '_')} ") is DEVICES[name]


@pytest.mark.parametrize("entry", DEVICES.values(), ids=lambda entry: entry.name)
def test_every_entry_is_complete(entry: Device) -> None:
    assert entry.source
    assert "2026" in entry.source
    assert {"float32", "tf32", "float16", "bfloat16"} <= entry.flops.keys()
    assert all(flops > 1e11 for flops in entry.flops.values())
    assert entry.bandwidth_bytes_per_second > 1e10
    assert entry.memory_bytes > 2**30
    assert 0 < entry.compute_efficiency < 1
    assert 0 < entry.bandwidth_efficiency < 1
    assert 0 < entry.launch_seconds < 1e-4
    assert hash(entry) == hash(device(entry.name))


# With structured sparsity these would be twice as much, and with float16 accumulation the
# GeForce cards' would be too.
@pytest.mark.parametrize(
    ("name", "dtype", "flops"),
    [
        ("h100", "bfloat16", 989e12),
        ("h200", "bfloat16", 989e12),
        ("b200", "bfloat16", 2250e12),
        ("a100-40gb", "bfloat16", 312e12),
        ("a100-80gb", "tf32", 156e12),
        ("a100-80gb", "float32", 19.5e12),
        ("l4", "bfloat16", 121e12),
        ("t4", "float16", 65e12),
        ("t4", "bfloat16", 8.1e12),
        ("rtx3090", "float16", 71e12),
        ("rtx4090", "bfloat16", 165.2e12),
        ("rtx5090", "bfloat16", 209.5e12),
        ("mi300x", "bfloat16", 1307.4e12),
    ],
)
def test_peaks_are_dense(name: str, dtype: str, flops: float) -> None:
    assert device(name).peak_flops(dtype) == flops


def test_other_bounds() -> None:
    assert device("l4").bandwidth_bytes_per_second == 300e9
    assert device("a100-40gb").memory_bytes < 40 * 2**30
    assert device("h100").peak_flops("int64") == device("h100").peak_flops("float32")


def test_allocation_and_workspace() -> None:
    assert all(entry.allocation_bytes == 512 for entry in GPUS)
    assert device("a100-80gb").workspace_bytes == 8_519_680
    assert device("h100").workspace_bytes == 32 * 2**20
    assert (device("cpu").allocation_bytes, device("cpu").workspace_bytes) == (1, 0)


@pytest.mark.parametrize("name", ["", "a100", "h1000", "tpu", "cuda:x"])
def test_an_unknown_name_is_refused_with_the_known_ones(name: str) -> None:
    with pytest.raises(DeviceError) as caught:
        device(name)
    assert repr(name) in str(caught.value)
    assert all(repr(known) in str(caught.value) for known in DEVICES)


@pytest.mark.parametrize(
    ("reported", "name"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA A100-SXM4-40GB", "a100-40gb"),
        ("NVIDIA A100 80GB PCIe", "a100-80gb"),
        ("NVIDIA L4", "l4"),
        ("Tesla T4", "t4"),
        ("NVIDIA GeForce RTX 4090", "rtx4090"),
        ("AMD Instinct MI300X", "mi300x"),
    ],
)
def test_a_reported_name_keeps_its_own_memory(reported: str, name: str) -> None:
    present = device_reported_as(reported, 12_345_678_912)
    assert (present.name, present.memory_bytes) == (name, 12_345_678_912)


@pytest.mark.parametrize(
    "reported", ["NVIDIA L40S", "NVIDIA GH200 480GB", "NVIDIA H100 PCIe", "GeForce RTX 4090 Laptop"]
)
def test_a_similar_name_is_not_mistaken(reported: str) -> None:
    with pytest.raises(DeviceError, match="nearest"):
        device_reported_as(reported, 2**35)


def test_a_gpu_of_the_table_has_its_own_compute_capability() -> None:
    found = {name: device(name).compute_capability for name in ("t4", "a100-80gb", "l4", "h100")}
    assert found == {"t4": (7, 5), "a100-80gb": (8, 0), "l4": (8, 9), "h100": (9, 0)}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_cuda_without_a_gpu_names_the_way_out() -> None:
    with pytest.raises(DeviceError, match=r"sees no GPU here.*'h100'"):
        device("cuda")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_cuda_is_the_gpu_of_this_machine() -> None:
    try:
        present = device("cuda")
    except DeviceError as error:
        pytest.skip(str(error))
    assert present.memory_bytes == torch.cuda.get_device_properties("cuda").total_memory
