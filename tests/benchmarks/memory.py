"""The memory that a process needs: as estimated before a run, and at its peak.

python tests/benchmarks/memory.py              GB a card of GLM-Large and GLM-10B, and which cards that fits
python tests/benchmarks/memory.py --check      estimates beside peaks, full training beside LoRA

The table is what memory.training_memory and memory.evaluation_memory give for batch 2, source 608, target
160, recompute, fp16 O2 and 5 beams, without what the device's libraries take for themselves. A card is said
to fit where its GiB hold 1 GB more than that. With Paddle 2 full training on one process takes 4 bytes more
a weight, for it clips the gradients into new ones. The check runs each setting in a process of its own, in
float32 and on this machine.
"""

import json
import tempfile
from types import SimpleNamespace

import numpy as np
import paddle
from common import (
    SRC_LENGTH,
    TGT_LENGTH,
    SpecialTokens,
    children,
    load_model,
    parser,
    print_machine,
    print_table,
)
from paddlenlp.peft import LoRAConfig
from paddlenlp.transformers import GLMConfig

from data import DataCollator, build_features
from glm import device
from glm.arguments import LORA_MODULES, GenerationArguments, GLMTrainingArguments
from glm.decoding.decoder import beam_search
from glm.training import memory
from glm.weights import adapters as lora
from glm.weights.shapes import count_parameters
from utils import GLMTrainer

CARDS = (16, 24, 40, 80)  # GiB
MODELS = {
    "GLM-Large": {"num_layers": 24, "hidden_size": 1024, "num_attention_heads": 16},
    "GLM-10B": {"num_layers": 48, "hidden_size": 4096, "num_attention_heads": 64},
}


def config_of_lora(rank=8, modules=LORA_MODULES, **kwargs):
    return LoRAConfig(
        r=rank, lora_alpha=2 * rank, target_modules=[rf".*\.{module}" for module in modules], **kwargs
    )


def config_of(name):
    return GLMConfig(vocab_size=50048, max_sequence_length=1024, **MODELS[name])


def cards(size):
    return next((f"{card} GB" for card in CARDS if size + 1e9 <= card * 2**30), "none")


def table():
    # Whatever this machine has.
    card = {"on_cpu": False, "cuda_graphs": True, "paddle_2": False}
    rows = []
    lengths = {"batch_size": 2, "source_length": SRC_LENGTH, "target_length": TGT_LENGTH}
    for name in MODELS:
        kinds = {"full": {}, "LoRA": {"lora_config": config_of_lora()}}
        kinds["LoRA, int8"] = {**kinds["LoRA"], "quantized": True}
        for kind, weights in kinds.items():
            setting = memory.Setting(
                config_of(name), **lengths, **card, precision="O2", recompute=True, num_beams=5, **weights
            )
            cells = {"train": [], "evaluate": []}
            for degree in (1, 2, 4, 8):
                setting.degree = degree
                estimates = memory.training_memory(setting), memory.evaluation_memory(setting)
                for purpose, estimate in zip(cells, estimates):
                    cells[purpose].append(f"{estimate['total'] / 1e9:.1f} ({cards(estimate['total'])})")
            rows += [[name, kind, purpose, *cells[purpose]] for purpose in cells]
    print_table(
        ["GB a card (which fits)", "weights", "to", *(f"tensor parallel {n}" for n in (1, 2, 4, 8))], rows
    )
    print()
    peer = {"batch_size": 16, "source_length": 512, "target_length": 25, "precision": "O2", "recompute": True}
    peer["lora_config"] = config_of_lora(4, ["query_key_value"])
    rows = [["PaddleNLP's figure for 2 cards", f"{23913 * 2**20 / 1e9:.1f}"]]
    for degree in (1, 2):
        setting = memory.Setting(config_of("GLM-10B"), degree=degree, **peer, **card)
        size = memory.training_memory(setting)["total"]
        rows.append([f"ours, tensor parallel {degree}", f"{size / 1e9:.1f}"])
    print_table(["GLM-10B, LoRA, fp16, recompute, batch 16, source 512, target 25", "GB a card"], rows)


