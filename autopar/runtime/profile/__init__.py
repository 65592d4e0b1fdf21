"""Measuring a machine: ``torchrun -m autopar.runtime.profile job.json`` in ranks, ``machine`` in their parent."""
