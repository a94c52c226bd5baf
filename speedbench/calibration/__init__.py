"""Known-answer checkpoints: what they are, what they must answer, and whether an engine says so."""
