"""A GPU agrees with the CPU up to rounding, and with itself to the last bit. Skipped without one."""

import math
from pathlib import Path

import pytest
import torch
import toy_workers
from tiny import all_families, ids_for, random_keep, save_family, tiny_llama

from nirvana.allocation import Allocation, allocate
from nirvana.benchmark import Workload, benchmark
from nirvana.divergence import kl_divergence
from nirvana.saliency import channel_saliency, unit_saliency
from nirvana.walk import Stack, final_hidden_states
from tasks.params import Runtime
from tasks.workers import runners
from tasks.workers.child import fix_torch
from tasks.workers.jobs import Job

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
needs_two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA GPUs")

RTOL = 1e-3
FAMILIES = all_families()


@pytest.fixture(autouse=True)
def as_a_step_computes():
    threads = torch.get_num_threads()
    fix_torch(threads)
    yield
    torch.use_deterministic_algorithms(False)


def assert_equal(left, right):
    assert left.objective == right.objective
    assert left.sums.keys() == right.sums.keys()
    assert all(torch.equal(left.sums[key], right.sums[key]) for key in left.sums)


@pytest.mark.parametrize("name", FAMILIES)
def test_saliency_is_that_of_the_cpu(name, tmp_path):
    save_family(name, tmp_path)
    ids = ids_for(name, 4, 12)
    on_cpu, on_gpu = (channel_saliency(Stack.open(tmp_path, device), ids) for device in ("cpu", "cuda"))
    assert on_gpu.objective == pytest.approx(on_cpu.objective, rel=RTOL)
    for key, vector in on_cpu.sums.items():
        assert on_gpu.sums[key].device.type == "cpu"
        torch.testing.assert_close(on_gpu.sums[key], vector, rtol=RTOL, atol=1e-5 * float(vector.max()))


@pytest.mark.parametrize("name", ["llama", "qwen3", "t5-relu-tied"])
def test_kept_units_differ_at_the_cut_only(name, tmp_path):
    save_family(name, tmp_path)
    ids = ids_for(name, 4, 12)
    sites = Stack.open(tmp_path).architecture.sites()
    saliency, keep = {}, {}
    for device in ("cpu", "cuda"):
        units = unit_saliency(sites, channel_saliency(Stack.open(tmp_path, device), ids).sums)
        saliency[device] = {site: values.numpy() for site, values in units.items()}
        keep[device] = allocate(sites, saliency[device], Allocation(0.4, gamma=1.5, round_to=1))
    for module in ("attention", "mlp"):
        differing = [
            saliency["cpu"][site.name][unit]
            for site in sites
            if site.module == module
            for unit in set(keep["cpu"][site.name]) ^ set(keep["cuda"][site.name])
        ]
        # units that changed places are as good as each other
        assert not differing or max(differing) <= min(differing) * (1 + 4 * RTOL)


@pytest.mark.parametrize("name", FAMILIES)
def test_saliency_is_the_same_to_the_last_bit_whenever_and_however(name, tmp_path):
    save_family(name, tmp_path)
    ids = ids_for(name, 4, 12)
    first = channel_saliency(Stack.open(tmp_path, "cuda"), ids)
    assert_equal(channel_saliency(Stack.open(tmp_path, "cuda"), ids), first)
    assert_equal(channel_saliency(Stack.open(tmp_path, "cuda"), ids, memory="fast"), first)
    assert_equal(channel_saliency(Stack.open(tmp_path, "cuda", execution="streamed"), ids), first)


def test_many_tokens_on_few_units_are_the_same_to_the_last_bit(tmp_path):
    """Sums of thousands of terms, where additions in any order would show."""
    save_family("llama", tmp_path)
    ids = ids_for("llama", 8, 256)
    first = channel_saliency(Stack.open(tmp_path, "cuda"), ids, microbatch=8)
    for _ in range(3):
        assert_equal(channel_saliency(Stack.open(tmp_path, "cuda"), ids, microbatch=8), first)


@pytest.mark.parametrize("name", FAMILIES)
def test_kl_is_that_of_the_cpu_and_repeats(name, tmp_path):
    save_family(name, tmp_path)
    ids = ids_for(name, 3, 15)
    keep = random_keep(Stack.open(tmp_path).architecture.sites())
    values = []
    for device, execution in (("cpu", "resident"), ("cuda", "resident"), ("cuda", "streamed"), ("cuda", "resident")):
        stack = Stack.open(tmp_path, device, execution=execution)
        values.append(kl_divergence(stack, keep, ids, final_hidden_states(stack, ids)))
    assert values[1] == values[2] == values[3]
    assert values[1] == pytest.approx(values[0], rel=RTOL)


def test_benchmark_measures_the_gpu(tmp_path):
    dense, smaller = tiny_llama(tmp_path / "dense", intermediate_size=8192), tiny_llama(tmp_path / "smaller")
    workload = Workload(batch_size=2, prompt_length=16, decode_tokens=4, repeats=2, warmup=1)
    result = benchmark(dense, smaller, workload, torch.device("cuda"))
    assert result["machine"]["device"] == torch.cuda.get_device_name()
    for name in ("dense", "pruned"):
        assert all(math.isfinite(value) and value > 0 for value in result[name].values())
    weights = result["dense"]["parameters"] * 4
    assert result["dense"]["peak_bytes"] >= weights
    assert result["pruned"]["peak_bytes"] < result["dense"]["peak_bytes"]


@needs_two_gpus
@pytest.mark.slow
def test_processes_take_one_gpu_each(tmp_path):
    runtime = Runtime("cuda", "auto", "auto", "processes", 2, None)
    jobs = [Job(index, Path(f"{index}"), {}, {"folder": str(tmp_path)}) for index in range(4)]
    found = set()
    runners.run(
        toy_workers.gpu, jobs, runtime, 2, torch.device("cuda"), lambda job, value: found.add(value), lambda share: None
    )
    assert found == {b"cuda:0 0", b"cuda:1 1"}


@needs_two_gpus
def test_gpus_of_one_machine_agree_to_the_last_bit(tmp_path):
    save_family("llama", tmp_path)
    ids = ids_for("llama", 4, 12)
    first, second = (channel_saliency(Stack.open(tmp_path, device), ids) for device in ("cuda:0", "cuda:1"))
    assert_equal(first, second)