def check(args):
    """One setting: its estimate, its peak in bytes, and how fast it trains."""
    kind, *flags = args.setting.split()
    model = load_model(args.model)
    lora_config = config_of_lora(dtype="float32") if "lora" in flags else None
    if lora_config:
        adapter = lora.Adapter(None, lora_config)
        model = lora.add_lora(model, SimpleNamespace(adapter=adapter, base_fingerprint=None), seed=0)
    rng, dataset = np.random.default_rng(0), []
    for index in range(3 * args.batch_size):  # as long as they may be
        source = rng.integers(10, 50000, args.source - 3).tolist()
        source = [
            SpecialTokens.cls_token_id,
            *source,
            SpecialTokens.gmask_token_id,
            SpecialTokens.eos_token_id,
        ]
        labels = [*rng.integers(10, 50000, args.target - 1).tolist(), SpecialTokens.eop_token_id]
        features = build_features(SpecialTokens, source, labels)
        for key in ("input_ids", "labels"):
            features[key] = np.minimum(features[key], model.config.vocab_size - 1)
        dataset.append({**features, "index": index})
    with tempfile.TemporaryDirectory() as folder:
        trainer = GLMTrainer(
            model=model,
            train_dataset=dataset,
            data_collator=DataCollator(SpecialTokens.pad_token_id),
            args=GLMTrainingArguments(
                output_dir=folder,
                max_steps=3,
                save_strategy="no",
                logging_steps=1,
                recompute="recompute" in flags,
                per_device_train_batch_size=args.batch_size,
                report_to="none",
                disable_tqdm=True,
                log_level="warning",
            ),
            generation=GenerationArguments(),
        )
        setting = memory.Setting(
            model.config,
            args.batch_size,
            args.source,
            args.target,
            recompute="recompute" in flags,
            lora_config=lora_config,
        )
        device.memory_peak(reset=True)  # after loading, where Paddle can
        if kind == "train":
            trainer.train()
            estimate = memory.training_memory(setting)
            step, before = (
                [row["interval_runtime"] for row in trainer.state.log_history if "interval_runtime" in row],
                1,
            )
            speed = args.batch_size * len(step[before:]) / sum(step[before:])
        else:
            model.eval()
            batch = trainer.data_collator(dataset[: args.batch_size])
            source = paddle.to_tensor(batch["input_ids"][:, : args.source])
            generation = GenerationArguments(tgt_length=args.target, min_tgt_length=args.target)
            vocab_size = model.config.vocab_size
            beam_search(model, source, batch["source_length"], generation, vocab_size - 2, vocab_size - 1)
            with paddle.no_grad():
                trainer.target_losses(model, {key: paddle.to_tensor(value) for key, value in batch.items()})
            setting.num_beams = generation.num_beams
            estimate = memory.evaluation_memory(setting)
            speed = None
    count, trained = count_parameters(model.config, lora_config=lora_config)
    return {
        "estimate": estimate["total"],
        "peak": device.memory_peak(),
        "speed": speed,
        "share": trained / count,
    }


def main():
    arguments = parser(__doc__)
    arguments.add_argument("--check", action="store_true")
    arguments.add_argument("--batch_sizes", type=int, nargs="+", default=[2, 4])
    arguments.add_argument("--setting", help="of one worker")
    arguments.add_argument("--source", type=int, default=SRC_LENGTH)
    arguments.add_argument("--target", type=int, default=TGT_LENGTH)
    args = arguments.parse_args()
    if args.worker:
        args.batch_size = int(args.worker.split()[1])
        print(json.dumps(check(args), default=float))
        return
    if not args.check:
        return table()
    print_machine()
    print(f"{args.layers} layers of width {args.width}, source {args.source}, target {args.target}")
    settings = [f"train{recompute}{kind}" for kind in ("", " lora") for recompute in ("", " recompute")]
    workers = {
        f"batch {size} {setting}": ["--setting", setting]
        for setting in [*settings, "evaluate"]
        for size in args.batch_sizes
    }
    rows = []
    for name, result in children(args, workers).items():
        size, setting = name.split(maxsplit=2)[1:]
        gigabytes = [f"{result[key] / 1e9:.2f}" for key in ("estimate", "peak")]
        speed = "" if result["speed"] is None else f"{result['speed']:.3f}"
        share = f"{100 * result['share']:.2f} %" if "train" in setting else ""
        rows.append([setting, size, *gigabytes, f"{result['estimate'] / result['peak']:.2f}", speed, share])
    print_table(["", "batch", "GB estimated", "GB at the peak", "ratio", "samples/s", "trained"], rows)


if __name__ == "__main__":
    main()
