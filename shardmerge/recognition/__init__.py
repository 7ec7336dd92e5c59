"""What a checkpoint is, and the mappings that lead on from there."""
