"""A Flower app whose clients do nothing but send back what they received: what remains is the engine's own cost."""
