"""Adapters on the road: named tensors <-> one flat array, its codecs, Flower's records, and the byte ledger."""
