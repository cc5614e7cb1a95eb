"""Training, side by side: PaddleNLP's recipe and ours, on the same weights and records.

python tests/benchmarks/train.py [--layers 24]

PaddleNLP's recipe pads every record to 608 + 160 tokens, computes logits at every position and takes its own
loss; here without label smoothing, whose log_softmax on a CPU would flatter us. Ours groups records by
length, pads to the batch's longest, and computes logits at target positions alone, with label smoothing.
Both run AdamW without recompute, and have the CPU set up as in device.use_the_whole_cpu.
"""

import json
import tempfile
import time

import numpy as np
import paddle
from common import (
    SRC_LENGTH,
    TGT_LENGTH,
    SpecialTokens,
    children,
    load_model,
    make_dataset,
    matrix_products,
    parser,
    peak_mb,
    print_machine,
    print_table,
)

from data import DataCollator, build_attention_mask
from glm.arguments import GenerationArguments, GLMTrainingArguments
from glm.training.sampler import GroupedBatchSampler
from utils import GLMTrainer


def timed_steps(model, batches, loss_of):
    """Seconds of each step after the first, which warms up."""
    optimizer = paddle.optimizer.AdamW(
        1e-5, parameters=model.parameters(), grad_clip=paddle.nn.ClipGradByGlobalNorm(1.0), weight_decay=0.1
    )
    model.train()
    seconds = []
    for batch in batches:
        start = time.time()
        loss = loss_of({key: paddle.to_tensor(value) for key, value in batch.items()})
        loss.backward()
        optimizer.step()
        optimizer.clear_grad()
        assert np.isfinite(float(loss))
        seconds.append(time.time() - start)
    return seconds[1:]


def paddlenlp(args, model, dataset):
    def pad(features):
        """As build_inputs_for_generation with padding="max_length": source to 608, then targets to 160."""
        batch_size, length = len(features), SRC_LENGTH + TGT_LENGTH
        input_ids = np.full([batch_size, length], SpecialTokens.pad_token_id)
        position_ids = np.zeros([batch_size, 2, length], dtype="int64")
        labels, loss_mask = (
            np.zeros([batch_size, length], dtype="int64"),
            np.zeros([batch_size, length], "float32"),
        )
        source_length = np.array([feature["source_length"] for feature in features])
        mask = build_attention_mask(source_length, source_length, length)
        column = np.arange(length)
        mask |= ((column[:, None] >= column) & (column >= SRC_LENGTH))[None, None]
        for row, feature in enumerate(features):
            source, targets = feature["source_length"], len(feature["labels"])
            end = SRC_LENGTH + targets
            input_ids[row, :source] = feature["input_ids"][:source]
            input_ids[row, SRC_LENGTH:end] = feature["input_ids"][source:]
            position_ids[row, 0] = np.where(column < SRC_LENGTH, column, source - 2)
            position_ids[row, 1, SRC_LENGTH:] = np.arange(1, TGT_LENGTH + 1)
            labels[row, SRC_LENGTH:end], loss_mask[row, SRC_LENGTH:end] = feature["labels"], 1
        return {
            "input_ids": input_ids,
            "position_ids": position_ids,
            "attention_mask": mask.astype("float32"),
            "labels": labels,
            "loss_mask": loss_mask,
        }

    size = args.batch_size
    batches = [pad(dataset[start * size : (start + 1) * size]) for start in range(args.peer_steps + 1)]
    seconds = timed_steps(model, batches, lambda batch: model(**batch)[0])
    return {"speed": args.peer_steps * size / sum(seconds), "peak": peak_mb()}


def ours(args, model, dataset):
    with tempfile.TemporaryDirectory() as folder:
        trainer = GLMTrainer(
            model=model,
            args=GLMTrainingArguments(output_dir=folder, disable_tqdm=True, report_to=["none"]),
            generation=GenerationArguments(),
        )
    size, collate = args.batch_size, DataCollator(SpecialTokens.pad_token_id)
    sampler = GroupedBatchSampler(dataset, size, 1, 0, size, shuffle=True, group_by_length=True, seed=0)
    chosen = list(sampler)
    longest = max(chosen, key=lambda batch: max(len(dataset[index]["input_ids"]) for index in batch))
    batches = [
        collate([dataset[index] for index in batch]) for batch in [longest, *chosen]
    ]  # the first warms up
    seconds = timed_steps(model, batches, lambda batch: trainer.compute_loss(model, batch))
    peak, limit = peak_mb(), 0.0
    for batch in batches[1:]:
        products = matrix_products(model, batch["input_ids"].size, len(batch["labels"]), backward=True)
        products()
        start = time.time()
        products()
        limit += time.time() - start
    tokens = np.mean([batch["input_ids"].size / size for batch in batches[1:]])
    return {
        "speed": len(chosen) * size / sum(seconds),
        "peak": peak,
        "limit": len(chosen) * size / limit,
        "tokens": tokens,
    }


def main():
    arguments = parser(__doc__)
    arguments.add_argument("--records", type=int, default=64)
    arguments.add_argument("--peer_steps", type=int, default=3, help="steps timed of PaddleNLP's recipe")
    args = arguments.parse_args()
    if args.worker:
        dataset = make_dataset(args.records)
        worker = paddlenlp if args.worker == "PaddleNLP" else ours
        result = worker(args, load_model(args.model), dataset)
        print(json.dumps(result, default=float))
        return
    print_machine()
    results = children(args, {"PaddleNLP": [], "ours": []})
    peer, own = results["PaddleNLP"], results["ours"]
    print(f"{args.layers} layers, batch {args.batch_size}, {args.records} records")
    rows = [
        ["PaddleNLP's recipe", SRC_LENGTH + TGT_LENGTH, f"{peer['speed']:.3f}", f"{peer['peak']:.0f}"],
        ["ours", f"{own['tokens']:.0f}", f"{own['speed']:.3f}", f"{own['peak']:.0f}"],
        ["ratio", "", f"{own['speed'] / peer['speed']:.1f}", f"{peer['peak'] / own['peak']:.2f}"],
        ["matrix products alone", f"{own['tokens']:.0f}", f"{own['limit']:.3f}", ""],
        ["products / ours", "", f"{own['limit'] / own['speed']:.2f}", ""],
    ]
    print_table(["", "tokens a record", "samples/s", "peak MB"], rows)


if __name__ == "__main__":
    main()
