"""Cached decoding against the model's plain forward, beam search against exhaustive search and loops."""

import itertools
from math import inf
from types import SimpleNamespace

import numpy as np
import paddle
import pytest
import scipy.stats
from helpers import (
    best_hypotheses,
    generation_arguments,
    log_softmax,
    plain_log_probabilities,
    random_glm,
    repeats_ngram,
)

from glm import device, graphs, modeling
from glm.decoding.beams import Beams
from glm.decoding.cache import decode_one_token, prefill
from glm.decoding.candidates import Candidates, draw_tokens
from glm.decoding.decoder import beam_search
from glm.graphs import CapturedStep

START, END = 1, 2


def make_sources(lengths=(9, 5, 12), vocab_size=24, seed=0):
    rng = np.random.default_rng(seed)
    sources = [rng.integers(3, vocab_size, [length]).tolist() for length in lengths]
    input_ids = np.zeros([len(sources), max(lengths)], dtype="int64")
    for row, source in enumerate(sources):
        input_ids[row, : len(source)] = source
    return sources, paddle.to_tensor(input_ids), np.array(lengths)


@paddle.no_grad()
def test_cached_decoding_equals_the_plain_forward_at_every_step():
    """Three beams on different paths that branch on the way, padded sources, six steps."""
    model, num_beams, steps = random_glm(), 3, 6
    sources, input_ids, lengths = make_sources()
    rng = np.random.default_rng(1)
    cache = prefill(model, input_ids, lengths, num_beams)
    origins = np.arange(3 * num_beams).reshape([3, num_beams])
    cache.compact(origins, 0, steps)
    paths = [[[] for _ in range(num_beams)] for _ in sources]
    fed = np.full([3, num_beams], START)
    for _ in range(steps):
        logits = decode_one_token(model, cache, paddle.to_tensor(fed), paddle.to_tensor(origins))
        logits = logits.reshape([3, num_beams, -1])
        for row, beam in itertools.product(range(3), range(num_beams)):
            expected = plain_log_probabilities(model, sources[row], paths[row][beam])
            np.testing.assert_allclose(log_softmax(logits.numpy()[row, beam]), expected, atol=1e-4)
        parents = rng.integers(0, num_beams, [3, num_beams])
        fed = rng.integers(3, 24, [3, num_beams])
        origins = np.arange(3)[:, None] * num_beams + parents
        paths = [[[*paths[r][parents[r, k]], int(fed[r, k])] for k in range(num_beams)] for r in range(3)]


OPERATORS = {
    name: operator
    for name, operator in vars(paddle._C_ops).items()
    if callable(operator) and not name.startswith("_")
}
TENSOR_OPERATORS = ["__add__", "__sub__", "__mul__", "__rsub__", "__rmul__", "__truediv__", "__getitem__"]
TENSOR_OPERATORS += ["__ge__", "__eq__", "__lt__"]


class RecordedGraph:
    """Stands in for CUDAGraph on a CPU: it records operators on their tensors, and replays them.

    As on a card, what is recorded has no effect before the first replay, and a replay reads
    and writes the tensors of the capture, whatever Python's names stand for by then.
    """

    capturing, replays = None, 0

    def __init__(self, place):
        self.records, self.undo = [], []

    def capture_begin(self):
        assert RecordedGraph.capturing is None
        RecordedGraph.capturing = self

    def capture_end(self):
        RecordedGraph.capturing = None
        for tensor, before in reversed(self.undo):
            tensor.get_tensor().set(before, paddle.CPUPlace())

    def replay(self):
        RecordedGraph.replays += 1
        for operator, args, kwargs, outputs in self.records:
            results = operator(*args, **kwargs)
            results = results if isinstance(results, (list, tuple)) else [results]
            for output, result in zip(outputs, results):
                OPERATORS["assign_out_"](result, output)

    @classmethod
    def recorded(cls, operator, in_place=None):
        """Returns ``operator`` as it is to be called: recorded in a capture."""

        def call(*args, **kwargs):
            graph, cls.capturing = cls.capturing, None  # what it calls itself is part of it
            try:
                if graph is not None and in_place is not None:
                    graph.undo.append((args[in_place], args[in_place].numpy()))
                results = operator(*args, **kwargs)
                if graph is not None:
                    outputs = results if isinstance(results, (list, tuple)) else [results]
                    graph.records.append((operator, args, kwargs, outputs))
            finally:
                cls.capturing = graph
            return results

        return call


