"""Typed errors for all external input: configuration, data, updates, state.

An error names the field as the user typed it, the value received and what is allowed.
Invariants of the code itself are `assert`s.
"""


class PilotError(Exception):
    """Base class of all errors that this package raises deliberately."""


class ConfigError(PilotError):
    """A configuration value is unknown, of the wrong type or out of range."""


class DataError(PilotError):
    """A training or test example cannot be used."""


class ModelError(PilotError):
    """A base model or its parameters do not fit the app."""


class TrainingError(PilotError):
    """Local training cannot continue, for instance because the loss is not finite."""


class UpdateError(PilotError):
    """A client's update cannot enter the aggregation."""


class StateError(PilotError):
    """A client's private state or a checkpoint is missing, corrupt or of another run."""


class RunError(PilotError):
    """A federated run cannot start or continue."""


class BelowMinimum(RunError):
    """Fewer than `strategy.min_replies` clients can take part or delivered a usable update."""


class WorkerDied(RunError):
    """A worker process of the simulation died; the run can resume from its last checkpoint."""
