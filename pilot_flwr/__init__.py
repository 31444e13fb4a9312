"""Pilot: federated multimodal instruction tuning (AAAI 2025) as a Flower app.

A tour, in the order of imports; `[tool.importlinter]` in pyproject.toml enforces it::

    algorithm   the paper's mathematics        config      every setting, its rules
    metrics     scores of answers              protocol    every message, declared once
    run         a run's folder and events      data        examples, federation, converters
    model       base model and adapters        client      one client's session
    flower      records, messages, grids       site        answer messages; a warm site
    inference   use a finished run             server      roster, events, resume
    launch      simulation or SuperLink        sweeps      many runs, compared
    report      figures and pages

Flower runs `client_app`, `server_app` and `strategy`; `cli` is ``pilot-flwr``.
Docstrings call Xiong et al., AAAI 2025, arXiv 2501.13985, "the paper".
"""

__version__ = "0.1.0"
