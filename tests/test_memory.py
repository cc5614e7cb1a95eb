"""What a run takes: counted by hand, and against the peaks of real runs."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import paddle
import pytest
from helpers import ROOT, add_lora, flags, lora_config, random_glm
from paddlenlp.transformers import GLMConfig, GLMForConditionalGeneration

from glm import arguments, device
from glm.decoding.cache import prefill
from glm.errors import Fault, as_input_error
from glm.training import memory
from glm.training.flat_optimizer import FlatAdamW
from glm.weights.shapes import count_parameters


@pytest.mark.parametrize("config", [None, lora_config(), lora_config(["dense_h_to_4h"], r=5)])
def test_parameters_are_counted(config):
    model = random_glm(num_layers=3)
    whole = trained = None
    if config:
        model = add_lora(model, config)
        trained = sum(weight.size for weight in model.parameters() if not weight.stop_gradient)
    whole = sum(weight.size for weight in model.parameters())
    assert count_parameters(model.config, 1, config) == (whole, trained or whole)


def test_memory_of_several_processes_by_hand():
    """GLM-10B on 8 processes: an eighth of each linear and of the embedding, norms and positions whole."""
    config = GLMConfig(num_layers=48, hidden_size=4096, num_attention_heads=64, vocab_size=50048)
    linears = 48 * (4096 * (3 + 1 + 4 + 4) * 4096 + (3 + 4) * 4096) + 50048 * 4096
    whole = 48 * (2 + 4) * 4096 + 2 * (config.max_sequence_length + 1) * 4096 + 2 * 4096
    assert count_parameters(config, 8) == (linears // 8 + whole,) * 2
    setting = memory.Setting(config, 2, 608, 160, "O2", recompute=True, degree=8)
    needs = memory.training_memory(setting)
    count = linears // 8 + whole
    assert needs["weights"] == 2 * count and needs["optimizer"] == 12 * count  # two moments, master weights
    assert needs["gradients"] == 4 * count  # in float32; fleet clips them in place
    assert needs["total"] == sum(size for name, size in needs.items() if name != "total")
    adapter = memory.training_memory(dataclasses.replace(setting, lora_config=lora_config()))
    assert adapter["optimizer"] < needs["optimizer"] / 100 and adapter["total"] < 0.25 * needs["total"]


def allocated():
    return paddle.base.core.host_memory_stat_current_value("Allocated", 0)


def test_clipped_gradients_are_counted():
    """Of one process: Paddle 2 makes them anew, Paddle 3 does not."""
    weights = [paddle.create_parameter([256, 256], "float32") for _ in range(8)]
    sum((weight * 100).sum() for weight in weights).backward()
    gradients = [(weight, weight.grad) for weight in weights]
    before = allocated()
    clipped = paddle.nn.ClipGradByGlobalNorm(1.0)(gradients)
    copies = 1 + (allocated() - before) / (8 * 256 * 256 * 4)
    assert float(sum((gradient**2).sum() for _, gradient in clipped)) == pytest.approx(1, abs=1e-3)
    assert 4 * copies == pytest.approx(memory.gradients_at_update(memory.Setting(None, 1, 1, 1), 1), abs=0.04)
    assert memory.gradients_at_update(memory.Setting(None, 1, 1, 1, degree=2), 1) == 4


def test_what_accumulation_adds_up_is_counted(monkeypatch):
    """In float32, beside the half gradients of the pass that runs: of all weights that have half copies."""
    model = paddle.nn.Sequential(paddle.nn.Linear(256, 256))
    adamw = paddle.optimizer.AdamW(parameters=model.parameters(), apply_decay_param_fun=lambda name: True)
    optimizer = FlatAdamW(adamw, model, "bfloat16")
    for leaf in optimizer.groups[0].leaves:
        leaf.grad = paddle.zeros(leaf.shape, leaf.dtype)
    before = allocated()
    optimizer.accumulate_gradients()
    count = 256 * 256 + 256
    assert allocated() - before == pytest.approx((4 - 2) * count, rel=0.02)
    setting = memory.Setting(GLM_LARGE, 2, 608, 160, "O1", recompute=True, on_cpu=False, paddle_2=False)
    accumulating = dataclasses.replace(setting, accumulates=True)
    update = [memory.gradients_at_update(each, count) for each in (setting, accumulating)]
    assert update[1] - update[0] == 4 * count
    monkeypatch.setattr(memory, "_add_largest", lambda _, peaks: peaks["first layer"])
    gradients = [memory.training_memory(each)["gradients"] for each in (setting, accumulating)]
    assert gradients[1] - gradients[0] == 4 * 24 * 12 * 1024**2


@pytest.mark.parametrize("precision, megabytes", [("float32", 182.5), ("O1", 97.5), ("O2", 91.3)])
def test_what_a_layer_keeps_on_a_card(precision, megabytes):
    """Against Paddle's allocator on a custom device, where a layer of GLM-Large's width kept so much.

    For O1 that was 169.8 while the softmax was float32, and cast: 6 bytes of each of 18.9 million numbers
    where there are 2 now.
    """
    config = GLMConfig(
        num_layers=4,
        hidden_size=1024,
        num_attention_heads=16,
        vocab_size=50048,
        attention_dropout_prob=0.0,
        output_dropout_prob=0.0,
    )
    kept, _ = memory._layer_memory(memory.Setting(config, 2, 608, 160, precision, on_cpu=False))
    assert kept / 1e6 == pytest.approx(megabytes, rel=0.01)


@paddle.no_grad()
@pytest.mark.parametrize("cpu", [True, False])
def test_the_cache_is_counted(monkeypatch, cpu):
    """A card has slots for all tokens at once; a CPU half of them, in the middle of the search."""
    monkeypatch.setattr("glm.decoding.cache.on_cpu", lambda: cpu)
    monkeypatch.setattr("glm.modeling.on_cpu", lambda: cpu)
    monkeypatch.setattr("glm.decoding.cache.supports_cuda_graphs", lambda: not cpu)
    model, lengths, beams = random_glm(num_layers=3), np.full([20], 40), 4
    setting = memory.Setting(model.config, 20, 40, 20, num_beams=beams, on_cpu=cpu, cuda_graphs=not cpu)
    source = np.ones([20, 40], "int64")
    cache = prefill(model, paddle.to_tensor(source), lengths, beams)
    before, kept = allocated(), 3 * (3 if cpu else 2) * source.size * model.config.hidden_size * 4
    cache.compact(np.arange(20 * beams).reshape([20, beams]), 0, 10 if cpu else 20)
    taken = allocated() - before + kept
    monkeypatch.setattr(memory, "_add_largest", lambda _, peaks: peaks["decoding"])
    assert taken / memory.evaluation_memory(setting)["caches"] == pytest.approx(1, abs=0.1)


@paddle.no_grad()
@pytest.mark.parametrize("cpu, tables", [(True, 3), (False, 2)])
def test_what_prefill_keeps(monkeypatch, cpu, tables):
    """Keys and values once; on a CPU the queries beside them, which is faster than a copy."""
    for room in ("decoding.cache", "modeling"):
        monkeypatch.setattr(f"glm.{room}.on_cpu", lambda: cpu)
    model, lengths = random_glm(num_layers=3), np.full([20], 60)
    input_ids = paddle.ones([20, 60], "int64")
    prefill(model, input_ids, lengths, 5)  # the orders of rows that it makes are kept
    before = allocated()
    cache = prefill(model, input_ids, lengths, 5)
    kept = allocated() - before
    table = 20 * 60 * model.config.hidden_size * 4
    assert len(cache.layers) == 3 and 1 < kept / (3 * tables * table) < 1.1


@pytest.mark.parametrize("setting", ["train", "train recompute lora"])
def test_estimates_are_close_to_peaks(tmp_path, setting):
    """In a process of its own, by the benchmark's own check."""
    config = GLMConfig(
        num_layers=4, hidden_size=256, num_attention_heads=8, vocab_size=2000, max_sequence_length=1024
    )
    GLMForConditionalGeneration(config).save_pretrained(str(tmp_path))
    command = [sys.executable, "tests/benchmarks/memory.py", "--check", "--worker", "batch 4"]
    command += flags(model=tmp_path, setting=setting, source=384, target=64)
    result = subprocess.run(list(map(str, command)), cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    printed = json.loads(result.stdout.splitlines()[-1])
    assert 0.75 < printed["estimate"] / printed["peak"] < 1.25, printed
    assert (printed["share"] < 0.05) == ("lora" in setting) and printed["speed"] > 0


GLM_10B = GLMConfig(num_layers=48, hidden_size=4096, num_attention_heads=64, vocab_size=50048)
GLM_LARGE = GLMConfig(num_layers=24, hidden_size=1024, num_attention_heads=16, vocab_size=50048)


def test_a_run_says_what_it_needs(tmp_path, monkeypatch):
    """More than there is: a warning that names what would help, the most first, and no error."""
    args = arguments.GLMTrainingArguments(output_dir=str(tmp_path), do_train=True, device="cpu")
    dataset = [{"source_length": 600, "labels": [1] * 25}, {"source_length": 20, "labels": [1] * 30}]
    generation = arguments.GenerationArguments()
    pretrained, logged = SimpleNamespace(config=GLM_10B, adapter=None, quantized=False), []
    for level in ("train", "warning"):
        monkeypatch.setattr(memory.logger, level, logged.append)
    for free, warned in ((1e9, True), (1e12, False)):
        logged.clear()
        monkeypatch.setattr(memory, "free_memory", lambda free=free: free)
        needs = memory.estimate_memory(args, pretrained, generation, dataset, dataset).totals
        expected = memory.training_memory(memory.Setting(GLM_10B, args.per_device_train_batch_size, 600, 30))
        assert needs["train"] == expected["total"] and needs["eval"] > expected["optimizer"]
        assert f"{expected['total'] / 1e9:.2f} GB to train" in logged[0]
        assert f"cpu has {free / 1e9:.2f} GB free" in logged[0] and len(logged) == 1 + warned


@pytest.mark.parametrize("cpu", [True, False])
def test_what_would_help_is_what_the_device_can_do(monkeypatch, cpu):
    """Half precision and tensor parallelism need cards, and heads that can be dealt to them."""
    monkeypatch.setattr(memory, "supports_dtype", lambda name: not cpu)
    setting = memory.Setting(GLM_LARGE, 8, 608, 160, on_cpu=cpu)
    estimate = memory.MemoryEstimate({"train": setting})
    text = estimate.what_would_help("train")
    saved = [float(part.split()[0]) for part in text.split("(")[1:]]
    assert saved == sorted(saved, reverse=True)
    for flag in ("--lora True", "--recompute", "--per_device_train_batch_size 1"):
        assert flag in text
    for flag in ("--tensor_parallel_degree 2", "--fp16"):
        assert (flag in text) == (not cpu)
    setting.degree = 64
    assert "--tensor_parallel_degree" not in memory.MemoryEstimate({"train": setting}).what_would_help(
        "train"
    )


@pytest.mark.parametrize("cpu", [True, False])
def test_a_run_says_what_would_be_faster(cpu):
    """Where it would fit, and no more: what it would then need is what such a run says it needs."""
    train = memory.Setting(GLM_LARGE, 2, 608, 160, recompute=True, on_cpu=cpu, cuda_graphs=not cpu)
    search = dataclasses.replace(train, recompute=False, num_beams=5)
    plain = memory.training_memory(dataclasses.replace(train, recompute=False))["total"]
    optimizer = memory.training_memory(train)["optimizer"]
    large = memory.evaluation_memory(dataclasses.replace(search, batch_size=16))["total"] + optimizer

    def texts(free, records=16, **changes):
        settings = {"train": train, "eval": search}
        settings = {kind: dataclasses.replace(settings[kind], **changes.get(kind, {})) for kind in settings}
        return memory.MemoryEstimate(settings, records).what_would_be_faster(free)

    said = texts(1e11)
    assert f"without --recompute it would need {plain / 1e9:.2f} GB" in said[0]
    assert ("two thirds" in said[0]) == (not cpu) and len(said) == (1 if cpu else 2)
    if not cpu:
        assert f"_eval_batch_size 16 it would need {large / 1e9:.2f} GB" in said[1]
        assert len(texts(1e11, records=15)) == 1
    assert texts(min(plain, large)) == []
    assert texts(1e11, train={"recompute": False}, eval={"batch_size": 8}) == []


def test_a_split_model_that_fits_on_one_card():
    """Its cards had better share the data: by which flags, and what each would need."""
    train = memory.Setting(GLM_LARGE, 2, 608, 160, degree=2, on_cpu=False, cuda_graphs=True)
    alone = dataclasses.replace(train, degree=1)
    whole = memory.training_memory(alone)["total"]
    shared = memory.training_memory(dataclasses.replace(alone, sharding_degree=2))["total"]
    assert shared < whole

    def said(free, **changes):
        changed = {kind: dataclasses.replace(train, **changes) for kind in ("train", "eval")}
        kinds = changed if "sharding_degree" not in changes else {"train": changed["train"]}
        return memory.MemoryEstimate(kinds).what_would_be_faster(free)

    (text,) = said(1e12)
    assert text.startswith("without --tensor_parallel_degree 2 the same cards") and "2 times the rec" in text
    assert f"{whole / 1e9:.2f} GB, which fits" in text
    (text,) = said(whole)  # the estimates may be wrong by a tenth
    assert text.startswith("with --sharding stage1 in place of --tensor_parallel_degree 2 the same cards")
    assert f"{shared / 1e9:.2f} GB, which fits" in text
    assert said(shared) == [] and said(1e12, degree=1) == [] and said(1e12, on_cpu=True) == []
    # With --sharding stage1 over two pairs of cards: then over four.
    (text,) = said(1e12, sharding_degree=2)
    four = memory.training_memory(dataclasses.replace(alone, sharding_degree=4))["total"]
    assert text.startswith("without --tensor_parallel_degree 2") and f"{four / 1e9:.2f} GB" in text


def test_running_out_of_memory_is_a_line(monkeypatch):
    """Whichever way Paddle says it, and nothing else is."""
    monkeypatch.setattr(memory, "free_memory", lambda: 5e9)
    estimate = memory.MemoryEstimate({"train": memory.Setting(GLM_LARGE, 2, 608, 160)})
    quoted = OSError("(External) MemoryError: (ResourceExhausted) Fail to alloc memory of 8 size")
    for error in (MemoryError("(ResourceExhausted) Out of memory error on GPU 0"), quoted):
        with pytest.raises(Fault) as fault, estimate.running_out("in a step", "train"):
            raise error
        assert fault.value.exit_code == 1
        size = f"{estimate.totals['train'] / 1e9:.2f} GB"
        text = f"in a step ({size} were estimated, cpu has 5.00 GB): what would help"
        assert text in str(fault.value) and "--recompute" in str(fault.value)
    with pytest.raises(Fault, match="lower --per_device_eval_batch_size or --num_beams"):
        with memory.MemoryEstimate({}).running_out("answering", "eval"):
            raise MemoryError
    with pytest.raises(OSError), estimate.running_out("in a step", "train"):
        raise OSError("disk")
    with pytest.raises(MemoryError), as_input_error("the checkpoint can't be loaded", "remove it"):
        raise MemoryError


@pytest.mark.parametrize("version", [1, 2])
def test_a_container_limits_memory_and_cores(tmp_path, monkeypatch, version):
    """By files as the kernel lays them out; the narrowest of the groups that hold this one counts."""
    files = {
        1: {
            "memory/a/memory.limit_in_bytes": "3000000",
            "memory/a/memory.usage_in_bytes": "1000000",
            "memory/a/memory.stat": "cache 7\ntotal_inactive_file 400000\n",
            "memory/a/b/memory.limit_in_bytes": "9223372036854771712",
            "memory/a/b/memory.usage_in_bytes": "900000",
            "memory/a/b/memory.stat": "total_inactive_file 1\n",
            "cpu/a/cpu.cfs_quota_us": "150000",
            "cpu/a/cpu.cfs_period_us": "100000",
            "cpu/cpu.cfs_quota_us": "-1",
            "cpu/cpu.cfs_period_us": "100000",
        },
        2: {
            "a/memory.max": "3000000",
            "a/memory.current": "1000000",
            "a/memory.stat": "anon 5\ninactive_file 400000\n",
            "a/b/memory.max": "max",
            "a/b/memory.current": "900000",
            "a/b/memory.stat": "inactive_file 1\n",
            "a/cpu.max": "150000 100000",
            "a/b/cpu.max": "max 100000",
        },
    }[version]
    for name, text in files.items():
        path = tmp_path / "sys" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    lines = {1: "4:memory:/a/b\n3:cpu,cpuacct:/a\n0::/\n", 2: "0::/a/b\n"}[version]
    (tmp_path / "cgroup").write_text(lines)
    moved = {"/proc/self/cgroup": tmp_path / "cgroup", "/sys/fs/cgroup": tmp_path / "sys"}
    monkeypatch.setattr(device, "Path", lambda *parts: Path(moved.get(parts[0], parts[0]), *parts[1:]))
    monkeypatch.setattr(device.os, "sched_getaffinity", lambda process: range(8), raising=False)
    assert device.free_memory() == 3000000 - (1000000 - 400000) and device.usable_cores() == 2
    (tmp_path / "cgroup").write_text("")
    assert device.free_memory() > 3000000 and device.usable_cores() == 8
    # A limit of the process, by ``ulimit -v``, is of the address space: its first number is in pages.
    (tmp_path / "statm").write_text("1000 7 7 1 0 7 0\n")
    moved["/proc/self/statm"] = tmp_path / "statm"
    limits = {device.resource.RLIMIT_AS: (5_000_000, -1)}
    monkeypatch.setattr(device.resource, "getrlimit", limits.get)
    assert device.free_memory() == 5_000_000 - 1000 * os.sysconf("SC_PAGE_SIZE")