@pytest.fixture
def captured(monkeypatch):
    """Has beam search take the way of a card, with RecordedGraph; counts what a token takes."""
    wrappers = {}
    for name, operator in OPERATORS.items():
        # assign_out_ writes its second argument, the others with such a name their first.
        in_place = 1 if name == "assign_out_" else 0 if name.endswith("_") else None
        wrappers[id(operator)] = RecordedGraph.recorded(operator, in_place)
        monkeypatch.setattr(paddle._C_ops, name, wrappers[id(operator)])
    for owner in (paddle, paddle.nn.functional, paddle.Tensor):  # where Paddle 3 has them too
        for name, value in list(vars(owner).items()):
            if id(value) in wrappers:
                monkeypatch.setattr(owner, name, wrappers[id(value)])
    for name in TENSOR_OPERATORS:
        recorded = RecordedGraph.recorded(getattr(paddle.Tensor, name))
        monkeypatch.setattr(paddle.Tensor, name, recorded)
    counts = {"captures": 0, "uploads": 0, "downloads": 0, "replays": 0}

    def counted(function, name):
        def call(*args, **kwargs):
            assert RecordedGraph.capturing is None, f"{name} in a capture"
            counts[name] += 1
            return function(*args, **kwargs)

        return call

    monkeypatch.setattr(paddle, "to_tensor", counted(paddle.to_tensor, "uploads"))
    monkeypatch.setattr("glm.decoding.decoder.upload", counted(device.upload, "uploads"))
    monkeypatch.setattr(paddle.Tensor, "numpy", counted(paddle.Tensor.numpy, "downloads"))
    monkeypatch.setattr("glm.graphs.CUDAGraph", counted(RecordedGraph, "captures"))
    monkeypatch.setattr(RecordedGraph, "replay", counted(RecordedGraph.replay, "replays"))
    for room in ("glm.modeling", "glm.decoding.cache"):
        monkeypatch.setattr(f"{room}.on_cpu", lambda: False)
    for room in ("glm.graphs", "glm.decoding.cache", "glm.decoding.decoder"):
        monkeypatch.setattr(f"{room}.supports_cuda_graphs", lambda: True)
    return counts


def louder_end(model, factor=2.0):
    """Makes the end token likelier, so that hypotheses finish at different steps."""
    weight = model.glm.word_embeddings.weight.numpy()
    weight[END] *= factor
    model.glm.word_embeddings.weight.set_value(weight)
    return model


CAPTURED = [
    {},
    {"no_repeat_ngram_size": 2, "min_tgt_length": 3},
    {"no_repeat_ngram_size": 1, "tgt_length": 18},  # more bans than spare candidates
    {"num_beams": 1},
    {"select_topk": False, "top_k": 5, "temperature": 0.7},
    {"select_topk": False, "top_p": 0.9, "no_repeat_ngram_size": 1, "min_tgt_length": 3},
]


@pytest.mark.parametrize("changes", CAPTURED, ids=str)
def test_a_captured_search_equals_an_eager_one(request, monkeypatch, changes):
    """Examples finish at different steps, and leave when a quarter runs."""
    if not changes.get("select_topk", True):  # noise depends on which examples have left
        monkeypatch.setattr("glm.decoding.decoder.supports_cuda_graphs", lambda: True)
    lengths = (9, 5, 12, 7, 4, 10, 6, 8, 11)
    _, input_ids, lengths = make_sources(lengths)
    model = louder_end(random_glm(4, num_layers=1), 4.0)
    generation = generation_arguments(**{"tgt_length": 14, "num_beams": 4, **changes})
    paddle.seed(5)
    expected = best_hypotheses(model, input_ids, lengths, generation, START, END)
    counts = request.getfixturevalue("captured")
    paddle.seed(5)
    results = best_hypotheses(model, input_ids, lengths, generation, START, END)
    for (tokens, score), (other, other_score) in zip(results, expected):
        assert tokens == other and score == pytest.approx(other_score, abs=1e-5)
    assert 2 <= counts["captures"] <= 3 and counts["replays"] > counts["captures"]


@pytest.mark.parametrize("changes", [{}, {"select_topk": False, "no_repeat_ngram_size": 2, "top_p": 0.9}])
def test_a_token_is_one_upload_one_launch_and_one_download(captured, changes):
    _, input_ids, lengths = make_sources()
    model = random_glm(num_layers=1)
    counts = []
    for tokens in (8, 12):
        generation = generation_arguments(tgt_length=tokens, min_tgt_length=tokens, **changes)
        captured.update(uploads=0, downloads=0, replays=0, captures=0)
        beam_search(model, input_ids, lengths, generation, START, END)
        counts.append(dict(captured))
    assert counts[1]["captures"] == 1
    for name in ("uploads", "downloads", "replays"):
        assert counts[1][name] - counts[0][name] == 4, name


