"""ROUGE and BLEU of two lists of texts."""

import functools
import sys
import unicodedata

from paddlenlp.metrics import BLEU
from paddlenlp.transformers import BasicTokenizer
from rouge import Rouge


@functools.cache
def _basic_tokenizer():
    return BasicTokenizer(do_lower_case=True)


def _words(text):
    """Split a text, in NFKC as the tokenizer has it, into the words that metrics count, list[str].

    A word is a Chinese character, a run of Latin letters or digits, or a punctuation mark.
    """
    return _basic_tokenizer().tokenize(unicodedata.normalize("NFKC", text))


def rouge(prediction, reference):
    """Return ROUGE-1, ROUGE-2 and ROUGE-L (F1) of two texts over ``_words``, dict.

    Each is 0..1. An empty text scores 0.
    """
    prediction, reference = _words(prediction), _words(reference)
    if not (prediction and reference):
        return {"rouge1": 0.0, "rouge2": 0.0, "rougel": 0.0}
    # The package finds the longest common subsequence by recursion, one level a word.
    depth = len(prediction) + len(reference) + 1000
    sys.setrecursionlimit(max(sys.getrecursionlimit(), depth))
    # It splits sentences at ".", which numbers in place of words have not.
    numbers = {word: str(number) for number, word in enumerate(dict.fromkeys(prediction + reference))}
    prediction = " ".join(numbers[word] for word in prediction)
    reference = " ".join(numbers[word] for word in reference)
    (scores,) = Rouge(exclusive=False).get_scores(prediction, reference)
    return {f"rouge{kind}": scores[f"rouge-{kind}"]["f"] for kind in "12l"}


def compute_metrics(predictions, references, scores=None):
    """Return the mean of ``rouge`` over the records and corpus BLEU-4 over the same words, dict.

    Each is 0..1.

    Args:
        predictions, references: two lists of str of the same length.
        scores: what ``rouge`` says of each pair, list of dict, where that is known already.
    """
    if scores is None:
        scores = [rouge(*pair) for pair in zip(predictions, references)]
    bleu = BLEU(n_size=4)
    for prediction, reference in zip(predictions, references):
        bleu.add_inst(_words(prediction), [_words(reference)])
    metrics = {name: sum(score[name] for score in scores) / len(scores) for name in scores[0]}
    # Without a single generated word BLEU's brevity penalty has no value, and its limit is 0.
    metrics["bleu4"] = bleu.score() if bleu.bp_c else 0.0
    return metrics
