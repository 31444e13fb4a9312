"""Run sweeps as Hydra multiruns and compare their results."""
