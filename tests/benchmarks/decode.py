"""Beam search, side by side: PaddleNLP's generate() and ours, on the same weights and records.

python tests/benchmarks/decode.py [--layers 24]                one table, with the ratios and the limit
python tests/benchmarks/decode.py --growth                     how a step's time and memory grow

PaddleNLP's recipe pads every source to 608 tokens; ours pads to the batch's longest. Step times are taken
at 608 on both sides, the mean of all steps; PaddleNLP's, which grow with every token, of the first
--peer_tokens alone. Both have the CPU set up as in device.use_the_whole_cpu.
"""

import json
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
    reset_peak,
)

from data import build_attention_mask
from glm.arguments import GenerationArguments
from glm.decoding.beams import Beams
from glm.decoding.decoder import Decoder, beam_search

START, END = SpecialTokens.sop_token_id, SpecialTokens.eop_token_id


def make_sources(args):
    """Sources [B, args.source], padded on the right, and their lengths."""
    dataset = make_dataset(args.batch_size)
    lengths = np.array([min(feature["source_length"], args.source) for feature in dataset])
    input_ids = np.random.default_rng(0).integers(10, 50000, [args.batch_size, args.source])
    return np.where(np.arange(args.source) < lengths[:, None], input_ids, SpecialTokens.pad_token_id), lengths


def generation(args):
    tokens = args.tokens
    return GenerationArguments(
        tgt_length=tokens, min_tgt_length=tokens, num_beams=args.beams, no_repeat_ngram_size=3
    )


def ours(args, model=None):
    model = model or load_model(args.model)
    model.eval()
    input_ids, lengths = make_sources(args)
    source = paddle.to_tensor(input_ids[:, : lengths.max()])
    beam_search(model, source, lengths, generation(args), START, END)  # warm
    start = time.time()
    results = beam_search(model, source, lengths, generation(args), START, END)
    total = time.time() - start
    peak = peak_mb()
    reset_peak()  # what follows shows how memory grows, without what loading took
    with paddle.no_grad():
        full = paddle.to_tensor(input_ids)
        everything = np.full(len(lengths), input_ids.shape[1])
        start = time.time()
        decoder = Decoder(model, full, everything, START, generation(args))
        prefill_seconds = time.time() - start
        layers = decoder.cache.layers
        source_mb = sum(layer[1].numel().item() * 8 for layer in layers) / 2**20
        beams = Beams(len(lengths), generation(args), END)
        steps, products = [], []
        limit = matrix_products(model, args.batch_size * args.beams, args.batch_size * args.beams)
        while len(beams.example):  # beam_search's loop, with a clock
            start = time.time()
            beams.advance(decoder.next_candidates(beams))
            steps.append(time.time() - start)
            start = time.time()
            limit()
            products.append(time.time() - start)
        cache_mb = sum(layer[1].numel().item() * 8 for layer in layers) / 2**20
    assert all(len(tokens) == args.tokens for ((tokens, _),) in results)
    return {
        "total": total,
        "prefill": prefill_seconds,
        "step": np.mean(steps),
        "limit": np.mean(products),
        "peak": peak,
        "decoding_peak": peak_mb(),
        "source_cache": source_mb,
        "slots": cache_mb - source_mb,
    }


