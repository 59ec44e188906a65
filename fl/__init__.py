"""The shared vocabulary: keys, ciphers, datasets, models, adapters, learning and the wire."""
