"""Fuzzing: every reader of foreign bytes, held against inputs that were damaged on purpose."""
