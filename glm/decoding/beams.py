"""The rules of beam search, in numpy on the host."""

from collections import defaultdict

import numpy as np
from numpy import ndarray

from glm.arguments import GenerationArguments
from glm.decoding.candidates import Candidates


class Beams:
    """Run beam search by the rules of THUDM/GLM.

    A: examples that are not done; K: beams; T: tgt_length; M: candidates of a beam.

    Attributes:
        step: Tokens generated so far.
        example: int64 [A], which example of the batch each row is.
        parents: int64 [A, K], which beam of the step before each beam goes on from.
        tokens: int64 [A, K, T], of the running beams.
        sums: float64 [A, K], their log-probabilities; -inf where there is no beam.
        ancestry: bool [A, K, T * K], the slots that each beam descends from. In step t beam k of an
            example takes slot t * K + k.
        finished_tokens: int64 [A, K, T], the best finished hypotheses, the best first.
        finished_lengths: int64 [A, K].
        finished_scores: float64 [A, K], -inf where there are fewer.
        ngram_ends: Of each example of the batch: the last n - 1 tokens of a beam -> the slots in
            which a beam ended in them.
        results: Of each example of the batch its hypotheses, or None while it is running.
    """

    def __init__(self, batch_size: int, generation: GenerationArguments, end_token_id: int):
        self.generation, self.end_token_id = generation, end_token_id
        num_beams, tgt_length = generation.num_beams, generation.tgt_length
        self.step = 0
        self.example = np.arange(batch_size)
        self.parents = np.tile(np.arange(num_beams), (batch_size, 1))
        self.tokens = np.zeros([batch_size, num_beams, tgt_length], dtype="int64")
        self.sums = np.full([batch_size, num_beams], -np.inf)
        self.sums[:, 0] = 0  # all beams start alike: only the first may branch
        self.ancestry = np.zeros([batch_size, num_beams, tgt_length * num_beams], dtype=bool)
        self.finished_tokens = np.zeros_like(self.tokens)
        self.finished_lengths = np.zeros([batch_size, num_beams], dtype="int64")
        self.finished_scores = np.full([batch_size, num_beams], -np.inf)
        self.ngram_ends = [defaultdict(list) for _ in range(batch_size)]
        self.results = [None] * batch_size

    def banned(self) -> ndarray:
        """Return the impossible next tokens, int64 [N, 3] of rows, beams and tokens, once a step.

        They are the end token before min_tgt_length, and what would repeat an n-gram. The time is
        proportional to the bans and to the n-grams that other beams of the example have too.
        """
        bans, n, step = [], self.generation.no_repeat_ngram_size, self.step
        if step < self.generation.min_tgt_length:
            bans = [(*beam, self.end_token_id) for beam in np.ndindex(self.sums.shape)]
        if 0 < n <= step + 1:
            bans += self._repeated_ngrams(n)
        return np.array(bans, dtype="int64").reshape([-1, 3])

    def _repeated_ngrams(self, n):
        """List the tokens that would repeat an n-gram, (row, beam, token), and note the last ones."""
        repeats, step, num_beams = [], self.step, self.sums.shape[1]
        for row, beam in zip(*np.nonzero(self.sums > -np.inf)):
            tokens = self.tokens[row, beam]
            slots = self.ngram_ends[self.example[row]][tuple(tokens[step - n + 1 : step])]
            # A slot of step s holds token s - 1, and token s is what followed it.
            for slot in slots:
                if self.ancestry[row, beam, slot]:
                    repeats.append((row, beam, tokens[slot // num_beams]))
            slots.append(step * num_beams + beam)
        return repeats

    def advance(self, candidates: Candidates) -> None:
        """Take one step with ``candidates``. Examples that are done leave."""
        continuations = self._best_continuations(candidates)
        done = self._finish_hypotheses(*continuations)
        stuck = self._live_on(*continuations)
        self._leave(done | stuck)

    def _best_continuations(self, candidates):
        """Choose the 2 * num_beams best continuations of each example, drawn by their keys if any are.

        Returns:
            Their sums, token ids and parents, [A, 2 * K] or fewer, those of the largest sum first.
        """
        num_rows, _, count = candidates.token_ids.shape
        sums = (candidates.log_probabilities + self.sums[:, :, None]).reshape([num_rows, -1])
        keys = (candidates.sort_keys + self.sums[:, :, None]).reshape([num_rows, -1])
        row = np.arange(num_rows)[:, None]
        chosen = np.argsort(-keys, axis=1, kind="stable")[:, : 2 * self.generation.num_beams]
        chosen = chosen[row, np.argsort(-sums[row, chosen], axis=1, kind="stable")]
        token_ids = candidates.token_ids.reshape([num_rows, -1])
        return sums[row, chosen], token_ids[row, chosen], chosen // count

    def _finish_hypotheses(self, sums, token_ids, parents):
        """Finish those with an end token among the first num_beams; a later one is dropped.

        Returns:
            Which examples are done, bool [A].
        """
        first, penalty = slice(self.generation.num_beams), self.generation.length_penalty
        ends = token_ids[:, first] == self.end_token_id
        if ends.any():
            scores = np.where(ends, sums[:, first], -np.inf) / max(self.step, 1) ** penalty
            row = np.arange(len(sums))[:, None]
            lengths = np.full_like(scores, self.step, dtype="int64")
            self._keep_finished(self.tokens[row, parents[:, first]], lengths, scores)
        # Compared with the best of all candidates over the length before this step, as in THUDM/GLM,
        # so that one beam is greedy search.
        return self.finished_scores[:, -1] >= sums[:, 0] / max(self.step, 1) ** penalty

    def _live_on(self, sums, token_ids, parents):
        """Go on with the first num_beams continuations that do not end.

        Returns:
            Which examples have none, as each is banned, bool [A]. What was running has finished then,
            unless something has before.
        """
        step, num_beams = self.step, self.generation.num_beams
        ends = token_ids == self.end_token_id
        row = np.arange(len(sums))[:, None]
        live = np.argsort(ends, axis=1, kind="stable")[:, :num_beams]
        sums = np.where(ends, -np.inf, sums)[row, live]
        token_ids, parents = token_ids[row, live], parents[row, live]
        stuck = (sums == -np.inf).all(axis=1)
        self._finish_running(stuck & (self.finished_scores == -np.inf).all(axis=1))
        beam = np.arange(num_beams)
        self.ancestry[:, beam, step * num_beams + beam] = True
        self.sums, self.parents = sums, parents
        self.tokens, self.ancestry = self.tokens[row, parents], self.ancestry[row, parents]
        self.tokens[:, :, step] = token_ids
        self.step += 1
        return stuck

    def _leave(self, done):
        """Take the results of the examples that are ``done`` (bool [A]), at tgt_length of all."""
        if self.step == self.generation.tgt_length:
            self._finish_running(~done)
            done = np.ones_like(done)
        for row in np.nonzero(done)[0]:
            count = max((self.finished_scores[row] > -np.inf).sum(), 1)
            lengths, scores = self.finished_lengths[row], self.finished_scores[row].tolist()
            self.results[self.example[row]] = [
                (self.finished_tokens[row, rank, : lengths[rank]].tolist(), scores[rank])
                for rank in range(min(count, self.generation.num_return_sequences))
            ]
        if done.any():
            names = "example parents tokens sums ancestry finished_tokens finished_lengths finished_scores"
            for name in names.split():
                setattr(self, name, getattr(self, name)[~done])

    def _finish_running(self, chosen):
        """Add the running beams of the ``chosen`` rows (bool [A]), with their own scores."""
        if chosen.any():
            penalty = self.generation.length_penalty
            scores = np.where(chosen[:, None], self.sums, -np.inf) / max(self.step, 1) ** penalty
            self._keep_finished(self.tokens, np.full(scores.shape, self.step), scores)

    def _keep_finished(self, tokens, lengths, scores):
        """Add hypotheses [A, M, T], [A, M], [A, M] to the finished ones, and keep the K best."""
        scores = np.concatenate([self.finished_scores, scores], axis=1)
        lengths = np.concatenate([self.finished_lengths, lengths], axis=1)
        tokens = np.concatenate([self.finished_tokens, tokens], axis=1)
        best = np.argsort(-scores, axis=1, kind="stable")[:, : self.sums.shape[1]]
        row = np.arange(len(scores))[:, None]
        self.finished_scores, self.finished_lengths = scores[row, best], lengths[row, best]
        self.finished_tokens = tokens[row, best]