def test_an_exception_ends_a_capture(captured):
    def fail():
        raise KeyboardInterrupt

    replayed = CapturedStep(fail)
    with pytest.raises(KeyboardInterrupt):
        replayed()
    assert RecordedGraph.capturing is None and captured["replays"] == 0


def test_a_collective_runs_between_two_graphs(captured, monkeypatch):
    """At every replay, on what the graph before it computed."""
    calls = []

    def all_reduce(tensor, op, group, use_calc_stream):  # of two processes with equal tensors
        assert RecordedGraph.capturing is None
        calls.append(tensor.tolist())
        OPERATORS["assign_out_"](OPERATORS["scale"](tensor, 2.0, 0.0, True), tensor)

    monkeypatch.setattr(paddle.distributed.stream, "all_reduce", all_reduce)
    value = paddle.zeros([1])

    def step():
        value.add_(paddle.ones([1]))
        total = value * 10.0
        graphs.all_reduce(total, None)
        return total + 1.0

    replayed = CapturedStep(step)
    for call in (1, 2, 3):
        assert replayed().tolist() == [20.0 * call + 1] and calls == [[10.0 * n] for n in range(1, call + 1)]
    assert captured["captures"] == 2 and captured["replays"] == 6


NO_LIBRARY = """

----------------------
Error Message Summary:
----------------------
PreconditionNotMetError: The third-party dynamic library (libcusolver.so) is not configured correctly.
  Suggestions:
  - Windows: set PATH by `set PATH=XXX; (at ../dynamic_loader.cc:304)"""


@pytest.mark.parametrize("failure", ["invalidated", "no library", "no library behind a collective", "memory"])
def test_where_a_capture_fails_the_search_goes_on_without(captured, monkeypatch, failure):
    _, input_ids, lengths = make_sources()
    model = random_glm(num_layers=1)
    args = model, input_ids, lengths, generation_arguments(), START, END
    expected = best_hypotheses(*args)
    assert captured["replays"]

    captured.update(replays=0, captures=0)
    monkeypatch.setattr(graphs, "_failed", False)
    warnings, begun_by_driver, reason = [], [], "CUDA error(900): not permitted here."
    monkeypatch.setattr("glm.graphs.logger.warning", warnings.append)
    begin, end, log_sum_exp = RecordedGraph.capture_begin, RecordedGraph.capture_end, modeling.log_sum_exp
    if failure == "invalidated":
        # As CUDA and Paddle do: Paddle ends its capture only if there is one on the stream.
        def capture_end(graph):
            if not begun_by_driver:
                raise OSError(f"(External) {reason} \n  [Hint: search for it.] (at ../gpu_info.cc:9)")
            end(graph)

        driver = SimpleNamespace(cuStreamBeginCapture_v2=lambda stream, mode: begun_by_driver.append(stream))
        monkeypatch.setattr(graphs.ctypes, "CDLL", {"libcuda.so.1": driver}.get)
        stream = SimpleNamespace(cuda_stream=1234)
        monkeypatch.setattr(paddle.device.cuda, "current_stream", lambda: stream)
        monkeypatch.setattr(RecordedGraph, "capture_end", capture_end)
    elif failure == "memory":
        reason = "Out of memory error on GPU 0."

        def out_of_memory(*args):
            if RecordedGraph.capturing:
                raise MemoryError(
                    f"\nError Message Summary:\n---\nResourceExhaustedError: \n\n{reason} Free it.\n"
                )
            return log_sum_exp(*args)

        monkeypatch.setattr("glm.decoding.candidates.log_sum_exp", out_of_memory)
    else:
        reason, number = "(libcusolver.so)", 1 + failure.endswith("collective")

        def capture_begin(graph):
            if captured["captures"] == number:
                raise RuntimeError(NO_LIBRARY)
            begin(graph)

        def log_sum_exp_of_two(*args):
            graphs._collective(lambda: None)
            return log_sum_exp(*args)

        monkeypatch.setattr("glm.decoding.candidates.log_sum_exp", log_sum_exp_of_two)
        monkeypatch.setattr(RecordedGraph, "capture_begin", capture_begin)

        # Of a graph that is not being captured Paddle's is a segmentation fault.
        def capture_end(graph):
            assert RecordedGraph.capturing is graph
            end(graph)

        monkeypatch.setattr(RecordedGraph, "capture_end", capture_end)
    assert best_hypotheses(*args) == expected
    assert RecordedGraph.capturing is None and captured["replays"] == 0
    assert len(begun_by_driver) == (failure == "invalidated")
    assert len(warnings) == 1 and reason in warnings[0] and "\n" not in warnings[0]
    assert "Windows" not in warnings[0] and "Hint" not in warnings[0]


