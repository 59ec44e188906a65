"""How fast is it, beside what people write otherwise and beside what the machine could do: ratios, measured side by side."""
