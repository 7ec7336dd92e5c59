"""Who carries a plan out: each takes parts and has them made; no order, and no number of makers, is a condition."""
