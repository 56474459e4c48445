"""Metrics of free texts against references: BLEU-4, ROUGE-L, METEOR, CIDEr, each by the library that the field uses."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Sequence
from typing import Any

TOKENISER = "casefold, then the regular expression [^\\W_]+(?:'[^\\W_]+)? (in place of PTBTokenizer)"
_WORD = re.compile(r"[^\W_]+(?:'[^\W_]+)?")


def tokenise(text: str) -> str:
    """Words with a space between them; `TOKENISER` says how."""
    return " ".join(_WORD.findall(text.replace("’", "'").casefold()))


def bleu(answers: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, Any]:
    """Corpus BLEU-4 of sacrebleu, in [0, 100]."""
    from sacrebleu.metrics import BLEU

    metric = BLEU()
    most = max(map(len, references))
    streams: list[Any] = [
        [texts[index] if index < len(texts) else None for texts in references] for index in range(most)
    ]
    value = metric.corpus_score([" ".join(answer.split()) for answer in answers], streams).score
    return {"value": value, "signature": f"sacrebleu {metric.get_signature()}"}


def rouge_l(answers: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, Any]:
    """Mean F1 of ROUGE-L, of the reference that fits best, in [0, 1]."""
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"], use_stemmer=False)
    values = [
        scorer.score_multi(texts, answer)["rougeL"].fmeasure for answer, texts in zip(answers, references, strict=True)
    ]
    return {"value": sum(values) / len(values), "signature": "rouge_score rougeL F1, use_stemmer=False, best reference"}


def meteor(answers: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, Any]:
    """METEOR 1.5 of pycocoevalcap, in [0, 1]; it runs in Java."""
    from pycocoevalcap.meteor.meteor import Meteor

    if shutil.which("java") is None:
        return {"value": None, "why": "METEOR needs Java, and there is no `java` on this machine"}
    try:
        value, _ = Meteor().compute_score(*_tokenised(answers, references))
    except (OSError, ValueError) as error:
        return {"value": None, "why": f"METEOR's Java program gave no figure: {error}"}
    return {"value": float(value), "signature": f"pycocoevalcap METEOR 1.5, -l en -norm; {TOKENISER}"}


def cider(answers: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, Any]:
    """CIDEr-D of pycocoevalcap, in [0, 10]; of one text alone it is 0, because nothing is rare then."""
    from pycocoevalcap.cider.cider import Cider

    value, _ = Cider().compute_score(*_tokenised(answers, references))
    return {"value": float(value), "signature": f"pycocoevalcap CIDEr-D, n=4, sigma=6; {TOKENISER}"}


def _tokenised(
    answers: Sequence[str], references: Sequence[Sequence[str]]
) -> tuple[dict[int, list[str]], dict[int, list[str]]]:
    wanted = {index: [tokenise(text) for text in texts] for index, texts in enumerate(references)}
    return wanted, {index: [tokenise(answer)] for index, answer in enumerate(answers)}


CAPTION_METRICS: dict[str, Callable[[Sequence[str], Sequence[Sequence[str]]], dict[str, Any]]] = {
    "BLEU-4": bleu,
    "ROUGE-L": rouge_l,
    "METEOR": meteor,
    "CIDEr": cider,
}


def caption_scores(
    answers: Sequence[str], references: Sequence[Sequence[str]], names: Sequence[str] = tuple(CAPTION_METRICS)
) -> dict[str, dict[str, Any]]:
    """Metrics of a corpus: `value` and `signature`, or `None` and `why` where one cannot be had.

    Args:
        answers: of the model.
        references: at least one for each.
        names: keys of `CAPTION_METRICS`.
    """
    scores = {}
    for name in names:
        try:
            scores[name] = CAPTION_METRICS[name](answers, references)
        except ImportError as error:
            package = {"BLEU-4": "sacrebleu", "ROUGE-L": "rouge-score"}.get(name, "pycocoevalcap")
            scores[name] = {"value": None, "why": f"{error}; pip install {package}"}
    return scores
