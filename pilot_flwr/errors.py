"""Typed errors for everything that comes from outside: configuration, data, updates, state.

An error names the field as the user typed it, the value received and what is allowed.
Invariants of the code itself are `assert`s, not one of these.
"""


class PilotError(Exception):
    """Base class of every error that this package raises on purpose."""


class ConfigError(PilotError):
    """A configuration value is unknown, of the wrong type or out of range."""


class DataError(PilotError):
    """A training or test example cannot be used as it is."""


class ModelError(PilotError):
    """A base model or its parameters are not what the app needs."""


class TrainingError(PilotError):
    """Local training cannot go on, for instance because the loss is not finite."""


class UpdateError(PilotError):
    """A client's update cannot enter the aggregation."""


class StateError(PilotError):
    """A client's private state or a checkpoint is missing, torn or foreign."""


class RunError(PilotError):
    """A federated run cannot start, or cannot go on."""


class BelowMinimum(RunError):
    """Fewer clients than `strategy.min_replies` can take part, or delivered a usable update."""


class WorkerDied(RunError):
    """A worker process of the simulation died: the run may go on from its last checkpoint."""
