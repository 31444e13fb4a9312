"""Pilot: federated multimodal instruction tuning as a Flower app.

The map of the package, from left to right (imports go to the right only)::

    errors, config -> connector, losses, aggregation, metrics, data
        -> parameters, models, checkpoint -> training, evaluation
        -> wire, strategy, client_app, server_app -> cli

"Pilot: Building the Federated Multimodal Instruction Tuning Framework",
Xiong et al., AAAI 2025, arXiv 2501.13985, is "the paper" in every docstring.
"""

__version__ = "0.1.0"