@pytest.mark.parametrize("select_topk", [True, False])
def test_candidates(select_topk):
    """Distinct, the best first, each with the score that PaddleNLP's own forward gives its tokens."""
    sources, input_ids, lengths = make_sources((9, 5))
    model, penalty = random_glm(2), 0.7
    generation = generation_arguments(num_beams=4, num_return_sequences=4, select_topk=select_topk)
    paddle.seed(3)
    results = beam_search(model, input_ids, lengths, generation, START, END)
    for source, hypotheses in zip(sources, results):
        assert len(hypotheses) == 4 and len({tuple(tokens) for tokens, _ in hypotheses}) == 4
        scores = [score for _, score in hypotheses]
        assert scores == sorted(scores, reverse=True)
        for tokens, score in hypotheses:
            path = [*tokens, END] if len(tokens) < generation.tgt_length else tokens
            total = sum(
                plain_log_probabilities(model, source, path[:i])[token] for i, token in enumerate(path)
            )
            assert score == pytest.approx(total / len(tokens) ** penalty, abs=1e-3)


def test_draws_are_ranked_by_their_sums():
    """Drawn by their keys, then ranked by log-probability, on which the first num_beams depend."""
    generation = generation_arguments(num_beams=2, select_topk=False, length_penalty=0.0)
    beams = Beams(1, generation, END)
    # The first beam's candidates: keys say 3, END, 4, 5, 6 (6 is not drawn); log-probabilities say 5, 4,
    # 3, END.
    keys, log_p = [9.0, 8.0, 7.0, 6.0, 5.0], [-3.0, -4.0, -2.0, -1.0, -0.5]
    dead = [-np.inf] * 5
    token_ids = np.array([[[3, END, 4, 5, 6], [0] * 5]])
    beams.advance(Candidates(np.array([[keys, dead]]), np.array([[log_p, dead]]), token_ids))
    assert beams.tokens[0, :, 0].tolist() == [5, 4] and beams.sums[0].tolist() == [-1.0, -2.0]
    assert (
        beams.finished_scores[0].tolist() == [-np.inf] * 2
    )  # END is the last of the four, not of the first two
    assert beams.parents.tolist() == [[0, 0]]


@paddle.no_grad()
def test_slots_that_no_beam_sees_are_left_out():
    """All beams go on from the first: one slot of each past step stays, and no padding."""
    model, num_beams, slots = random_glm(), 3, 9
    _, input_ids, lengths = make_sources((9, 7))
    input_ids = paddle.concat([input_ids, paddle.zeros([2, 4], "int64")], axis=1)  # more padding
    cache = prefill(model, input_ids, lengths, num_beams)
    origins = np.arange(6).reshape([2, 3])
    for steps in (16, 16, 8):
        cache.compact(origins, slots - 9, steps)
        assert cache.layers[0][1].shape == [1, 2, 4, slots + steps * num_beams, 8]
        for _ in range(steps):
            token_ids = paddle.full([2, num_beams], 5, dtype="int64")
            decode_one_token(model, cache, token_ids, paddle.to_tensor(origins))
            origins = np.array([[0] * num_beams, [num_beams] * num_beams])
        slots += steps


