"""Exports: a Hugging Face folder in, files of one format out, and the runtimes that load them back."""
