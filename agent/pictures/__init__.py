"""Picture formats read from their headers, without a decoder: sizes, structure, what may survive."""
