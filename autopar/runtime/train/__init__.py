"""A training run: ``torchrun -m autopar.runtime.train job.json``."""
