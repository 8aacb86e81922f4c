"""Metrics of text."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["bleu_score"]


def _ngrams(tokens: Sequence[str], longest: int) -> Counter[tuple[str, ...]]:
    """How often each sequence of up to so many tokens occurs."""
    return Counter(
        tuple(tokens[start : start + size])
        for size in range(1, longest + 1)
        for start in range(len(tokens) - size + 1)
    )


def bleu_score(
    translate_corpus: Sequence[Sequence[str]],
    reference_corpus: Sequence[Sequence[Sequence[str]]],
    n_gram: int = 4,
    smooth: bool = False,
) -> Tensor:
    """The BLEU score of translations.

    Papineni et al., "BLEU: a method for automatic evaluation of machine translation" (2002).

    Args:
        translate_corpus: the translations, each a sequence of tokens.
        reference_corpus: for each translation, its references.
        n_gram: up to how many tokens in a row to compare.
        smooth: add one to all counts, as Lin and Och (2004) do to those of several tokens.

    >>> translation = ["the cat is on the mat".split()]
    >>> references = [["there is a cat on the mat".split(), "a cat is on the mat".split()]]
    >>> bleu_score(translation, references)
    tensor(0.7598)
    """
    if len(translate_corpus) != len(reference_corpus):
        raise AssertionError("there must be references for each translation, and no others")
    matched = torch.zeros(n_gram)
    counted = torch.zeros(n_gram)
    length = reference_length = 0
    for translation, references in zip(translate_corpus, reference_corpus, strict=True):
        length += len(translation)
        # the length of the reference that is closest in length
        reference_length += min(
            (len(r) for r in references), key=lambda n: abs(n - len(translation))
        )
        found = _ngrams(translation, n_gram)
        allowed: Counter[tuple[str, ...]] = Counter()
        for reference in references:
            allowed |= _ngrams(reference, n_gram)
        for gram, count in (found & allowed).items():
            matched[len(gram) - 1] += count
        for gram, count in found.items():
            counted[len(gram) - 1] += count
    if matched.min() == 0.0:
        return torch.tensor(0.0)
    precision = (matched + 1) / (counted + 1) if smooth else matched / counted
    brevity = 1.0 if length > reference_length else 1 - reference_length / length
    penalty = torch.tensor(1.0) if brevity == 1.0 else torch.exp(torch.tensor(brevity))
    return penalty * precision.log().mean().exp()
