"""Text as training input: files, tokenizers, token caches, the order of samples, and batches ready in time."""
