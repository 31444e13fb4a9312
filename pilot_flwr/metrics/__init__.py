"""The table of metrics: what `data.files.<task>.metric` may name.

To add a metric, write a function in the module of its family and add its row to `METRICS`.
"""

from pilot_flwr.metrics import captions, grounding, text
from pilot_flwr.metrics.score import Metric, Score, per_prediction

__all__ = ["METRICS", "Metric", "Score"]

METRICS: dict[str, Metric] = {
    "exact_match": Metric("exact match", per_prediction(text.exact_match)),
    "gqa": Metric("GQA accuracy", per_prediction(text.gqa)),
    "vqav2": Metric("VQAv2 accuracy", per_prediction(text.vqav2), check=text.check_annotators),
    "textvqa": Metric(
        "TextVQA accuracy", per_prediction(text.textvqa), check=text.check_annotators
    ),
    "anls": Metric("ANLS", per_prediction(text.anls)),
    "scienceqa": Metric(
        "ScienceQA accuracy", per_prediction(text.scienceqa), check=text.check_letters
    ),
    "grounding": Metric(
        "IoU > 0.5", per_prediction(grounding.grounding), check=grounding.check_boxes
    ),
    "grounding_quarters": Metric(
        "IoU > 0.5",
        per_prediction(grounding.grounding_quarters),
        check=grounding.check_quarters,
    ),
    "cider_d": Metric(
        "CIDEr-D",
        captions.on_tokens(captions.cider_d),
        maximum=10.0,
        approximate=captions.why_approximate,
    ),
    "bleu_4": Metric(
        "BLEU-4", captions.on_tokens(captions.bleu_4), approximate=captions.why_approximate
    ),
    "rouge_l": Metric(
        "ROUGE-L", captions.on_tokens(captions.rouge_l), approximate=captions.why_approximate
    ),
}
"""Metric by the name under which a task asks for it."""
