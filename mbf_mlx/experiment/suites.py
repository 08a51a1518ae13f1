"""The published benchmarks that the paper is measured on: their orders, files and training settings.

Each suite reads the files of its benchmark as they are published: O-LoRA's `CL_Benchmark` (standard, long) and SAPT's
`CL_Benchmark/SuperNI` (superni). data/benchmark_formats.py makes the prompts.

Source: Qiao and Mahdavi 2025, arXiv:2512.23017, its orders O1 to O6 and the two of SuperNI, and its protocol (learning
rate, batches, epochs, rank, layers). What it does not report (the LoRA scale, warmup, weight decay, sequence lengths)
stays at our defaults. Orders: Wang et al. 2023, arXiv:2310.14152, and Zhao et al. 2024, arXiv:2401.08295.
"""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Suite:
    """One benchmark, as an experiment file names it with `preset`."""

    paths: dict[str, str]  # what an order calls a task -> its folder below the benchmark's own
    orders: dict[str, tuple[str, ...]]
    metric: str = "auto"
    train: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)


_GROUPS = {
    "NLI": ("MNLI", "CB", "RTE"),
    "SC": ("amazon", "yelp", "IMDB", "SST-2"),
    "TC": ("dbpedia", "agnews", "yahoo"),
    "WiC": ("WiC",),
    "COPA": ("COPA",),
    "QQP": ("QQP",),
    "BoolQA": ("BoolQA",),
    "MultiRC": ("MultiRC",),
}
_CL_BENCHMARK = {name.lower(): f"{group}/{name}" for group, names in _GROUPS.items() for name in names}
_PROTOCOL = {"learning_rate": 1e-4, "batch_size": 1, "grad_accumulation_steps": 8, "epochs": 1}


def _order(text: str) -> tuple[str, ...]:
    return tuple(text.split())


_SUPERNI = {
    "002": "task002_quoref_answer_generation",
    "073": "task073_commonsenseqa_answer_generation",
    "181": "task181_outcome_extraction",
    "363": "task363_sst2_polarity_classification",
    "511": "task511_reddit_tifu_long_text_summarization",
    "591": "task591_sciq_answer_generation",
    "639": "task639_multi_woz_user_utterance_generation",
    "748": "task748_glucose_reverse_cause_event_detection",
    "875": "task875_emotion_classification",
    "1290": "task1290_xsum_summarization",
    "1510": "task1510_evalution_relation_extraction",
    "1572": "task1572_samsum_summary",
    "1590": "task1590_diplomacy_text_generation",
    "1687": "task1687_sentiment140_classification",
    "1729": "task1729_personachat_generate_next",
}

SUITES = {
    "standard": Suite(
        paths=_CL_BENCHMARK,
        orders={
            "O1": _order("dbpedia amazon yahoo agnews"),
            "O2": _order("dbpedia amazon agnews yahoo"),
            "O3": _order("yahoo amazon agnews dbpedia"),
        },
        metric="exact_match",
        train=_PROTOCOL,
        data={"template": "none"},
    ),
    "long": Suite(
        paths=_CL_BENCHMARK,
        orders={
            "O4": _order(
                "mnli cb wic copa qqp boolqa rte imdb yelp amazon sst-2 dbpedia agnews multirc yahoo",
            ),
            "O5": _order(
                "multirc boolqa wic mnli cb copa qqp rte imdb sst-2 dbpedia agnews yelp amazon yahoo",
            ),
            "O6": _order(
                "yelp amazon mnli cb copa qqp rte imdb sst-2 dbpedia agnews yahoo multirc boolqa wic",
            ),
        },
        metric="exact_match",
        train=_PROTOCOL,
        data={"template": "none"},
    ),
    "superni": Suite(
        paths=_SUPERNI,
        orders={
            "O1": _order("1572 363 1290 181 002 1510 639 1729 073 1590 748 511 591 1687 875"),
            "O2": _order("748 073 1590 639 1572 1687 591 363 1510 1729 181 511 002 1290 875"),
        },
        metric="rouge_l",
        train={"learning_rate": 5e-5, "batch_size": 2, "grad_accumulation_steps": 4, "epochs": 5},
        data={"template": "none"},
    ),
}
