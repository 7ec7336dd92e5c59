"""Who carries a plan out: each takes parts and has them made, here or elsewhere; no order and no number is a condition."""
