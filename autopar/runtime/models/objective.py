"""What a model learns from text: the next token, or the tokens that were masked.

An objective changes samples where they are read, by their global index, so that every layout trains on the same; splits
a batch into inputs and targets; and gives the loss. The loss of a part of a batch, divided by batch or by sequence, is
such that the mean over equal parts is that of the whole.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from autopar.errors import InputError
from autopar.model.transformer import language_model_loss
from autopar.runtime.data.corpus import Rows

MASKED_SHARE = 0.15
# Of the chosen tokens 80 percent become the mask, 10 percent a random token, and the rest stay (BERT, section 3.1).
MASK_SHARE, RANDOM_SHARE = 0.8, 0.1
IGNORED = -100


class Objective(Protocol):
    """See the module's docstring."""

    def rows(self, rows: Rows) -> Rows:
        """Samples as this objective wants them, from samples of text."""
        ...

    def split(self, batch: Tensor) -> tuple[Tensor, Tensor]:
        """Samples [B, S + 1] to inputs and targets, both [B, S]."""
        ...

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Logits [B, S, V] and targets [B, S] to a mean."""
        ...


@dataclass(frozen=True, slots=True)
class NextToken:
    """Each token is predicted from those before it."""

    def rows(self, rows: Rows) -> Rows:
        """Text as it is."""
        return rows

    def split(self, batch: Tensor) -> tuple[Tensor, Tensor]:
        """All tokens but the last, and all but the first."""
        return batch[:, :-1], batch[:, 1:]

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Mean cross entropy."""
        return language_model_loss(logits, targets)


@dataclass(frozen=True, kw_only=True, slots=True)
class MaskedTokens:
    """Masked tokens are predicted from all others (BERT, Devlin et al. 2018).

    Every sequence has equally many chosen tokens, MASKED_SHARE of them rounded, so that means of parts are means of the
    whole. A chosen token is one negative number in a sample until ``split``: -1 - original - vocab_size * replacement.

    Attributes:
        seq_len: tokens of a sequence.
        vocab_size: of the model; its last token is the mask.
        seed: of the choice, with a sample's global index.
    """

    seq_len: int
    vocab_size: int
    seed: int

    @property
    def num_masked(self) -> int:
        """Chosen tokens of a sequence."""
        return max(1, round(MASKED_SHARE * self.seq_len))

    def rows(self, rows: Rows) -> Rows:
        """Samples with chosen tokens. They raise InputError for a text that has the mask itself."""

        def masked(start: int, count: int) -> npt.NDArray[np.int64]:
            samples = rows(start, count).copy()
            if samples.max() >= self.vocab_size - 1:
                raise InputError(
                    f"token {samples.max()} of the text is not below {self.vocab_size - 1}, the mask: masked tokens "
                    "need a vocab_size with room for one more than the text's tokens"
                )
            for offset, sample in enumerate(samples):
                self._choose(sample, np.random.default_rng((self.seed, start + offset)))
            return samples

        return masked

    def _choose(self, sample: npt.NDArray[np.int64], generator: np.random.Generator) -> None:
        places = generator.permutation(self.seq_len)[: self.num_masked]
        kinds = generator.random(self.num_masked)
        others = generator.integers(0, self.vocab_size - 1, self.num_masked)
        original = sample[places]
        shown = np.where(kinds < MASK_SHARE, self.vocab_size - 1, original)
        shown = np.where((kinds >= MASK_SHARE) & (kinds < MASK_SHARE + RANDOM_SHARE), others, shown)
        sample[places] = -1 - original - self.vocab_size * shown

    def split(self, batch: Tensor) -> tuple[Tensor, Tensor]:
        """What is shown, and the original of chosen tokens; the others are IGNORED."""
        samples = batch[:, :-1]
        hidden = -1 - samples
        chosen = samples < 0
        inputs = torch.where(chosen, hidden.div(self.vocab_size, rounding_mode="floor"), samples)
        return inputs, torch.where(chosen, hidden.remainder(self.vocab_size), IGNORED)

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Cross entropy of the chosen tokens, divided by as many as there are in so many tokens of whole sequences."""
        total = F.cross_entropy(logits.flatten(0, -2), targets.flatten(), ignore_index=IGNORED, reduction="sum")
        return total / (targets.numel() * self.num_masked / self.seq_len)
