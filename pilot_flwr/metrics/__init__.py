"""The table of metrics, from which `data.files.<task>.metric` selects.

To add a metric, write a function in the module of its family and add its row to `METRICS`.
"""

from functools import partial

from pilot_flwr.metrics import captions, grounding, text
from pilot_flwr.metrics.score import Metric, Score, per_prediction

__all__ = ["METRICS", "Metric", "Score"]

_caption_metric = partial(Metric, approximate=captions.why_approximate)

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
    "cider_d": _caption_metric("CIDEr-D", captions.on_tokens(captions.cider_d), maximum=10.0),
    "bleu_4": _caption_metric("BLEU-4", captions.on_tokens(captions.bleu_4)),
    "rouge_l": _caption_metric("ROUGE-L", captions.on_tokens(captions.rouge_l)),
}
"""Metric by the value of `data.files.<task>.metric`."""
