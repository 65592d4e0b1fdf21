"""Checkpoints that go anywhere: written under one plan, read under any other, to the bit.

A folder holds one directory per step, ``step-00000120``, with one safetensors file per rank that wrote it
(``rank-00003.safetensors``), ``manifest.json``, which says where every piece of every tensor lies and what the hash of
every file is, and ``manifest.sha256``. Nothing in them can run: tensors are raw bytes, all else is JSON.
"""

from autopar.runtime.checkpoint.checkpoints import Checkpoints, Loaded

__all__ = ["Checkpoints", "Loaded"]
