"""What a run takes: counted by hand, and against the peaks of real runs."""

import dataclasses
import json
import subprocess
import sys

import numpy as np
import paddle
import pytest
from helpers import ROOT, flags, lora_config, random_glm
from paddlenlp.transformers import GLMConfig, GLMForConditionalGeneration

from glm import arguments, lora, memory
from glm.cache import prefill


@pytest.mark.parametrize("config", [None, lora_config(), lora_config(["dense_h_to_4h"], r=5)])
def test_parameters_are_counted(config):
    model = random_glm(num_layers=3)
    whole = trained = None
    if config:
        model = lora.add_lora(model, config, lora.adapter_weights(None, model.config, config, 0))
        trained = sum(weight.size for weight in model.parameters() if not weight.stop_gradient)
    whole = sum(weight.size for weight in model.parameters())
    assert memory.count_parameters(model.config, 1, config) == (whole, trained or whole)


def test_memory_of_several_processes_by_hand():
    """GLM-10B on 8 processes: an eighth of each linear and of the embedding, norms and positions whole."""
    config = GLMConfig(num_layers=48, hidden_size=4096, num_attention_heads=64, vocab_size=50048)
    linears = 48 * (4096 * (3 + 1 + 4 + 4) * 4096 + (3 + 4) * 4096) + 50048 * 4096
    whole = 48 * (2 + 4) * 4096 + 2 * (config.max_sequence_length + 1) * 4096 + 2 * 4096
    assert memory.count_parameters(config, 8) == (linears // 8 + whole,) * 2
    setting = memory.Setting(config, 2, 608, 160, "O2", recompute=True, degree=8)
    needs = memory.training_memory(setting)
    count = linears // 8 + whole
    assert needs["weights"] == 2 * count and needs["optimizer"] == 12 * count  # two moments, master weights
    assert needs["gradients"] == 8 * count  # in float32, and once more while they are clipped
    assert needs["total"] == sum(size for name, size in needs.items() if name != "total")
    adapter = memory.training_memory(dataclasses.replace(setting, lora_config=lora_config()))
    assert adapter["optimizer"] < needs["optimizer"] / 100 and adapter["total"] < 0.25 * needs["total"]


@paddle.no_grad()
@pytest.mark.parametrize("cpu, tables", [(True, 3), (False, 2)])
def test_what_prefill_keeps(monkeypatch, cpu, tables):
    """Keys and values once; on a CPU the queries beside them, which is faster than a copy."""
    for room in ("cache", "modeling"):
        monkeypatch.setattr(f"glm.{room}.on_cpu", lambda: cpu)
    model, lengths = random_glm(num_layers=3), np.full([20], 60)
    input_ids = paddle.ones([20, 60], "int64")
    prefill(model, input_ids, lengths, 5)  # the orders of rows that it makes are kept
    allocated = paddle.base.core.host_memory_stat_current_value
    before = allocated("Allocated", 0)
    cache = prefill(model, input_ids, lengths, 5)
    kept = allocated("Allocated", 0) - before
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


def test_a_run_says_what_it_needs(tmp_path, monkeypatch, capfd):
    """More than there is: a warning that names what would help, the most first, and no error."""
    args = arguments.GLMTrainingArguments(output_dir=str(tmp_path), do_train=True, device="cpu")
    config = GLMConfig(num_layers=48, hidden_size=4096, num_attention_heads=64, vocab_size=50048)
    dataset = [{"source_length": 600, "labels": [1] * 25}, {"source_length": 20, "labels": [1] * 30}]
    generation = arguments.GenerationArguments()
    logged = []
    for level in ("train", "warning"):
        monkeypatch.setattr(memory.logger, level, logged.append)
    for free, warned in ((1e9, True), (1e12, False)):
        logged.clear()
        monkeypatch.setattr(memory, "free_memory", lambda free=free: free)
        needs = memory.estimate_memory(args, config, None, generation, dataset, dataset)
        setting = memory.Setting(config, args.per_device_train_batch_size, 600, 30)
        expected = memory.training_memory(setting)
        assert needs["train"] == expected["total"] and needs["eval"] > expected["optimizer"]
        assert (
            f"{expected['total'] / 1e9:.2f} GB to train" in logged[0]
            and f"{free / 1e9:.2f} GB free" in logged[0]
        )
        assert len(logged) == 1 + warned
    logged.clear()
    monkeypatch.setattr(memory, "free_memory", lambda: 1e9)
    memory.estimate_memory(args, config, None, generation, dataset, [])
    saved = [float(text.split()[0]) for text in logged[1].split("(")[1:]]
    assert saved == sorted(saved, reverse=True)
    for flag in (
        "--lora True",
        "--recompute",
        "--tensor_parallel_degree 2",
        "--per_device_train_batch_size 1",
    ):
        assert flag in logged[1]