@paddle.no_grad()
@pytest.mark.parametrize("qkv_per_head", [False, True])
def test_where_a_token_goes_in_the_cache(qkv_per_head):
    """Each number that query_key_value gives, in either layout, after an example has left."""
    num_beams, heads, size = 3, 4, 8
    _, input_ids, lengths = make_sources((9, 7))
    cache = prefill(random_glm(), input_ids, lengths, num_beams)
    cache.qkv_per_head = qkv_per_head
    cache.compact(np.arange(6).reshape([2, 3]), 0, 5)
    cache.advance(paddle.arange(6).reshape([2, 3]))
    cache.compact(np.array([[3, 4, 5]]), 1, 4)  # the second example alone goes on
    cache.advance(paddle.arange(3).reshape([1, 3]))
    used = 7 + 2 * num_beams
    assert cache.position_ids.tolist() == [[[5], [2]]]
    assert (cache.mask[0, 0] == 0).sum(-1).tolist() == [9] * 3  # source, a past slot, its own
    projected = np.arange(num_beams * 3 * heads * size, dtype="float32") + 1000
    for layer, keys, values, query in cache.layers:
        layer.scatter_(cache.new_rows, paddle.to_tensor(projected).reshape([-1, size]))
        columns = (heads, 3, size) if qkv_per_head else (3, heads, size)
        for beam, numbers in enumerate(projected.reshape(num_beams, *columns)):
            numbers = numbers if not qkv_per_head else numbers.swapaxes(0, 1)  # [3, H, D]
            slot = used - num_beams + beam
            assert cache.mask[0, 0, beam, slot] == 0
            for part, where, expected in zip((query, keys, values), (beam, slot, slot), numbers):
                np.testing.assert_array_equal(part[0, 0, :, where].numpy(), expected)
        assert (layer >= 1000).sum() == projected.size  # and nowhere else


@pytest.mark.parametrize("growth", [1, 2, 5, 16])
def test_a_cache_that_grows_while_examples_leave(monkeypatch, growth):
    """The same hypotheses whatever the room is that is added at a time."""
    _, input_ids, lengths = make_sources((9, 5, 12, 7))
    model = louder_end(random_glm(1, num_layers=2))
    generation = generation_arguments(tgt_length=11, num_beams=3, no_repeat_ngram_size=2)
    expected = [
        best_hypotheses(model, input_ids[i : i + 1, :n], lengths[i : i + 1], generation, START, END)[0]
        for i, n in enumerate(lengths.tolist())
    ]
    monkeypatch.setattr("glm.decoding.decoder.GROWTH", growth)
    for (tokens, score), (expected_tokens, expected_score) in zip(
        best_hypotheses(model, input_ids, lengths, generation, START, END), expected
    ):
        assert tokens == expected_tokens and score == pytest.approx(expected_score, abs=1e-4)


@paddle.no_grad()
def test_the_source_is_stored_once_per_example():
    model = random_glm()
    _, input_ids, lengths = make_sources()
    for num_beams in (1, 7):
        cache = prefill(model, input_ids, lengths, num_beams)
        assert [layer[1].shape for layer in cache.layers] == [[1, 3, 4, 12, 8]] * 2
        cache.compact(np.arange(3 * num_beams).reshape([3, -1]), 0, 16)
        slots = 12 + 16 * num_beams
        assert [part.shape for part in cache.layers[1][1:]] == [
            [1, 3, 4, n, 8] for n in (slots, slots, num_beams)
        ]
        for layer, keys, values, query in cache.layers:  # one tensor, of which these are views
            assert len(layer) == 3 * 4 * (2 * slots + num_beams)
            layer[:] = 5.0
            assert keys[0, 0, 0, -1, 0] == values[0, 0, 0, -1, 0] == query[0, 0, 0, 0, 0] == 5


def exhaustive_search(model, source, vocab_size, generation):
    """All hypotheses there are, the best first, scored by DESIGN's rules from plain forwards."""
    found, frontier = [], [((), 0.0)]
    for length in range(generation.tgt_length + 1):
        extended = []
        for tokens, total in frontier:
            if length == generation.tgt_length:
                found.append((total / length**generation.length_penalty, tokens))
                continue
            log_p = plain_log_probabilities(model, source, tokens)
            for token in range(vocab_size):
                if token == END:
                    if length >= generation.min_tgt_length:
                        score = (total + log_p[END]) / max(length, 1) ** generation.length_penalty
                        found.append((score, tokens))
                elif not repeats_ngram((*tokens, token), generation.no_repeat_ngram_size):
                    extended.append(((*tokens, token), total + log_p[token]))
        frontier = extended
    return sorted(found, reverse=True)


def assert_same_hypotheses(hypotheses, expected):
    """The same token ids and scores, the best first, as pairs (score, tokens)."""
    assert [tokens for tokens, _ in hypotheses] == [list(tokens) for _, tokens in expected]
    scores = [score for _, score in hypotheses]
    np.testing.assert_allclose(scores, [score for score, _ in expected], atol=1e-4)


