"""Named tensors and words as Flower's messages, and back."""
