"""Stage 2: train a student from a cache of teacher logits, or on labels alone."""
