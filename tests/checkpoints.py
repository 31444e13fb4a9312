"""Small checkpoints of the families that `pilot_flwr.model.architectures` knows."""

import families

WRITERS = {name: families.WRITERS[name] for name in ("llava-1.5", "interleave", "onevision")}
