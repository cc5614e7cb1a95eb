"""What the benchmarks share: a model, records of DuReader's lengths, children, and the table."""

import argparse
import ctypes
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))
SRC_LENGTH, TGT_LENGTH = 608, 160  # the recipe's


def parser(description):
    result = argparse.ArgumentParser(description=description)
    result.add_argument("--layers", type=int, default=6, help="24 is GLM-Large")
    result.add_argument("--width", type=int, default=1024, help="in heads of 64; 1024 is GLM-Large")
    result.add_argument("--batch_size", type=int, default=2)
    result.add_argument("--worker", help=argparse.SUPPRESS)
    result.add_argument("--model", help=argparse.SUPPRESS)
    return result


class SpecialTokens:
    """The special ids of glm-large-chinese's tokenizer that features need."""

    cls_token_id, gmask_token_id, eos_token_id, pad_token_id = 50002, 50009, 50000, 50000
    sop_token_id, eop_token_id = 50006, 50007


def make_dataset(count, seed=0):
    """Features of random ids with DuReaderQG's lengths.

    Contexts have 292 characters on average, questions 9, answers 5. The published tokenizer takes about
    1.8 characters of running text a token, 9 tokens for the source's fixed words, 7 for the target's.
    """
    import numpy as np

    from data import build_features

    rng = np.random.default_rng(seed)
    dataset = []
    for index in range(count):
        characters = rng.lognormal(np.log(292) - 0.6**2 / 2, 0.6)
        source_length = min(3 + 9 + 3 + round(characters / 1.8), SRC_LENGTH)
        source = rng.integers(10, 50000, source_length - 3).tolist()
        source = [
            SpecialTokens.cls_token_id,
            *source,
            SpecialTokens.gmask_token_id,
            SpecialTokens.eos_token_id,
        ]
        labels = [*rng.integers(10, 50000, 7 + rng.integers(3, 8)).tolist(), SpecialTokens.eop_token_id]
        dataset.append({**build_features(SpecialTokens, source, labels), "index": index})
    return dataset


def save_model(folder, layers, width):
    """A random GLM with GLM-Large's vocabulary, once for all children."""
    import paddle
    from paddlenlp.transformers import GLMConfig, GLMForConditionalGeneration

    paddle.seed(0)
    config = GLMConfig(
        num_layers=layers,
        hidden_size=width,
        num_attention_heads=width // 64,
        vocab_size=50048,
        max_sequence_length=1024,
        output_predict=True,
        attention_dropout_prob=0.1,
        embedding_dropout_prob=0.1,
        output_dropout_prob=0.1,
    )
    GLMForConditionalGeneration(config).save_pretrained(folder)


def load_model(folder):
    from glm.device import use_the_whole_cpu
    from glm.weights import loading, pretrained

    use_the_whole_cpu()
    config = pretrained.read_config(folder, folder)
    return loading.load_model(pretrained.Pretrained(folder, folder, folder, config, tokenizer=None))


def matrix_products(model, rows, head_rows, backward=False):
    """Every weight's product at these numbers of rows; with backward also those of its gradients."""
    import paddle

    weights = []
    for layer in model.glm.transformer.layers:
        attention, mlp = layer.attention, layer.mlp
        linears = (attention.query_key_value, attention.dense, mlp.dense_h_to_4h, mlp.dense_4h_to_h)
        weights += [(linear.weight, rows, False) for linear in linears]
    weights.append((model.glm.word_embeddings.weight, head_rows, True))
    inputs = {}
    for weight, count, transposed in weights:
        width = weight.shape[1 if transposed else 0]
        inputs.setdefault((count, width), paddle.randn([count, width]))

    def run():
        with paddle.no_grad():
            for weight, count, transposed in weights:
                x = inputs[count, weight.shape[1 if transposed else 0]]
                y = paddle.matmul(x, weight, transpose_y=transposed)
                if backward:
                    paddle.matmul(y, weight, transpose_y=not transposed)
                    paddle.matmul(x, y, transpose_x=True)

    return run


def peak_mb():
    """The largest resident set of this process, since its start or since ``reset_peak``."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("VmHWM")) / 1024


def reset_peak():
    """Return freed memory to the system and let ``peak_mb`` start again from what is in use."""
    ctypes.CDLL(None).malloc_trim(0)
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")


def children(args, workers):
    """Run each worker in a process of its own on the same weights. Returns {worker: what it printed}."""
    # As this process began: importing paddle has set OMP_NUM_THREADS to 1, which a child would take for
    # the user's.
    with open("/proc/self/environ") as file:
        environment = dict(line.split("=", 1) for line in file.read().split("\0") if "=" in line)
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        code = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import common\n"
        code += f"common.save_model({folder!r}, {args.layers}, {args.width})"
        subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
        for worker, flags in workers.items():
            command = [sys.executable, *sys.argv, "--worker", worker, "--model", folder, *map(str, flags)]
            output = subprocess.run(command, capture_output=True, text=True, env=environment)
            if output.returncode:
                raise SystemExit(f"{worker} failed:\n{output.stderr[-3000:]}")
            results[worker] = json.loads(output.stdout.splitlines()[-1])
    return results


def print_table(head, rows):
    widths = [max(len(str(row[i])) for row in [head, *rows]) for i in range(len(head))]
    for row in [head, ["-" * width for width in widths], *rows]:
        print("| " + " | ".join(str(cell).ljust(width) for cell, width in zip(row, widths)) + " |")


def print_machine():
    with open("/proc/cpuinfo") as file:
        names = [line.split(":")[1].strip() for line in file if line.startswith("model name")]
    print(f"{names[0] if names else 'unknown processor'}, {len(os.sched_getaffinity(0))} cores, float32")