@pytest.mark.parametrize(
    "length_penalty, no_repeat_ngram_size, min_tgt_length",
    [(0.7, 0, 0), (0.0, 0, 0), (2.0, 0, 1), (0.7, 2, 0), (1.0, 1, 2), (0.7, 3, 4), (-1.0, 2, 3)],
)
def test_wide_beams_find_what_exhaustive_search_finds(length_penalty, no_repeat_ngram_size, min_tgt_length):
    sources, input_ids, lengths = make_sources((4, 6), vocab_size=5)
    generation = generation_arguments(
        tgt_length=4,
        num_beams=350,  # more than there are hypotheses, 4 ** 4 + 4 ** 3 + ...: nothing is ever dropped
        length_penalty=length_penalty,
        no_repeat_ngram_size=no_repeat_ngram_size,
        min_tgt_length=min_tgt_length,
        num_return_sequences=30,
    )
    for seed in (0, 1):
        model = random_glm(seed, vocab_size=5, num_layers=1, hidden_size=16, heads=2, spread=0.5)
        results = beam_search(model, input_ids, lengths, generation, START, END)
        for source, hypotheses in zip(sources, results):
            assert_same_hypotheses(hypotheses, exhaustive_search(model, source, 5, generation)[:30])


def loop_beam_search(model, source, generation):
    """One example, one beam at a time, from lists and plain forwards: the rules of THUDM/GLM."""
    num_beams, penalty = generation.num_beams, generation.length_penalty
    running, finished = [(0.0, ())], []
    for step in range(generation.tgt_length):
        continuations = []
        for total, tokens in running:
            log_p = plain_log_probabilities(model, source, tokens)
            for token, value in enumerate(log_p):
                banned = step < generation.min_tgt_length if token == END else False
                if not banned and (
                    token == END or not repeats_ngram((*tokens, token), generation.no_repeat_ngram_size)
                ):
                    continuations.append((total + value, tokens, token))
        continuations = sorted(continuations, key=lambda c: -c[0])[: 2 * num_beams]
        running = []
        for rank, (total, tokens, token) in enumerate(continuations):
            if token != END:
                running.append((total, (*tokens, token)))
            elif rank < num_beams:
                finished.append((total / max(step, 1) ** penalty, tokens))
        running = running[:num_beams]
        finished = sorted(finished, key=lambda f: -f[0])[:num_beams]
        if len(finished) == num_beams and finished[-1][0] >= continuations[0][0] / max(step, 1) ** penalty:
            break
    else:
        finished += [(total / generation.tgt_length**penalty, tokens) for total, tokens in running]
    return sorted(finished, key=lambda f: -f[0])[:num_beams]


@pytest.mark.parametrize("num_beams", [1, 2, 4])
@pytest.mark.parametrize("no_repeat_ngram_size, min_tgt_length", [(0, 0), (2, 3), (3, 10), (1, 9)])
def test_narrow_beams_equal_plain_loops(monkeypatch, num_beams, no_repeat_ngram_size, min_tgt_length):
    """And all their hypotheses; with (1, 9) a beam has more bans than candidates to spare."""
    monkeypatch.setattr("glm.decoding.decoder.SPARE", 1)
    generation = generation_arguments(
        tgt_length=10,
        num_beams=num_beams,
        num_return_sequences=num_beams,
        no_repeat_ngram_size=no_repeat_ngram_size,
        min_tgt_length=min_tgt_length,
    )
    sources, input_ids, lengths = make_sources((9, 5, 12, 7))
    for seed in range(3):
        model = louder_end(random_glm(seed, num_layers=1))
        results = beam_search(model, input_ids, lengths, generation, START, END)
        for source, hypotheses in zip(sources, results):
            assert_same_hypotheses(hypotheses, loop_beam_search(model, source, generation))


def test_one_beam_is_greedy_search():
    sources, input_ids, lengths = make_sources()
    model = random_glm(5)
    results = best_hypotheses(
        model, input_ids, lengths, generation_arguments(tgt_length=12, num_beams=1), START, END
    )
    for source, (tokens, _) in zip(sources, results):
        greedy = []
        while len(greedy) < 12:
            token = int(plain_log_probabilities(model, source, greedy).argmax())
            if token == END:
                break
            greedy.append(token)
        assert tokens == greedy


def test_when_everything_is_banned_what_there_is_comes_out():
    sources, input_ids, lengths = make_sources((4, 6), vocab_size=4)
    model = random_glm(0, vocab_size=4, num_layers=1, hidden_size=16, heads=2)
    generation = generation_arguments(tgt_length=9, min_tgt_length=9, no_repeat_ngram_size=1, num_beams=2)
    for tokens, score in best_hypotheses(model, input_ids, lengths, generation, START, END):
        assert sorted(tokens) == [0, 1, 3] and np.isfinite(score)