def growth(args):
    """``ours`` at several settings, by its name "source beams batch"."""
    model, longest = load_model(args.model), args.source
    settings = [(longest, 5, 2), (longest // 4, 5, 2), (longest // 2, 5, 2)]
    settings += [(longest, beams, 2) for beams in (1, 10)] + [(longest, 5, size) for size in (1, 4, 8)]
    results = {}
    for args.source, args.beams, args.batch_size in settings:
        results[f"{args.source} {args.beams} {args.batch_size}"] = ours(args, model)
    return results


def paddlenlp(args):
    model = load_model(args.model)
    model.eval()
    input_ids, lengths = make_sources(args)
    batch_size, length = input_ids.shape

    def generate(tokens):
        position_ids = np.zeros([batch_size, 2, length + tokens], dtype="int64")
        position_ids[:, 0, :length] = np.arange(length)
        position_ids[:, 0, length:] = (lengths - 2)[:, None]
        position_ids[:, 1, length:] = np.arange(1, tokens + 1)
        # Padding sits between source and targets, as its recipe pads; nobody sees it.
        mask = build_attention_mask(lengths, np.full(batch_size, length), length + tokens)
        column = np.arange(length + tokens)
        mask |= ((column[:, None] >= column) & (column >= length))[None, None]
        start = time.time()
        output, _ = model.generate(
            input_ids=paddle.to_tensor(np.concatenate([input_ids, np.full([batch_size, 1], START)], axis=1)),
            position_ids=paddle.to_tensor(position_ids),
            attention_mask=paddle.to_tensor(mask.astype("float32")),
            decode_strategy="beam_search",
            num_beams=args.beams,
            max_length=tokens,
            min_length=tokens,
            length_penalty=0.7,
            no_repeat_ngram_size=3,
            bos_token_id=START,
            eos_token_id=END,
            pad_token_id=SpecialTokens.pad_token_id,
            use_cache=True,
        )
        assert output.shape[1] == tokens, output.shape
        return time.time() - start

    few = 2
    generate(few)  # warm
    short, total = generate(few), generate(args.peer_tokens)
    return {"total": total, "step": (total - short) / (args.peer_tokens - few), "peak": peak_mb()}


def main():
    arguments = parser(__doc__)
    arguments.add_argument("--tokens", type=int, default=TGT_LENGTH)
    arguments.add_argument(
        "--peer_tokens", type=int, default=8, help="of PaddleNLP, whose steps take longer and longer"
    )
    arguments.add_argument("--beams", type=int, default=5)
    arguments.add_argument("--source", type=int, default=SRC_LENGTH)
    arguments.add_argument("--growth", action="store_true")
    args = arguments.parse_args()
    if args.worker:
        worker = {"PaddleNLP": paddlenlp, "ours": ours, "growth": growth}[args.worker]
        print(json.dumps(worker(args), default=float))
        return
    print_machine()
    if args.growth:
        rows = []
        for name, result in children(args, {"growth": []})["growth"].items():
            memory = [f"{result[key]:.0f}" for key in ("decoding_peak", "source_cache", "slots")]
            rows.append(
                [*name.split(), f"{result['step'] * 1e3:.1f}", f"{result['limit'] * 1e3:.1f}", *memory]
            )
        print_table(
            ["source", "beams", "batch", "step ms", "products ms", "peak MB", "source cache MB", "slots MB"],
            rows,
        )
        return
    results = children(args, {"PaddleNLP": [], "ours": []})
    peer, own = results["PaddleNLP"], results["ours"]
    speed, peer_speed = (
        args.batch_size * args.tokens / own["total"],
        args.batch_size * args.peer_tokens / peer["total"],
    )
    rows = [
        ["PaddleNLP generate()", f"{peer_speed:.2f}", f"{peer['step'] * 1e3:.0f}", f"{peer['peak']:.0f}"],
        ["ours", f"{speed:.2f}", f"{own['step'] * 1e3:.1f}", f"{own['peak']:.0f}"],
        [
            "ratio",
            f"{speed / peer_speed:.1f}",
            f"{peer['step'] / own['step']:.1f}",
            f"{peer['peak'] / own['peak']:.2f}",
        ],
        ["matrix products alone", "", f"{own['limit'] * 1e3:.1f}", ""],
        ["ours / products", "", f"{own['step'] / own['limit']:.2f}", ""],
    ]
    print(
        f"{args.layers} layers, batch {args.batch_size}, {args.beams} beams, {args.tokens} tokens; "
        f"prefill of ours at {args.source} tokens {own['prefill']:.2f} s"
    )
    print_table(["", "tokens/s", f"step ms at {args.source}", "peak MB"], rows)


if __name__ == "__main__":
    main()
