"""FastEagle in JAX: exact speculative decoding with a drafter that guesses N tokens in one forward pass."""