def draw(logits, select, temperature=1.0, bans=(), **filters):
    """What ``draw_tokens`` gives for logits [N, V], as Candidates of one row."""
    bans = paddle.to_tensor(np.array([*bans, logits.size], dtype="int64"))
    noise = paddle.uniform(logits.shape, min=1e-20, max=1.0)
    generation = generation_arguments(temperature=temperature, **filters)
    keys, log_probabilities, token_ids = draw_tokens(logits, noise, bans, select, generation).numpy()
    return Candidates(keys, log_probabilities, token_ids.astype("int64"))


def draws(log_p, count, select=2, **filters):
    """``count`` draws of ``select`` tokens without replacement, int [count, select], in the order drawn."""
    logits = paddle.to_tensor(np.tile(np.asarray(log_p, dtype="float32") + 3, [count, 1]))
    keys, log_probabilities, token_ids = draw(logits, select, **filters)
    expected = np.take_along_axis(np.tile(log_softmax(log_p), [count, 1]), token_ids, -1)
    finite = np.isfinite(keys)
    np.testing.assert_allclose(log_probabilities[finite], expected[finite], atol=1e-5)
    assert (np.diff(np.where(finite, keys, -1e9), axis=-1) <= 0).all()
    return np.where(finite, token_ids, -1)


def test_drawing_without_replacement_has_the_right_distribution():
    paddle.seed(7)
    p = np.array([0.4, 0.3, 0.15, 0.1, 0.05])
    pairs = draws(np.log(p), 20000)
    assert (pairs[:, 0] != pairs[:, 1]).all()
    observed = np.zeros([5, 5])
    np.add.at(observed, (pairs[:, 0], pairs[:, 1]), 1)
    expected = p[:, None] * p[None, :] / (1 - p[:, None])  # the first, then the second of what is left
    off = ~np.eye(5, dtype=bool)
    assert scipy.stats.chisquare(observed[off], expected[off] * 20000).pvalue > 0.001
    # The same test tells this distribution from a slightly flatter one.
    flat = p**0.9 / (p**0.9).sum()
    wrong = flat[:, None] * flat[None, :] / (1 - flat[:, None])
    assert scipy.stats.chisquare(observed[off], wrong[off] * 20000).pvalue < 1e-6


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_keys_of_several_beams_can_be_compared(temperature):
    """Whatever the logits' level and spread, a beam's largest key has the standard Gumbel distribution."""
    paddle.seed(9)
    rows = np.array([[9.0, 8.0, 5.0, 4.0], [-3.0, -3.1, -3.2, -3.3]])
    logits = paddle.to_tensor(np.tile(rows, [4000, 1]).astype("float32"))
    keys = draw(logits, 1, temperature).sort_keys.reshape([-1, 2])
    for beam in (0, 1):
        assert scipy.stats.kstest(keys[:, beam], "gumbel_r").pvalue > 0.001


def test_a_beam_s_own_sum_is_part_of_its_keys():
    """A beam far behind gives no draw, however large its tokens' keys are."""
    beams = Beams(1, generation_arguments(num_beams=2, select_topk=False), END)
    beams.sums = np.array([[-1.0, -20.0]])
    keys = np.array([[[-1.0, -2.0, -3.0, -4.0], [1.5, 1.0, 0.5, 0.0]]])
    log_p = np.array([[[-1.0, -2.0, -3.0, -4.0], [-0.1, -3.0, -4.0, -5.0]]])
    beams.advance(Candidates(keys, log_p, np.array([[[3, 4, 5, 6], [7, 8, 9, 10]]])))
    assert beams.parents.tolist() == [[0, 0]] and beams.tokens[0, :, 0].tolist() == [3, 4]
    # And the other way round: by their keys alone the first beam's would be drawn.
    beams = Beams(1, generation_arguments(num_beams=2, select_topk=False), END)
    beams.sums = np.array([[-20.0, -1.0]])
    beams.advance(Candidates(keys[:, ::-1], log_p, np.array([[[3, 4, 5, 6], [7, 8, 9, 10]]])))
    assert beams.parents.tolist() == [[1, 1]]


