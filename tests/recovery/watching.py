"""The text of the tiny trainings as a watch."""

from training_setup import TEXT, tokenizer

from hf_structprune.recovery.watch import Watch


WATCH = Watch(tokenizer(), TEXT, window=32, max_windows=4)
