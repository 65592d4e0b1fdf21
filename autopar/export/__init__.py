"""A plan told in the words of other programs."""