def test_top_k_and_top_p_filter_the_draw():
    paddle.seed(8)
    log_p = np.log([0.4, 0.3, 0.15, 0.1, 0.05])
    for filters, allowed in (
        ({"top_k": 3}, [0, 1, 2]),
        ({"top_p": 0.6}, [0, 1]),  # 0.4 is not enough, 0.7 is
        ({"top_p": 0.4 - 1e-3}, [0]),
        ({"top_p": 0.42}, [0, 1]),
        ({"top_p": 0.68}, [0, 1]),
        ({"top_k": 2, "top_p": 0.99}, [0, 1]),
        ({"top_k": 9, "top_p": 1.0}, [0, 1, 2, 3, 4]),
        ({"temperature": 2.0}, [0, 1, 2, 3, 4]),
        ({"temperature": 0.5, "top_p": 0.6}, [0, 1]),  # of 0.55, 0.31 and less
        ({"temperature": 0.5, "top_k": 3}, [0, 1, 2]),
    ):
        first = draws(log_p, 5000, **filters)[:, 0]
        share = np.exp(log_p[allowed] / filters.get("temperature", 1.0))
        share /= share.sum()
        counts = np.bincount(first, minlength=5)
        assert counts.sum() == counts[allowed].sum()
        if len(allowed) > 1:
            assert scipy.stats.chisquare(counts[allowed], share * 5000).pvalue > 0.001


def test_drawn_beams_keep_the_rules_and_repeat_with_the_seed():
    _, input_ids, lengths = make_sources()
    model = random_glm(2)
    generation = generation_arguments(
        tgt_length=12, min_tgt_length=5, no_repeat_ngram_size=2, select_topk=False, top_k=8, top_p=0.9
    )
    results = []
    for seed in (3, 3, 4):
        paddle.seed(seed)
        results.append(best_hypotheses(model, input_ids, lengths, generation, START, END))
    assert results[0] == results[1] != results[2]
    for tokens, _ in results[0] + results[2]:
        assert 5 <= len(tokens) <= 12 and END not in tokens and not repeats_ngram(tokens, 2)


@pytest.mark.parametrize("filters", [{"top_k": 1}, {"top_k": 3}, {"top_p": 0.5}, {"top_k": 4, "top_p": 0.7}])
@pytest.mark.parametrize("garbage", [False, True])  # as topk's ids of -inf entries are on a GPU
def test_filtered_and_banned_tokens_are_never_chosen(monkeypatch, filters, garbage):
    """Every live beam's last token is one that its parent's distribution leaves, and not banned."""
    topk = paddle.topk

    def gpu_topk(values, k):
        keys, token_ids = topk(values, k)
        return keys, paddle.where(
            keys == -inf, paddle.full_like(token_ids, -1 if k % 2 else 2**40), token_ids
        )

    if garbage:
        monkeypatch.setattr(paddle, "topk", gpu_topk)
    sources, input_ids, lengths = make_sources((9, 5))
    model = random_glm(3, num_layers=1)
    generation = generation_arguments(
        tgt_length=7, num_beams=5, select_topk=False, no_repeat_ngram_size=2, min_tgt_length=3, **filters
    )
    advance, live = Beams.advance, []

    def checked(beams, candidates):
        keys, log_probabilities, token_ids = candidates
        assert ((token_ids >= 0) & (token_ids < 24)).all()
        assert ((keys == -inf) == (log_probabilities == -inf)).all()
        before, examples, count = beams.tokens.copy(), beams.example.copy(), beams.step
        advance(beams, candidates)
        for row, beam in zip(*np.nonzero(beams.sums > -inf)):
            live.append((int(beams.example[row]), beams.tokens[row, beam, : count + 1].tolist()))
        assert before.shape[0] == len(examples)

    monkeypatch.setattr(Beams, "advance", checked)
    paddle.seed(1)
    results = best_hypotheses(model, input_ids, lengths, generation, START, END)
    assert all(np.isfinite(score) for _, score in results) and len(live) > 10
    for example, tokens in live:
        log_p = plain_log_probabilities(model, sources[example], tokens[:-1])
        if len(tokens) <= 3:
            log_p[END] = -inf
        for token in range(24):
            if repeats_ngram((*tokens[:-1], token), 2):
                log_p[token] = -inf
        order = np.argsort(-log_p)[: filters.get("top_k", 24)]
        p = np.exp(log_p[order]) / np.exp(log_p[order]).sum()
        allowed = order[(np.cumsum(p) - p < filters.get("top_p", 1.0)) & (p > 0)]
        assert tokens[-1] in allowed and not repeats_ngram(tokens, 2)
