"""ROUGE and BLEU of two lists of texts."""

import functools
import sys
import unicodedata

from paddlenlp.metrics import BLEU
from paddlenlp.transformers import BasicTokenizer
from rouge import Rouge


@functools.lru_cache(maxsize=None)
def _basic_tokenizer():
    return BasicTokenizer(do_lower_case=True)


def _words(text):
    """What counts, in NFKC as the tokenizer has it: a Chinese character, a run of Latin letters or digits, a mark."""
    return _basic_tokenizer().tokenize(unicodedata.normalize("NFKC", text))


def rouge(prediction, reference):
    """ROUGE-1, ROUGE-2 and ROUGE-L (F1) of two texts, over ``_words``, each 0..1. An empty text scores 0."""
    prediction, reference = _words(prediction), _words(reference)
    if not (prediction and reference):
        return {"rouge1": 0.0, "rouge2": 0.0, "rougel": 0.0}
    # The package finds the common subsequence by recursion, one level a word.
    sys.setrecursionlimit(max(sys.getrecursionlimit(), len(prediction) + len(reference) + 1000))
    # It splits sentences at ".": numbers in place of words have none.
    numbers = {word: str(number) for number, word in enumerate(dict.fromkeys(prediction + reference))}
    texts = (" ".join(numbers[word] for word in words) for words in (prediction, reference))
    (scores,) = Rouge(exclusive=False).get_scores(*texts)
    return {f"rouge{kind}": scores[f"rouge-{kind}"]["f"] for kind in "12l"}


def compute_metrics(predictions, references):
    """``rouge``, the mean over the records, and corpus BLEU-4 over the same words, each 0..1.

    Args: two lists of str of the same length.
    """
    bleu = BLEU(n_size=4)
    scores = []
    for prediction, reference in zip(predictions, references):
        bleu.add_inst(_words(prediction), [_words(reference)])
        scores.append(rouge(prediction, reference))
    metrics = {name: sum(score[name] for score in scores) / len(scores) for name in scores[0]}
    # Without a single generated word BLEU's brevity penalty has no value, and its limit is 0.
    metrics["bleu4"] = bleu.score() if bleu.bp_c else 0.0
    return metrics
