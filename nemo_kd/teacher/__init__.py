"""Stage 1: run a teacher over datasets and cache its top-k logits."""
