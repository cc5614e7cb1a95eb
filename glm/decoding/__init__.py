"""Beam search: the rules, the decoder, its cache of keys and values, the candidates for a token."""
