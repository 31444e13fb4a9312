"""The comparison of methods on the two scenarios: rates searched, methods and ablations run."""
